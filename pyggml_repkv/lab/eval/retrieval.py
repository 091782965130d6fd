"""Asks the questions of retrieval_tasks.py at every length and depth, and judges the answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np

from pyggml_repkv.engine.model import Model
from pyggml_repkv.lab.eval.asking import Progress, answers
from pyggml_repkv.lab.eval.haystack import FILLER, fill_json, fill_text
from pyggml_repkv.lab.eval.retrieval_tasks import TASKS, Question, pairs
from pyggml_repkv.memory.config import MemoryConfig


@dataclass(frozen=True, slots=True)
class RetrievalResult:
    """One answer. length: the wanted prompt length; n_tokens: the prompt's real one, haystack and question; found:
    whether the answer contains all of `expected`, whatever the line breaks, and no rival before; share: how much of
    `expected` the answer begins with, 1 if found; the rest as in asking.Answer.
    """

    task: str
    kv: str
    length: int
    n_tokens: int
    depth: float
    expected: str
    answer: str
    found: bool
    share: float
    n_shared: int
    shared_ms: float
    prompt_ms: float
    decode_ms: float
    kv_stats: dict[str, object]


@dataclass(frozen=True, slots=True)
class Asked:
    """Identifies a question: depth number depth_index of n_depths evenly spaced ones."""

    length: int
    depth_index: int
    n_depths: int

    @property
    def depth(self) -> float:
        return (self.depth_index + 0.5) / self.n_depths


def questions(lengths: Sequence[int], n_depths: int) -> list[Asked]:
    return [Asked(length, i, n_depths) for length in lengths for i in range(n_depths)]


_FULL_STOPS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")
_CLOSING = " \n\r\t\"')]*_\u00bb\u2019\u201d\u300d"


@dataclass(frozen=True, slots=True)
class Reading:
    """A haystack as token ids, and its questions, in the order of depths, as what they ask and as token ids."""

    haystack: list[int]
    questions: tuple[Question, ...]
    tails: list[list[int]]


def reading_of(model: Model, task: str, length: int, n_depths: int, seed: int, text: str | None) -> Reading:
    """Returns what is read and asked; the prompt of the longest question has `length` tokens, or for `kv` less than a
    pair fewer. Only the arguments decide, so every policy gets the same. text: the filler, repeated if it is too short;
    None: the usual filler. Raises InputError for a length without room for the needles.
    """
    encode, bos = partial(model.tokenizer.encode, add_special=False), model.tokenizer.encode("")
    rng = np.random.default_rng([seed, length, n_depths])
    quiz = TASKS[task].make(rng, [asked.depth for asked in questions([length], n_depths)])
    tails = [encode(question.text) for question in quiz.questions]
    n_tokens = length - len(bos) - max(map(len, tails))
    if task == "kv":
        haystack = fill_json(encode, quiz.head, quiz.needles, n_tokens, pairs(rng))
    else:
        filler = encode(text or FILLER)
        ends = _sentence_ends(model, filler) if text else ()
        haystack = fill_text(encode, quiz.head, quiz.needles, n_tokens, filler, ends)
    return Reading([*bos, *haystack], quiz.questions, tails)


def _sentence_ends(model: Model, tokens: Sequence[int]) -> set[int]:
    # A quotation mark or a line break may follow the full stop.
    return {t for t in set(tokens) if model.tokenizer.decode([t]).rstrip(_CLOSING).endswith(_FULL_STOPS)}


def run_retrieval(
    model: Model,
    memory: MemoryConfig,
    task: str,
    asked: Sequence[Asked],
    seed: int,
    text: str | None = None,
    progress: Progress = lambda _: nullcontext(),
) -> Iterator[RetrievalResult]:
    """Yields the answers to questions of one length and number of depths, which share a haystack that is read once.

    Raises as `reading_of` and `answers` do.
    """
    length, n_depths = asked[0].length, asked[0].n_depths
    reading = reading_of(model, task, length, n_depths, seed, text)
    picked = [(each, reading.questions[each.depth_index], reading.tails[each.depth_index]) for each in asked]
    given = answers(
        model, memory, reading.haystack, [(tail, question.n_answer) for _, question, tail in picked], progress
    )
    for (each, question, tail), answer in zip(picked, given, strict=True):
        found, share = judged(answer.text, question.expected, question.rivals)
        yield RetrievalResult(
            task=task,
            kv=memory.kv,
            length=length,
            n_tokens=len(reading.haystack) + len(tail),
            depth=each.depth,
            expected=question.expected,
            answer=answer.text,
            found=found,
            share=share,
            n_shared=answer.n_shared,
            shared_ms=answer.shared_ms,
            prompt_ms=answer.prompt_ms,
            decode_ms=answer.decode_ms,
            kv_stats=answer.kv_stats,
        )


def judged(answer: str, expected: str, rivals: Sequence[str] = ()) -> tuple[bool, float]:
    """Returns `found` and `share` of RetrievalResult."""
    answer, expected = (" ".join(text.split()) for text in (answer, expected))
    before, is_there, _ = answer.partition(expected)
    found = bool(is_there) and not any(rival in before for rival in rivals)
    same = list(takewhile(lambda pair: pair[0] == pair[1], zip(answer, expected, strict=False)))
    return found, 1.0 if found else len(same) / len(expected)


def summary(results: Sequence[RetrievalResult]) -> dict[str, Any]:
    """Returns the object of `--json`: found [n, of] by policy and length, and every result."""
    found: dict[str, dict[str, list[int]]] = {}
    for r in results:
        counts = found.setdefault(r.kv, {}).setdefault(str(r.length), [0, 0])
        counts[0] += r.found
        counts[1] += 1
    return {"task": results[0].task if results else "", "found": found, "results": [asdict(r) for r in results]}
