"""What a session that is kept needs of a RepKV memory: its state between two steps, and putting it back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import ComputeError, InputError
from pyggml_repkv.memory.arenas import as_rows
from pyggml_repkv.memory.block_file import BlockFile, BlockHeader
from pyggml_repkv.memory.block_store import BlockStore, RecordLayout
from pyggml_repkv.memory.blocks import parse_block
from pyggml_repkv.memory.boundaries import LOOKAHEAD

if TYPE_CHECKING:
    from pyggml_repkv.memory.repkv import RepKVMemory

# How far behind its end a session can go back to without reading everything again, at least.
N_BACK = 1024

BlockRow = tuple[int, int, int, int]
"""(block, first position, n_tokens, offset in the file)."""


@dataclass(frozen=True, slots=True)
class RepKVState:
    """After n_past tokens. scores: float32 [n_layer, n_past - sealed_end, K]; far_at: n_past when older tokens began to
    be seen from one distance, 0 from the start, -1 not yet; warm: int32 [n_layer, n], blocks worth reading first;
    kept: int32 [n_layer, 1 or K, 1 + n], what the last token selected if the next one holds on to it, else empty.
    """

    n_past: int
    sealed_end: int
    n_blocks: int
    far_at: int
    scores: NDArray[np.float32]
    warm: NDArray[np.int32]
    kept: NDArray[np.int32]


class Checkpoints:
    """Of one memory. n_sink, n_batch: of its settings; n_layer: of its model; entry_bytes: of a token's rows, of all
    layers: the store's keys and values and the window's rotated keys.
    """

    def __init__(self, memory: RepKVMemory) -> None:
        self._memory = memory
        self.n_sink, self.n_batch = memory.memory.n_sink, memory.memory.n_batch
        self.n_layer = memory.config.n_layer
        k_bytes, v_bytes = (as_rows(arena).shape[1] for arena in (memory.k_store[0], memory.v_store[0]))
        self._row_bytes = k_bytes, v_bytes
        self.entry_bytes = self.n_layer * (2 * k_bytes + v_bytes)

    @property
    def header_bytes(self) -> int:
        """Of a block on disk."""
        assert self._memory.disk is not None
        return self._memory.disk.layout.header_bytes

    @property
    def far_at(self) -> int:
        """See RepKVState."""
        return self._memory.far_at

    @property
    def long(self) -> bool:
        """Whether it is far from the start because of its length."""
        return self._memory.long

    @property
    def n_blocks(self) -> int:
        return self._memory.blocks.n_blocks

    def n_ring(self, n_step: int) -> int:
        """Open tokens that a file must hold: what the newest save needs must outlast what the next one writes, and what
        older ones need N_BACK more; n_step: most tokens between two saves.
        """
        m = self._memory.memory
        return m.n_local + parse_block(m.block).max_size + LOOKAHEAD + 3 * n_step + N_BACK

    def check(self) -> None:
        """Raises ComputeError for a memory that was stopped halfway."""
        if self._memory.torn:
            raise ComputeError("the memory was stopped while it was being rearranged: it is not saved")

    def check_copy(self) -> None:
        """Also raises InputError where a copy would not be the same."""
        self.check()
        disk = self._memory.disk
        if disk is not None and disk.layout.file_types != disk.layout.types:
            raise InputError(
                "blocks of another --cache-type-evicted would be rounded again: give --session from the start"
            )

    def flush(self) -> None:
        """Waits until every block is written. Raises StoreError."""
        assert self._memory.disk is not None
        self._memory.disk.store.flush()

    def take(self, n_past: int) -> RepKVState:
        """A copy of the state."""
        m = self._memory
        end = m.blocks.sealed_end
        scores = (
            np.stack([s[end:n_past] for s in m.scores]) if n_past > end else np.empty((self.n_layer, 0, 0), np.float32)
        )
        disk = m.disk
        warm = np.stack([disk.store.resident(i) for i in range(self.n_layer)]) if disk else np.empty((self.n_layer, 0))
        return RepKVState(n_past, end, self.n_blocks, m.far_at, scores, warm.astype(np.int32), m.kept_selection)

    def open_positions(self, first: int, n_past: int) -> NDArray[np.int64]:
        """Those of [first, n_past) that no block holds: sinks and what follows the last block."""
        positions = np.arange(first, n_past)
        return positions[(positions < self.n_sink) | (positions >= self._memory.blocks.sealed_end)]

    def blocks_from(self, first: int) -> list[BlockRow]:
        """Blocks from a number on, of a memory whose blocks are in the session's file."""
        bounds, disk = self._memory.blocks.bounds, self._memory.disk
        assert disk is not None
        return [(b, bounds[b], bounds[b + 1] - bounds[b], disk.store.offsets[b]) for b in range(first, self.n_blocks)]

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Rows of open tokens: uint8 [n, entry_bytes]."""
        m = self._memory
        rows = np.zeros((len(positions), self.entry_bytes), np.uint8)
        store = self._store_rows(positions)
        in_window = positions >= m.local_base
        local = positions[in_window] - m.local_base
        at = 0
        for k_store, v_store, k_local in zip(m.k_store, m.v_store, m.k_local, strict=True):
            for arena in (k_store, v_store):
                values = as_rows(arena)
                rows[:, at : at + values.shape[1]] = values[store]
                at += values.shape[1]
            values = as_rows(k_local)
            rows[in_window, at : at + values.shape[1]] = values[local]
            at += values.shape[1]
        return rows

    def put_rows(self, first: int, rows: NDArray[np.uint8]) -> None:
        """The reverse, into store and, as far as they belong there, window."""
        m, (k_bytes, v_bytes) = self._memory, self._row_bytes
        positions = np.arange(first, first + len(rows))
        store = self._store_rows(positions)
        in_window = positions >= m.local_base
        local = positions[in_window] - m.local_base
        at = 0
        for i in range(self.n_layer):
            k, v, rotated = np.split(rows[:, at : at + 2 * k_bytes + v_bytes], (k_bytes, k_bytes + v_bytes), axis=1)
            as_rows(m.k_store[i])[store], as_rows(m.v_store[i])[store] = k, v
            as_rows(m.k_local[i])[local], as_rows(m.v_local[i])[local] = rotated[in_window], v[in_window]
            at += 2 * k_bytes + v_bytes

    def _store_rows(self, positions: NDArray[np.integer]) -> NDArray[np.integer]:
        return np.where(positions < self.n_sink, positions, positions - self._memory.store_base)

    def restore(self, state: RepKVState, headers: Sequence[tuple[int, BlockHeader]], tokens: Sequence[int]) -> None:
        """Goes on where a state was taken, in a memory that is still empty; the rows follow by `put_rows`.

        headers: offset and header of each block; tokens: those from state.sealed_end on. Raises StoreError where they
        do not fit.
        """
        self._memory.restore(state, headers, tokens)

    def copy_blocks(self, file: BlockFile) -> list[BlockRow]:
        """Writes every block into another file, of a session that has none yet. Raises StoreError."""
        memory, config, m = self._memory, self._memory.config, self._memory.memory
        bounds, types = memory.blocks.bounds, (m.type_k, m.type_v)
        layout = RecordLayout(config, parse_block(m.block).max_size, types, types, memory.n_extra)
        # It only writes: the one slot of each layer, and where blocks would lie, are never looked at.
        places = np.zeros((config.n_layer, max(1, self.n_blocks), 2), np.int32)
        nowhere = [0] * config.n_layer
        writer = BlockStore(
            file, layout, n_slots=1, max_blocks=places.shape[1], n_threads=0, first_row=0, k_rows=nowhere,
            v_rows=nowhere, places=[p.ctypes.data for p in places], debug=False, memory=places,
        )  # fmt: skip
        try:
            for block in range(self.n_blocks):
                begin, end = bounds[block : block + 2]
                rows = [self._block_rows(layer, block, begin, end) for layer in range(config.n_layer)]
                k_rows, v_rows = ([r[i].ctypes.data for r in rows] for i in (0, 1))
                writer.put(
                    begin, end - begin, rotated=not memory.far, k_rows=k_rows, v_rows=v_rows,
                    extra=memory.pack_block(block),
                )  # fmt: skip
            writer.flush()
            return [(b, bounds[b], bounds[b + 1] - bounds[b], offset) for b, offset in enumerate(writer.offsets)]
        finally:
            writer.close()

    def _block_rows(self, layer: int, block: int, begin: int, end: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        memory = self._memory
        if memory.disk is not None:
            return memory.disk.store.read(layer, block, end - begin)
        return as_rows(memory.k_store[layer])[begin:end], as_rows(memory.v_store[layer])[begin:end]
