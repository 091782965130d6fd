"""Output is complete or the exit code says so, whatever the stream does and however Python buffers it."""

import os
import resource
import subprocess
import sys
import time

import pytest

from tests.subprocesses import ROOT

BUFFERING = pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])

# The command line around a command that writes a million characters.
WRITER = """
import sys, types
from pyggml_repkv.cli import main, output
def command(argv):
    output.{stream}("ä123456789" * 100_000)
    output.write_file("-", "end")
    return 0
main._dispatch = command
sys.exit(main.main([]))
"""
TEXT = ("ä123456789" * 100_000 + "end").encode()


def start(unbuffered, stream="write", **options):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-c", WRITER.format(stream=stream)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, **{"stderr": subprocess.PIPE, **options})


def read_slowly(descriptor):
    parts = []
    while part := os.read(descriptor, 50_000):
        parts.append(part)
        time.sleep(0.001)
    os.close(descriptor)
    return b"".join(parts)


@BUFFERING
@pytest.mark.parametrize("stream", ["write", "log"])
def test_a_pipe_that_does_not_block_gets_everything(unbuffered, stream):
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with start(unbuffered, stream, stdout=write_end, stderr=write_end) as process:
        os.close(write_end)
        time.sleep(0.2)  # it fills the pipe meanwhile
        assert read_slowly(read_end) == TEXT
        assert process.wait(60) == 0


@BUFFERING
def test_a_file_that_takes_only_a_part_is_a_failure(unbuffered, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, 64 * 1024))

    with (tmp_path / "out").open("wb") as file, start(unbuffered, stdout=file, preexec_fn=limit) as process:
        error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 1
    assert error == "pyggml_repkv: error: cannot write to stdout: File too large\n"


@BUFFERING
def test_a_reader_that_leaves_halfway_ends_it_quietly(unbuffered):
    with start(unbuffered, stdout=subprocess.PIPE) as process:
        process.stdout.read(1000)
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (1, b"")
