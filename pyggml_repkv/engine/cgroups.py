"""What the control groups around this process allow, as containers set them: memory and processor time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = "/sys/fs/cgroup"


def memory_limits() -> list[tuple[int, int]]:
    """(bytes free, bytes allowed) of each group that has a limit."""
    found = []
    for folder, is_v2 in _groups("memory"):
        names = ("memory.max", "memory.current") if is_v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        most, used = (read(f"{folder}/{name}").strip() for name in names)
        if most.isdigit() and used.isdigit():
            # Cached file pages, the mapped model's among them, count as used until the kernel wants them back.
            cached = [line.split() for line in read(f"{folder}/memory.stat").splitlines()]
            free = sum(int(value) for name, value in cached if name in ("inactive_file", "active_file"))
            found.append((max(0, int(most) - int(used) + free), int(most)))
    return found


def cpu_quota() -> float | None:
    """The processors' worth of time that the tightest group allows; None: no group has a quota."""
    found = []
    for folder, is_v2 in _groups("cpu"):
        if is_v2:
            quota, _, period = read(f"{folder}/cpu.max").strip().partition(" ")
        else:
            quota, period = (read(f"{folder}/cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        # Without a quota it is "max", or -1.
        if quota.isdigit() and period.isdigit() and int(period):
            found.append(int(quota) / int(period))
    return min(found, default=None)


def _groups(controller: str) -> Iterator[tuple[str, bool]]:
    """(folder, whether it is of version 2) of every group around this process."""
    for line in read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            roots = [_ROOT]
        elif controller in controllers.split(","):
            # Controllers that are mounted together may have one folder, or each a link to it.
            roots = [f"{_ROOT}/{name}" for name in dict.fromkeys((controller, controllers))]
        else:
            continue
        # In a container the path may be the host's, which is not there: the root is the container's own group then.
        for folder in (PurePosixPath(path), *PurePosixPath(path).parents):
            for root in roots:
                yield f"{root}{folder}".rstrip("/"), controllers == ""


def read(path: str) -> str:
    """Text of a file in /proc or /sys; "" where it cannot be read."""
    try:
        return Path(path).read_text(encoding="ascii")
    except (OSError, UnicodeError):
        return ""
