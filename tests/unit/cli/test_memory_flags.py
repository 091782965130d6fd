"""A flag that the memory has no use for is named, never ignored."""

import pytest

from pyggml_repkv.cli.main import main


@pytest.mark.parametrize(
    ("flags", "named", "policies"),
    [
        (["--n-local", "64"], "--n-local", "full"),
        (["--late", "--per-head", "--budget", "3"], "--budget, --per-head, --late", "full"),
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
    line = capsys.readouterr().err.removeprefix("pyggml_repkv: error: ")
    are = "is" if len(fields) == 1 else "are"
    assert line.endswith(f" {are} of no use with --kv {policies}; is --kv repkv meant?\n")
    assert sorted(line.split(f" {are} ")[0].split(", ")) == fields


def test_several_policies_are_named_one_by_one(capsys):
    assert main(["bench", "-m", "there-is-none", "--kv", "full,window", "--per-head"]) == 2
    line = "pyggml_repkv: error: --per-head is of no use with --kv full or window; is --kv repkv meant?\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("command", ["bench", "eval passkey"])
def test_what_evicts_nothing_has_no_disk(tiny_model, capsys, command):
    path = tiny_model(n_layer=2, n_head=4, n_head_kv=2, head_dim=32, n_ctx=512, seed=1)
    flags = ["--kv", "full,window,repkv", "--kv-ram", "100M", "--kv-disk-max", "1G", "-t", "1"]
    flags += ["-p", "64", "-n", "2", "-r", "1"] if command == "bench" else ["--lengths", "300", "--depths", "1"]
    code = main([*command.split(), "-m", str(path), *flags])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert all(name in captured.out for name in ("full", "window", "repkv"))


def test_one_of_several_policies_is_enough(capsys):
    argv = ["bench", "-m", "there-is-none", "--n-local", "64", "--kv"]
    assert main([*argv, "full,window"]) == 2
    assert "there-is-none" in capsys.readouterr().err
    assert main([*argv, "full"]) == 2
    assert "--n-local" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--prefetch", "off"], "--prefetch is"),
        (["--kv-disk-max", "1G"], "--kv-disk-max is"),
        (["--cache-type-evicted", "q8_0", "--prefetch", "on"], "--cache-type-evicted, --prefetch are"),
    ],
)
def test_flags_of_a_disk_need_one(run, model, capsys, tmp_path, flags, named):
    flags = ["--kv", "repkv", *flags]
    wanted = f"error: {named} for blocks on disk: give --kv-ram or --kv-dir"
    assert run(*flags).error_line == f"{wanted} or --session, too"
    for place in (["--kv-ram", "1G"], ["--kv-dir", str(tmp_path)], ["--session", str(tmp_path / "new")]):
        assert run(*flags, *place).code == 0
    for command in (["bench"], ["eval", "passkey"], ["graph", "verify"], ["model", "info"]):
        assert main([*command, "-m", "there-is-none", *flags]) == 2
        assert capsys.readouterr().err == f"pyggml_repkv: {wanted}, too\n"


@pytest.mark.parametrize(
    ("task", "flags"),
    [
        ("perplexity", ["--depths", "3"]),
        ("recall", ["--stretch", "64"]),
        ("perplexity", ["--samples", "4"]),
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--per-head"], "--per-head is of no use with --index tokens:4, but with representatives:N"),
        (["--score", "dot", "--n-score", "9"], "--score, --n-score are of no use with --index tokens:4, but"),
        (
            ["--index", "representatives:4", "--unit", "8"],
            "--unit is of no use with --index representatives:4",
        ),
    ],
)
def test_flags_of_another_index_are_refused(capsys, flags, message):
    assert main(["bench", "-m", "there-is-none", "--kv", "repkv", *flags]) == 2
    assert message in capsys.readouterr().err
