"""Blocks on disk and the slots of RAM that the attended parts of them lie in (native/block_store.h)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import ComputeError, StoreError
from pyggml_repkv.ffi.handles import Handle
from pyggml_repkv.ffi.library import native, native_ffi
from pyggml_repkv.memory.store.block_file import BlockFile, BlockHeader
from pyggml_repkv.memory.store.layout import RecordLayout

# Blocks that may wait to be written; compute waits where there are more.
N_STAGING = 8

_REASONS = {
    native.REPKV_IO_SHORT: "the file ends before it does",
    native.REPKV_IO_CHECKSUM: "its checksum is wrong, the bytes are damaged",
}


_EVENTS = {
    native.REPKV_EVENT_SELECTED: "selected",
    native.REPKV_EVENT_WAIT: "wait",
    native.REPKV_EVENT_READ: "read",
    native.REPKV_EVENT_STAGED: "staged",
    native.REPKV_EVENT_WRITE: "write",
}


@dataclass(frozen=True, slots=True)
class Event:
    """kind: a layer has `selected` its units, compute did `wait` for them, n_units of a block's lane were `read`, taken
    from a buffer before they were written (`staged`) or, all of a block, written (`write`); ahead: before the layer
    asked; times in ms, monotonic.
    """

    kind: str
    layer: int
    block: int
    ahead: bool
    begin_ms: float
    end_ms: float
    lane: int = -1
    n_units: int = 0


class BlockStore(Handle):
    """n_slots: of each lane; k_rows, v_rows: addresses of each layer's arenas, whose slots begin at row first_row;
    places: those of each layer's table int32 [n_lanes, max_units, 3] of (row, n_tokens, first position) by unit;
    memory: what owns all these, kept until the threads of the store are gone, also where nobody closes it.
    """

    def __init__(
        self, file: BlockFile, layout: RecordLayout, *, n_slots: int, max_blocks: int, max_units: int, n_threads: int,
        first_row: int, k_rows: Sequence[int], v_rows: Sequence[int], places: Sequence[int], debug: bool,
        memory: object,
    ) -> None:  # fmt: skip
        config = native_ffi.new("struct repkv_store_config *")
        config.layout = layout.native[0]
        config.fd, config.n_slots, config.n_threads = file.fd, n_slots, n_threads
        config.max_blocks, config.max_units = max_blocks, max_units
        config.n_staging, config.first_row, config.debug = N_STAGING, first_row, debug
        tables = native_ffi.new("int32_t *[]", [native_ffi.cast("int32_t *", address) for address in places])
        pointer = native.repkv_store_open(config, _addresses(k_rows), _addresses(v_rows), tables)
        if pointer == native_ffi.NULL:
            raise ComputeError(f"not enough memory or threads for a store of {max_blocks} blocks")
        self._kept = [file, memory]
        super().__init__(pointer, native.repkv_store_close, keep=self._kept)
        self.file, self.layout, self.n_slots = file, layout, n_slots
        self.n_bytes = 0
        """Of its blocks on disk."""
        self.n_units = 0
        self._held: list[tuple[int, int]] = []
        self.offsets: list[int] = []
        self.headers: list[BlockHeader] = []
        """Of each block, without the bytes that the memory put into it."""

    def put(
        self, first_position: int, unit_ends: Sequence[int], *, rotated: bool, k_rows: Sequence[int],
        v_rows: Sequence[int], extra: bytes = b"",
    ) -> None:  # fmt: skip
        """Takes the next block from rows at these addresses, layer by layer; it is written in the background.

        unit_ends: counted in tokens from its first; the last one is how many it has. Raises StoreError where an earlier
        block could not be written.
        """
        block, layout = len(self.offsets), self.layout
        assert layout.takes(unit_ends)
        sums = np.empty((len(unit_ends), layout.n_layer, layout.n_lanes), np.uint64)
        shape, _keep = _block_shape(first_position, unit_ends, rotated=rotated)
        addresses = [_addresses(rows) for rows in (k_rows, v_rows)]
        into = native_ffi.cast("uint64_t *", sums.ctypes.data)
        # A little while at a time, so that Ctrl-C is heard.
        while status := native.repkv_store_put(self.pointer, block, shape, *addresses, into):
            if status < 0:
                self.raise_error(of_writes=True)
        types, row_bytes = layout.file_types, layout.file_row_bytes
        header = BlockHeader(block, first_position, tuple(unit_ends), rotated, types, row_bytes, sums, extra)  # type: ignore[arg-type]
        offset = self.file.take(layout.block_bytes(unit_ends))
        native.repkv_store_commit(self.pointer, header.pack(layout.header_bytes), offset)
        self._note(header, offset)

    def add(self, header: BlockHeader, offset: int) -> None:
        """Tells of a block that is in the file already, and that the layout takes (`RecordLayout.check`)."""
        sums = native_ffi.cast("uint64_t *", header.checksums.ctypes.data)
        shape, _keep = _block_shape(header.first_position, header.unit_ends, rotated=header.rotated)
        native.repkv_store_add(self.pointer, len(self.offsets), shape, offset, sums)
        self.file.hold(offset, self.layout.block_bytes(header.unit_ends))
        self._note(header, offset)

    def _note(self, header: BlockHeader, offset: int) -> None:
        self.offsets.append(offset)
        self.headers.append(replace(header, extra=b""))
        n_bytes = self.layout.block_bytes(header.unit_ends)
        self.n_bytes += n_bytes
        self.n_units += len(header.unit_ends)
        self._held.append((offset, n_bytes))

    def close(self) -> None:
        super().close()
        self._kept.clear()
        held, self._held = self._held, []
        for offset, n_bytes in held:
            self.file.let_go(offset, n_bytes)

    def flush(self) -> None:
        """Waits until every block is written. Raises StoreError where one could not be."""
        while status := native.repkv_store_flush(self.pointer):
            if status < 0:
                self.raise_error(of_writes=True)

    def require(self, layer: int, *rows: Sequence[int]) -> None:
        """Makes units resident, as the hook does between two nodes; row r is of lane r % n_lanes. Raises StoreError."""
        selected = _selection(rows)
        pointer = native_ffi.cast("int32_t *", selected.ctypes.data)
        if native.repkv_store_require(self.pointer, layer, pointer, *selected.shape, native_ffi.NULL) < 0:
            self.raise_error()

    def prefetch(self, layer: int, *rows: Sequence[int]) -> None:
        """Starts to read units, the most wanted first; row r is of lane r % n_lanes."""
        selected = _selection(rows)
        pointer = native_ffi.cast("int32_t *", selected.ctypes.data)
        native.repkv_store_prefetch(self.pointer, layer, pointer, *selected.shape)

    def read(self, layer: int, block: int, n_tokens: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """A block's key and value rows in a layer, as in the arenas: uint8 [n_tokens, row bytes]. Raises StoreError."""
        k, v = (np.empty((self.layout.max_tokens, n), np.uint8) for n in self.layout.row_bytes)
        pointers = (native_ffi.cast("char *", rows.ctypes.data) for rows in (k, v))
        error = native_ffi.new("struct repkv_store_error *")
        if native.repkv_store_read(self.pointer, layer, block, *pointers, error) < 0:
            self._raise(error)
        return k[:n_tokens], v[:n_tokens]

    def unrotate(self, table: NDArray[np.float32]) -> None:
        """From now on rotated keys are turned back by table [n_positions, rope_dim] as they come from disk."""
        self._kept.append(table)
        native.repkv_store_unrotate(self.pointer, native_ffi.cast("float *", table.ctypes.data))

    def resident(self, layer: int) -> NDArray[np.int32]:
        """The unit in each slot, int32 [n_lanes, n_slots], -1 for none."""
        units = np.empty((self.layout.n_lanes, self.n_slots), np.int32)
        native.repkv_store_resident(self.pointer, layer, native_ffi.cast("int32_t *", units.ctypes.data))
        return units

    @property
    def stats(self) -> Any:
        """struct repkv_store_stats."""
        stats = native_ffi.new("struct repkv_store_stats *")
        native.repkv_store_get_stats(self.pointer, stats)
        return stats[0]

    @contextmanager
    def trace(self, n_max: int = 2**16) -> Iterator[list[Event]]:
        """Yields a list that holds at the end what happened meanwhile, at most n_max events, in order of their ends."""
        events: list[Event] = []
        buffer = native_ffi.new("struct repkv_event[]", n_max)
        native.repkv_store_trace(self.pointer, buffer, n_max)
        try:
            yield events
        finally:
            n = native.repkv_store_trace(self.pointer, native_ffi.NULL, 0)
            events += [
                Event(_EVENTS[e.kind], e.layer, e.block, bool(e.ahead), e.begin_ms, e.end_ms, e.lane, e.n_units)
                for e in buffer[0:n]
            ]

    def inject(self, **faults: int) -> None:
        """Faults for tests: fields of struct repkv_faults."""
        native.repkv_store_inject(self.pointer, native_ffi.new("struct repkv_faults *", faults))

    def raise_error(self, *, of_writes: bool = False) -> None:
        """Raises the read that failed the last requirement, or the write that failed, if any, as a StoreError; as a
        ComputeError where there are too few slots.
        """
        self._raise(native.repkv_store_last_error(self.pointer, of_writes))

    def _raise(self, error: Any) -> None:
        """error: a struct repkv_store_error."""
        path, reason = self.file.path, _REASONS.get(error.kind) or os.strerror(error.error)
        if error.kind == native.REPKV_IO_WRITE:
            raise StoreError(f"{path}: block {error.block} could not be written: {reason}", lost=False)
        if error.kind == native.REPKV_IO_SLOTS:
            raise ComputeError(f"layer {error.layer} attends more at once than its {self.n_slots} slots hold")
        if error.kind != native.REPKV_IO_OK:
            raise StoreError(f"{path}: block {error.block} of layer {error.layer} could not be read: {reason}")


def _block_shape(first_position: int, unit_ends: Sequence[int], *, rotated: bool) -> tuple[Any, Any]:
    """struct repkv_block_shape, and what it points to."""
    ends = native_ffi.new("int32_t[]", list(unit_ends))
    shape = native_ffi.new("struct repkv_block_shape *")
    shape.first_position, shape.rotated = first_position, rotated
    shape.unit_ends, shape.n_units = ends, len(unit_ends)
    return shape, ends


def _selection(rows: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """Int32 [n_rows, 1 + n], as `block_topk` makes it: how many units, and which."""
    selected = np.zeros((len(rows), 1 + max(map(len, rows))), np.int32)
    for row, units in zip(selected, rows, strict=True):
        row[: 1 + len(units)] = len(units), *units
    return selected


def _addresses(rows: Sequence[int]) -> Any:
    return native_ffi.new("char *[]", [native_ffi.cast("char *", address) for address in rows])
