"""`--kv repkv`: older tokens in blocks, found again by representative tokens, the most relevant attended at each step.

A block that is selected is attended where it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import InputError, StoreError
from pyggml_repkv.ffi.context import Tensor, set_name
from pyggml_repkv.ffi.library import g, native, native_ffi
from pyggml_repkv.memory.arenas import as_array, as_rows
from pyggml_repkv.memory.block_file import BlockFile, BlockHeader
from pyggml_repkv.memory.blocks import Blocks, FixedBlocks, SemanticBlocks, parse_block
from pyggml_repkv.memory.boundaries import LOOKAHEAD
from pyggml_repkv.memory.bounded import N_SINGLE, BoundedMemory
from pyggml_repkv.memory.cache_types import to_float32
from pyggml_repkv.memory.disk_tier import DiskTier, default_folder
from pyggml_repkv.memory.policy import NO_DISK, DiskNeed, PolicyInputs
from pyggml_repkv.memory.repkv_checkpoints import Checkpoints, RepKVState
from pyggml_repkv.ops.kernels import LANES
from pyggml_repkv.ops.makers import Ops

# Threads that read blocks: measured in docs/disk.md.
N_IO_THREADS = 4

_NOTHING = np.empty(0, np.int32)


class RepKVMemory(BoundedMemory):
    """The index holds the keys of each block's representatives, one tensor per layer (layout: native/select_ops.h).

    To try another summary of a block, override `representatives` or `block_keys`.
    """

    name = "repkv"

    def __init__(self, inputs: PolicyInputs) -> None:
        memory, config = inputs.memory, inputs.graph.config
        self.block_shape = (config.n_head_kv, memory.n_repr, config.head_dim)
        # Bytes that `pack_block` takes.
        self.n_extra = (
            config.n_layer
            * config.n_head_kv
            * memory.n_repr
            * (4 + config.head_dim * (4 if memory.type_k == "f32" else 2))
        )
        super().__init__(inputs, n_stored=None, n_tensors=3 * config.n_layer + 2)
        self.blocks = _make_blocks(inputs)
        n_groups = self._max_blocks // LANES
        # Halves the reads of the search; a key that was kept in F32 is compared in F32.
        type_ = g.GGML_TYPE_F32 if memory.type_k == "f32" else g.GGML_TYPE_F16
        n_values = config.n_embd_kv * memory.n_repr * LANES
        layers = range(config.n_layer)
        self.index = [self.arenas.new(type_, (n_groups, n_values), f"index-{i}") for i in layers]
        dtype = np.float32 if memory.type_k == "f32" else np.float16
        self.index_arrays = [as_array(t, dtype).reshape(n_groups, *self.block_shape, LANES) for t in self.index]
        self.score_tensors = [
            self.arenas.new(g.GGML_TYPE_F32, (self.n_ctx, config.n_head_kv), f"score_l-{i}") for i in layers
        ]
        self.scores = [as_array(t, np.float32).reshape(self.n_ctx, config.n_head_kv) for t in self.score_tensors]
        self.places_tensor = self.arenas.new(g.GGML_TYPE_I32, (self._max_blocks, 2), "block_places")
        self._places = as_array(self.places_tensor, np.int32).reshape(-1, 2)
        self._group_bytes: int = config.n_layer * self.index[0].contents.nb[1]  # of the index, 16 blocks
        # Which tokens stand for each block; longer than there are blocks.
        self.chosen = np.empty((0, config.n_layer, config.n_head_kv, memory.n_repr), np.int32)
        # What the last token selected, in one of two halves: the other is written meanwhile, so that a step that fails
        # can be taken back. -1: there is nothing to hold on to, as after a chunk.
        self._kept_half = -1
        n_rows = config.n_head_kv if memory.per_head else 1
        shape = (2, n_rows, 1 + self.n_top_max)
        self.kept_tensors = [self.arenas.new(g.GGML_TYPE_I32, shape, f"kept-{i}") for i in layers if memory.keeps]
        self._kept = [as_array(t, np.int32).reshape(shape) for t in self.kept_tensors]
        self._undo: tuple[int, int, list[NDArray[np.float32]]] | None = None

    def make_disk(self, inputs: PolicyInputs) -> DiskTier | None:
        memory, scheme = inputs.memory, parse_block(inputs.memory.block)
        if not memory.on_disk and inputs.block_file is None:
            if memory.kv_disk_max or memory.type_evicted:
                raise InputError("--kv-disk-max and --cache-type-evicted need --kv-ram, --kv-dir or --session")
            return None
        file = inputs.block_file
        if file is None:
            file = BlockFile(Path(memory.kv_dir) if memory.kv_dir else default_folder(), None)
        n_rows = inputs.graph.config.n_head_kv if memory.per_head else 1
        # What a step finds open: the window, what fills no block yet, and the step; twice the latter, so that the rows
        # move less often.
        n_open = memory.n_local + scheme.max_size + LOOKAHEAD + 3 * max(memory.n_batch, N_SINGLE)
        # Only a session that goes on elsewhere needs it.
        n_extra = 0 if inputs.block_file is None else self.n_extra
        try:
            return DiskTier(
                inputs.graph.config, memory, file, max_block=scheme.max_size, max_blocks=self._max_blocks,
                n_selected=n_rows * self.n_top_max, n_open=n_open, n_extra=n_extra,
                n_threads=N_IO_THREADS,
            )  # fmt: skip
        except BaseException:
            file.close()
            raise

    @property
    def _max_blocks(self) -> int:
        """How many blocks a full context may have, in whole groups."""
        return -(-self.n_ctx // (parse_block(self.memory.block).min_size * LANES)) * LANES

    def select(self, ops: Ops, q: Tensor, q_far: Tensor, regions: Tensor, layer: int) -> Tensor:
        m, score = self.memory, self.score_tensors[layer]
        if m.score == "dot":
            marker = ops.score_acc(q, self.k_local[layer], score, regions, m.n_scoring)
        else:
            marker = ops.score_attention(q, self.k_local[layer], score, regions, m.n_scoring)
        set_name(marker, "score_acc", layer)
        relevance = ops.relevance(q_far, self.index[layer], regions, marker, n_repr=m.n_repr, kind=m.relevance)
        return self._top(ops, relevance, regions, layer, None)

    def select_one(self, ops: Ops, qkv: Tensor, rope: Tensor, regions: Tensor, layer: int) -> Tensor:
        m, score = self.memory, self.score_tensors[layer]
        if m.score == "dot":
            marker = ops.score_acc_one(qkv, self.k_local[layer], score, rope, regions, m.n_scoring)
        else:
            marker = ops.score_attention_one(qkv, self.k_local[layer], score, rope, regions, m.n_scoring)
        set_name(marker, "score_acc", layer)
        relevance = ops.relevance_one(qkv, self.index[layer], rope, regions, marker, n_repr=m.n_repr, kind=m.relevance)
        kept = self.kept_tensors[layer] if m.keeps else None
        return self._top(ops, relevance, regions, layer, kept)

    def _top(self, ops: Ops, relevance: Tensor, regions: Tensor, layer: int, kept: Tensor | None) -> Tensor:
        set_name(relevance, "block_relevance", layer)
        m = self.memory
        selected = ops.block_topk(
            relevance, regions, self.n_top_max, kind=m.relevance, per_head=m.per_head, sticky=m.sticky, kept=kept,
            late=m.late and kept is not None,
        )  # fmt: skip
        set_name(selected, "block_topk", layer)
        return selected

    def begin_step(self, tokens: NDArray[np.int32], n_past: int) -> None:
        # What the last step would have taken back is settled now, however far this one comes.
        self._undo = None
        super().begin_step(tokens, n_past)
        if self._kept:
            one = len(tokens) == 1
            self.regions.kept = self._kept_half if one else -1
            self._kept_half = int(self._kept_half == 0) if one else -1

    @property
    def knows_selection(self) -> bool:
        if self.disk is None or not self.disk.prefetches:
            return False
        half = self.regions.kept
        return half >= 0 and bool(self._kept[0][half, 0, 0] > 0)

    def assume_selected(self, n_past: int) -> None:
        """For a graph that is never computed: as if the token before had selected, if there was a choice by then."""
        if self._n_blocks_at(n_past) > self.n_select(n_past, 1):
            self.regions.kept = 0
            for kept in self._kept:
                kept[..., 0] = 1

    def seal(self, tokens: NDArray[np.int32], n_past: int, start: int) -> tuple[int, int]:
        self.blocks.append(tokens.tolist(), n_past)
        first_new = self.blocks.n_blocks
        for block, (begin, end) in enumerate(self.blocks.seal(start), first_new):
            self._make_room_for(block)
            self.chosen[block] = [self.representatives(i, begin, end) for i in range(self.config.n_layer)]
            self._index_block(block)
            self._places[block] = begin, end - begin
            if self.disk is not None:
                extra = self.pack_block(block) if self.disk.layout.n_extra else b""
                self.disk.seal(begin, end, rotated=not self.far, extra=extra)
        if self.disk is not None:
            self._forget_scores()
        self._remember(n_past, len(tokens))
        return self.blocks.sealed_end, self.blocks.n_blocks

    def _make_room_for(self, block: int) -> None:
        if block >= len(self.chosen):
            room = np.empty((max(64, block), *self.chosen.shape[1:]), np.int32)
            self.chosen = np.concatenate((self.chosen, room))

    def restore(self, state: RepKVState, headers: Sequence[tuple[int, BlockHeader]], tokens: Sequence[int]) -> None:
        """Goes on where `take_state` was, in a memory that is still empty; the rows follow by `put_rows`.

        headers: offset and header of each block; tokens: those from state.sealed_end on. Raises StoreError where the
        blocks are not those of the state.
        """
        assert self.disk is not None
        position = self.memory.n_sink
        for block, (offset, header) in enumerate(headers):
            if (header.block, header.first_position) != (block, position):
                raise StoreError(f"{self.disk.file.path}: block {block} is not where it should be")
            self.disk.layout.check(header)
            position += header.n_tokens
            self._make_room_for(block)
            self.unpack_block(block, header)
            self._places[block] = header.first_position, header.n_tokens
            self.disk.store.add(header, offset)
        if position != state.sealed_end:
            raise StoreError(f"{self.disk.file.path}: its blocks end at token {position}, not at {state.sealed_end}")
        bounds = [self.memory.n_sink, *np.cumsum([h.n_tokens for _, h in headers], dtype=np.int64) + self.memory.n_sink]
        self.blocks.restore([int(b) for b in bounds], tokens)
        self.far, self.far_at = state.far_at >= 0, state.far_at
        if state.far_at > 0:
            self.disk.unrotate(self.unrotation(0, state.far_at))
        self.disk.resume(position)
        self.local_base = self.local_start(state.n_past)
        if state.far_at > 0:
            # What they carry of the index is from before their keys were turned back.
            for block in (b for b, (_, header) in enumerate(headers) if header.rotated):
                self._index_block(block)
        for scores, values in zip(self.scores, state.scores, strict=True):
            scores[state.sealed_end : state.n_past] = values.reshape(-1, self.config.n_head_kv)
        self._restore_kept(state.kept, state.n_past)
        for layer, blocks in enumerate(state.warm):
            self.disk.store.prefetch(layer, [b for b in blocks.tolist() if 0 <= b < len(headers)])

    @property
    def kept_selection(self) -> NDArray[np.int32]:
        """What the last token selected if that matters to the next one: int32 [n_layer, 1 or K, 1 + n], else empty."""
        return np.stack([kept[self._kept_half] for kept in self._kept]) if self._kept_half >= 0 else _NOTHING

    def _restore_kept(self, selection: NDArray[np.int32], n_past: int) -> None:
        """Raises StoreError for what no step can have selected before n_past: C code takes it as it is."""
        self._kept_half = -1
        if not selection.size:
            return
        shape = (len(self._kept), *self._kept[0].shape[1:]) if self._kept else (0,)
        if selection.size != np.prod(shape):
            raise StoreError("what the last token selected is of another shape")
        counts = selection.reshape(shape)[..., 0]
        has_choice = self.blocks.n_blocks > self.n_select(n_past, 1)
        if (counts != counts[0, 0]).any() or (counts[0, 0] > 0 and not has_choice):
            raise StoreError("what the last token selected is damaged")
        for kept, rows in zip(self._kept, selection.reshape(shape), strict=True):
            for n, *blocks in rows.tolist():
                ids = [-1, *blocks[: max(n, 0)], self.blocks.n_blocks]
                if not 0 <= n <= self.memory.top_blocks or any(a >= b for a, b in pairwise(ids)):
                    raise StoreError("what the last token selected is damaged")
            kept[0] = rows
        self._kept_half = 0

    def checkpoint(self) -> Checkpoints:
        return Checkpoints(self)

    def pack_block(self, block: int) -> bytes:
        """What a block's header carries: its representatives, then its entries of the index, layer by layer."""
        keys = [index[block // LANES, ..., block % LANES].tobytes() for index in self.index_arrays]
        return self.chosen[block].tobytes() + b"".join(keys)

    def unpack_block(self, block: int, header: BlockHeader) -> None:
        """Puts them back. Raises StoreError where they do not fit."""
        n_layer, n_head_kv, n_repr, d = self.config.n_layer, *self.block_shape
        dtype = self.index_arrays[0].dtype
        n_chosen = 4 * n_layer * n_head_kv * n_repr
        if len(header.extra) != n_chosen + n_layer * n_head_kv * n_repr * d * dtype.itemsize:
            raise StoreError(f"block {block} carries an index of another shape")
        self.chosen[block] = np.frombuffer(header.extra[:n_chosen], np.int32).reshape(self.chosen.shape[1:])
        keys = np.frombuffer(header.extra[n_chosen:], dtype).reshape(n_layer, n_head_kv, n_repr, d)
        for index, values in zip(self.index_arrays, keys, strict=True):
            index[block // LANES, ..., block % LANES] = values

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
        """Float32 [n, K, d]: before RoPE with far positions, else rotated. Raises StoreError for unreadable ones."""
        if self.disk is None:
            return self._keys(self.k_store[layer], positions)
        if self.arenas.closed:
            raise InputError("the session is closed")
        rows = np.empty((len(positions), self.disk.layout.row_bytes[0]), np.uint8)
        evicted = (positions >= self.disk.n_sink) & (positions < self.disk.sealed_end)
        here = positions[~evicted]
        rows[~evicted] = as_rows(self.k_store[layer])[np.where(here < self.disk.n_sink, here, here - self.store_base)]
        block_of = np.searchsorted(self.blocks.bounds, positions, side="right") - 1
        for block in np.unique(block_of[evicted]).tolist():
            begin, end = self.blocks.bounds[block : block + 2]
            mine = evicted & (block_of == block)
            rows[mine] = self.disk.store.read(layer, block, end - begin)[0][positions[mine] - begin]
        return self._floats(rows)

    def local_keys(self, layer: int, first: int, end: int) -> NDArray[np.float32]:
        """Rotated keys of the window's positions [first, end), float32 [n, K, d]."""
        return self._keys(self.k_local[layer], np.arange(first - self.local_base, end - self.local_base))

    def _keys(self, arena: Tensor, rows: NDArray[np.integer]) -> NDArray[np.float32]:
        if self.arenas.closed:
            raise InputError("the session is closed")
        return self._floats(as_rows(arena)[rows])

    def _floats(self, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        keys = to_float32(rows, self.memory.type_k)
        return keys.reshape(len(rows), self.config.n_head_kv, self.config.head_dim)

    def _index_block(self, block: int) -> None:
        begin, end = self.blocks.bounds[block : block + 2]
        for layer, chosen in enumerate(self.chosen[block]):
            keys = self.block_keys(layer, begin, end, chosen)
            self.index_arrays[layer][block // LANES, ..., block % LANES] = keys

    def went_far(self) -> None:
        for block in range(self.blocks.n_blocks):
            self._index_block(block)

    def undo_step(self) -> None:
        if self._undo is not None:
            first, self._kept_half, saved = self._undo
            for scores, values in zip(self.scores, saved, strict=True):
                scores[first : first + len(values)] = values
            self._undo = None

    def _remember(self, n_past: int, n_tokens: int) -> None:
        first = max(0, n_past - self.memory.n_scoring)
        saved = [scores[first : n_past + n_tokens].copy() for scores in self.scores]
        self._undo = first, self._kept_half, saved

    def _forget_scores(self) -> None:
        """Gives the memory of scores back that nobody will change or ask for: those of blocks on disk."""
        for tensor in self.score_tensors:
            self.arenas.release_rows(tensor, self.blocks.sealed_end)

    def _check_scored(self, position: int) -> None:
        if self.disk is not None and self.memory.n_sink <= position < self.blocks.sealed_end:
            raise InputError(f"position {position} lies in a block on disk, whose scores are not kept")

    def get_scores(self, layer: int, position: int) -> NDArray[np.float32]:
        """Representative score of a token in a layer, float32 [K]. Raises InputError where the token is on disk."""
        self._check_scored(position)
        return self.scores[layer][position].copy()

    def set_scores(self, layer: int, position: int, values: NDArray[np.float32]) -> None:
        """Changes it; what was already chosen for a sealed block stays."""
        self._check_scored(position)
        self.scores[layer][position] = values

    def get_representatives(self, layer: int, block: int) -> NDArray[np.int32]:
        """Positions of the tokens that stand for a sealed block, int32 [K, n_repr]."""
        if not 0 <= block < self.blocks.n_blocks:
            raise IndexError(block)
        return self.chosen[block][layer].copy()

    def indexed_keys(self, layer: int, block: int) -> NDArray[np.float32]:
        """What the index holds for a sealed block, float32 [K, n_repr, d]."""
        return self.index_arrays[layer][block // LANES, ..., block % LANES].astype(np.float32)

    @property
    def block_bounds(self) -> NDArray[np.int32]:
        """As the graph sees them, int32 [n_blocks + 1]."""
        if self.arenas.closed:
            return np.empty(0, np.int32)
        places = self._places[: self.blocks.n_blocks]
        ends = places.sum(1)
        assert (ends[:-1] == places[1:, 0]).all()
        return np.concatenate(([self.memory.n_sink], ends)).astype(np.int32)

    def bytes_at(self, n_tokens: int) -> dict[str, int]:
        config, n_stored = self.config, min(n_tokens, self.n_ctx)
        n_blocks = self._n_blocks_at(n_stored)
        n_groups, n_scored = -(-n_blocks // LANES), n_stored
        tokens = {"tokens": self.row_bytes * n_stored}
        if self.disk is not None:
            n_open = min(self.memory.n_sink + self.disk.n_open, n_stored)
            tokens = {"tokens": self.row_bytes * n_open, "blocks": self.disk.ram_bytes_at(n_blocks)}
            tokens["buffers"] = self.disk.buffer_bytes if n_blocks else 0
            n_scored = n_open
        return {
            "window": self.row_bytes * min(self.n_local_rows, n_stored),
            **tokens,
            "index": n_groups * self._group_bytes,
            "scores": 4 * config.n_head_kv * config.n_layer * n_scored,
        }

    def disk_need(self, n_tokens: int) -> DiskNeed | None:
        """What n_tokens tokens need of the disk, None if nothing."""
        if self.disk is None:
            return None
        needed = self.disk.disk_bytes_at(max(0, n_tokens - self.memory.n_local - self.memory.n_sink))
        return DiskNeed(needed - self.disk.store.end, self.disk.file.free_bytes(), needed, self.memory.kv_disk_max,
                        str(self.disk.file.folder))  # fmt: skip

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
            "ram_bytes": parts["tokens"] + parts.get("blocks", 0),
            "index_bytes": self.blocks.n_blocks * self._group_bytes // LANES,
            "score_bytes": parts["scores"],
            "far_tokens": self.local_start(n_past),
            "far_positions": self.far,
            **(NO_DISK if self.disk is None else self.disk.stats()),
        }

    def close(self) -> None:
        self.scores, self.index_arrays, self._kept, self._undo = [], [], [], None
        self._places = np.empty((0, 2), np.int32)
        super().close()


def _make_blocks(inputs: PolicyInputs) -> Blocks:
    scheme, n_sink = parse_block(inputs.memory.block), inputs.memory.n_sink
    if scheme.kind == "fixed":
        return FixedBlocks(n_sink, scheme.max_size)
    return SemanticBlocks(n_sink, scheme.min_size, scheme.max_size, inputs.boundaries())
