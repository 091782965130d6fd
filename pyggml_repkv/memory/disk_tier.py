"""What RepKV adds where evicted blocks live on disk: slots in RAM, and the hook that fills them around compute.

The store arena of a layer is then [sinks | open tokens | slots] instead of one row for every position. Open tokens are
those that no block on disk holds: the remainder, the window and the step's own.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import ComputeError, InputError
from pyggml_repkv.ffi.context import Tensor
from pyggml_repkv.ffi.library import g, native, native_ffi
from pyggml_repkv.memory.arenas import Arenas, as_array
from pyggml_repkv.memory.block_file import BlockFile
from pyggml_repkv.memory.block_store import N_STAGING, BlockStore, RecordLayout
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.model.config import ModelConfig

_CHANGED = "a slot was given to another block while it was attended"


def default_folder() -> Path:
    """Where blocks go if nobody says: beside the cached models, since temporary folders may lie in RAM."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "pyggml_repkv" / "kv"


@dataclass(frozen=True, slots=True)
class HookPoint:
    """A node of a graph at which the hook runs; late: whether what it keeps is attended by the next token; n_known: how
    many layers from this one on attend what the last token kept, so that they are asked for together (0: only this one,
    and what the node selects).
    """

    node: Tensor
    layer: int
    late: bool = False
    n_known: int = 0


class StepHook:
    """The hook of one plan: an eval callback for ggml's scheduler (native/hooks.h)."""

    def __init__(self, tier: DiskTier) -> None:
        self._tier = tier
        self._hooks = native_ffi.new("struct repkv_hooks *")
        self._points: Any = None
        self.callback = int(native_ffi.cast("uintptr_t", native.repkv_eval_hook_address()))
        self.userdata = int(native_ffi.cast("uintptr_t", self._hooks))

    @property
    def observes(self) -> bool:
        return self._points is not None

    def observe(self, points: Sequence[HookPoint], kept: Sequence[Tensor]) -> None:
        """Sets where it runs, in the order of the graph; kept: kept-l of each layer, if any point needs them."""
        self._points = native_ffi.new("struct repkv_hook_point[]", len(points))
        for c_point, point in zip(self._points, points, strict=True):
            c_point.node = native_ffi.cast("void *", _address(point.node))
            c_point.layer, c_point.late, c_point.n_known = point.layer, point.late, point.n_known
        hooks, tier = self._hooks, self._tier
        hooks.store, hooks.points, hooks.n_points = tier.store.pointer, self._points, len(points)
        self._kept = native_ffi.new("void *[]", [native_ffi.cast("void *", _address(t)) for t in kept])
        hooks.kept = self._kept

    def begin(self) -> None:
        """Before each compute of the plan."""
        native.repkv_hooks_begin(self._hooks)

    def check(self) -> None:
        """After each compute that was stopped: raises what the hook met, if that was it."""
        if self._hooks.status == native.REPKV_HOOK_CHANGED:
            raise ComputeError(_CHANGED)
        if self._hooks.status == -1:
            self._tier.store.raise_error()

    def check_complete(self) -> None:
        """After each whole compute: raises ComputeError if it did not run everywhere, in order."""
        if self._hooks.next != self._hooks.n_points:
            raise ComputeError(f"hooks ran at {self._hooks.next} of {self._hooks.n_points} nodes")
        if native.repkv_hooks_end(self._hooks) != 0:
            raise ComputeError(_CHANGED)


class DiskTier:
    """Owns file and store. n_selected: most blocks that a layer attends at once; n_open: rows for open tokens."""

    def __init__(
        self, config: ModelConfig, memory: MemoryConfig, file: BlockFile, *, max_block: int, max_blocks: int,
        n_selected: int, n_open: int, n_extra: int, n_threads: int,
    ) -> None:  # fmt: skip
        types = memory.type_k, memory.type_v
        evicted = (memory.type_evicted, memory.type_evicted) if memory.type_evicted else types
        self.layout = RecordLayout(config, max_block, types, evicted, n_extra)
        self.n_layer, self.n_sink, self.n_open = config.n_layer, memory.n_sink, n_open
        self.file, self._memory, self._max_blocks, self._n_threads = file, memory, max_blocks, n_threads
        slot_bytes = config.n_layer * self.layout.slot_bytes
        n_slots = memory.kv_ram // slot_bytes if memory.kv_ram else max_blocks
        self.n_slots = min(n_slots, max_blocks)
        if self.n_slots < min(n_selected, max_blocks):
            least = -(-n_selected * slot_bytes // 2**20)
            raise InputError(
                f"--kv-ram has room for {self.n_slots} blocks, and up to {n_selected} are attended at once: give at "
                f"least {least}M, or attend fewer (--n-dense 0, --top-blocks, --chunk-blocks)"
            )
        self.prefetches = memory.late and memory.prefetch == "on"
        self.n_rows = memory.n_sink + n_open + self.n_slots * max_block
        # First open position less the row it lies in.
        self.base = 0
        self.sealed_end = memory.n_sink
        self.places: list[Tensor] = []
        self._table: NDArray[np.float32] | None = None
        self.store: BlockStore

    def open(self, arenas: Arenas, k_store: Sequence[Tensor], v_store: Sequence[Tensor]) -> None:
        """Starts the store over these arenas of n_rows rows."""
        layers = range(self.n_layer)
        self.places = [arenas.new(g.GGML_TYPE_I32, (self._max_blocks, 2), f"block_places-{i}") for i in layers]
        self._k, self._v = ([int(t.contents.data) for t in tensors] for tensors in (k_store, v_store))
        self.store = BlockStore(
            self.file, self.layout, n_slots=self.n_slots, max_blocks=self._max_blocks, n_threads=self._n_threads,
            first_row=self.n_sink + self.n_open, k_rows=self._k, v_rows=self._v,
            places=[as_array(t, np.uint8).ctypes.data for t in self.places], debug=self._memory.kv_debug, memory=arenas,
        )  # fmt: skip

    def seal(self, begin: int, end: int, *, rotated: bool, extra: bytes) -> None:
        """Evicts the next block, the open tokens [begin, end). Raises StoreError, InputError past --kv-disk-max."""
        n_bytes = self.store.end + self.layout.block_bytes(end - begin)
        if self._memory.kv_disk_max and n_bytes > self._memory.kv_disk_max:
            raise InputError(
                f"{n_bytes} bytes of evicted blocks are more than --kv-disk-max {self._memory.kv_disk_max}"
            )
        row, (k_bytes, v_bytes) = begin - self.base, self.layout.row_bytes
        k_rows, v_rows = [a + row * k_bytes for a in self._k], [a + row * v_bytes for a in self._v]
        block = len(self.store.offsets)
        self.store.put(begin, end - begin, rotated=rotated, k_rows=k_rows, v_rows=v_rows, extra=extra)
        self.sealed_end = end
        # What has just left the window is likely to be wanted soon, and need not be read for it.
        for layer in range(self.n_layer):
            self.store.prefetch(layer, [block])

    def unrotate(self, table: NDArray[np.float32]) -> None:
        """Keys that were stored rotated are turned back from now on; table [n_positions, rope_dim]."""
        self._table = np.ascontiguousarray(table, np.float32)
        self.store.unrotate(self._table)

    def make_room(self, arenas: Sequence[NDArray[np.uint8]], n_past: int, n_tokens: int) -> None:
        """Moves the open tokens to the start of their rows where the next ones would not fit."""
        if n_past + n_tokens - self.base <= self.n_sink + self.n_open:
            return
        first = self.sealed_end - self.base
        n_kept = n_past - self.sealed_end
        for rows in arenas:
            rows[self.n_sink : self.n_sink + n_kept] = rows[first : first + n_kept].copy()
        self.base = self.sealed_end - self.n_sink

    def resume(self, sealed_end: int) -> None:
        """Goes on with an empty row for each token from sealed_end on."""
        self.sealed_end = sealed_end
        self.base = sealed_end - self.n_sink

    def ram_bytes_at(self, n_blocks: int) -> int:
        """What the slots take once there are n_blocks."""
        return self.n_layer * self.layout.slot_bytes * min(n_blocks, self.n_slots)

    @property
    def buffer_bytes(self) -> int:
        """What waits to be written, and where records are read to."""
        return N_STAGING * self.layout.block_bytes(self.layout.max_tokens)

    def disk_bytes_at(self, n_tokens: int) -> int:
        n_blocks, rest = divmod(n_tokens, self.layout.max_tokens)
        return n_blocks * self.layout.block_bytes(self.layout.max_tokens) + bool(rest) * self.layout.block_bytes(rest)

    def stats(self) -> dict[str, object]:
        """What `kv` of `run --json` says of disk and prefetch."""
        s = self.store.stats
        return {
            "slots": self.n_slots,
            "disk_bytes": self.store.end,
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
        """Before the arenas."""
        self.store.close()
        self.file.close()


def _address(tensor: Tensor) -> int:
    return ctypes.cast(tensor, ctypes.c_void_p).value or 0
