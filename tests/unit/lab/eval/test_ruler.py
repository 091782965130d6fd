"""RULER's tasks: structure, lengths, scores, which questions share a document, and the command line."""

import json
import re
from collections import Counter

import numpy as np
import pytest

from pyggml_repkv.cli.main import main
from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError
from pyggml_repkv.lab.eval import ruler
from pyggml_repkv.lab.eval.ruler import RulerResult, Sample, fitted, prompt_tokens, run_ruler, score, split_prompts
from pyggml_repkv.lab.eval.ruler_tasks import FILLER, TASKS, Source
from pyggml_repkv.memory.config import MemoryConfig

RNG = np.random.default_rng(3)
WORDS = ["".join(RNG.choice([*"abcdefghijklmnop"], 7)) for _ in range(900)]
TEXT = " ".join(f"On day {i} the {WORDS[i]} met a {WORDS[-i]}." for i in range(len(WORDS)))


@pytest.fixture(scope="module")
def model(demo_model):
    with Model.load(demo_model) as loaded:
        yield loaded


def made(name, n, *, length=8192, seed=1):
    return TASKS[name].make(np.random.default_rng(seed), Source(TEXT, length), n)


def said_in(text):
    return re.findall(r"Among the hidden (number|uuid)s of (\S+) is (\S+)\.", text)


NIAH = {
    # needles of the haystack, of what kind, keys, values of a key, asked
    "niah_single_1": (1, "noise", "number", 1, 1, 1),
    "niah_single_2": (1, "text", "number", 1, 1, 1),
    "niah_single_3": (1, "text", "uuid", 1, 1, 1),
    "niah_multikey_1": (4, "text", "number", 4, 1, 1),
    "niah_multikey_2": (51, "needles", "number", 51, 1, 1),
    "niah_multikey_3": (51, "needles", "uuid", 51, 1, 1),
    "niah_multivalue": (4, "text", "number", 1, 4, 1),
    "niah_multiquery": (4, "text", "number", 4, 1, 4),
}


@pytest.mark.parametrize("name", NIAH)
def test_needles_are_as_many_and_of_the_kind(name):
    n_needles, haystack, kind, n_keys, n_values, n_asked = NIAH[name]
    document = made(name, 50)
    said = said_in(document.text)
    assert len(said) == len(set(said)) == n_needles
    assert {each[0] for each in said} == {kind}
    assert Counter(Counter(key for _, key, _ in said).values()) == {n_values: n_keys}
    form = r"\d{7}" if kind == "number" else r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    assert all(re.fullmatch(form, value) for _, _, value in said)
    keys_are_uuids = all(re.fullmatch(r"[0-9a-f-]{36}", key) for _, key, _ in said)
    assert keys_are_uuids == (name == "niah_multikey_3")
    owned = {}
    for _, key, value in said:
        owned.setdefault(key, set()).add(value)
    for question in document.questions:
        asked = [key for key in owned if key in question.text]
        assert len(asked) == n_asked
        assert all(key in question.prefix for key in asked)
        assert set(question.expected) == {value for key in asked for value in owned[key]}
        assert len(question.expected) == n_asked * n_values
    lines = document.text.splitlines()
    assert lines.count(FILLER.strip()) == (51 if haystack == "noise" else 0)
    assert ("On day 3 the" in document.text) == (haystack == "text")


def test_every_needle_among_needles_can_be_asked_for():
    assert len(made("niah_multikey_2", 50).questions) == 51
    assert len(made("niah_multikey_1", 50).questions) == 4


def test_needles_stand_between_sentences():
    places = set()
    for seed in range(30):
        before, after = made("niah_single_2", 700, seed=seed).text.split("Among the hidden")
        assert before.endswith(("\n", ". "))
        assert re.match(r".*?\.( On day|\n)", after)
        places.add(round(len(before) / (len(before) + len(after)), 1))
    assert len(places) > 6


def test_a_short_text_is_repeated():
    text = TASKS["niah_single_2"].make(np.random.default_rng(1), Source("A word. ", 4096), 41).text
    assert text.split().count("word.") == 20


def test_variables_are_a_chain_after_an_example():
    document = made("vt", 30)
    ((question),) = document.questions
    said = re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)\.", document.text)
    example, asked = said[:5], said[5:]
    for chain, size in ((example, 3), (asked, 5)):
        assert {len(name) for name, _ in chain} == {size}
        assert [value for _, value in chain[1:]] == [name for name, _ in chain[:-1]]
        assert re.fullmatch(r"\d{5}", chain[0][1])
    assert question.expected == tuple(name for name, _ in asked)
    assert asked[0][1] in question.text
    # The example ends with its answer.
    assert " ".join(name for name, _ in example) + "\n\n" in document.text
    assert document.text.count(FILLER.strip()) == 10 + 30 + 5


@pytest.mark.parametrize(("length", "n_common", "n_rare"), [(8192, 30, 3), (2048, 6, 1)])
def test_ten_words_are_more_common(length, n_common, n_rare):
    document = made("cwe", 40, length=length)
    example, listed = document.text.split("\n1. ")[0], document.text.rsplit("Here is", 1)[1]
    counts = Counter(re.findall(r"\d+\. (\w+)", listed))
    (question,) = document.questions
    assert {counts[word] for word in question.expected} == {n_common}
    assert Counter(counts.values()) == {n_common: 10, n_rare: 40}
    assert all(word in TEXT.split() or f"{word}." in TEXT.split() for word in counts)
    assert "Here is" in example
    assert re.search(r"10\. \w+\nHere is", document.text)


def test_a_text_with_too_few_words_is_one_line():
    with pytest.raises(InputError, match=r"cwe of 8192 tokens takes 40 words, and --text has 1$"):
        TASKS["cwe"].make(np.random.default_rng(1), Source("word " * 100, 8192), 40)


def test_words_come_as_often_as_a_zeta_distribution_says():
    document = made("fwe", 2000)
    counts = Counter(document.text.split("words. ", 1)[1].split())
    (question,) = document.questions
    most = [word for word, _ in counts.most_common(4)]
    assert most == ["...", *question.expected]
    assert [counts[word] for word in most] == [int(2000 * 6 / np.pi**2 / k**2) for k in (1, 2, 3, 4)]
    assert all(re.fullmatch("[a-z]{6}", word) for word in question.expected)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [2048, 8192])
def test_prompt_and_answer_have_nearly_the_length_and_no_more(model, name, length):
    task = TASKS[name]
    document = fitted(model, task, Source(TEXT, length), [1, 2])
    asked = document.questions[: task.n_shared]
    assert len(asked) == task.n_shared
    longest = max(len(prompt_tokens(model, document.text, question)) for question in asked) + task.n_answer
    assert 0.95 * length - 130 < longest <= length
    assert fitted(model, task, Source(TEXT, length), [1, 2]) == document
    assert fitted(model, task, Source(TEXT, length), [1, 3]).questions != document.questions


@pytest.mark.parametrize("name", TASKS)
def test_a_length_without_room_is_one_line(model, name):
    with pytest.raises(InputError, match=r"--lengths 60 is too short: .* alone take \d+ tokens"):
        fitted(model, TASKS[name], Source(TEXT, 60), [1])


@pytest.mark.parametrize("template", [True, False])
def test_prompts_part_where_the_question_begins(model, monkeypatch, template):
    if not template:
        monkeypatch.setattr(model, "chat_template", None)
    document = made("niah_multikey_1", 300)
    haystack, tails = split_prompts(model, document.text, document.questions)
    decode = model.tokenizer.decode
    for question, tail in zip(document.questions, tails, strict=True):
        prompt = decode([*haystack, *tail])
        assert document.text + question.text in prompt
        assert prompt.endswith(question.prefix)
        assert question.text[-20:] in decode(tail)
        assert question.expected[0] in decode(haystack)
        assert question.expected[0] not in decode(tail)
    assert document.text[-100:-2] in decode(haystack)
    assert (prompt.count("<|im_start|>") > 1) == template
    # One question alone has the same haystack.
    assert split_prompts(model, document.text, document.questions[:1])[0][: len(haystack)] == haystack


def test_a_score_is_the_share_of_the_strings_in_the_answer():
    assert score("it is ABC, and\x0112", ["abc", "12", "x"]) == pytest.approx(2 / 3)
    assert score("", ["x"]) == 0
    assert score("x", ["x"]) == 1


def result(task, kv, length, points):
    return RulerResult(task, kv, length, 0, length, ["x"], "", points, 1, 1.0, 1.0, 1.0, {})


def test_scores_are_averaged_by_task_and_then_over_tasks():
    results = [result("vt", "full", 4096, 1.0), result("vt", "full", 4096, 0.5), result("fwe", "full", 4096, 0.25),
               result("vt", "window", 4096, 0.0), result("fwe", "window", 4096, 1 / 3)]  # fmt: skip
    done = ruler.summary(results)
    assert done["scores"]["vt"] == {"full": {"4096": 75.0}, "window": {"4096": 0.0}}
    assert done["average"] == {"full": {"4096": 50.0}, "window": {"4096": pytest.approx(100 / 6)}}
    assert ruler.table(done).splitlines() == [
        "         full 4096  window 4096",
        "vt            75.0          0.0",
        "fwe           25.0         33.3",
        "average       50.0         16.7",
    ]


def test_documents_are_shared_as_the_task_says(tiny_model):
    memory = MemoryConfig(n_ctx=4096)
    with Model.load(tiny_model(n_ctx=4096, n_layer=1), repack=False) as model:
        for name, n, shared in (("niah_multikey_2", 12, [10] * 10 + [2] * 2), ("vt", 2, [1, 1])):
            asked = [Sample(3500, i) for i in range(n)]
            found = list(run_ruler(model, memory, name, asked, 1))
            assert [each.n_shared for each in found] == shared
            assert [each.sample for each in found] == list(range(n))
            assert len({tuple(each.expected) for each in found}) == n
            # A sample is the same however many others there are.
            (last,) = run_ruler(model, memory, name, asked[-1:], 1)
            assert (last.expected, last.n_shared) == (found[-1].expected, 1)
            assert last.answer == found[-1].answer


def test_what_is_known_is_not_asked_again(tiny_model, tmp_path, capsys, monkeypatch):
    out, text = tmp_path / "out.jsonl", tmp_path / "text"
    text.write_text(TEXT)
    model = tiny_model(n_layer=1, n_ctx=4096)
    argv = ["eval", "ruler", "-m", str(model), "--tasks", "niah_single_1,fwe", "--lengths", "1500"]
    argv += ["--samples", "2", "--kv", "full,window", "--out", str(out)]
    assert main([*argv, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert [*first["scores"]] == ["niah_single_1", "fwe"]
    assert [*first["average"]] == ["full", "window"]
    assert len(first["results"]) == len(out.read_text().splitlines()) == 8
    monkeypatch.setattr(Model, "session", None)
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"] == first["results"]
    # Neither task is made from the text.
    assert main([*argv, "--text", str(text)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"  (from {out})\n") == 8
    assert re.search(r"^ +full 1500  window 1500\nniah_single_1 +\d", printed, re.M)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            [],
            "niah_single_2, niah_single_3, niah_multikey_1, niah_multivalue, niah_multiquery, cwe of ruler need a text",
        ),
        (["--tasks", "cwe"], "cwe of ruler need a text: --text FILE, or leave them out: --tasks vt"),
        (["--tasks", "vt,qa_1"], "--tasks: 'qa_1' is none of niah_single_1, "),
        (["--tasks", ""], "--tasks: '' is none of "),
        (["--tasks", "vt", "--samples", "0"], "--samples: must be a whole number from 1 to 1000"),
        (["--tasks", "vt", "--depths", "2"], "--depths is for passkey"),
        (["--tasks", "vt", "--png", "x.png"], "--png is for passkey"),
        (["--tasks", "vt", "--lengths", "256"], "--lengths 256 is too short: "),
        (["--tasks", "cwe", "--text", "{text}"], "words, and --text has 1"),
        (["--tasks", "fwe", "--lengths", "512", "-c", "300"], "do not fit: 0 of 300 are used"),
    ],
)
def test_wrong_flags_get_one_line(demo_model, tmp_path, capsys, argv, message):
    (tmp_path / "text").write_text("word. " * 50)
    argv = [a.format(text=tmp_path / "text") for a in argv]
    assert main(["eval", "ruler", "-m", str(demo_model), *argv]) in (1, 2)
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_other_tasks_have_no_samples(capsys):
    assert main(["eval", "passkey", "-m", "none", "--samples", "3"]) == 2
    assert "--samples is for ruler; passkey has no use for it" in capsys.readouterr().err
