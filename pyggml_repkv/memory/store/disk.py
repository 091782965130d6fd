"""A store whose blocks are on disk: the arenas hold sinks, open tokens, and slots for the units that are attended.

Rows are [sinks | open tokens | slots]. Open tokens are those that no block holds: the remainder, the window and the
step's own. Each lane, the columns of the key heads that select together, has slots of its own in the same rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import InputError
from pyggml_repkv.ffi.context import Tensor
from pyggml_repkv.ffi.handles import Backend
from pyggml_repkv.ffi.library import g
from pyggml_repkv.memory.bounded.rotation import Rotation
from pyggml_repkv.memory.cache_types import GGML_CACHE_TYPES
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.cut.blocks import Blocks
from pyggml_repkv.memory.cut.boundaries import LOOKAHEAD
from pyggml_repkv.memory.hook import StepHook
from pyggml_repkv.memory.policy import DiskNeed
from pyggml_repkv.memory.store.arenas import Arenas, Rows, as_array, as_rows
from pyggml_repkv.memory.store.block_file import BlockFile
from pyggml_repkv.memory.store.block_store import N_STAGING, BlockStore
from pyggml_repkv.memory.store.layout import BlockShape, RecordLayout
from pyggml_repkv.memory.store.ram import floats
from pyggml_repkv.model.config import ModelConfig

# Threads that read blocks: so many reads are under way at once.
N_IO_THREADS = 8


def block_folder(memory: MemoryConfig) -> Path:
    """Where a file of blocks goes that nobody keeps."""
    return Path(memory.kv_dir) if memory.kv_dir else default_folder()


def default_folder() -> Path:
    """Where blocks go if nobody says: beside the cached models, since temporary folders may lie in RAM."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "pyggml_repkv" / "kv"


class DiskStore:
    """Owns its share of the file, and the native store `io`.

    n_selected: most units that a lane attends at once; n_extra: bytes that a block's header carries besides; kept:
    kept-l of each layer, if the next token attends what this one selected.
    """

    def __init__(
        self, arenas: Arenas, config: ModelConfig, memory: MemoryConfig, file: BlockFile, blocks: Blocks, *,
        shape: BlockShape, max_blocks: int, n_selected: int, n_extra: int, kept: Sequence[Tensor],
    ) -> None:  # fmt: skip
        self._arenas, self._config, self._memory, self._blocks = arenas, config, memory, blocks
        self.file, self._kept = file, kept
        types = memory.type_k, memory.type_v
        evicted = (memory.type_evicted, memory.type_evicted) if memory.type_evicted else types
        self.layout = RecordLayout(config, shape, types, evicted, n_extra)
        max_units = max_blocks * shape.max_units
        self.n_slots = self._count_slots(n_selected, max_units)
        self.reads_ahead = memory.late and memory.prefetch == "on"
        # What a step finds open: the window, what fills no block yet, and the step; twice the latter, so that the rows
        # move less often.
        self.n_open = memory.n_local + shape.max_tokens + LOOKAHEAD + 3 * memory.n_batch
        n_sink = memory.n_sink
        self.base = 0
        """First open position less the row it lies in."""
        self.sealed_end = n_sink
        self._inverse: NDArray[np.float32] | None = None
        arena_shape = n_sink + self.n_open + self.n_slots * shape.max_unit, config.n_embd_kv

        def rows(n_past: int) -> Rows:
            # Slots are empty in a fork.
            return Rows(0, min(n_sink + self.n_open, n_past - self.base))

        def arena(type_name: str, name: str) -> Tensor:
            return arenas.new(GGML_CACHE_TYPES[type_name], arena_shape, name, rows=rows)

        layers = range(config.n_layer)
        self.k = [arena(memory.type_k, f"k_store-{i}") for i in layers]
        self.v = [arena(memory.type_v, f"v_store-{i}") for i in layers]
        # A fork begins with empty slots, so no place is taken over.
        tables = shape.n_lanes, max_units, 3
        self._places = [
            arenas.new(g.GGML_TYPE_I32, tables, f"unit_places-{i}", rows=lambda _: Rows(0, 0)) for i in layers
        ]
        self._addresses = [[int(t.contents.data) for t in tensors] for tensors in (self.k, self.v)]
        self.io = BlockStore(
            file, self.layout, n_slots=self.n_slots, max_blocks=max_blocks, max_units=max_units, n_threads=N_IO_THREADS,
            first_row=n_sink + self.n_open, k_rows=self._addresses[0], v_rows=self._addresses[1],
            places=[as_array(t, np.uint8).ctypes.data for t in self._places], debug=memory.kv_debug,
            memory=arenas.memory,
        )  # fmt: skip

    def _count_slots(self, n_selected: int, max_units: int) -> int:
        slot_bytes = self._config.n_layer * self.layout.slot_bytes
        n_slots = self._memory.kv_ram // slot_bytes if self._memory.kv_ram else max_units
        n_least, max_unit = min(n_selected, max_units), self.layout.max_unit
        if n_slots < n_least:
            raise InputError(
                f"--kv-ram has room for {n_slots * max_unit} tokens, and up to {n_least * max_unit} are attended at "
                f"once: give at least {-(-n_least * slot_bytes // 2**20)}M, or attend fewer (--n-dense 0, "
                "--budget, --chunk-budget, --group 0)"
            )
        # Rows of an arena are 32-bit numbers; half of them is far more than open tokens leave.
        return min(n_slots, max_units, 2**30 // self.layout.max_unit)

    def places(self, layer: int) -> Tensor:
        return self._places[layer]

    def new_hook(self, backend: Backend) -> StepHook:
        return StepHook(self.io, self._kept, backend, reads_ahead=self.reads_ahead)

    def seal(
        self, block: int, begin: int, end: int, unit_ends: Sequence[int], *, rotated: bool, extra: bytes
    ) -> None:  # fmt: skip
        """Evicts the open tokens [begin, end), in units that end at these positions. Raises StoreError, InputError past
        --kv-disk-max.
        """
        ends = [position - begin for position in unit_ends]
        n_bytes = self.file.n_bytes + self.layout.block_bytes(ends)
        if self._memory.kv_disk_max and n_bytes > self._memory.kv_disk_max:
            raise InputError(
                f"{n_bytes} bytes of evicted blocks are more than --kv-disk-max {self._memory.kv_disk_max}"
            )
        row = begin - self.base
        k_rows, v_rows = (
            [address + row * n for address in addresses]
            for addresses, n in zip(self._addresses, self.layout.row_bytes, strict=True)
        )
        first = self.io.n_units
        self.io.put(begin, ends, rotated=rotated, k_rows=k_rows, v_rows=v_rows, extra=extra)
        self.sealed_end = end
        # What has just left the window is likely to be wanted soon, and need not be read for it.
        new = [range(first, self.io.n_units)] * self.layout.n_lanes
        for layer in range(self._config.n_layer):
            self.io.prefetch(layer, *new)

    def make_room(self, n_past: int, n_tokens: int) -> None:
        """Moves the open tokens to the start of their rows where the next ones would not fit."""
        n_sink = self._memory.n_sink
        if n_past + n_tokens - self.base <= n_sink + self.n_open:
            return
        first, n_kept = self.sealed_end - self.base, n_past - self.sealed_end
        for tensor in (*self.k, *self.v):
            rows = as_rows(tensor)
            rows[n_sink : n_sink + n_kept] = rows[first : first + n_kept].copy()
        self.resume(self.sealed_end)

    def resume(self, sealed_end: int) -> None:
        """Goes on with a row for each token from sealed_end on."""
        self.sealed_end = sealed_end
        self.base = sealed_end - self._memory.n_sink

    def keys(self, layer: int, positions: NDArray[np.integer]) -> NDArray[np.float32]:
        if self._arenas.closed:
            raise InputError("the session is closed")
        rows = np.empty((len(positions), self.layout.row_bytes[0]), np.uint8)
        n_sink, bounds = self._memory.n_sink, self._blocks.bounds
        evicted = (positions >= n_sink) & (positions < self.sealed_end)
        here = positions[~evicted]
        rows[~evicted] = as_rows(self.k[layer])[np.where(here < n_sink, here, here - self.base)]
        block_of = np.searchsorted(bounds, positions, side="right") - 1
        for block in np.unique(block_of[evicted]).tolist():
            begin, end = bounds[block : block + 2]
            mine = evicted & (block_of == block)
            rows[mine] = self.io.read(layer, block, end - begin)[0][positions[mine] - begin]
        return floats(rows, self._config, self._memory)

    def rows(self, layer: int, block: int, begin: int, end: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Key and value rows of a block, the tokens [begin, end): uint8 [n, row bytes]. Raises StoreError."""
        return self.io.read(layer, block, end - begin)

    def turn_back(self, rotation: Rotation, n_past: int) -> None:
        # What is on disk is turned back whenever it is read.
        self.turn_back_blocks(rotation.inverse(0, n_past))
        rotation.turn_back(self.k, 0, min(self._memory.n_sink, n_past), 0)
        rotation.turn_back(self.k, self.sealed_end, n_past, self.base)

    def turn_back_blocks(self, inverse: NDArray[np.float32]) -> None:
        """Keys that were stored rotated are turned back as they are read; inverse: tables [n_positions, rope_dim]."""
        self._inverse = np.ascontiguousarray(inverse, np.float32)
        self.io.unrotate(self._inverse)

    def share_file(self) -> BlockFile:
        # A fork reads the file, so nothing may wait to be written.
        self.io.flush()
        return self.file.share(block_folder(self._memory))

    def new_file(self) -> BlockFile:
        return BlockFile(block_folder(self._memory), None)

    def copy_from(self, other: DiskStore) -> None:
        for header, offset in zip(other.io.headers, other.io.offsets, strict=True):
            self.io.add(header, offset)
        self.base, self.sealed_end = other.base, other.sealed_end
        if other._inverse is not None:
            self.turn_back_blocks(other._inverse)

    def ram_bytes_at(self, n_units: int) -> dict[str, int]:
        """What slots and buffers take once there are n_units."""
        slots = self._config.n_layer * self.layout.slot_bytes * min(n_units, self.n_slots)
        # What waits to be written, and where records are read to.
        buffers = N_STAGING * self.layout.even_block_bytes(self.layout.max_tokens) if n_units else 0
        return {"blocks": slots, "buffers": buffers}

    def need(self, n_tokens: int) -> DiskNeed:
        """What n_tokens evicted tokens need of the disk."""
        n_blocks, rest = divmod(max(0, n_tokens), self.layout.max_tokens)
        needed = n_blocks * self.layout.even_block_bytes(self.layout.max_tokens)
        needed += self.layout.even_block_bytes(rest) if rest else 0
        return DiskNeed(
            needed - self.io.n_bytes, self.file.free_bytes(), needed, self._memory.kv_disk_max, str(self.file.folder)
        )

    def stats(self) -> dict[str, object]:
        """What `kv` of `run --json` says of disk and prefetch."""
        s = self.io.stats
        return {
            "slots": self.n_slots,
            "disk_bytes": self.io.n_bytes,
            "disk_written_bytes": int(s.written_bytes),
            "disk_read_bytes": int(s.read_bytes),
            "direct_io": self.file.direct,
            "prefetch": {
                "required": int(s.required),
                "hits": int(s.hits),
                "issued": int(s.issued),
                "used": int(s.used),
                "late": int(s.late),
                "missed": int(s.missed),
                "reads": int(s.reads),
                "wait_ms": round(float(s.wait_ms), 3),
                "read_ms": round(float(s.read_ms), 3),
                "write_wait_ms": round(float(s.write_wait_ms), 3),
            },
        }

    def close(self) -> None:
        self.io.close()
        self.file.close()
