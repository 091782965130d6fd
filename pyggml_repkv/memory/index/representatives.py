"""Blocks found by a few representative tokens each (InfLLM, arXiv 2402.04617): those that later tokens ask for most."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import InputError, StoreError
from pyggml_repkv.ffi.context import Tensor, set_name
from pyggml_repkv.ffi.library import g, native, native_ffi
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.index.base import IndexParts, Queries, Selection
from pyggml_repkv.memory.store.arenas import Rows, as_array
from pyggml_repkv.ops.kernels import LANES
from pyggml_repkv.ops.makers import Ops


def top_scored(scores: NDArray[np.float32], begin: int, end: int, n: int) -> NDArray[np.int32]:
    """The n tokens of [begin, end) with the highest scores [n_positions, K], contiguous -> positions int32 [K, n]."""
    chosen = np.empty((scores.shape[1], n), np.int32)
    native.repkv_repr_topk(
        native_ffi.cast("int32_t *", chosen.ctypes.data), native_ffi.cast("float *", scores.ctypes.data), begin, end,
        *chosen.shape,
    )  # fmt: skip
    return chosen


class Representatives:
    """The keys of each block's representatives, one tensor a layer (layout: native/select_ops.h), and the scores of all
    tokens that choose them, score_l float32 [n_positions, K].

    To try another summary of a block, override `choose` or `block_keys`.
    """

    writes: ClassVar[frozenset[str]] = frozenset(("score_l",))

    @staticmethod
    def unit_of(memory: MemoryConfig) -> None:
        return None

    @staticmethod
    def n_groups(memory: MemoryConfig, n_tokens: int) -> int:
        return 1

    @staticmethod
    def selects_per_head(memory: MemoryConfig) -> bool:
        return memory.per_head

    def __init__(self, parts: IndexParts) -> None:
        self.config, self.memory, self._parts = parts.config, parts.memory, parts
        self.keys = parts.keys
        config, memory = parts.config, parts.memory
        self.n_entries = memory.index_kind[1]
        self._shape = config.n_head_kv, self.n_entries, config.head_dim
        # Halves the reads of the search; a key that was kept in F32 is compared in F32.
        type_, dtype = (g.GGML_TYPE_F32, np.float32) if memory.type_k == "f32" else (g.GGML_TYPE_F16, np.float16)
        self.block_bytes = config.n_layer * int(np.prod(self._shape)) * np.dtype(dtype).itemsize
        self.n_packed = self.block_bytes + 4 * config.n_layer * config.n_head_kv * self.n_entries
        n_groups, layers = parts.max_units // LANES, range(config.n_layer)

        def groups(n_past: int) -> Rows:
            return Rows(parts.blocks.n_blocks // LANES, -(-parts.blocks.n_blocks // LANES))

        def scored(n_past: int) -> Rows:
            return Rows(min(parts.blocks.sealed_end, n_past), n_past)

        shape = n_groups, int(np.prod(self._shape)) * LANES
        self._index = [parts.arenas.new(type_, shape, f"index-{i}", rows=groups) for i in layers]
        self._arrays = [as_array(t, dtype).reshape(n_groups, *self._shape, LANES) for t in self._index]
        shape = parts.n_ctx, config.n_head_kv
        self._score_tensors = [parts.arenas.new(g.GGML_TYPE_F32, shape, f"score_l-{i}", rows=scored) for i in layers]
        self.scores = [as_array(t, np.float32).reshape(shape) for t in self._score_tensors]
        # Which tokens stand for each block, int32; longer than there are blocks.
        self.chosen = np.empty((0, config.n_layer, *self._shape[:2]), np.int32)
        self._undo: tuple[int, list[NDArray[np.float32]]] | None = None
        # Scores of blocks before this position are gone.
        self._forgotten = 0

    def n_queries(self, n_tokens: int) -> int:
        return 1

    def nodes(self, ops: Ops, q: Queries, regions: Tensor, places: Tensor, layer: int) -> Selection:
        m, index, kept = self.memory, self._index[layer], None
        marker = self._score(ops, q, regions, layer)
        set_name(marker, "score_acc", layer)
        if q.rope is None:
            relevance = ops.relevance(q.far, index, regions, marker, n_repr=self.n_entries, kind=m.relevance)
        else:
            relevance = ops.relevance_one(
                q.far, index, q.rope, regions, marker, n_repr=self.n_entries, kind=m.relevance
            )  # fmt: skip
            kept = self._parts.kept.tensors[layer] if m.keeps else None
        set_name(relevance, "block_relevance", layer)
        n_rows = self.config.n_head_kv if m.per_head else 1
        blocks = ops.block_topk(
            relevance, self._parts.units, regions, n_top=self._parts.n_top, kind=m.relevance, n_rows=n_rows,
            n_lines=self.config.n_head // n_rows, n_padded=self._parts.max_units, sticky=m.sticky, kept=kept,
            late=m.late and kept is not None,
        )  # fmt: skip
        set_name(blocks, "block_topk", layer)
        runs = ops.locate(blocks, places)
        set_name(runs, "row_runs", layer)
        return Selection(blocks, runs)

    def _score(self, ops: Ops, q: Queries, regions: Tensor, layer: int) -> Tensor:
        sources, n = (q.near, self._parts.local.k[layer], self._score_tensors[layer]), self.memory.n_scoring
        if q.rope is None:
            score = ops.score_acc if self.memory.score == "dot" else ops.score_attention
            return score(*sources, regions, n)
        score_one = ops.score_acc_one if self.memory.score == "dot" else ops.score_attention_one
        return score_one(*sources, q.rope, regions, n)

    def seal(self, block: int, begin: int, end: int) -> None:
        self._make_room_for(block)
        self.chosen[block] = [self.choose(i, begin, end) for i in range(self.config.n_layer)]
        self._put(block, begin, end)

    def renew(self, block: int, begin: int, end: int) -> None:
        for tensor in self._index:
            self._parts.arenas.thaw(tensor)
        self._put(block, begin, end)

    def _put(self, block: int, begin: int, end: int) -> None:
        for layer, chosen in enumerate(self.chosen[block]):
            keys = self.block_keys(layer, begin, end, chosen)
            self._arrays[layer][block // LANES, ..., block % LANES] = keys

    def choose(self, layer: int, begin: int, end: int) -> NDArray[np.int32]:
        """Positions int32 [K, n_repr] of the tokens that stand for the block [begin, end) in a layer."""
        return top_scored(self.scores[layer], begin, end, self.n_entries)

    def block_keys(self, layer: int, begin: int, end: int, chosen: NDArray[np.int32]) -> NDArray[np.float32]:
        """Float32 [K, n_repr, d]: what the index holds for a block; here the keys of the representatives."""
        positions, at = np.unique(chosen, return_inverse=True)
        return self.keys(layer, positions)[at.reshape(chosen.shape), np.arange(len(chosen))[:, None]]

    def _make_room_for(self, block: int) -> None:
        if block >= len(self.chosen):
            room = np.empty((max(64, block), *self.chosen.shape[1:]), np.int32)
            self.chosen = np.concatenate((self.chosen, room))

    def pack(self, block: int, begin: int, end: int) -> bytes:
        """Representatives, then their keys, layer by layer."""
        keys = [index[block // LANES, ..., block % LANES].tobytes() for index in self._arrays]
        return self.chosen[block].tobytes() + b"".join(keys)

    def unpack(self, block: int, begin: int, end: int, data: bytes) -> None:
        if len(data) != self.n_packed:
            raise StoreError(f"block {block} carries an index of another shape")
        self._make_room_for(block)
        n_chosen = self.n_packed - self.block_bytes
        self.chosen[block] = np.frombuffer(data[:n_chosen], np.int32).reshape(self.chosen.shape[1:])
        keys = np.frombuffer(data[n_chosen:], self._arrays[0].dtype).reshape(-1, *self._shape)
        for index, values in zip(self._arrays, keys, strict=True):
            index[block // LANES, ..., block % LANES] = values

    def entries(self, layer: int, block: int) -> NDArray[np.float32]:
        """What the index holds for a block, float32 [K, n_repr, d]."""
        return self._arrays[layer][block // LANES, ..., block % LANES].astype(np.float32)

    def get_score(self, layer: int, position: int) -> NDArray[np.float32]:
        """Representative score of a token in a layer, float32 [K]. Raises InputError where it is no longer held."""
        self._check_held(position)
        return self.scores[layer][position].copy()

    def set_score(self, layer: int, position: int, values: NDArray[np.float32]) -> None:
        """Changes it; what was already chosen for a block stays."""
        self._check_held(position)
        self.scores[layer][position] = values

    def _check_held(self, position: int) -> None:
        if self.memory.n_sink <= position < self._forgotten:
            raise InputError(f"position {position} lies in a block on disk, whose scores are not kept")

    def take_state(self, first: int, end: int) -> NDArray[np.float32]:
        """Scores of the tokens [first, end): float32 [n_layer, n, K]."""
        return np.stack([scores[first:end] for scores in self.scores])

    def put_state(self, first: int, end: int, values: NDArray[np.float32]) -> None:
        # Sinks have none, also where some are still to come.
        if values.size != self.config.n_layer * self.config.n_head_kv * max(0, end - first):
            raise StoreError("the scores are damaged")
        for scores, layer in zip(self.scores, values.reshape(self.config.n_layer, -1), strict=True):
            rows = layer.reshape(-1, self.config.n_head_kv)
            scores[first : first + len(rows)] = rows

    def settle(self) -> None:
        self._undo = None

    def remember(self, n_past: int, n_tokens: int) -> None:
        first = max(0, n_past - self.memory.n_scoring)
        self._undo = first, [scores[first : n_past + n_tokens].copy() for scores in self.scores]

    def undo(self) -> None:
        if self._undo is not None:
            first, saved = self._undo
            for scores, values in zip(self.scores, saved, strict=True):
                scores[first : first + len(values)] = values
            self._undo = None

    def forget(self, end: int) -> None:
        """Gives the memory of their scores back."""
        self._forgotten = end
        for tensor in self._score_tensors:
            self._parts.arenas.release_rows(tensor, end)

    def bytes_at(self, n_blocks: int, n_open: int) -> dict[str, int]:
        c = self.config
        return {
            "index": -(-n_blocks // LANES) * LANES * self.block_bytes,
            "scores": 4 * c.n_head_kv * c.n_layer * n_open,
        }

    def copy_from(self, other: Representatives) -> None:
        self.chosen, self._forgotten = other.chosen.copy(), other._forgotten

    def close(self) -> None:
        self.scores, self._arrays, self._undo = [], [], None
