"""Checks that this CPU can run the extension, before any of the extension's code runs (native/isa.c)."""

from __future__ import annotations

import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def needed_features(extension: Path) -> list[str]:
    """Returns the features that the extension's code may use, named as in /proc/cpuinfo; empty if it names none."""
    found = re.search(rb"repkv_isa:([^\0]*)", extension.read_bytes())
    return re.findall(r"(\w+)=1\b", found[1].decode()) if found else []


def lacking_features(extension: Path) -> list[str]:
    """Returns the needed features that this CPU lacks; empty without /proc/cpuinfo."""
    try:
        with CPUINFO.open() as lines:
            features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return []
    known = set(features.partition(":")[2].split())
    return [name for name in needed_features(extension) if name not in known] if known else []
