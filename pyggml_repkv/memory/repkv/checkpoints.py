"""What a session that is kept needs of a RepKV memory (memory/checkpoints.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import ComputeError, InputError
from pyggml_repkv.memory.bounded.local import LocalWindow
from pyggml_repkv.memory.bounded.rotation import Rotation
from pyggml_repkv.memory.checkpoints import BlockRow, State
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.cut.blocks import Blocks, Scheme
from pyggml_repkv.memory.cut.boundaries import LOOKAHEAD
from pyggml_repkv.memory.index.base import Index
from pyggml_repkv.memory.index.kept import Kept
from pyggml_repkv.memory.store.arenas import as_rows
from pyggml_repkv.memory.store.block_file import BlockFile, BlockHeader
from pyggml_repkv.memory.store.block_store import BlockStore
from pyggml_repkv.memory.store.disk import DiskStore
from pyggml_repkv.memory.store.layout import BlockShape, RecordLayout
from pyggml_repkv.memory.store.ram import RamStore
from pyggml_repkv.model.config import ModelConfig

# How far behind its end a session can go back to without reading everything again, at least.
N_BACK = 1024


class Parts(Protocol):
    """The parts of a RepKV memory that a checkpoint saves."""

    config: ModelConfig
    memory: MemoryConfig
    rotation: Rotation
    local: LocalWindow
    store: RamStore | DiskStore
    blocks: Blocks
    scheme: Scheme
    shape: BlockShape
    index: Index
    kept: Kept

    @property
    def torn(self) -> bool: ...

    @property
    def disk(self) -> DiskStore | None: ...

    def restore(self, state: State, headers: Sequence[tuple[int, BlockHeader]], tokens: Sequence[int]) -> None: ...


class RepKVCheckpoints:
    """A token's entry holds its rows of the store's keys and values and of the window's rotated keys."""

    def __init__(self, memory: Parts) -> None:
        self._memory = memory
        self.n_sink, self.n_batch = memory.memory.n_sink, memory.memory.n_batch
        self.n_layer = memory.config.n_layer
        k_bytes, v_bytes = (as_rows(arena).shape[1] for arena in (memory.store.k[0], memory.store.v[0]))
        self._row_bytes = k_bytes, v_bytes
        self.entry_bytes = self.n_layer * (2 * k_bytes + v_bytes)

    @property
    def header_bytes(self) -> int:
        assert self._memory.disk is not None
        return self._memory.disk.layout.header_bytes

    @property
    def far_at(self) -> int:
        return self._memory.rotation.far_at

    @property
    def long(self) -> bool:
        return self._memory.rotation.long

    @property
    def n_blocks(self) -> int:
        return self._memory.blocks.n_blocks

    def n_ring(self, n_step: int) -> int:
        # What the newest save needs must outlast what the next one writes, and what older ones need N_BACK more.
        m = self._memory.memory
        return m.n_local + self._memory.scheme.largest_block + LOOKAHEAD + 3 * n_step + N_BACK

    def check(self) -> None:
        if self._memory.torn:
            raise ComputeError("the memory was stopped while it was being rearranged: it is not saved")

    def check_copy(self) -> None:
        self.check()
        disk = self._memory.disk
        if disk is not None and disk.layout.file_types != disk.layout.types:
            raise InputError(
                "blocks of another --cache-type-evicted would be rounded again: give --session from the start"
            )

    def flush(self) -> None:
        assert self._memory.disk is not None
        self._memory.disk.io.flush()

    def take(self, n_past: int) -> State:
        m = self._memory
        end = m.blocks.sealed_end
        scores = m.index.take_state(end, max(n_past, end))
        disk = m.disk
        slots = [disk.io.resident(i) if disk else np.empty((1, 0), np.int32) for i in range(self.n_layer)]
        return State(n_past, end, self.n_blocks, self.far_at, scores, _filled(slots), m.kept.selection)

    def open_positions(self, first: int, n_past: int) -> NDArray[np.int64]:
        positions = np.arange(first, n_past)
        return positions[(positions < self.n_sink) | (positions >= self._memory.blocks.sealed_end)]

    def blocks_from(self, first: int) -> list[BlockRow]:
        bounds, disk = self._memory.blocks.bounds, self._memory.disk
        assert disk is not None
        return [(b, bounds[b], bounds[b + 1] - bounds[b], disk.io.offsets[b]) for b in range(first, self.n_blocks)]

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Rows of open tokens: uint8 [n, entry_bytes]."""
        m = self._memory
        rows = np.zeros((len(positions), self.entry_bytes), np.uint8)
        store = self._store_rows(positions)
        in_window = positions >= m.local.base
        local = positions[in_window] - m.local.base
        at = 0
        for k_store, v_store, k_local in zip(m.store.k, m.store.v, m.local.k, strict=True):
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
        in_window = positions >= m.local.base
        local = positions[in_window] - m.local.base
        at = 0
        for i in range(self.n_layer):
            k, v, rotated = np.split(rows[:, at : at + 2 * k_bytes + v_bytes], (k_bytes, k_bytes + v_bytes), axis=1)
            as_rows(m.store.k[i])[store], as_rows(m.store.v[i])[store] = k, v
            as_rows(m.local.k[i])[local], as_rows(m.local.v[i])[local] = rotated[in_window], v[in_window]
            at += 2 * k_bytes + v_bytes

    def _store_rows(self, positions: NDArray[np.integer]) -> NDArray[np.integer]:
        return np.where(positions < self.n_sink, positions, positions - self._memory.store.base)

    def restore(self, state: State, headers: Sequence[tuple[int, BlockHeader]], tokens: Sequence[int]) -> None:
        self._memory.restore(state, headers, tokens)

    def copy_blocks(self, file: BlockFile) -> list[BlockRow]:
        memory, config, m = self._memory, self._memory.config, self._memory.memory
        bounds, types = memory.blocks.bounds, (m.type_k, m.type_v)
        layout = RecordLayout(config, memory.shape, types, types, memory.index.n_packed)
        # It only writes: slots, and where units would lie, are never looked at.
        nowhere = [0] * config.n_layer
        writer = BlockStore(
            file, layout, n_slots=1, max_blocks=max(1, self.n_blocks), max_units=memory.blocks.n_units + 1,
            n_threads=0, first_row=0, k_rows=nowhere, v_rows=nowhere, places=nowhere, debug=False, memory=None,
        )  # fmt: skip
        try:
            for block in range(self.n_blocks):
                begin, end = bounds[block : block + 2]
                rows = [memory.store.rows(layer, block, begin, end) for layer in range(config.n_layer)]
                k_rows, v_rows = ([r[i].ctypes.data for r in rows] for i in (0, 1))
                ends = [unit_end - begin for unit_end in memory.blocks.unit_ends(begin, end)]
                writer.put(
                    begin, ends, rotated=not memory.rotation.far, k_rows=k_rows, v_rows=v_rows,
                    extra=memory.index.pack(block, begin, end),
                )  # fmt: skip
            writer.flush()
            return [(b, bounds[b], bounds[b + 1] - bounds[b], offset) for b, offset in enumerate(writer.offsets)]
        finally:
            writer.close()


def _filled(slots: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    """Slots [n_lanes, n_slots] of each layer -> the units in them, int32 [n_layer, n_lanes * n], with -1 after a lane's
    last; most slots may be empty.
    """
    units = [[lane[lane >= 0] for lane in layer] for layer in slots]
    filled = np.full((len(units), len(units[0]), max(len(lane) for layer in units for lane in layer)), -1, np.int32)
    for rows, layer in zip(filled, units, strict=True):
        for row, lane in zip(rows, layer, strict=True):
            row[: len(lane)] = lane
    return filled.reshape(len(units), -1)
