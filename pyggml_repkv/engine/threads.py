"""How many threads compute, unless somebody says."""

from __future__ import annotations

import os
from pathlib import Path

MAX_THREADS = 512


def default_threads() -> int:
    """Physical cores among the CPUs of this process: a second thread on one core slows matrix kernels."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return min(len({_core(cpu) for cpu in os.sched_getaffinity(0)}), MAX_THREADS)


def _core(cpu: int) -> str:
    """The CPUs that share the core of `cpu`, or `cpu` itself where the kernel does not say."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text("ascii")
    except OSError:
        return str(cpu)
