"""How much memory a run will need, and how much there is."""

from __future__ import annotations

import os
from pathlib import Path

from pyggml_repkv.errors import ComputeError

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)


def available_bytes() -> int:
    """What this process could still take: of the machine, or of the control group it runs in, whichever is less."""
    return min([_of_machine(), *filter(None, (_of_cgroup(*names) for names in _CGROUPS))])


def _of_machine() -> int:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_cgroup(limit: str, usage: str, stat: str, reclaimable: str) -> int | None:
    most, used = _read(limit).strip(), _read(usage).strip()
    if not most.isdigit() or not used.isdigit():
        return None
    # Cached file pages count as used until the kernel wants them back.
    cached = [int(line.split()[1]) for line in _read(stat).splitlines() if line.startswith(f"{reclaimable} ")]
    return max(0, int(most) - int(used) + sum(cached))


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""


def check(parts: dict[str, int], n_tokens: int) -> None:
    """Raises ComputeError where the parts (bytes by name) are more than there is."""
    needed, available = sum(parts.values()), available_bytes()
    if needed > available:
        raise ComputeError(
            f"{n_tokens} tokens need {size(needed)} of memory ({describe(parts)}) and {size(available)} are free: "
            "give fewer tokens, -ctk q8_0 -ctv q8_0, or --kv window"
        )


def describe(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {size(n_bytes)}" for name, n_bytes in parts.items() if n_bytes)


def size(n_bytes: float) -> str:
    """For people: 512 kB, 93 MB, 1.4 GB."""
    if n_bytes < 1e6:
        return f"{n_bytes / 1e3:.0f} kB"
    return f"{n_bytes / 1e6:.0f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:.1f} GB"
