"""Ctrl-C and SIGTERM at any moment: the exit code says which, a session is saved, nobody sees a traceback."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyggml_repkv.cli import main as command_line
from pyggml_repkv.cli import signals
from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError
from tests.subprocesses import ROOT

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture
def command(tiny_model, tmp_path):
    flags = ["--n-local", "64", "--n-sink", "4", "--block", "fixed:16", "--n-dense", "0", "--ignore-eos", "-t", "1"]
    flags += ["--kv", "repkv", "-n", "100000", "-p", "the and in", "--session", str(tmp_path / "kept")]
    return [sys.executable, "-m", "pyggml_repkv", "run", "-m", str(tiny_model(n_ctx=256, seed=1)), *flags]


def start(command):
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_handlers(process):
    """Before that it is Python's own start that a signal meets."""
    caught = 0
    while process.poll() is None and not caught >> (signal.SIGTERM - 1) & 1:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)


@pytest.mark.parametrize("number", CODES)
def test_the_first_signal_saves_the_session_and_says_so(command, tmp_path, number):
    saved = None
    for attempt in range(20):
        kept = str(tmp_path / f"kept-{attempt}")
        process = start([*command[:-1], kept])
        process.stdout.read(200)
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1].decode()
        assert process.returncode == CODES[number], errors
        saved = re.search(r"pyggml_repkv: session: saved after (\d+) tokens\n", errors)
        if saved:
            break
        # It may come while the memory is rearranged: then what was saved before is whole.
        assert "pyggml_repkv: warning: session: the memory was stopped" in errors
    assert saved
    with Model.load(command[5], threads=1, repack=False) as model, model.resume(kept) as session:
        assert session.n_past == int(saved[1]) > 0


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("seed", range(8))
def test_many_signals_at_any_moment_are_no_traceback(command, number, seed):
    rng = random.Random(seed)
    process = start(command)
    wait_for_handlers(process)
    time.sleep(rng.random() * rng.choice([0.3, 3]))
    for _ in range(5):
        process.send_signal(number)
        time.sleep(rng.random() * 0.02)
    errors = process.communicate(timeout=60)[1].decode()
    assert (process.returncode, "Traceback" in errors, "ignored" in errors) == (CODES[number], False, False), errors


STUCK = """
import sys, time
from pyggml_repkv.cli import signals
signals.install()
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("stopping", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", CODES)
def test_a_second_one_ends_at_once(number):
    process = subprocess.Popen([sys.executable, "-c", STUCK], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == b"stopping\n"
    time.sleep(0.6)
    process.send_signal(number)
    assert process.communicate(timeout=10)[1] == b""
    assert process.returncode == CODES[number]


INSIDE = """
import os, sys
from pyggml_repkv.cli import signals
signals._TOGETHER_S = 1000
signals.install()
try:
    {body}
except KeyboardInterrupt:
    os.kill(os.getpid(), {second:d})
    print("saved")
    code = signals.exit_code()
signals.ignore()
sys.exit(code)
"""
BODIES = {"plain": "os.kill(os.getpid(), {:d})", "exec": "exec('os.kill(os.getpid(), {:d})')"}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("second", CODES)
@pytest.mark.parametrize("first", CODES)
def test_two_that_come_together_are_one_which_decides_the_exit_code(tmp_path, first, second, body):
    """With -m, Python forgets the exit code where a plain KeyboardInterrupt has passed through exec()."""
    (tmp_path / "inside.py").write_text(INSIDE.format(body=BODIES[body].format(first), second=second))
    command, env = [sys.executable, "-m", "inside"], {**os.environ, "PYTHONPATH": f"{ROOT}"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (CODES[first], b"saved\n", b"")


@pytest.mark.parametrize("error", [ImportError("numpy"), MemoryError(), InputError("this is no GGUF file")])
def test_what_a_library_makes_of_a_signal_is_no_error(monkeypatch, capsys, error):
    def stop(_):
        raise error

    monkeypatch.setattr(command_line, "_dispatch", stop)
    monkeypatch.setattr(signals, "_stopped", (signal.SIGTERM, 0.0))
    assert (command_line.main([]), capsys.readouterr().err) == (143, "")


FINALIZER = """
import os, signal, time
from pyggml_repkv.cli import signals
signals.install()
class Slow:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
Slow()
time.sleep(60)
"""


def test_one_that_comes_in_a_finalizer_is_not_lost():
    command = [sys.executable, "-c", FINALIZER]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (130, b"")


@pytest.mark.parametrize(
    ("status", "code", "line"), [("text", 1, "pyggml_repkv: error: text\n"), (None, 0, ""), (7, 7, ""), (0, 0, "")]
)
def test_an_exit_with_a_text_is_a_failure_with_that_text(monkeypatch, capsys, status, code, line):
    def leave(_):
        raise SystemExit(status)

    monkeypatch.setattr(command_line, "_dispatch", leave)
    assert (command_line.main([]), capsys.readouterr().err) == (code, line)
