"""A mapped file that is truncated while it is in use: the process ends in one line if its program asked for that."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import TinySpec, write_tiny_model

TOUCH = """
import mmap, os, signal, sys
import numpy as np
from pyggml_repkv.ffi import lost_files

def mapped(path):
    open(path, "wb").write(bytes(3 * mmap.PAGESIZE))
    data = np.memmap(path, np.uint8, "r")
    lost_files.watch(data, path)
    return data

lost_files.watch(np.memmap(sys.argv[0], np.uint8, "r"), "before")
if "exits" in sys.argv:
    lost_files.exit_on_lost_files("prog: ")
"""


def ended(tmp_path: Path, code: str, *args: str) -> tuple[int, str]:
    """How a process that runs TOUCH and `code` ended, and its stderr."""
    script = tmp_path / "script.py"
    script.write_text(TOUCH + code)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, str(script), *args], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr


def test_a_truncated_file_ends_the_process_in_one_line(tmp_path: Path) -> None:
    code = 'd = mapped("a"); e = mapped("b"); os.truncate("b", 9); print(d[-1], flush=True); e[-1]; print("alive")'
    what = "prog: b: cannot be read any more: it was truncated, or its drive is gone; put the file back and run again\n"
    assert ended(tmp_path, code, "exits") == (1, what)


@pytest.mark.parametrize(
    "code",
    [
        'd = mapped("a"); e = np.memmap("a", np.uint8, "r"); os.truncate("a", 9); e[-1]',
        'd = mapped("a"); e = np.memmap("a", np.uint8, "r"); del d; os.truncate("a", 9); e[-1]',
        'd = mapped("a"); os.kill(os.getpid(), signal.SIGBUS); d[0]',
    ],
    ids=["another mapping", "no longer watched", "sent by a user"],
)
def test_other_bus_errors_do_what_they_did(tmp_path: Path, code: str) -> None:
    returncode, error = ended(tmp_path, code, "exits")
    assert returncode == -signal.SIGBUS
    assert "prog" not in error


def test_a_library_takes_over_no_signal(tmp_path: Path) -> None:
    assert ended(tmp_path, 'd = mapped("a"); os.truncate("a", 9); d[-1]')[0] == -signal.SIGBUS


@pytest.mark.parametrize("kv", ["full", "repkv"])
def test_a_model_truncated_in_mid_run_is_one_line_and_loses_no_session(tmp_path: Path, kv: str) -> None:
    path, whole = tmp_path / "m.gguf", tmp_path / "whole.gguf"
    write_tiny_model(whole, TinySpec(n_ctx=100_000))
    shutil.copy(whole, path)
    session = ["--session", str(tmp_path / "kept"), "--kv", kv] if kv == "repkv" else []
    run = [
        sys.executable,
        "-m",
        "pyggml_repkv",
        "run",
        "-m",
        str(path),
        "-p",
        "the tin and the on",
        "--greedy",
        *session,
    ]
    process = subprocess.Popen(
        [*run, "-n", "90000", "--ignore-eos"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    assert process.stdout is not None
    assert len(process.stdout.read(100)) == 100
    os.truncate(path, 0)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert error.decode().splitlines()[-1].startswith(f"pyggml_repkv: error: {path}: cannot be read any more")
    if session:
        shutil.copy(whole, path)
        again = subprocess.run(
            [*run, "-n", "1"], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[3]
        )
        assert again.returncode == 0
        assert "session: " in again.stderr
