"""`model info`: its output, and that every failure is one line."""

import json

import pytest

from pyggml_repkv.cli.main import main
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.gguf_file import GGUFFile
from tests.tiny_models import QT, VT, TinySpec, write_split_model, write_tiny_model


@pytest.fixture
def info(capsys):
    def call(*argv):
        code = main(["model", "info", *map(str, argv)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def cells(text, label):
    """Returns the cells after the label in a row of a table."""
    line = next(line for line in text.splitlines() if line.strip().startswith(label))
    return [cell.strip() for cell in line.strip().removeprefix(label).split("  ") if cell.strip()]


def test_the_table_has_the_right_numbers(info, tiny_model):
    path = tiny_model(n_layer=3, n_ctx=256, weight_type=QT.Q8_0)
    code, out, err = info(path)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"file          {path}"
    assert "GGUF version 3, 39 tensors" in lines[1]
    for label, text in (
        ("architecture", "qwen2"),
        ("layers", "3"),
        ("embedding", "64"),
        ("heads", "4 for queries, 2 for keys and values, of 16"),
        ("feed-forward", "96"),
        ("vocabulary", "288 tokens"),
        ("trained on", "256 tokens"),
        ("rope", "base 10000, not scaled"),
        ("norm", "RMS, epsilon 1e-06"),
        ("output", "a matrix of its own"),
        ("special", "bos 269 <|endoftext|>"),
        ("chat template", "default"),
        ("memory", "for 256 tokens;"),
    ):
        assert any(line.startswith(f"{label:<14}{text}") for line in lines), label
    n_q8_0 = 2 * 288 * 64 + 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)
    assert cells(out, "Q8_0")[:4] == ["23", f"{n_q8_0:,}", f"{n_q8_0 * 34 / 32 / 1e3:.0f} kB", "8.50"]
    assert cells(out, "--kv full") == ["--kv window", "--kv repkv"]
    assert cells(out, "keys and values") == [f"{256 * 3 * 2 * 32 * 2 / 1e3:.0f} kB", "-", "-"]
    assert cells(out, "fits") == ["yes"] * 3


@pytest.mark.parametrize(
    ("spec", "flags", "trained", "rope"),
    [
        ({}, ("--rope-scaling", "yarn", "--rope-scale", "4"), "1,024", "base 10000, yarn scaling by 4 from 256 tokens"),
        ({}, ("--rope-freq-base", "5e5"), "256", "base 500000, not scaled"),
        ({"scaling_kind": "yarn", "scaling_factor": 4.0}, (), "1,024", "base 10000, yarn scaling by 4 from 256 tokens"),
        ({"scaling_kind": "yarn", "scaling_factor": 4.0}, ("--rope-scaling", "none"), "256", "base 10000, not scaled"),
    ],
)
def test_it_shows_how_far_yarn_reaches(info, tiny_model, spec, flags, trained, rope):
    path = tiny_model(n_layer=1, n_ctx=256, **spec)
    code, out, err = info(path, *flags)
    assert (code, err) == (0, "")
    assert f"trained on    {trained} tokens\nrope          {rope}\n" in out
    assert f"memory        for {trained} tokens;" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rope-scale", "0"), "--rope-scale: must be a number from 1e-06 to 1e+06, got '0'"),
        (("--rope-scale", "nan"), "--rope-scale: must be a number"),
        (("--rope-freq-base", "inf"), "--rope-freq-base: must be a number from 1.001 to 1e+12"),
        (("--yarn-orig-ctx", "-1"), "--yarn-orig-ctx: must be a whole number from 1 to"),
        (("--rope-scaling", "longrope"), "--rope-scaling: invalid choice: 'longrope'"),
        (("--rope-scale", "4"), "--rope-scale 4 has nothing to scale: add --rope-scaling yarn or linear"),
        (("--rope-scaling", "yarn", "--rope-scale", "0.5"), "yarn scaling needs a factor of at least 1"),
    ],
)
def test_senseless_scaling_is_one_line(info, tiny_model, flags, message):
    code, out, err = info(tiny_model(n_layer=1), *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_all_parts_and_rows_of_no_token_are_counted(info, tmp_path):
    parts = write_split_model(tmp_path / "m", TinySpec())
    n_bytes = sum(path.stat().st_size for path in parts)
    code, out, err = info(parts[0])
    assert (code, err) == (0, "")
    assert f"{n_bytes / 1e3:.0f} kB in 3 files, GGUF version 3, 27 tensors" in out
    assert json.loads(info(parts[0], "--json")[1])["file"]["n_parts"] == 3
    code, _, err = info(parts[1])
    assert (code, err.count("\n")) == (2, 1)

    def fewer(metadata, _):
        for key in ("tokens", "token_type"):
            values, kind = metadata[f"tokenizer.ggml.{key}"]
            metadata[f"tokenizer.ggml.{key}"] = (values[:-16], kind)

    write_tiny_model(tmp_path / "fewer.gguf", TinySpec(), fewer)
    assert "vocabulary    272 tokens (288 rows)" in info(tmp_path / "fewer.gguf")[1]


def test_it_says_why_run_refuses_a_tokenizer(info, tmp_path):
    def edit(metadata, _):
        del metadata["tokenizer.ggml.merges"]

    write_tiny_model(tmp_path / "m.gguf", TinySpec(), edit)
    code, out, err = info(tmp_path / "m.gguf")
    assert (code, err) == (0, "")
    assert "`run` refuses it: tokenizer.ggml.merges is missing" in out
    assert cells(out, "fits") == ["no"] * 3
    assert all(len(line) <= 80 for line in out.splitlines()[1:])


def test_it_fits_a_terminal_of_80_columns(info, tiny_model, monkeypatch):
    path = tiny_model(n_layer=1, n_ctx=256, weight_type=QT.Q4_0, head_dim=64)
    monkeypatch.chdir(path.parent)
    for flags in ((), ("-c", "134217728", "--kv-ram", "16M", "--kv-dir", "kv")):
        _, out, _ = info(path.name, *flags)
        assert max(map(len, out.splitlines())) <= 80


def test_json_is_one_object(info, tiny_model):
    path = tiny_model(n_ctx=256)
    code, out, err = info("-m", path, "--json", "-c", 200, "-b", 32)
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    found = json.loads(out)
    config = ModelConfig.from_gguf(GGUFFile.open(path))
    assert found["config"]["n_embd"] == config.n_embd
    assert found["config"]["norm_eps"] == config.norm_eps
    assert [(p["policy"], p["fits"]) for p in found["memory"]["policies"]] == [
        ("full", True), ("window", True), ("repkv", True),
    ]  # fmt: skip
    assert found["memory"]["n_tokens"] == 200


def test_one_policy_is_shown_where_it_is_named(info, tiny_model, tmp_path):
    _, out, _ = info(tiny_model(), "-c", 20000, "--kv", "repkv", "--kv-ram", "16M", "--kv-dir", tmp_path, "-b", 64)
    assert cells(out, "--kv repkv") == []
    assert len(cells(out, "blocks")) == len(cells(out, "disk")) == 1
    assert "--kv full" not in out
    assert f"are free in {tmp_path}" in " ".join(out.split())


def test_only_policies_that_the_flags_allow_are_shown(info, tiny_model):
    for flag in (["--exact-graph"], ["-fa", "off"]):
        code, out, _ = info(tiny_model(), "--json", *flag)
        assert code == 0
        assert [p["policy"] for p in json.loads(out)["memory"]["policies"]] == ["full"]


def test_what_does_not_fit_is_no_failure(info, tiny_model):
    code, out, err = info(tiny_model(head_dim=64), "--kv", "full", "-c", "100000000")
    assert (code, err) == (0, "")
    assert cells(out, "fits") == ["no"]
    assert cells(out, "keys and values") == ["102.4 GB"]
    assert "full: 100000000 tokens need 102.4 GB and" in out


def test_a_vocabulary_is_shown_without_a_plan(info, golden_dir):
    code, out, err = info(golden_dir / "qwen2-vocab.gguf")
    assert (code, err) == (0, "")
    assert "vocabulary    152,064 tokens" in out
    assert "152,064 tokens, 151,387 merges" in out
    assert "weights       none: this file is a vocabulary" in out
    assert "memory" not in out
    assert "output" not in out


def test_what_a_file_says_cannot_reach_the_terminal(info, tmp_path):
    def edit(metadata, _):
        metadata["general.name"] = ("a\x1b[2Jb\nc", VT.STRING)
        metadata["tokenizer.chat_template.\x1b]0;x\x07"] = ("\x1b", VT.STRING)
        metadata["tokenizer.ggml.pre"] = ("\x1b[31m", VT.STRING)
        metadata["tokenizer.ggml.tokens"][0][271] = "\x1b[1m\r" * 100

    path = tmp_path / "hostile.gguf"
    write_tiny_model(path, TinySpec(), edit)
    code, out, err = info(path)
    assert (code, err) == (0, "")
    assert all(c.isprintable() or c == "\n" for c in out)
    assert r"a\x1b[2Jb\nc" in out
    assert "`run` refuses it: tokenizer.ggml.pre is " in out
    code, out, _ = info(path, "--json")
    assert code == 0
    assert out.isascii()
    assert json.loads(out)["tokenizer"]["pre"] == "\x1b[31m"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["/nowhere/at/all"], "/nowhere/at/all: no such file"),
        (["/"], "/: is a directory"),
        (["a\0b"], "no file and no model named 'a\\x00b'"),
        ([__file__], "is not a GGUF file"),
        ([""], "argument MODEL: must not be empty"),
        (["-m", "a", "b"], "as MODEL and with -m or -hf: leave one out"),
        (["MODEL", "-c", "100000000000"], "-c/--ctx-size: must be a whole number from 0 to 134217728"),
        (["MODEL", "--kv", "nope"], "'nope' is none of full, window, repkv"),
        (["MODEL", "--kv", "nope.py"], "--kv nope.py: there is no such file"),
        (["MODEL", "--kv", "full", "--kv-ram", "1M"], "--kv-ram is of no use with --kv full"),
        (["MODEL", "--kv", "repkv", "-fa", "off"], "which --kv repkv never does"),
        (["MODEL", "--kv-ram", "1"], "--kv-ram has room for 0 tokens"),
        (["MODEL", "--kv-ram", "1G", "--kv-dir", "/proc/x"], "the blocks need a directory that can be written"),
        (["MODEL", "--block", "7"], "--block is '7'"),
        (["MODEL", "--index", "representatives:4", "--n-score", "5000"], "--n-score is 5000"),
        (["MODEL", "-ctk", "q8_0"], "-ctk q8_0 needs a head size that 32 divides"),
        (["MODEL", "--colour"], "unknown arguments: --colour"),
    ],
)
def test_a_bad_input_is_one_line_and_exit_code_2(info, tiny_model, argv, message):
    code, out, err = info(*(tiny_model() if arg == "MODEL" else arg for arg in argv))
    assert (code, out) == (2, "")
    assert err.startswith("pyggml_repkv: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_cut_file_is_one_line_and_exit_code_2(info, tiny_model, tmp_path):
    data = tiny_model().read_bytes()
    for length in (1, 30, 2000, len(data) // 2):
        path = tmp_path / "cut.gguf"
        path.write_bytes(data[:length])
        code, out, err = info(path)
        assert (code, out, err.count("\n")) == (2, "", 1)
