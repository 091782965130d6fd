"""A flag that the memory has no use for is named, never ignored."""

import pytest

from pyggml_repkv.cli.main import main


@pytest.mark.parametrize(
    ("flags", "named", "policies"),
    [
        (["--n-local", "64"], "--n-local", "full"),
        (["--late", "--per-head", "--top-blocks", "3"], "--top-blocks, --per-head, --late", "full"),
        (["--preset", "fast"], "--preset", "full"),
        (["--preset", "balanced", "--kv", "window"], "--preset", "window"),
        (["--kv", "window", "--n-local", "64", "--block", "fixed:64"], "--block", "window"),
        (["--kv-ram", "2G"], "--kv-ram", "full"),
        (["--kv", "window", "--cache-type-evicted", "q8_0"], "--cache-type-evicted", "window"),
    ],
)
@pytest.mark.parametrize("command", ["run", "graph verify", "model info", "bench"])
def test_a_flag_that_the_memory_does_not_use_is_named(capsys, command, flags, named, policies):
    kv = [] if "--kv" in flags else ["--kv", "full"]
    argv = [*command.split(), "-m", "there-is-none", *kv, *flags]
    assert main([*argv, "-p", "Hi"] if command == "run" else argv) == 2
    fields = sorted(named.split(", "))
    line = capsys.readouterr().err
    assert line.endswith(f": --kv {policies} has no use for that; is --kv repkv meant?\n")
    assert sorted(line.removeprefix("pyggml_repkv: error: ").split(": ")[0].split(", ")) == fields


def test_one_of_several_policies_is_enough(capsys):
    argv = ["bench", "-m", "there-is-none", "--n-local", "64", "--kv"]
    assert main([*argv, "full,window"]) == 2
    assert "there-is-none" in capsys.readouterr().err
    assert main([*argv, "full"]) == 2
    assert "--n-local" in capsys.readouterr().err


def test_prefetch_needs_a_disk(run, model):
    flags = ["--kv", "repkv", "--prefetch", "off"]
    assert run(*flags).error_line == "error: --prefetch reads from disk: it needs --kv-ram, --kv-dir or --session"
    assert run(*flags, "--kv-ram", "1G").code == 0
    assert run("--kv", "repkv", "--kv-dir", "/tmp", "--kv-disk-max", "1G", "--cache-type-evicted", "f16").code == 0


@pytest.mark.parametrize(
    ("task", "flags"),
    [
        ("perplexity", ["--depths", "3"]),
        ("recall", ["--stretch", "64"]),
        ("passkey", ["--blocks", "4"]),
        ("fidelity", ["--seed", "2"]),
        ("perplexity", ["--out", "x"]),
        ("recall", ["--png", "x.png"]),
    ],
)
def test_a_flag_of_another_task_is_named(tmp_path, capsys, task, flags):
    (tmp_path / "text").write_text("words")
    kv = [] if task == "perplexity" else ["--kv", "repkv"]
    assert main(["eval", task, "-m", "there-is-none", "--text", str(tmp_path / "text"), *kv, *flags]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"pyggml_repkv: error: {flags[0]} is for ")
    assert line.endswith(f"; {task} has no use for it\n")
