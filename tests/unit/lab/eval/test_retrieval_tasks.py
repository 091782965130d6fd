"""Haystacks of exact lengths, a needle for each depth that no other makes wrong, and how answers are judged."""

import json
import re

import numpy as np
import pytest

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError
from pyggml_repkv.lab.eval import words
from pyggml_repkv.lab.eval.retrieval import judged, questions, reading_of
from pyggml_repkv.lab.eval.retrieval_tasks import MAX_DEPTHS, N_HOPS, N_KEYS, N_VALUES, TASKS

PROSE = " ".join(f"On day {i} the ship went on, and nobody saw land." for i in range(40))


@pytest.fixture(scope="module")
def model(demo_model):
    with Model.load(demo_model) as loaded:
        yield loaded


def text_of(model, reading):
    return model.tokenizer.decode(reading.haystack)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("n_tokens", "n_depths"), [(4097, 1), (4097, 10), (8000, 5)])
def test_the_prompt_has_its_length_and_the_answer_its_depth(model, task, n_tokens, n_depths):
    reading = reading_of(model, task, n_tokens, n_depths, 1, PROSE)
    text = text_of(model, reading)
    longest = len(reading.haystack) + max(map(len, reading.tails))
    if task == "kv":
        assert n_tokens - 80 < longest <= n_tokens
    else:
        assert longest == n_tokens
    for asked, question in zip(questions([n_tokens], n_depths), reading.questions, strict=True):
        # Among so many needles, each lies a little off.
        assert abs(text.index(question.expected) / len(text) - asked.depth) < 0.07 + 350 / len(text)
    again, other = (reading_of(model, task, n_tokens, n_depths, seed, PROSE) for seed in (1, 2))
    assert again == reading
    assert {q.expected for q in other.questions} != {q.expected for q in reading.questions}


@pytest.mark.parametrize("task", TASKS)
def test_no_needle_makes_another_answer_wrong(model, task):
    quiz = TASKS[task].make(np.random.default_rng(1), [asked.depth for asked in questions([1], MAX_DEPTHS)])
    expected = [question.expected for question in quiz.questions]
    assert len(expected) == MAX_DEPTHS
    assert len({question.text for question in quiz.questions}) == MAX_DEPTHS
    if task != "first":
        assert len(set(expected)) == MAX_DEPTHS
    said = [text for _, text in quiz.needles]
    for question in quiz.questions:
        holders = [text for text in said if question.expected in text]
        assert len(holders) == 1
        # Nothing else is said of what the question names last, but older values.
        *_, name = re.findall(r"[a-z]+-[a-z]+|VAR [A-Z]{3}|in [A-Z]\w+ [A-Z]\w+|[0-9a-f-]{36}", question.text)
        n_said = {"latest": N_VALUES, "first": 1}.get(task, 1)
        assert sum(name in text for text in said) == n_said


@pytest.mark.parametrize("task", TASKS)
def test_a_question_does_not_lie_in_the_haystack(model, task):
    reading = reading_of(model, task, 2000, 3, 1, PROSE)
    text = text_of(model, reading)
    for question, tail in zip(reading.questions, reading.tails, strict=True):
        assert question.text not in text
        assert model.tokenizer.decode(tail) == question.text


def test_the_json_object_is_one_and_has_the_pairs(model):
    reading = reading_of(model, "kv", 3000, 4, 1, None)
    for question in reading.questions:
        text = text_of(model, reading) + question.text
        pairs = json.loads(text[text.index("{") : text.index("}") + 1])
        assert pairs[question.text.split('Key: "')[1].split('"')[0]] == question.expected
        assert len(pairs) > 20


def test_a_chain_leads_to_its_value(model):
    reading = reading_of(model, "chain", 2000, 5, 1, None)
    lines = [line for line in text_of(model, reading).splitlines() if line.startswith("VAR ")]
    said = dict(line[4:-1].split(" = ") for line in lines)
    assert len(said) == len(lines) == 5 * (N_HOPS + 1)
    seen = [line[4:7] for line in lines]
    for question in reading.questions:
        name = question.text.rsplit("The value of VAR ", 1)[1].removesuffix(" is")
        for _ in range(N_HOPS):
            assert seen.index(said[name].removeprefix("VAR ")) < seen.index(name)
            name = said[name].removeprefix("VAR ")
        assert said[name] == question.expected


def test_one_of_several_keys_with_names_that_are_alike(model):
    text = text_of(model, reading := reading_of(model, "multikey", 3000, 3, 1, None))
    keys = dict(re.findall(r"The pass key of (\S+) is (\d+)", text))
    for question in reading.questions:
        name = question.text.split()[-2]
        assert keys[name] == question.expected
        assert sum(other.endswith(name[name.index("-") :]) for other in keys) == N_KEYS
    assert len(set(keys.values())) == len(keys) == 3 * N_KEYS


def test_the_latest_value_is_the_last_in_the_text(model):
    text = text_of(model, reading := reading_of(model, "latest", 3000, 4, 1, None))
    for question in reading.questions:
        name = question.text.split()[-2]
        values = re.findall(rf"The new code of {name} is (\d+)\.", text)
        assert values == [*question.rivals, question.expected]
        assert len(set(values)) == N_VALUES


def test_the_first_of_two_comes_first_in_the_text_and_anywhere_in_the_question(model):
    text = text_of(model, reading := reading_of(model, "first", 6000, 40, 1, None))
    said_first = 0
    for question in reading.questions:
        (other,) = question.rivals
        assert text.index(f"the {question.expected} arrived") < text.index(f"the {other} arrived")
        said_first += question.text.index(question.expected) < question.text.index(other)
    assert 8 < said_first < 32


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_without_room_is_an_error(model, task):
    with pytest.raises(InputError, match=r"--lengths is too short: what is hidden has \d+ tokens, and \d+ are left"):
        reading_of(model, task, 20, 1, 1, PROSE)


@pytest.mark.parametrize("task", TASKS)
def test_a_text_begins_once(model, monkeypatch, task):
    plain = reading_of(model, task, 700, 2, 1, PROSE).haystack
    monkeypatch.setattr(model.tokenizer, "add_bos", True)
    monkeypatch.setattr(model.tokenizer, "bos_id", 1)
    assert 1 not in plain
    reading = reading_of(model, task, 700, 2, 1, PROSE)
    assert (reading.haystack[0], reading.haystack.count(1)) == (1, 1)
    assert len(reading.haystack) + max(map(len, reading.tails)) <= 700


def test_needles_are_put_after_a_sentence(model):
    before = text_of(model, reading_of(model, "niah", 2000, 10, 1, PROSE)).split("\n\nThe best thing")[:-1]
    assert len(before) == 10
    assert all(part == "" or part.endswith(".") for part in before)


@pytest.mark.parametrize("end", [".", "!", "?", '."', ".)", ".\n", "\u3002"])
def test_a_sentence_may_end_in_many_ways(model, end):
    text = (("on " * 20).strip() + end) * 50
    before = text_of(model, reading_of(model, "niah", 600, 1, 1, text)).split("\n\nThe best thing")[0]
    assert before.rstrip().endswith(end.rstrip())


def test_a_needle_stays_near_its_depth_where_no_sentence_ends(model):
    reading = reading_of(model, "niah", 2000, 5, 1, "Hello. " + "word and more of it, " * 1000)
    text = text_of(model, reading)
    for index, question in enumerate(reading.questions):
        assert text.index(question.expected) / len(text) == pytest.approx((index + 0.5) / 5, abs=0.05)


def test_an_answer_may_break_its_lines():
    assert judged(" swim in the\ncold river.", "swim in the cold river") == (True, 1.0)
    assert judged("He said: swim  in the cold river", "swim in the cold river") == (True, 1.0)
    assert judged("swim in\nthe hot river", "swim in the cold river") == (False, 12 / 22)
    assert judged("", "31415") == (False, 0.0)


def test_a_rival_before_the_answer_makes_it_wrong():
    assert judged(" 31415, once 27182", "31415", ["27182"]) == (True, 1.0)
    assert judged(" 27182, then 31415", "31415", ["27182"]) == (False, 0.0)


def test_how_much_of_an_answer_is_there():
    assert [judged(answer, "31410") for answer in ("31415", "314", "no")] == [(False, 0.8), (False, 0.6), (False, 0.0)]


def test_depths_are_evenly_spaced():
    assert [a.depth for a in questions([500], 2)] == [0.25, 0.75]


def test_words_differ_and_are_as_many_as_asked_for():
    rng = np.random.default_rng(1)
    for drawn in (
        words.names(rng, 5000),
        words.numbers(rng, 500),
        words.uuids(rng, 50),
        words.letters(rng, 20, 3, "ab8"),
    ):
        assert len(set(drawn)) == len(drawn)
    assert {len(n) for n in words.numbers(rng, 500)} == {5}
    groups = words.groups_of_names(rng, 200, 3)
    assert len({name.split("-")[1] for group in groups for name in group}) == 200
    assert all(len(set(group)) == 3 for group in groups)
    with pytest.raises(InputError, match="different names are needed"):
        words.names(rng, 10**6)
    with pytest.raises(InputError, match="different nouns are needed"):
        words.groups_of_names(rng, 10**6)
