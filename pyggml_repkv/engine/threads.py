"""The default number of compute threads."""

from __future__ import annotations

import os
from pathlib import Path

from pyggml_repkv.engine import cgroups

MAX_THREADS = 512


def default_threads() -> int:
    """The physical cores among this process's CPUs, at most as many as a control group's quota has whole processors.

    A second thread on one core slows matrix kernels; threads beyond a quota make all of them wait.
    """
    quota = cgroups.cpu_quota()
    return max(1, min(_n_cores(), MAX_THREADS, MAX_THREADS if quota is None else int(quota)))


def _n_cores() -> int:
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return len({_core(cpu) for cpu in os.sched_getaffinity(0)})


def _core(cpu: int) -> str:
    """The CPUs that share the core of `cpu`, or `cpu` itself where the kernel does not say."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text("ascii")
    except OSError:
        return str(cpu)
