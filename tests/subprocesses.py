"""Runs Python in another process, for code that may kill it: C aborts, signals, broken installations."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_python(source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `source` in the repository's root."""
    command = [sys.executable, "-c", source, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def printed(source: str, *arguments: str) -> list[str]:
    """Returns the lines that `source` prints. It must end by itself and write nothing to stderr."""
    done = run_python(source, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()
