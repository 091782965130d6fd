"""How much memory a run will need, and how much there is."""

from __future__ import annotations

import os

from pyggml_repkv.engine import cgroups
from pyggml_repkv.errors import ComputeError, InputError
from pyggml_repkv.memory.policy import DiskNeed


def available_bytes() -> int:
    """What this process could still take: of the machine, or of the control groups it runs in, whichever is least."""
    return _available()[0]


def describe_available() -> str:
    """For people: how much that is, and of what where a control group is what binds."""
    free, allowed = _available()
    return f"{size(free)} free" + (f" of the {size(allowed)} that the control group allows" if allowed else "")


def _available() -> tuple[int, int]:
    """(bytes free, what the control group allows that binds or 0)."""
    return min([(_of_machine(), 0), *cgroups.memory_limits()])


def _of_machine() -> int:
    for line in cgroups.read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check(parts: dict[str, int], n_tokens: int) -> None:
    """Raises ComputeError where the parts (bytes by name, none of them resident yet) are more than there is."""
    needed, available = sum(parts.values()), available_bytes()
    if needed > available:
        raise ComputeError(
            f"{n_tokens} tokens need {size(needed)} of memory ({describe(parts)}) and {size(available)} are free: "
            "give fewer tokens, -ctk q8_0 -ctv q8_0, or --kv window"
        )


def check_disk(need: DiskNeed, n_tokens: int) -> None:
    """Raises InputError where n_tokens need more disk than there is, or than --kv-disk-max allows."""
    if need.limit and need.total > need.limit:
        raise InputError(
            f"{n_tokens} tokens need {size(need.total)} on disk and --kv-disk-max is {size(need.limit)}: raise it, "
            "give fewer tokens, or --cache-type-evicted q8_0"
        )
    if need.more > need.free:
        raise InputError(
            f"{n_tokens} tokens need {size(need.more)} on disk and {need.folder} has {size(need.free)} free: use a "
            "directory on a larger disk, give fewer tokens, or --cache-type-evicted q8_0"
        )


def describe(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {size(n_bytes)}" for name, n_bytes in parts.items() if n_bytes)


def size(n_bytes: float) -> str:
    """For people: 512 kB, 93 MB, 1.4 GB."""
    if n_bytes < 1e6:
        return f"{n_bytes / 1e3:.0f} kB"
    return f"{n_bytes / 1e6:.0f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:.1f} GB"
