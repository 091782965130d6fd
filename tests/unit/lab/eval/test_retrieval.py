"""Retrieval tasks: exact lengths, each needle once in its place, results that are kept, and the command line."""

import errno
import json
import os

import numpy as np
import pytest

from pyggml_repkv.cli import progress
from pyggml_repkv.cli.main import main
from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError, RepkvError
from pyggml_repkv.lab.eval import heat_map
from pyggml_repkv.lab.eval.results_file import ResultsFile
from pyggml_repkv.lab.eval.retrieval import Asked, judged, prompt_of, questions
from pyggml_repkv.lab.eval.retrieval_tasks import TASKS


@pytest.fixture(scope="module")
def model(demo_model):
    with Model.load(demo_model) as loaded:
        yield loaded


PROSE = " ".join(f"On day {i} the ship went on, and nobody saw land." for i in range(40))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("n_tokens", [500, 4097])
@pytest.mark.parametrize("index", [0, 3, 9])
def test_the_prompt_has_its_length_and_the_answer_its_depth(model, task, n_tokens, index):
    asked = Asked(n_tokens, index, 10)
    prompt, expected, _ = prompt_of(model, task, asked, 1, PROSE)
    text = model.tokenizer.decode(prompt)
    if task == "kv":
        assert n_tokens - 80 < len(prompt) <= n_tokens
    else:
        assert len(prompt) == n_tokens
    assert 1 <= text.count(expected) <= 2
    assert abs(text.index(expected) / len(text) - asked.depth) < 0.05 + 350 / len(text)
    assert prompt_of(model, task, asked, 1, PROSE)[0] == prompt
    assert prompt_of(model, task, asked, 2, PROSE)[1] != expected or task == "niah"


def test_the_json_object_is_one_and_has_the_pair(model):
    prompt, expected, _ = prompt_of(model, "kv", Asked(3000, 1, 4), 1, None)
    text = model.tokenizer.decode(prompt)
    pairs = json.loads(text[text.index("{") : text.index("}") + 1])
    key = text.split('Key: "')[1].split('"')[0]
    assert pairs[key] == expected
    assert len(pairs) > 20


def test_a_chain_leads_to_its_value(model):
    prompt, expected, _ = prompt_of(model, "chain", Asked(1000, 0, 2), 1, None)
    text = model.tokenizer.decode(prompt)
    said = dict(line[4:-1].split(" = ") for line in text.splitlines() if line.startswith("VAR ") and " = " in line)
    name = text.rsplit("The value of VAR ", 1)[1].removesuffix(" is")
    steps = 0
    while not (value := said[name]).isdigit():
        name, steps = value.removeprefix("VAR "), steps + 1
    assert (value, steps) == (expected, 2)


def test_a_prompt_without_room_is_an_error(model):
    for task in TASKS:
        with pytest.raises(InputError, match="is too short"):
            prompt_of(model, task, Asked(20, 0, 1), 1, PROSE)


def test_an_answer_may_break_its_lines():
    assert judged(" swim in the\ncold river.", "swim in the cold river") == (True, 1.0)
    assert judged("He said: swim  in the cold river", "swim in the cold river") == (True, 1.0)
    assert judged("swim in\nthe hot river", "swim in the cold river") == (False, 12 / 22)
    assert judged("", "31415") == (False, 0.0)


@pytest.mark.parametrize("task", TASKS)
def test_a_text_begins_once(model, monkeypatch, task):
    plain = prompt_of(model, task, Asked(500, 0, 2), 1, PROSE)[0]
    monkeypatch.setattr(model.tokenizer, "add_bos", True)
    monkeypatch.setattr(model.tokenizer, "bos_id", 1)
    assert 1 not in plain
    prompt = prompt_of(model, task, Asked(500, 0, 2), 1, PROSE)[0]
    assert (prompt[0], prompt.count(1)) == (1, 1)
    assert len(prompt) <= 500


@pytest.mark.parametrize("index", range(10))
def test_a_needle_is_put_after_a_sentence(model, index):
    prompt, _, _ = prompt_of(model, "niah", Asked(1000, index, 10), 1, PROSE)
    before = model.tokenizer.decode(prompt).split("\n\nThe best thing")[0]
    assert before == "" or before.endswith(".")


@pytest.mark.parametrize("end", [".", "!", "?", '."', ".)", ".\n", "\u3002"])
def test_a_sentence_may_end_in_many_ways(model, end):
    text = (("on " * 20).strip() + end) * 50
    prompt, _, _ = prompt_of(model, "niah", Asked(600, 1, 3), 1, text)
    before = model.tokenizer.decode(prompt).split("\n\nThe best thing")[0]
    assert before.rstrip().endswith(end.rstrip())


def test_a_needle_stays_near_its_depth_where_no_sentence_ends(model):
    text = "Hello. " + "word and more of it, " * 1000
    for index in range(5):
        prompt, expected, _ = prompt_of(model, "niah", Asked(2000, index, 5), 1, text)
        found = model.tokenizer.decode(prompt)
        assert found.index(expected) / len(found) == pytest.approx((index + 0.5) / 5, abs=0.05)


def test_how_much_of_an_answer_is_there():
    assert [judged(answer, "31410") for answer in ("31415", "314", "no")] == [(False, 0.8), (False, 0.6), (False, 0.0)]


def test_depths_are_evenly_spaced():
    assert [a.depth for a in questions([500], 2)] == [0.25, 0.75]


@pytest.mark.parametrize("kv", ["full", "repkv"])
def test_the_demo_model_finds_the_key(demo_model, capsys, kv):
    argv = ["eval", "passkey", "-m", str(demo_model), "--lengths", "1500", "--depths", "2", "--kv", kv, "--json"]
    small = ["--n-local", "256", "--n-score", "128", "--positions", "far", "--n-dense", "0"]
    assert main([*argv, *(small if kv == "repkv" else [])]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["found"] == {kv: {"1500": [2, 2]}}
    blocks = [r["kv_stats"]["blocks"] for r in result["results"]]
    assert all(n > 0 for n in blocks) == (kv == "repkv")
    assert len({r["expected"] for r in result["results"]}) == 2
    assert np.isfinite([r["decode_ms"] for r in result["results"]]).all()


def test_what_is_known_is_not_asked_again(demo_model, tmp_path, capsys, monkeypatch):
    out, png = tmp_path / "results.jsonl", tmp_path / "map.png"
    argv = ["eval", "number", "-m", str(demo_model), "--lengths", "300,400", "--depths", "2", "--kv", "full,window"]
    argv += ["--out", str(out), "--json"]
    assert main([*argv, "--png", str(png)]) == 0
    first = json.loads(capsys.readouterr().out)
    assert png.read_bytes().startswith(b"\x89PNG")
    lines = out.read_text().splitlines()
    assert len(lines) == 8
    # After a crash in the middle of the last line, its question is asked again.
    out.write_text("\n".join(lines)[:-40])
    assert main(argv) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["found"] == first["found"]
    assert again["results"][:7] == first["results"][:7]
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
        ["-c", "500"],
        ["--rope-freq-base", "200000"],
        ["--text", "{text}"],
        ["--depths", "3"],
        ["-m", "{other}"],
        ["--kv", "{policy}"],
    ],
    ids=lambda change: " ".join(change[:2]),
)
def test_other_settings_are_asked_again(demo_model, tiny_model, tmp_path, capsys, change):
    files = {"text": tmp_path / "text", "policy": tmp_path / "mine.py", "other": tiny_model(n_layer=2, n_ctx=512)}
    files["text"].write_text(PROSE)
    files["policy"].write_text("from pyggml_repkv.memory.full.memory import FullMemory as make_policy")
    out = tmp_path / "results.jsonl"
    argv = ["eval", "passkey", "-m", str(demo_model), "--lengths", "300", "--depths", "1", "--out", str(out), "--json"]
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
    [(["--kv", "full,window", "--n-local", "512"], 2), (["--no-repack"], 1), (["--lengths", "300,300"], 1)],
)
def test_what_changes_no_answer_is_not_asked_again(demo_model, tmp_path, capsys, change, n_lines):
    out = tmp_path / "results.jsonl"
    argv = ["eval", "passkey", "-m", str(demo_model), "--lengths", "300", "--depths", "1", "--out", str(out), "--json"]
    assert main(argv) == main([*argv, *change]) == 0
    assert len(out.read_text().splitlines()) == n_lines


@pytest.mark.parametrize("field", [{"n_tokens": "a"}, {"found": "x"}, {"more": 1}, {"prompt_ms": None}])
def test_a_damaged_answer_is_one_line(demo_model, tmp_path, capsys, field):
    out = tmp_path / "results.jsonl"
    argv = ["eval", "passkey", "-m", str(demo_model), "--lengths", "300", "--depths", "1", "--out", str(out)]
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


def test_a_picture_that_fails_leaves_the_answers(demo_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(heat_map, "check_can_draw", lambda _: None)
    (tmp_path / "x.png").mkdir()
    argv = ["eval", "passkey", "-m", str(demo_model), "--lengths", "300", "--depths", "1", "--json"]
    assert main([*argv, "--png", str(tmp_path / "x.png")]) == 1
    out, err = capsys.readouterr()
    assert len(json.loads(out)["results"]) == 1
    assert "x.png: Is a directory" in err


def test_how_much_of_a_prompt_is_read_is_told(demo_model, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    argv = ["eval", "passkey", "-m", str(demo_model), "--lengths", "300", "--depths", "1", "-b", "100"]
    assert main(argv) == 0
    assert "read 100 of 300 tokens" in capsys.readouterr().err
    assert main([*argv, "--json"]) == 0
    assert capsys.readouterr().err == ""


def test_one_process_writes_to_a_file(tmp_path):
    path = str(tmp_path / "x")
    with ResultsFile(path) as file:
        file.add({"a": 1}, {"b": 2})
        with pytest.raises(InputError, match="another process writes to it"):
            ResultsFile(path)
    with ResultsFile(path) as file:
        assert file.get({"a": 1}) == {"b": 2}


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with ResultsFile(str(tmp_path / "x")) as file, pytest.raises(RepkvError, match="x: No space left on device"):
        file.add({"a": 1}, {"b": 2})


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/full", "/tmp"])
def test_what_is_no_file_is_refused(name):
    with pytest.raises(InputError, match=f"--out {name}: not a regular file"):
        ResultsFile(name)


def test_a_file_of_another_kind_is_refused(tmp_path):
    for text in ("hello\n", '{"settings": {}}\n', "[1, 2]\n", "[" * 100_000 + "\n"):
        (tmp_path / "x").write_text(text)
        with pytest.raises(InputError, match="line 1 is no result"):
            ResultsFile(str(tmp_path / "x"))
    (tmp_path / "x").write_text("a note without an end")
    with pytest.raises(InputError, match="last line is no result"):
        ResultsFile(str(tmp_path / "x"))
    assert (tmp_path / "x").read_text() == "a note without an end"
    (tmp_path / "x").write_text('{"sett')
    with ResultsFile(str(tmp_path / "x")):
        pass
    assert (tmp_path / "x").read_text() == ""
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not a text"):
        ResultsFile(str(tmp_path / "x"))


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
        (
            ["recall", "--text", "{text}", "--kv", "repkv,window"],
            "recall judges the blocks of one memory, as --kv repkv",
        ),
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
    ],
)
def test_wrong_flags_get_one_line(demo_model, tmp_path, capsys, argv, message):
    (tmp_path / "text").write_text(PROSE)
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "x.png").mkdir()
    argv = [a.format(text=tmp_path / "text", folder=tmp_path) for a in argv]
    few = ["--depths", "1"] if argv[0] in ("passkey", "niah") else []
    assert main(["eval", *argv, "-m", str(demo_model), *few]) in (1, 2)
    err = capsys.readouterr().err
    assert message in err
    assert "internal error" not in err
