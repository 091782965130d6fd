"""Run tests of the native code with sanitizers: for memory errors, undefined behaviour, and races in the block store.

A copy of the package and its tests is compiled with a sanitizer (native/build.py) and tested with the sanitizer's
library loaded first. ggml is not compiled again, so its own errors are not seen. The check for races computes with one
thread, because the sanitizer does not know OpenMP's barriers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from _native_copy import make_copy, run_tests


@dataclass(frozen=True)
class Check:
    """A run of tests. sanitizers: for -fsanitize; library: loaded before Python; options: its environment variables."""

    sanitizers: str
    library: str
    options: dict[str, str]
    tests: tuple[str, ...]


CHECKS = (
    Check(
        "address,undefined",
        "libasan.so",
        # Python leaves memory to the end of the process: not a leak.
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
        ("tests/unit/native", "tests/properties/test_block_store.py", "tests/properties/test_repkv_oracle.py"),
    ),
    Check(
        "thread",
        "libtsan.so",
        {"TSAN_OPTIONS": "halt_on_error=1", "OMP_THREAD_LIMIT": "1"},
        (
            "tests/unit/native/test_block_store.py",
            "tests/unit/native/test_hooks.py",
            "tests/properties/test_block_store.py",
            "tests/properties/test_disk_memory.py",
        ),
    ),
)


def run(check: Check) -> tuple[int, str]:
    command = [os.environ.get("CC", "cc"), f"-print-file-name={check.library}"]
    library = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(library):
        raise SystemExit(f"error: {command[0]} has no {check.library}; install it (Debian: apt-get install gcc)")
    with tempfile.TemporaryDirectory() as folder:
        make_copy(Path(folder), REPKV_SANITIZE=check.sanitizers)
        environment = {"CI": "true", "LD_PRELOAD": library, **check.options}
        return run_tests(Path(folder), *check.tests, **environment)


def main() -> int:
    """Runs both checks at once; returns 1 if one fails."""
    with ThreadPoolExecutor(len(CHECKS)) as pool:
        results = list(pool.map(run, CHECKS))
    for check, (_, output) in zip(CHECKS, results, strict=True):
        print(f"{check.sanitizers}: {' '.join(check.tests)}\n{output}", flush=True)
    return int(any(code for code, _ in results))


if __name__ == "__main__":
    sys.exit(main())
