"""A bounded memory's part of a static graph: store, select, attend. Every effect is a source of a later node."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.ffi.context import Tensor, set_name
from pyggml_repkv.ffi.handles import tensor_array
from pyggml_repkv.ffi.library import g
from pyggml_repkv.memory.disk_tier import HookPoint, StepHook
from pyggml_repkv.memory.policy import StepAttention, UnobservedStep
from pyggml_repkv.memory.regions import Regions
from pyggml_repkv.ops.kernels import PANEL
from pyggml_repkv.ops.makers import Ops

if TYPE_CHECKING:
    from pyggml_repkv.memory.bounded import BoundedMemory

_FUSED = "graphs of bounded memories are planned for fused nodes only"

# Points of a step at which the hook runs where all blocks are known before it: each splits the graph, and between its
# read and the next token's wait for it all points but one are passed.
N_KNOWN_POINTS = 4


class BoundedStep(UnobservedStep, ABC):
    def __init__(self, memory: BoundedMemory, ops: Ops, n_tokens: int) -> None:
        self._memory, self._ops, self._n_tokens = memory, ops, n_tokens
        self._regions = Regions.input(ops.g)
        self.hook_points: list[HookPoint] = []
        if memory.disk is not None:
            self.hook = StepHook(memory.disk)
        self._selected: list[Tensor] = []
        self._relevance: list[Tensor] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        raise AssertionError(_FUSED)

    def store(self, k: Tensor, v: Tensor, layer: int) -> None:
        raise AssertionError(_FUSED)

    def attend_one(self, qkv: Tensor, layer: int) -> Tensor:
        raise AssertionError(_FUSED)

    def attend_packed(self, qkv: Tensor, layer: int) -> Tensor:
        raise AssertionError(_FUSED)

    def store_packed(self, qkv: Tensor, layer: int) -> None:
        raise AssertionError(_FUSED)

    def fill(self, n_past: int) -> None:
        regions = self._memory.regions
        assert (n_past, self._n_tokens) == (regions.first, regions.n_tokens)
        regions.fill(self._regions)
        if isinstance(self.hook, StepHook) and not self.hook.observes:
            self.hook.observe(self.hook_points, self._memory.kept_tensors)
        self._memory.last_step = self

    def observed_selection(self, layer: int) -> NDArray[np.int32]:
        """What a layer selected in the last compute: [1 or K, 1 + n], how many and which."""
        selected = tensor_array(self._selected[layer]).view(np.int32)
        return selected.reshape(-1, selected.shape[-1])

    def observed_relevance(self, layer: int) -> NDArray[np.float32]:
        """What a layer compared blocks by in the last compute: [H, n_blocks]."""
        n_head, n_blocks = self._memory.config.n_head, self._memory.regions.n_blocks
        seen = 2 * self._ops.kernels.n_threads
        flat = tensor_array(self._relevance[layer])
        return flat[: len(flat) - n_head * seen].reshape(n_head, -1)[:, :n_blocks].copy()

    @abstractmethod
    def observed_queries(self, layer: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A layer's last queries, scaled, as the window and as older tokens meet them: [T, H, d] each."""

    def _hook_at(self, selected: Tensor, layer: int, *, late: bool = False, n_known: int = 0) -> None:
        self.hook_points.append(HookPoint(selected, layer, late=late, n_known=n_known))

    def _observe(self, tensor: Tensor) -> Tensor:
        """What stays readable after compute where someone looks on."""
        return self._ops.g.output(tensor) if self._memory.observed else tensor


class BoundedChunk(BoundedStep):
    """A chunk, packed."""

    def __init__(self, memory: BoundedMemory, ops: Ops, n_tokens: int) -> None:
        super().__init__(memory, ops, n_tokens)
        self._local_cells = ops.g.input(g.GGML_TYPE_I32, (2,), "kv_local_cells")
        self._store_cells = ops.g.input(g.GGML_TYPE_I32, (2,), "kv_store_cells")
        self._far_rope = ops.g.input(g.GGML_TYPE_F32, (memory.config.rope_dim,), "far_rope")
        self._queries: list[tuple[Tensor, Tensor]] = []

    def attend_packed(self, qkv: Tensor, layer: int) -> Tensor:
        m = self._memory
        q, q_far, selected = self._store_and_select(qkv, layer)
        local = q, m.k_local[layer], m.v_local[layer]
        far = q_far, m.k_store[layer], m.v_store[layer]
        self._hook_at(selected, layer)
        return self._ops.attend_memory(*local, *far, selected, m.places(layer), self._regions)

    def store_packed(self, qkv: Tensor, layer: int) -> None:
        # Nobody reads them, and a node that nobody reads is dropped with what it writes.
        for node in self._store_and_select(qkv, layer):
            self._ops.g.expand(node)

    def _store_and_select(self, qkv: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        m = self._memory
        q = self._ops.store_kv(qkv, m.k_local[layer], m.v_local[layer], self._local_cells)
        set_name(q, "Qcur", layer)
        store = m.k_store[layer], m.v_store[layer]
        if m.far:
            q_far = self._ops.store_far(qkv, *store, self._far_rope, self._regions)
        else:
            q_far = self._ops.store_kv(qkv, *store, self._store_cells)
        set_name(q_far, "Qfar", layer)
        selected = m.select(self._ops, q, q_far, self._regions, layer)
        self._queries.append((self._observe(q), self._observe(q_far)))
        self._selected.append(self._observe(selected))
        if self._memory.observed:
            self._relevance.append(self._observe(selected.contents.src[0]))
        return q, q_far, selected

    def fill(self, n_past: int) -> None:
        super().fill(n_past)
        tensor_array(self._local_cells)[...] = (n_past - self._memory.local_base, self._n_tokens)
        if self._memory.far:
            tensor_array(self._far_rope)[...] = self._memory.far_table
        else:
            tensor_array(self._store_cells)[...] = (n_past - self._memory.store_base, self._n_tokens)

    def observed_queries(self, layer: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        near, far = (self._unpacked(q) for q in self._queries[layer])
        return near, far

    def _unpacked(self, q: Tensor) -> NDArray[np.float32]:
        c = self._memory.config
        packed = tensor_array(q).reshape(-1, c.n_head, c.head_dim, PANEL)
        return packed.transpose(0, 3, 1, 2).reshape(-1, c.n_head, c.head_dim)[: self._n_tokens].copy()


class BoundedOne(BoundedStep):
    """One token. known: it attends what the last one selected."""

    def __init__(self, memory: BoundedMemory, ops: Ops, *, known: bool) -> None:
        super().__init__(memory, ops, 1)
        self._known = known
        self._rope = ops.g.input(g.GGML_TYPE_F32, (2, memory.config.rope_dim), "near_far_rope")
        self._queries: list[Tensor] = []

    def attend_one(self, qkv: Tensor, layer: int) -> Tensor:
        m = self._memory
        selected = m.select_one(self._ops, qkv, self._rope, self._regions, layer)
        self._queries.append(self._observe(qkv))
        self._selected.append(self._observe(selected))
        if self._memory.observed:
            self._relevance.append(self._observe(selected.contents.src[0]))
        arenas = m.k_local[layer], m.v_local[layer], m.k_store[layer], m.v_store[layer]
        if not self._known:
            self._hook_at(selected, layer, late=m.disk is not None and m.disk.prefetches)
        elif layer % (n := max(2, -(-m.config.n_layer // N_KNOWN_POINTS))) == 0:
            self._hook_at(selected, layer, late=True, n_known=min(n, m.config.n_layer - layer))
        return self._ops.attend_memory_one(qkv, *arenas, self._rope, selected, m.places(layer), self._regions)

    def fill(self, n_past: int) -> None:
        super().fill(n_past)
        near = self._memory.near_table(n_past)
        tensor_array(self._rope)[...] = (near, self._memory.far_table if self._memory.far else near)

    def observed_queries(self, layer: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        c = self._memory.config
        q = tensor_array(self._queries[layer])[: c.n_embd_q].reshape(1, c.n_head, c.head_dim) * c.head_dim**-0.5
        near = self._memory.near_table(self._memory.regions.first)
        far = self._memory.far_table if self._memory.far else near
        return _rotated(q, near), _rotated(q, far)


def hook_points_of(attention: StepAttention) -> list[HookPoint]:
    """Where the hook of a step's graph runs, in its order; empty where there is none."""
    return attention.hook_points if isinstance(attention, BoundedStep) and attention.hook is not None else []


def _rotated(q: NDArray[np.float32], table: NDArray[np.float32]) -> NDArray[np.float32]:
    """q [..., d], table [rope_dim]: cosines, then sines, of pairs (i, i + rope_dim / 2)."""
    half = len(table) // 2
    a, b, rest = q[..., :half], q[..., half : 2 * half], q[..., 2 * half :]
    cosine, sine = table[:half], table[half:]
    return np.concatenate((a * cosine - b * sine, a * sine + b * cosine, rest), -1, dtype=np.float32)
