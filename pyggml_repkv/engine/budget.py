"""How much memory a run will need, and how much there is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from pyggml_repkv.errors import ComputeError, InputError
from pyggml_repkv.memory.policy import DiskNeed

_V2_ROOT, _V1_ROOT = "/sys/fs/cgroup", "/sys/fs/cgroup/memory"


def available_bytes() -> int:
    """What this process could still take: of the machine, or of the control groups it runs in, whichever is least."""
    limits = [_of_cgroup(folder, *names) for folder, *names in _cgroups()]
    return min([_of_machine(), *(limit for limit in limits if limit is not None)])


def _of_machine() -> int:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroups() -> Iterator[tuple[str, str, str]]:
    """(folder, file of the limit, file of the use) of every group around this process."""
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = _V2_ROOT, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = _V1_ROOT, ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # In a container the path may be the host's, which is not there: the root is the container's own group then.
        for folder in (PurePosixPath(path), *PurePosixPath(path).parents):
            yield (f"{root}{folder}".rstrip("/"), *names)


def _of_cgroup(folder: str, limit: str, usage: str) -> int | None:
    most, used = _read(f"{folder}/{limit}").strip(), _read(f"{folder}/{usage}").strip()
    if not most.isdigit() or not used.isdigit():
        return None
    # Cached file pages, the mapped model's among them, count as used until the kernel wants them back.
    cached = [line.split() for line in _read(f"{folder}/memory.stat").splitlines()]
    free = sum(int(value) for name, value in cached if name in ("inactive_file", "active_file"))
    return max(0, int(most) - int(used) + free)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""


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
