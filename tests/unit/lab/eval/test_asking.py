"""A haystack is read once, in whole steps, and every question by a fork that ends with it."""

import contextlib
import logging

import numpy as np
import pytest

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import ContextFullError, InputError
from pyggml_repkv.lab.eval.asking import answers
from pyggml_repkv.memory.config import MemoryConfig

SMALL = MemoryConfig(
    kv="repkv", n_ctx=256, n_batch=32, n_sink=4, n_local=32, n_score=16, n_dense=0, block="fixed:16", budget=48,
    index="representatives:4", chunk_budget=48,
)  # fmt: skip
HAYSTACK = np.random.default_rng(5).integers(0, 256, 150).tolist()
QUESTIONS = [(np.random.default_rng(i).integers(0, 256, 20).tolist(), 5) for i in range(3)]


@pytest.fixture
def model(tiny_model):
    with Model.load(tiny_model(n_ctx=256), repack=False) as loaded:
        yield loaded


class FakeSession:
    """Writes down what is read, in its own list of calls."""

    n_batch, n_ctx_train = 4, 100

    def __init__(self, log, forks=True, policy=None):
        self.log, self.forks = log, forks
        self.policy = policy or type("Policy", (), {"n_ctx": 100, "bounded": False})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.log.append("close")

    def close(self):
        self.log.append("close")

    def read(self, tokens):
        self.log.append(("read", len(tokens)))

    def prefill(self, tokens):
        self.log.append(("ask", tuple(tokens)))
        return np.eye(8)[3]

    def decode(self, token):
        self.log.append("decode")
        return np.eye(8)[token + 1]

    def fork(self):
        if not self.forks:
            raise InputError("it cannot be forked")
        self.log.append("fork")
        return FakeSession(self.log)

    def stats(self):
        return {}


class FakeModel:
    def __init__(self, **options):
        self.log, self.options = [], options
        self.tokenizer = type(
            "Tokenizer", (), {"eog_ids": frozenset({6}), "decode": staticmethod(lambda ids: str(ids))}
        )

    def session(self, _):
        self.log.append("open")
        return FakeSession(self.log, **self.options)


def test_a_haystack_is_read_once_and_forks_are_asked():
    model = FakeModel()
    got = list(answers(model, MemoryConfig(), range(10), [([i, i], 2) for i in range(3)]))
    begin = ["open", "fork", "close", "close", "open", ("read", 4), ("read", 4), ("read", 2)]
    assert model.log == [*begin, *(x for i in range(3) for x in ("fork", ("ask", (i, i)), "decode", "close")), "close"]
    assert [answer.n_shared for answer in got] == [3, 3, 3]
    assert [answer.text for answer in got] == ["[3, 4]"] * 3
    assert len({answer.shared_ms for answer in got}) == 1
    # The reading counts once in all.
    assert sum(answer.prompt_ms for answer in got) >= got[0].shared_ms
    assert all(answer.prompt_ms < 1e3 + answer.shared_ms for answer in got)


def test_an_answer_ends_with_its_last_token():
    model = FakeModel()
    (answer,) = answers(model, MemoryConfig(), range(3), [([1], 20)])
    assert answer.text == "[3, 4, 5]"
    assert model.log == ["open", ("read", 3), ("ask", (1,)), *["decode"] * 3, "close"]


def test_a_memory_that_cannot_be_forked_reads_for_each_question(caplog):
    model = FakeModel(forks=False)
    with caplog.at_level(logging.WARNING):
        got = list(answers(model, MemoryConfig(), range(4), [([1], 1), ([2], 1)]))
    each = [["open", ("read", 4), ("ask", (i,)), "close"] for i in (1, 2)]
    assert model.log == ["open", "close", *each[0], *each[1]]
    assert [answer.n_shared for answer in got] == [1, 1]
    assert [record.message for record in caplog.records] == [
        "the haystack is read for each question: it cannot be forked"
    ]


def test_what_does_not_fit_is_known_before_anything_is_read():
    model = FakeModel()
    with pytest.raises(ContextFullError, match="101 tokens do not fit"):
        list(answers(model, MemoryConfig(), range(90), [([1, 2], 3), ([1] * 8, 4)]))
    assert not any(isinstance(call, tuple) for call in model.log)
    assert len(list(answers(model, MemoryConfig(), range(90), [([1, 2], 3), ([1] * 8, 3)]))) == 2


def test_how_much_is_read_is_told():
    told = []

    @contextlib.contextmanager
    def progress(n_tokens):
        told.append(n_tokens)
        yield lambda *done: told.append(done)

    list(answers(FakeModel(), MemoryConfig(), range(10), [([1], 1), ([1], 1)], progress))
    assert told == [10, (4, 10), (8, 10), (10, 10)]


@pytest.mark.parametrize("memory", [SMALL, MemoryConfig(kv="full", n_ctx=256, n_batch=32)], ids=lambda m: m.kv)
def test_a_fork_answers_as_a_session_of_its_own(model, memory):
    together = list(answers(model, memory, HAYSTACK, QUESTIONS))
    alone = [next(answers(model, memory, HAYSTACK, [question])) for question in QUESTIONS]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [answer.n_shared for answer in together + alone] == [3, 3, 3, 1, 1, 1]
    assert len({answer.text for answer in together}) > 1
    for answer in together:
        assert answer.kv_stats["policy"] == memory.kv


def test_values_that_are_kept_transposed_are_read_for_each_question(model):
    memory = MemoryConfig(kv="full", n_ctx=256, n_batch=32, flash_attn=False)
    assert [answer.n_shared for answer in answers(model, memory, HAYSTACK, QUESTIONS)] == [1, 1, 1]
