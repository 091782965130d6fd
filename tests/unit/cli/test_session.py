"""`run --session` from a shell: Ctrl-C, then the same command again."""

import signal
import subprocess
import sys

import pytest

from tests.subprocesses import ROOT

N_PREDICT = 1500


@pytest.fixture(params=[[], ["--sticky", "0.4", "--late"]], ids=["", "late"])
def command(tiny_model, request):
    model = tiny_model(n_layer=2, n_head=4, n_head_kv=2, head_dim=32, n_ctx=256, seed=1)
    flags = [
        "--n-local",
        "64",
        "--n-sink",
        "4",
        "--block",
        "fixed:16",
        "--index",
        "representatives:4",
        "--budget",
        "64",
        "--chunk-budget",
        "64",
    ]
    flags += ["-n", str(N_PREDICT), "--seed", "3", "--ignore-eos", "--kv-ram", "1M", "--n-dense", "0", "-t", "1"]
    flags += request.param
    return [sys.executable, "-m", "pyggml_repkv", "run", "-m", str(model), "--kv", "repkv", "-p", "the and in", *flags]


def run(command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=False)


def test_a_text_stopped_by_ctrl_c_comes_out_whole_the_second_time(command, tmp_path):
    plain = run(command)
    assert plain.returncode == 0
    kept = [*command, "--session", str(tmp_path / "kept")]
    process = subprocess.Popen(kept, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    begun = process.stdout.read(300)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors
    assert plain.stdout.startswith((begun + rest).rstrip(b"\n")[:-4])  # the last character may have been cut
    assert len(begun + rest) < len(plain.stdout)
    again = run(kept)
    assert again.returncode == 0, again.stderr
    assert b"session: continuing its text" in again.stderr
    assert again.stdout == plain.stdout


def test_a_prompt_that_was_read_is_not_read_again(command, tmp_path):
    # If positions become far on the way, the session cannot go back to a place before that.
    kept = [*command, "--positions", "far", "--session", str(tmp_path / "kept")]
    first, second = run(kept), run(kept)
    assert first.stdout == second.stdout
    assert b"session: holds 5 of the prompt's 5 tokens" in second.stderr
    assert b"/     0 tokens" in second.stderr


def test_another_prompt_is_refused_and_loses_nothing(command, tmp_path):
    at = command.index("-p") + 1
    kept = [*command, "--session", str(tmp_path / "kept"), "-n", "1", "-c", "4000"]
    long = [*kept[:at], "the and in " * 400, *kept[at + 1 :]]
    assert run(long).returncode == 0
    refused = run(kept)
    assert refused.returncode == 2
    assert b"which this one shares the first" in refused.stderr.splitlines()[-1]
    assert b"session: holds" in run(long).stderr
    assert run([*kept, "--session-new"]).returncode == 0
    assert run(kept).returncode == 0
    alone = run([*command, "--session-new"])
    assert (alone.returncode, alone.stderr) == (2, b"pyggml_repkv: error: --session-new goes with --session DIR\n")
