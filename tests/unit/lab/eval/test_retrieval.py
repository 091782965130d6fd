"""Retrieval from the command line: results that are kept, pictures, and errors of one line."""

import json
import re

import numpy as np
import pytest

from pyggml_repkv.cli import progress
from pyggml_repkv.cli.main import main
from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError
from pyggml_repkv.lab.eval import heat_map
from tests.tiny_models import TinySpec, write_tiny_model

LENGTH = "800"
PROSE = " ".join(f"On day {i} the ship went on, and nobody saw land." for i in range(40))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The path of a model that says anything, but at once."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny_model(path, TinySpec(n_layer=1, n_ctx=1024, head_dim=32))
    return path


@pytest.mark.parametrize("kv", ["full", "repkv"])
def test_the_demo_model_finds_the_key(demo_model, capsys, kv):
    argv = ["eval", "passkey", "-m", str(demo_model), "--lengths", "1500", "--depths", "2", "--kv", kv, "--json"]
    small = ["--n-local", "256", "--positions", "far", "--n-dense", "0"]
    assert main([*argv, *(small if kv == "repkv" else [])]) == 0
    result = json.loads(capsys.readouterr().out)
    n_found, n = result["found"][kv]["1500"]
    # So small a model confuses the two names at times; nobody guesses a key.
    assert (n_found >= (1 if kv == "repkv" else 2), n) == (True, 2)
    blocks = [r["kv_stats"]["blocks"] for r in result["results"]]
    assert all(n > 0 for n in blocks) == (kv == "repkv")
    assert len({r["expected"] for r in result["results"]}) == 2
    assert np.isfinite([r["decode_ms"] for r in result["results"]]).all()
    assert {(r["n_shared"], r["n_tokens"] <= 1500) for r in result["results"]} == {(2, True)}


def test_what_is_known_is_not_asked_again(tiny, tmp_path, capsys, monkeypatch):
    out, png = tmp_path / "results.jsonl", tmp_path / "map.png"
    argv = ["eval", "number", "-m", str(tiny), "--lengths", "800,900", "--depths", "2", "--kv", "full,window"]
    argv += ["--out", str(out), "--json"]
    assert main([*argv, "--png", str(png)]) == 0
    first = json.loads(capsys.readouterr().out)
    assert png.read_bytes().startswith(b"\x89PNG")
    lines = out.read_text().splitlines()
    assert len(lines) == 8
    assert {json.loads(line)["result"]["n_shared"] for line in lines} == {2}
    # After a crash in the middle of the last line, its question is asked again.
    out.write_text("\n".join(lines)[:-40])
    assert main(argv) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["found"] == first["found"]
    assert again["results"][:7] == first["results"][:7]
    assert again["results"][7]["answer"] == first["results"][7]["answer"]
    assert again["results"][7]["n_shared"] == 1
    assert len(out.read_text().splitlines()) == 8
    monkeypatch.setattr(Model, "session", None)
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["results"] == again["results"]
    assert main(argv[:-1]) == 0
    assert capsys.readouterr().out.count(f"  (from {out})\n") == 8


@pytest.mark.parametrize(
    "change",
    [
        ["--seed", "2"],
        ["--exact-graph"],
        ["--kv", "window", "--n-local", "200"],
        ["-b", "64"],
        ["-ctk", "q8_0"],
        ["-c", "1000"],
        ["--rope-freq-base", "200000"],
        ["--text", "{text}"],
        ["--depths", "3"],
        ["-m", "{other}"],
        ["--kv", "{policy}"],
    ],
    ids=lambda change: " ".join(change[:2]),
)
def test_other_settings_are_asked_again(tiny, tiny_model, tmp_path, capsys, change):
    files = {"text": tmp_path / "text", "policy": tmp_path / "mine.py", "other": tiny_model(n_layer=2, n_ctx=1024)}
    files["text"].write_text(PROSE)
    files["policy"].write_text("from pyggml_repkv.memory.full.memory import FullMemory as make_policy")
    out = tmp_path / "results.jsonl"
    argv = ["eval", "passkey", "-m", str(tiny), "--lengths", LENGTH, "--depths", "1", "--out", str(out), "--json"]
    changed = [*argv, *(part.format(**files) for part in change)]
    for arguments, n_lines in ((argv, 1), (argv, 1), (changed, 1 + (3 if "3" in change else 1)), (argv, None)):
        assert main(arguments) == 0
        if n_lines is not None:
            assert len(out.read_text().splitlines()) == n_lines
    n_lines = len(out.read_text().splitlines())
    if "{policy}" in change:
        files["policy"].write_text("from pyggml_repkv.memory.full.memory import FullMemory as make_policy  # but other")
    assert main(changed) == 0
    assert len(out.read_text().splitlines()) == n_lines + ("{policy}" in change)


@pytest.mark.parametrize(
    ("change", "n_lines"),
    [(["--kv", "full,window", "--n-local", "512"], 2), (["--no-repack"], 1), (["--lengths", "800,800"], 1)],
)
def test_what_changes_no_answer_is_not_asked_again(tiny, tmp_path, capsys, change, n_lines):
    out = tmp_path / "results.jsonl"
    argv = ["eval", "passkey", "-m", str(tiny), "--lengths", LENGTH, "--depths", "1", "--out", str(out), "--json"]
    assert main(argv) == main([*argv, *change]) == 0
    assert len(out.read_text().splitlines()) == n_lines


@pytest.mark.parametrize("field", [{"n_tokens": "a"}, {"found": "x"}, {"more": 1}, {"prompt_ms": None}])
def test_a_damaged_answer_is_one_line(tiny, tmp_path, capsys, field):
    out = tmp_path / "results.jsonl"
    argv = ["eval", "passkey", "-m", str(tiny), "--lengths", LENGTH, "--depths", "1", "--out", str(out)]
    assert main(argv) == 0
    entry = json.loads(out.read_text())
    out.write_text(json.dumps({**entry, "result": entry["result"] | field}) + "\n")
    assert main(argv) == 2
    assert capsys.readouterr().err.endswith(f"--out {out} holds results of another version: give another file\n")


def test_where_no_picture_can_be_is_known_before(tmp_path):
    (tmp_path / "x.png").mkdir()
    for name, message in (
        ("x.png", "Is a directory"),
        ("no/x.png", "No such file"),
        ("x.foo", "not foo"),
        ("x", "name it"),
    ):
        with pytest.raises(InputError, match=message):
            heat_map.check_can_draw(str(tmp_path / name))
    heat_map.check_can_draw(str(tmp_path / "y.svg"))


def test_a_picture_that_fails_leaves_the_answers(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(heat_map, "check_can_draw", lambda _: None)
    (tmp_path / "x.png").mkdir()
    argv = ["eval", "passkey", "-m", str(tiny), "--lengths", LENGTH, "--depths", "1", "--json"]
    assert main([*argv, "--png", str(tmp_path / "x.png")]) == 1
    out, err = capsys.readouterr()
    assert len(json.loads(out)["results"]) == 1
    assert "x.png: Is a directory" in err


def test_how_much_of_a_prompt_is_read_is_told(tiny, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    argv = ["eval", "passkey", "-m", str(tiny), "--lengths", LENGTH, "--depths", "1", "-b", "100"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert re.search(r"read 100 of 7\d\d tokens", err)
    assert ", read once for 1 " in out
    assert main([*argv, "--json"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["niah"], "niah needs a text"),
        (["perplexity"], "perplexity needs a text"),
        (["passkey", "--kv", "full,full"], "names one twice"),
        (["passkey", "--kv", "full,other"], "'other' is none of"),
        (["fidelity", "--text", "{text}"], "fidelity compares with --kv full: leave it out"),
        (["fidelity", "--text", "{text}", "--kv", "repkv", "--lengths", "300,400"], "give one of --lengths"),
        (["perplexity", "--text", "{text}", "--out", "x"], "--out is for passkey"),
        (["recall", "--text", "{text}", "--kv", "repkv,window"], "recall judges the indexes of --kv repkv"),
        (["perplexity", "--text", "{text}", "--lengths", "9999"], "has only"),
        (["perplexity", "--text", "{text}", "-c", "9999"], "one chunk takes 9999"),
        (["perplexity", "--text", "{text}", "-c", "2"], "-c 2: a chunk needs at least 3 tokens"),
        (["passkey", "--lengths", "256", "--kv", "{folder}/no.py"], "there is no such file"),
        (["passkey", "--lengths", "256", "--kv", "{folder}/no.py", "--out", "{folder}/x"], "there is no such file"),
        (["passkey", "--lengths", "256", "--png", "{folder}/no/x.png"], "No such file"),
        (["passkey", "--lengths", "256", "--png", "x.foo"], "a picture can be "),
        (["passkey", "--lengths", "256", "--png", "{folder}"], "name it NAME.png"),
        (["passkey", "--lengths", "256", "--png", "{folder}/x.png"], "x.png: Is a directory"),
        (["niah", "--text", "{folder}/empty"], "empty is empty"),
        (["perplexity", "--text", "{folder}/empty"], "empty is empty"),
        (["passkey", "--lengths", "256", "--out", "{folder}/no/x"], "No such file"),
        (["latest", "--lengths", "256", "--depths", "9"], "--lengths is too short: what is hidden has"),
        (["passkey", "--depths", "101"], "--depths: must be a whole number from 1 to 100"),
        (["passkey", "-c", "300", "--lengths", "400"], "do not fit: 0 of 300 are used"),
    ],
)
def test_wrong_flags_get_one_line(tiny, tmp_path, capsys, argv, message):
    (tmp_path / "text").write_text(PROSE)
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "x.png").mkdir()
    argv = [a.format(text=tmp_path / "text", folder=tmp_path) for a in argv]
    few = ["--depths", "1"] if argv[0] in ("passkey", "niah") else []
    assert main(["eval", argv[0], *few, *argv[1:], "-m", str(tiny)]) in (1, 2)
    err = capsys.readouterr().err
    assert message in err
    assert "internal error" not in err
