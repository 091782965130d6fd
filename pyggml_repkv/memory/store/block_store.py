"""Blocks on disk and the slots of RAM that the attended ones lie in (native/block_store.h)."""

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
from pyggml_repkv.ffi.library import g, native, native_ffi
from pyggml_repkv.memory.cache_types import GGML_CACHE_TYPES
from pyggml_repkv.memory.store.block_file import BlockFile, BlockHeader, header_bytes
from pyggml_repkv.model.config import ModelConfig

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
    """kind: a layer has `selected` its blocks, compute did `wait` for them, a block was `read`, taken from a buffer
    before it was written (`staged`) or written (`write`); ahead: before the layer asked; times in ms, monotonic.
    """

    kind: str
    layer: int
    block: int
    ahead: bool
    begin_ms: float
    end_ms: float


class RecordLayout:
    """How a block of at most max_tokens tokens lies in arenas and on disk; types are names of CACHE_TYPES."""

    def __init__(
        self, config: ModelConfig, max_tokens: int, types: tuple[str, str], file_types: tuple[str, str], n_extra: int
    ) -> None:
        width = config.n_embd_kv
        self.n_layer, self.max_tokens, self.n_extra = config.n_layer, max_tokens, n_extra
        self.types, self.file_types = (tuple(int(GGML_CACHE_TYPES[n]) for n in names) for names in (types, file_types))
        self.row_bytes = tuple(int(g.ggml_row_size(GGML_CACHE_TYPES[name], width)) for name in types)
        self.file_row_bytes = tuple(int(g.ggml_row_size(t, width)) for t in self.file_types)
        self.header_bytes = header_bytes(config.n_layer, n_extra)
        self.native = native_ffi.new("struct repkv_record_layout *")
        n = self.native
        n.n_layer, n.max_tokens, n.header_bytes = config.n_layer, max_tokens, self.header_bytes
        n.n_head_kv, n.head_dim, n.rope_dim = config.n_head_kv, config.head_dim, config.rope_dim
        n.type_k, n.type_v = self.types
        n.file_type_k, n.file_type_v = self.file_types
        (n.k_row_bytes, n.v_row_bytes), (n.file_k_row_bytes, n.file_v_row_bytes) = self.row_bytes, self.file_row_bytes

    def check(self, header: BlockHeader) -> None:
        """Raises StoreError where a block is not laid out like this."""
        shape = header.types, header.row_bytes, len(header.checksums)
        if shape != (self.file_types, self.file_row_bytes, self.n_layer) or not 0 < header.n_tokens <= self.max_tokens:
            raise StoreError(f"block {header.block} is of another shape")

    def block_bytes(self, n_tokens: int) -> int:
        """On disk, with the header and all padding."""
        return int(native.repkv_block_bytes(self.native, n_tokens))

    @property
    def slot_bytes(self) -> int:
        """Of RAM, for one block in one layer."""
        return self.max_tokens * sum(self.row_bytes)


class BlockStore(Handle):
    """k_rows, v_rows: addresses of each layer's arenas, whose slots begin at row first_row; places: those of each
    layer's table of (row, n_tokens) by block; memory: what owns all these, kept until the threads of the store are
    gone, also where nobody closes it.
    """

    def __init__(
        self, file: BlockFile, layout: RecordLayout, *, n_slots: int, max_blocks: int, n_threads: int, first_row: int,
        k_rows: Sequence[int], v_rows: Sequence[int], places: Sequence[int], debug: bool,
        memory: object,
    ) -> None:  # fmt: skip
        config = native_ffi.new("struct repkv_store_config *")
        config.layout = layout.native[0]
        config.fd, config.n_slots, config.max_blocks, config.n_threads = file.fd, n_slots, max_blocks, n_threads
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
        self._held: list[tuple[int, int]] = []
        self.offsets: list[int] = []
        self.headers: list[BlockHeader] = []
        """Of each block, without the bytes that the memory put into it."""

    def put(
        self, first_position: int, n_tokens: int, *, rotated: bool, k_rows: Sequence[int], v_rows: Sequence[int],
        extra: bytes = b"",
    ) -> None:  # fmt: skip
        """Takes the next block from rows at these addresses, layer by layer; it is written in the background.

        Raises StoreError where an earlier one could not be written.
        """
        block, layout = len(self.offsets), self.layout
        sums = np.empty(layout.n_layer, np.uint64)
        addresses = [_addresses(rows) for rows in (k_rows, v_rows)]
        into = native_ffi.cast("uint64_t *", sums.ctypes.data)
        # A little while at a time, so that Ctrl-C is heard.
        while status := native.repkv_store_put(
            self.pointer, block, n_tokens, rotated, first_position, *addresses, into
        ):  # fmt: skip
            if status < 0:
                self.raise_error(of_writes=True)
        types, row_bytes = layout.file_types, layout.file_row_bytes
        header = BlockHeader(block, first_position, n_tokens, rotated, types, row_bytes, sums, extra)  # type: ignore[arg-type]
        offset = self.file.take(layout.block_bytes(n_tokens))
        native.repkv_store_commit(self.pointer, header.pack(layout.header_bytes), offset)
        self._note(header, offset)

    def add(self, header: BlockHeader, offset: int) -> None:
        """Tells of a block that is in the file already."""
        sums = native_ffi.cast("uint64_t *", header.checksums.ctypes.data)
        where = header.first_position, offset
        native.repkv_store_add(self.pointer, len(self.offsets), header.n_tokens, header.rotated, *where, sums)
        self.file.hold(offset, self.layout.block_bytes(header.n_tokens))
        self._note(header, offset)

    def _note(self, header: BlockHeader, offset: int) -> None:
        self.offsets.append(offset)
        self.headers.append(replace(header, extra=b""))
        n_bytes = self.layout.block_bytes(header.n_tokens)
        self.n_bytes += n_bytes
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

    def require(self, layer: int, blocks: Sequence[int]) -> None:
        """Makes blocks resident, as the hook does between two nodes. Raises StoreError."""
        selected = np.array([len(blocks), *blocks], np.int32)
        pointer = native_ffi.cast("int32_t *", selected.ctypes.data)
        if native.repkv_store_require(self.pointer, layer, pointer, 1, len(selected), native_ffi.NULL) < 0:
            self.raise_error()

    def prefetch(self, layer: int, blocks: Sequence[int]) -> None:
        """Starts to read blocks, the most wanted first."""
        wanted = np.array(blocks, np.int32)
        native.repkv_store_prefetch(self.pointer, layer, native_ffi.cast("int32_t *", wanted.ctypes.data), len(wanted))

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
        """The block in each slot, -1 for none."""
        blocks = np.empty(self.n_slots, np.int32)
        native.repkv_store_resident(self.pointer, layer, native_ffi.cast("int32_t *", blocks.ctypes.data))
        return blocks

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
                Event(_EVENTS[e.kind], e.layer, e.block, bool(e.ahead), e.begin_ms, e.end_ms) for e in buffer[0:n]
            ]

    def inject(self, **faults: int) -> None:
        """Faults for tests: fields of struct repkv_faults."""
        native.repkv_store_inject(self.pointer, native_ffi.new("struct repkv_faults *", faults))

    def raise_error(self, *, of_writes: bool = False) -> None:
        """Raises the read that failed the last requirement, or the write that failed, if any, as a StoreError."""
        self._raise(native.repkv_store_last_error(self.pointer, of_writes))

    def _raise(self, error: Any) -> None:
        """error: a struct repkv_store_error."""
        path, reason = self.file.path, _REASONS.get(error.kind) or os.strerror(error.error)
        if error.kind == native.REPKV_IO_WRITE:
            raise StoreError(f"{path}: block {error.block} could not be written: {reason}", lost=False)
        if error.kind != native.REPKV_IO_OK:
            raise StoreError(f"{path}: block {error.block} of layer {error.layer} could not be read: {reason}")


def _addresses(rows: Sequence[int]) -> Any:
    return native_ffi.new("char *[]", [native_ffi.cast("char *", address) for address in rows])
