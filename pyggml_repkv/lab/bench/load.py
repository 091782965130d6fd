"""How busy the machine is with other programs."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

# After this time, worker threads that ggml or OpenMP left spinning are asleep.
REST_S = 0.1
MAX_BUSY_CORES = 0.2


def busy_cores(seconds: float = 0.5) -> float:
    """Returns how many of this process's cores are busy while it sleeps. The engines must be idle too."""
    time.sleep(REST_S)
    start, before = time.perf_counter(), busy_ticks()
    time.sleep(seconds)
    ticks = busy_ticks() - before
    return ticks / os.sysconf("SC_CLK_TCK") / (time.perf_counter() - start)


def busy_ticks() -> int:
    """Returns the busy clock ticks of this process's cores since the machine started."""
    cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    total = 0
    for line in Path("/proc/stat").read_text("ascii").splitlines():
        name, *fields = line.split()
        if name in cores:
            # user, nice, system, (idle, iowait,) irq, softirq, steal; `user` already includes the rest
            ticks = list(map(int, fields[:8]))
            total += sum(ticks[:3]) + sum(ticks[5:])
    return total


def load_warning(busy: Sequence[float]) -> str | None:
    """Returns a warning if other programs kept cores busy, else None. busy: samples of `busy_cores`."""
    if max(busy, default=0.0) <= MAX_BUSY_CORES:
        return None
    return f"other programs kept up to {max(busy):.1f} of the cores busy: measure again on an idle machine"


def cpu_name() -> str:
    """Returns the kernel's name of the CPU, or ""."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
