"""RepKV's part of a static graph: score, select, attend. Every effect is a source of a node that follows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyggml_repkv.ffi.context import GraphContext, Tensor, set_name
from pyggml_repkv.ffi.handles import tensor_array
from pyggml_repkv.ffi.library import g

if TYPE_CHECKING:
    from pyggml_repkv.memory.repkv import RepKVMemory

_FUSED = "repkv graphs are planned for fused nodes only"
_N_REGIONS = 8


class _RepKVStep:
    def __init__(self, memory: RepKVMemory, context: GraphContext, n_tokens: int) -> None:
        self._memory, self._g, self._n_tokens = memory, context, n_tokens
        self._ops = memory.graph.fused_ops
        self._regions = context.input(g.GGML_TYPE_I32, (_N_REGIONS,), "kv_regions")

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
        tensor_array(self._regions)[...] = self._memory.begin_step(n_past, self._n_tokens)

    def _select(self, relevance: Tensor, layer: int) -> Tensor:
        set_name(relevance, "block_relevance", layer)
        selected = self._ops.block_topk(self._g, relevance, self._regions, self._memory.memory.top_blocks)
        set_name(selected, "block_topk", layer)
        return selected

    def _far_table(self) -> np.ndarray:
        """[rope_dim]: the one distance at which everything beyond the window is seen."""
        distance = np.array([self._memory.memory.n_local])
        return self._memory.graph.precise_rope_table(distance)[:, 0]


class RepKVChunk(_RepKVStep):
    """A chunk, packed."""

    def __init__(self, memory: RepKVMemory, context: GraphContext, n_tokens: int) -> None:
        super().__init__(memory, context, n_tokens)
        self._local_cells = context.input(g.GGML_TYPE_I32, (2,), "kv_local_cells")
        self._store_cells = context.input(g.GGML_TYPE_I32, (2,), "kv_store_cells")
        self._far_rope = context.input(g.GGML_TYPE_F32, (memory.config.rope_dim,), "far_rope")

    def attend_packed(self, qkv: Tensor, layer: int) -> Tensor:
        m, ops = self._memory, self._ops
        q, q_far, marker = self._store_and_score(qkv, layer)
        relevance = ops.relevance(self._g, q_far, m.index[layer], self._regions, marker, m.memory.n_repr)
        selected = self._select(relevance, layer)
        local = [q, m.k_local[layer], m.v_local[layer]]
        far = [q_far, m.k_store[layer], m.v_store[layer]]
        return ops.attend_memory(self._g, [*local, *far, selected, m.bounds_tensor, self._regions])

    def store_packed(self, qkv: Tensor, layer: int) -> None:
        _, q_far, marker = self._store_and_score(qkv, layer)
        self._g.expand(q_far)
        self._g.expand(marker)

    def _store_and_score(self, qkv: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        m, ops = self._memory, self._ops
        q = ops.store_kv(self._g, qkv, m.k_local[layer], m.v_local[layer], self._local_cells)
        set_name(q, "Qcur", layer)
        store = m.k_store[layer], m.v_store[layer]
        if m.far:
            q_far = ops.store_far(self._g, qkv, *store, self._far_rope, self._regions)
        else:
            q_far = ops.store_kv(self._g, qkv, *store, self._store_cells)
        set_name(q_far, "Qfar", layer)
        marker = ops.score_acc(self._g, q, m.k_local[layer], m.score_tensors[layer], self._regions, m.memory.n_score)
        set_name(marker, "score_acc", layer)
        return q, q_far, marker

    def fill(self, n_past: int) -> None:
        super().fill(n_past)
        tensor_array(self._local_cells)[...] = (n_past - self._memory.local_base, self._n_tokens)
        if self._memory.far:
            tensor_array(self._far_rope)[...] = self._far_table()
        else:
            tensor_array(self._store_cells)[...] = (n_past, self._n_tokens)


class RepKVOne(_RepKVStep):
    """One token."""

    def __init__(self, memory: RepKVMemory, context: GraphContext) -> None:
        super().__init__(memory, context, 1)
        self._rope = context.input(g.GGML_TYPE_F32, (2, memory.config.rope_dim), "near_far_rope")

    def attend_one(self, qkv: Tensor, layer: int) -> Tensor:
        m, ops = self._memory, self._ops
        n_score, n_repr = m.memory.n_score, m.memory.n_repr
        marker = ops.score_acc_one(
            self._g, qkv, m.k_local[layer], m.score_tensors[layer], self._rope, self._regions, n_score
        )
        set_name(marker, "score_acc", layer)
        relevance = ops.relevance_one(self._g, qkv, m.index[layer], self._rope, self._regions, marker, n_repr)
        selected = self._select(relevance, layer)
        arenas = [m.k_local[layer], m.v_local[layer], m.k_store[layer], m.v_store[layer]]
        sources = [qkv, *arenas, self._rope, selected, m.bounds_tensor, self._regions]
        return ops.attend_memory_one(self._g, sources)

    def fill(self, n_past: int) -> None:
        super().fill(n_past)
        near = self._memory.graph.precise_rope_table(np.array([n_past]))[:, 0]
        tensor_array(self._rope)[...] = (near, self._far_table() if self._memory.far else near)
