"""Copies the package and its tests, and compiles the native code there in another way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def make_copy(folder: Path, **environment: str) -> None:
    """Copies into `folder` and compiles there with these variables set (native/build.py). Raises SystemExit."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.o", "_native.c")
    for name in ("pyggml_repkv", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    code, output = _run(folder, "pyggml_repkv/native/build.py", **environment)
    if code != 0:
        raise SystemExit(output)


def run_tests(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Returns pytest's exit code and output for tests of a copy."""
    # Without capture (-s), a crash can say its reason.
    return _run(folder, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *arguments, **environment)


def _run(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    env, pipe = {**os.environ, **environment}, subprocess.PIPE
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout
