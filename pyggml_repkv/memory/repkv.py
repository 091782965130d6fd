"""`--kv repkv`: older tokens in blocks, found again by representative tokens, the most relevant attended at each step.

A block that is selected is attended where it lies.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import InputError
from pyggml_repkv.ffi.context import GraphContext, Tensor, set_name
from pyggml_repkv.ffi.library import g, native, native_ffi
from pyggml_repkv.graph.memory_ops import LANES
from pyggml_repkv.memory.arenas import as_array, as_rows
from pyggml_repkv.memory.blocks import Blocks, FixedBlocks, SemanticBlocks, parse_block
from pyggml_repkv.memory.bounded import BoundedMemory
from pyggml_repkv.memory.cache_types import to_float32
from pyggml_repkv.memory.policy import PolicyInputs


class RepKVMemory(BoundedMemory):
    """The index holds the keys of each block's representatives, one tensor per layer (layout: native/select_ops.h).

    To try another summary of a block, override `representatives` or `block_keys`.
    """

    name = "repkv"

    def __init__(self, inputs: PolicyInputs) -> None:
        memory, config = inputs.memory, inputs.graph.config
        super().__init__(inputs, n_stored=None, n_tensors=2 * config.n_layer + 2)
        self.blocks = _make_blocks(inputs)
        n_groups = -(-self.n_ctx // (parse_block(memory.block).min_size * LANES))
        self._block_shape = (config.n_head_kv, memory.n_repr, config.head_dim)
        # Halves the reads of the search; a key that was kept in F32 is compared in F32.
        type_ = g.GGML_TYPE_F32 if memory.type_k == "f32" else g.GGML_TYPE_F16
        n_values = config.n_embd_kv * memory.n_repr * LANES
        layers = range(config.n_layer)
        self.index = [self.arenas.new(type_, (n_groups, n_values), f"index-{i}") for i in layers]
        dtype = np.float32 if memory.type_k == "f32" else np.float16
        self._index = [as_array(t, dtype).reshape(n_groups, *self._block_shape, LANES) for t in self.index]
        self.score_tensors = [
            self.arenas.new(g.GGML_TYPE_F32, (self.n_ctx, config.n_head_kv), f"score_l-{i}") for i in layers
        ]
        self.scores = [as_array(t, np.float32).reshape(self.n_ctx, config.n_head_kv) for t in self.score_tensors]
        self.bounds_tensor = self.arenas.new(g.GGML_TYPE_I32, (n_groups * LANES + 1,), "block_bounds")
        self._bounds = as_array(self.bounds_tensor, np.int32)
        self._bounds[0] = memory.n_sink
        self._group_bytes: int = config.n_layer * self.index[0].contents.nb[1]  # of the index, 16 blocks
        # Which tokens stand for each block, [block][layer]: int32 [K, n_repr].
        self._chosen: list[list[NDArray[np.int32]]] = []
        self._undo: tuple[int, list[NDArray[np.float32]]] | None = None

    def select(self, context: GraphContext, q: Tensor, q_far: Tensor, regions: Tensor, layer: int) -> Tensor:
        m, score = self.memory, self.score_tensors[layer]
        if m.score == "dot":
            marker = self.ops.score_dot(context, q, self.k_local[layer], score, regions, m.n_scoring)
        else:
            marker = self.ops.score_attention(context, q, self.k_local[layer], score, regions, m.n_scoring)
        set_name(marker, "score_acc", layer)
        relevance = self.ops.relevance(
            context, q_far, self.index[layer], regions, marker, n_repr=m.n_repr, kind=m.relevance
        )
        return self._top(context, relevance, regions, layer)

    def select_one(self, context: GraphContext, qkv: Tensor, rope: Tensor, regions: Tensor, layer: int) -> Tensor:
        m, score = self.memory, self.score_tensors[layer]
        if m.score == "dot":
            marker = self.ops.score_dot_one(context, qkv, self.k_local[layer], score, rope, regions, m.n_scoring)
        else:
            marker = self.ops.score_attention_one(context, qkv, self.k_local[layer], score, rope, regions, m.n_scoring)
        set_name(marker, "score_acc", layer)
        relevance = self.ops.relevance_one(
            context, qkv, self.index[layer], rope, regions, marker, n_repr=m.n_repr, kind=m.relevance
        )
        return self._top(context, relevance, regions, layer)

    def _top(self, context: GraphContext, relevance: Tensor, regions: Tensor, layer: int) -> Tensor:
        set_name(relevance, "block_relevance", layer)
        m = self.memory
        kind, per_head = m.relevance, m.per_head
        selected = self.ops.block_topk(context, relevance, regions, self.n_top_max, kind=kind, per_head=per_head)
        set_name(selected, "block_topk", layer)
        return selected

    def begin_step(self, tokens: NDArray[np.int32], n_past: int) -> None:
        # What the last step would have taken back is settled now, however far this one comes.
        self._undo = None
        super().begin_step(tokens, n_past)

    def seal(self, tokens: NDArray[np.int32], n_past: int, start: int) -> tuple[int, int]:
        self.blocks.append(tokens.tolist(), n_past)
        for begin, end in self.blocks.seal(start):
            block = len(self._chosen)
            self._bounds[block + 1] = end
            self._chosen.append([self.representatives(i, begin, end) for i in range(self.config.n_layer)])
            self._index_block(block)
        self._remember_scores(n_past, len(tokens))
        return self.blocks.sealed_end, self.blocks.n_blocks

    def representatives(self, layer: int, begin: int, end: int) -> NDArray[np.int32]:
        """Positions int32 [K, n_repr] of the tokens that stand for the block [begin, end) in a layer."""
        n_head_kv, n_repr = self.config.n_head_kv, self.memory.n_repr
        chosen = np.empty((n_head_kv, n_repr), np.int32)
        score = native_ffi.cast("float *", self.scores[layer].ctypes.data)
        native.repkv_repr_topk(native_ffi.cast("int32_t *", chosen.ctypes.data), score, begin, end, n_head_kv, n_repr)
        return chosen

    def block_keys(self, layer: int, begin: int, end: int, chosen: NDArray[np.int32]) -> NDArray[np.float32]:
        """Float32 [K, n_repr, d]: what the index holds for a block; here the keys of the representatives."""
        positions, at = np.unique(chosen, return_inverse=True)
        return self.stored_keys(layer, positions)[at.reshape(chosen.shape), np.arange(len(chosen))[:, None]]

    def stored_keys(self, layer: int, positions: NDArray[np.integer]) -> NDArray[np.float32]:
        """Float32 [n, K, d]: before RoPE with far positions, else rotated."""
        return self._keys(self.k_store[layer], positions)

    def local_keys(self, layer: int, first: int, end: int) -> NDArray[np.float32]:
        """Rotated keys of the window's positions [first, end), float32 [n, K, d]."""
        return self._keys(self.k_local[layer], np.arange(first - self.local_base, end - self.local_base))

    def _keys(self, arena: Tensor, rows: NDArray[np.integer]) -> NDArray[np.float32]:
        if self.arenas.closed:
            raise InputError("the session is closed")
        keys = to_float32(as_rows(arena)[rows], self.memory.type_k)
        return keys.reshape(len(rows), self.config.n_head_kv, self.config.head_dim)

    def _index_block(self, block: int) -> None:
        begin, end = self.blocks.bounds[block : block + 2]
        for layer, chosen in enumerate(self._chosen[block]):
            keys = self.block_keys(layer, begin, end, chosen)
            self._index[layer][block // LANES, ..., block % LANES] = keys

    def went_far(self) -> None:
        for block in range(len(self._chosen)):
            self._index_block(block)

    def undo_step(self) -> None:
        if self._undo is not None:
            first, saved = self._undo
            for scores, values in zip(self.scores, saved, strict=True):
                scores[first : first + len(values)] = values
            self._undo = None

    def _remember_scores(self, n_past: int, n_tokens: int) -> None:
        first = max(0, n_past - self.memory.n_scoring)
        self._undo = first, [scores[first : n_past + n_tokens].copy() for scores in self.scores]

    def get_scores(self, layer: int, position: int) -> NDArray[np.float32]:
        """Representative score of a token in a layer, float32 [K]."""
        return self.scores[layer][position].copy()

    def set_scores(self, layer: int, position: int, values: NDArray[np.float32]) -> None:
        """Changes it; what was already chosen for a sealed block stays."""
        self.scores[layer][position] = values

    def get_representatives(self, layer: int, block: int) -> NDArray[np.int32]:
        """Positions of the tokens that stand for a sealed block, int32 [K, n_repr]."""
        return self._chosen[block][layer].copy()

    def indexed_keys(self, layer: int, block: int) -> NDArray[np.float32]:
        """What the index holds for a sealed block, float32 [K, n_repr, d]."""
        return self._index[layer][block // LANES, ..., block % LANES].astype(np.float32)

    @property
    def block_bounds(self) -> NDArray[np.int32]:
        """As the graph sees them, int32 [n_blocks + 1]."""
        return self._bounds[: self.blocks.n_blocks + 1].copy()

    def bytes_at(self, n_tokens: int) -> dict[str, int]:
        config, n_stored = self.config, min(n_tokens, self.n_ctx)
        n_groups = -(-self._n_blocks_at(n_stored) // LANES)
        return {
            "window": self.row_bytes * min(self.n_local_rows, n_stored),
            "tokens": self.row_bytes * n_stored,
            "index": n_groups * self._group_bytes,
            "scores": 4 * config.n_head_kv * config.n_layer * n_stored,
        }

    def _n_blocks_at(self, n_tokens: int) -> int:
        n_far = n_tokens - self.memory.n_local - self.memory.n_sink
        return max(0, n_far // parse_block(self.memory.block).min_size)

    def stats(self, n_past: int) -> dict[str, object]:
        parts = self.bytes_at(n_past)
        return {
            "policy": self.name,
            "blocks": self.blocks.n_blocks,
            "selected": min(self.n_select(max(0, n_past - 1), 1), self.blocks.n_blocks),
            "resident_bytes": parts["window"],
            "ram_bytes": parts["tokens"],
            "index_bytes": self.blocks.n_blocks * self._group_bytes // LANES,
            "score_bytes": parts["scores"],
            "far_tokens": self.local_start(n_past),
            "far_positions": self.far,
            "disk_bytes": 0,
            "disk_written_bytes": 0,
            "prefetch": {"issued": 0, "used": 0, "late": 0, "missed": 0, "wait_ms": 0.0},
        }

    def close(self) -> None:
        self.scores, self._index, self._bounds, self._undo = [], [], np.empty(0, np.int32), None
        super().close()


def _make_blocks(inputs: PolicyInputs) -> Blocks:
    scheme, n_sink = parse_block(inputs.memory.block), inputs.memory.n_sink
    if scheme.kind == "fixed":
        return FixedBlocks(n_sink, scheme.max_size)
    return SemanticBlocks(n_sink, scheme.min_size, scheme.max_size, inputs.boundaries())
