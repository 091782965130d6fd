"""A bounded memory's part of a static graph: store, select, attend. Every effect is a source of a later node."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.ffi.context import Tensor, set_name
from pyggml_repkv.ffi.handles import tensor_array
from pyggml_repkv.ffi.library import g
from pyggml_repkv.memory.bounded.local import LocalWindow
from pyggml_repkv.memory.bounded.rotation import Rotation, rotated
from pyggml_repkv.memory.centres import KeyCentres
from pyggml_repkv.memory.hook import StepHook
from pyggml_repkv.memory.index.base import Queries, Selection
from pyggml_repkv.memory.policy import HookPoint
from pyggml_repkv.memory.regions import Regions
from pyggml_repkv.memory.store.base import Store
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.ops.kernels import PANEL
from pyggml_repkv.ops.makers import Ops

# Points of a step at which the hook runs where all blocks are known before it: each splits the graph, and between its
# read and the next token's wait for it all points but one are passed.
N_KNOWN_POINTS = 4


class Parts(Protocol):
    """What a step's graph is built from. observed: whether queries and selections stay readable after a compute."""

    config: ModelConfig
    local: LocalWindow
    store: Store
    centres: KeyCentres
    rotation: Rotation
    regions: Regions
    observed: bool
    last_step: BoundedStep | None

    def select(self, ops: Ops, q: Queries, regions: Tensor, layer: int) -> Selection:
        """What is attended between sinks and window."""


class BoundedStep(ABC):
    """`hook` is what waits for blocks on disk; None where there are none."""

    def __init__(self, parts: Parts, ops: Ops, n_tokens: int) -> None:
        self._parts, self._ops, self._n_tokens = parts, ops, n_tokens
        ops.g.keep_alive(parts.centres)
        ops.g.keep_alive(parts.rotation)
        self._regions = Regions.input(ops.g)
        self.hook: StepHook | None = parts.store.new_hook(ops.kernels.backend)
        self._selections: list[Selection] = []

    @abstractmethod
    def attend(self, qkv: Tensor, layer: int) -> Tensor: ...

    @abstractmethod
    def store(self, qkv: Tensor, layer: int) -> None: ...

    def fill(self, n_past: int) -> None:
        regions = self._parts.regions
        assert (n_past, self._n_tokens) == (regions.first, regions.n_tokens)
        regions.fill(self._regions)
        self._parts.last_step = self

    def observed_selection(self, layer: int) -> NDArray[np.int32]:
        """What a layer selected in the last compute: [n_rows, 1 + n], how many and which."""
        selected = tensor_array(self._selections[layer].units).view(np.int32)
        return selected.reshape(-1, selected.shape[-1])

    @abstractmethod
    def observed_queries(self, layer: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A layer's last queries, scaled, as the window and as selection meet them: [T, H, d] each."""

    def _of(self, layer: int) -> Ops:
        return self._ops.centred(self._parts.centres.of(layer))

    def _select(self, q: Queries, layer: int) -> Selection:
        selection = self._parts.select(self._of(layer), q, self._regions, layer)
        self._selections.append(selection)
        if self._parts.observed:
            for tensor in (q.near, q.far, selection.units):
                self._ops.g.output(tensor)
        return selection


class BoundedChunk(BoundedStep):
    """A chunk, packed."""

    def __init__(self, parts: Parts, ops: Ops, n_tokens: int) -> None:
        super().__init__(parts, ops, n_tokens)
        self._local_cells = ops.g.input(g.GGML_TYPE_I32, (2,), "kv_local_cells")
        self._store_cells = ops.g.input(g.GGML_TYPE_I32, (2,), "kv_store_cells")
        self._far_rope = ops.g.input(g.GGML_TYPE_F32, (parts.config.rope_dim,), "far_rope")
        self._queries: list[Queries] = []

    def attend(self, qkv: Tensor, layer: int) -> Tensor:
        local, store = self._parts.local, self._parts.store
        q, selection = self._store_and_select(qkv, layer)
        if self.hook is not None:
            self.hook.add(HookPoint(selection.units, layer))
        return self._of(layer).attend_memory(
            q.near, local.k[layer], local.v[layer], q.far, store.k[layer], store.v[layer], selection.runs,
            self._regions, group=selection.group, order=self._parts.rotation.order,
        )  # fmt: skip

    def store(self, qkv: Tensor, layer: int) -> None:
        q, selection = self._store_and_select(qkv, layer)
        # Nobody reads them, and a node that nobody reads is dropped with what it writes.
        for node in (q.near, q.far, selection.units):
            self._ops.g.expand(node)

    def _store_and_select(self, qkv: Tensor, layer: int) -> tuple[Queries, Selection]:
        p, ops = self._parts, self._of(layer)
        near = ops.store_kv(qkv, p.local.k[layer], p.local.v[layer], self._local_cells)  # [P, H * d, PANEL]
        set_name(near, "Qcur", layer)
        arenas = p.store.k[layer], p.store.v[layer]
        if p.rotation.far:
            far = ops.store_far(qkv, *arenas, self._far_rope, self._regions)  # [P, H * d, PANEL]
        else:
            far = ops.store_kv(qkv, *arenas, self._store_cells)
        set_name(far, "Qfar", layer)
        q = Queries(near, far)
        self._queries.append(q)
        return q, self._select(q, layer)

    def fill(self, n_past: int) -> None:
        super().fill(n_past)
        p = self._parts
        tensor_array(self._local_cells)[...] = (n_past - p.local.base, self._n_tokens)
        if p.rotation.far:
            tensor_array(self._far_rope)[...] = p.rotation.far_table
        else:
            tensor_array(self._store_cells)[...] = (n_past - p.store.base, self._n_tokens)

    def observed_queries(self, layer: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        q = self._queries[layer]
        return self._unpacked(q.near), self._unpacked(q.far)

    def _unpacked(self, q: Tensor) -> NDArray[np.float32]:
        c = self._parts.config
        packed = tensor_array(q).reshape(-1, c.n_head, c.head_dim, PANEL)
        return packed.transpose(0, 3, 1, 2).reshape(-1, c.n_head, c.head_dim)[: self._n_tokens].copy()


class BoundedOne(BoundedStep):
    """One token. known: it attends what the last one selected."""

    def __init__(self, parts: Parts, ops: Ops, *, known: bool) -> None:
        super().__init__(parts, ops, 1)
        self._known = known
        self._rope = ops.g.input(g.GGML_TYPE_F32, (2, parts.config.rope_dim), "near_far_rope")
        self._queries: list[Tensor] = []

    def attend(self, qkv: Tensor, layer: int) -> Tensor:
        local, store = self._parts.local, self._parts.store
        self._queries.append(qkv)
        selection = self._select(Queries(qkv, qkv, self._rope), layer)
        if self.hook is not None:
            self._hook_at(self.hook, selection.units, layer)
        return self._of(layer).attend_memory_one(
            qkv, local.k[layer], local.v[layer], store.k[layer], store.v[layer], self._rope, selection.runs,
            self._regions, order=self._parts.rotation.order,
        )  # fmt: skip

    def store(self, qkv: Tensor, layer: int) -> None:
        # One op does both.
        self._ops.g.expand(self.attend(qkv, layer))

    def _hook_at(self, hook: StepHook, units: Tensor, layer: int) -> None:
        n_layer = self._parts.config.n_layer
        n = max(2, -(-n_layer // N_KNOWN_POINTS))
        if not self._known:
            hook.add(HookPoint(units, layer, late=hook.reads_ahead))
        elif layer % n == 0:
            hook.add(HookPoint(units, layer, late=True, n_known=min(n, n_layer - layer)))

    def fill(self, n_past: int) -> None:
        super().fill(n_past)
        rotation = self._parts.rotation
        tensor_array(self._rope)[...] = (rotation.near_table(n_past), rotation.older_table(n_past))

    def observed_queries(self, layer: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        c, rotation, position = self._parts.config, self._parts.rotation, self._parts.regions.first
        q = tensor_array(self._queries[layer])[: c.n_embd_q].reshape(1, c.n_head, c.head_dim) * c.head_dim**-0.5
        return rotated(q, rotation.near_table(position)), rotated(q, rotation.older_table(position))
