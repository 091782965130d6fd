import os
import subprocess
import sys

import pytest

from pyggml_repkv import __version__
from pyggml_repkv.cli.main import main
from pyggml_repkv.errors import ComputeError


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ComputeError("ggml failed\nbadly"), "error: ggml failed badly"),
        (MemoryError(), "error: out of memory"),
        (
            ZeroDivisionError("oops"),
            "error: internal error, ZeroDivisionError: oops (PYGGML_REPKV_DEBUG=1 shows where)",
        ),
        (OSError(28, "No space left on device", "/kv/file"), "error: /kv/file: No space left on device"),
    ],
)
def test_a_failure_is_one_line_and_exit_code_1(run, model, error, message):
    model.failure = ("prefill", error)
    done = run("-q", "--json")
    assert (done.code, done.out) == (1, "")
    assert done.error_line.startswith(message)
    assert model.closed == ["session", "model"]


def test_the_traceback_is_there_for_those_who_ask(run, model, monkeypatch):
    monkeypatch.setenv("PYGGML_REPKV_DEBUG", "1")
    model.failure = ("decode", ZeroDivisionError("oops"))
    done = run()
    assert done.code == 1
    assert "Traceback (most recent call last)" in done.err


def test_a_reader_that_left_is_no_error(run, model, monkeypatch):
    def gone(_):
        raise BrokenPipeError

    monkeypatch.setattr(sys.stdout, "write", gone)
    done = run("-q")
    assert (done.code, done.err) == (1, "")
    assert model.closed == ["session", "model"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give a command: run"),
        (["walk"], "there is no command 'walk'; the commands are run"),
        (["-p", "Hi"], "'-p' is not expected here: the command comes first"),
        (["--version", "run"], "'run' is not expected here"),
    ],
)
def test_a_wrong_command_is_one_line(capsys, argv, message):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pyggml_repkv: error: {message}")
    assert error.count("\n") == 1


def test_version_names_everything_that_matters(capsys):
    assert main(["--version"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["pyggml_repkv"] == __version__
    assert rows["ggml-python"] == "0.0.45"
    assert {"python", "numpy", "gguf", "tokenizers", "ggml", "cpu"} <= rows.keys()


def test_help_imports_nothing_heavy():
    for argv in (["--help"], ["run", "--help"]):
        script = (
            "import sys; from pyggml_repkv.cli.main import main; code = main(sys.argv[1:]); "
            "heavy = {'numpy', 'ggml', 'rich', 'jinja2', 'gguf', 'tokenizers'} & set(sys.modules); "
            "sys.exit(f'imported {heavy}' if heavy else code)"
        )
        done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert "usage: python -m pyggml_repkv" in done.stdout


@pytest.mark.parametrize(
    ("argv", "redirect", "code", "errors"),
    [
        ("run --help", ">&-", 1, "pyggml_repkv: error: cannot write to stdout: it is closed\n"),
        (
            "run --help",
            "> /dev/full",
            1,
            "pyggml_repkv: error: cannot write to stdout: No space left on device\n",
        ),
        ("run", "2> /dev/full", 2, ""),
        ("run", "2>&-", 2, ""),
    ],
)
def test_a_stream_that_fails_is_no_traceback(argv, redirect, code, errors):
    command = f"'{sys.executable}' -m pyggml_repkv {argv} {redirect}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, errors)


def test_a_pipe_nobody_reads_is_a_quiet_end():
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "pyggml_repkv", "run", "--help"]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, timeout=60)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, b"")
