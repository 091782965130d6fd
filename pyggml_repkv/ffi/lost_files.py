"""What happens when a mapped file is truncated, or its drive goes, while it is in use: the kernel sends SIGBUS.

A program that owns its process can end in one line instead. A library may not take over signals, so nothing is watched
before `exit_on_lost_files`.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_prefix: str | None = None


def exit_on_lost_files(prefix: str) -> None:
    """Files mapped from now on end the process with exit code 1 and a line, `prefix` first, when they can no longer be
    read.
    """
    global _prefix
    _prefix = prefix


def watch(data: np.memmap, name: str) -> None:
    """Watches the mapped file `name` for as long as it is mapped, if the program asked for that."""
    if _prefix is None:
        return
    from pyggml_repkv.ffi.library import native, native_ffi

    what = "it was truncated, or its drive is gone; put the file back and run again"
    line = f"{_prefix}{name}: cannot be read any more: {what}\n"
    kept = native_ffi.new("char[]", line.encode(errors="replace"))
    slot = native.repkv_watch_map(native_ffi.cast("void *", data.ctypes.data), data.nbytes, kept)
    if slot >= 0:
        weakref.finalize(data.base, lambda _: native.repkv_unwatch_map(slot), kept).atexit = False
