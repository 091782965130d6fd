"""Run tests of the native code with sanitizers: memory and undefined behaviour, then data races of the block store.

The package and its tests are copied, compiled there (native/build.py) and run with the sanitizer's library loaded
first. ggml is not compiled again: what it does itself is not watched, and it computes with one thread where races are
looked for, since the barriers of OpenMP are unknown to the sanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Check:
    """sanitizers: as -fsanitize takes them; library: that must be loaded before Python."""

    sanitizers: str
    library: str
    tests: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


CHECKS = (
    Check(
        "address,undefined",
        "libasan.so",
        ("tests/unit/native", "tests/properties/test_block_store.py"),
        # What Python leaves to the end of the process is no leak.
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    ),
    Check(
        "thread",
        "libtsan.so",
        ("tests/unit/native/test_block_store.py", "tests/properties/test_block_store.py"),
        {"TSAN_OPTIONS": "halt_on_error=1", "OMP_THREAD_LIMIT": "1"},
    ),
)


def native_copy(folder: Path, environment: dict[str, str]) -> None:
    """The package and its tests in `folder`, compiled there with these variables."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.o", "_native.c")
    for name in ("pyggml_repkv", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    build = [sys.executable, "pyggml_repkv/native/build.py"]
    subprocess.run(build, cwd=folder, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, check=True)


def run_tests(folder: Path, tests: tuple[str, ...], environment: dict[str, str]) -> int:
    """pytest's exit code in a copy. Output that a sanitizer writes as it ends the process must not be captured."""
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}, check=False).returncode


def runtime(library: str) -> str:
    compiler = os.environ.get("CC", "cc")
    found = subprocess.run([compiler, f"-print-file-name={library}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def main() -> int:
    for check in CHECKS:
        print(f"{check.sanitizers}: {' '.join(check.tests)}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            native_copy(Path(folder), {"REPKV_SANITIZE": check.sanitizers})
            environment = {"CI": "true", "LD_PRELOAD": runtime(check.library), **check.environment}
            if code := run_tests(Path(folder), check.tests, environment):
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
