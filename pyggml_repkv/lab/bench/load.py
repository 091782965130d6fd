"""Whether the machine does something else meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

# Worker threads that ggml or OpenMP left spinning are asleep after this.
REST_S = 0.1
MAX_BUSY_CORES = 0.2


def busy_cores(seconds: float = 0.5) -> float:
    """How many of the cores that this process may use are busy while it sleeps; the engines must rest too."""
    time.sleep(REST_S)
    start, before = time.perf_counter(), busy_ticks()
    time.sleep(seconds)
    ticks = busy_ticks() - before
    return ticks / os.sysconf("SC_CLK_TCK") / (time.perf_counter() - start)


def busy_ticks() -> int:
    """Of these cores since the machine started."""
    cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    total = 0
    for line in Path("/proc/stat").read_text("ascii").splitlines():
        name, *fields = line.split()
        if name in cores:
            # user, nice, system, (idle, iowait,) irq, softirq, steal; the rest is counted in user already
            ticks = list(map(int, fields[:8]))
            total += sum(ticks[:3]) + sum(ticks[5:])
    return total


def load_warning(busy: Sequence[float]) -> str | None:
    """busy: samples of `busy_cores`."""
    if max(busy, default=0.0) <= MAX_BUSY_CORES:
        return None
    return f"other programs kept up to {max(busy):.1f} of the cores busy: measure again on an idle machine"


def cpu_name() -> str:
    """As the kernel calls it; "" where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
