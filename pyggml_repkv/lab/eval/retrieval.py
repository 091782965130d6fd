"""Asks the questions of retrieval_tasks.py at every length and depth, and judges the answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np

from pyggml_repkv.engine.model import Model
from pyggml_repkv.engine.session import OnProgress
from pyggml_repkv.lab.eval.retrieval_tasks import FILLER, TASKS, build_json_prompt, build_prompt, pairs
from pyggml_repkv.memory.config import MemoryConfig


@dataclass(frozen=True, slots=True)
class RetrievalResult:
    """One answer. length: the wanted prompt length; n_tokens: the prompt's real one; found: whether the answer contains
    all of `expected`, whatever the line breaks; share: how much of `expected` the answer begins with, 1 if found;
    prompt_ms: of the prompt; decode_ms: of one token.
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
    prompt_ms: float
    decode_ms: float
    kv_stats: dict[str, object]

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> RetrievalResult:
        """Returns the result that `asdict` turned into `fields`. Raises TypeError or ValueError for anything else."""
        result = cls(**fields)
        for name, kinds in _KINDS.items():
            if type(fields[name]) not in kinds:
                raise ValueError(name)
        return result


_NUMBER = (int, float)
_KINDS: dict[str, tuple[type, ...]] = {
    "task": (str,), "kv": (str,), "length": (int,), "n_tokens": (int,), "depth": _NUMBER, "expected": (str,),
    "answer": (str,), "found": (bool,), "share": _NUMBER, "prompt_ms": _NUMBER, "decode_ms": _NUMBER,
    "kv_stats": (dict,),
}  # fmt: skip


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


def prompt_of(
    model: Model, task: str, asked: Asked, seed: int, text: str | None
) -> tuple[list[int], str, int]:  # fmt: skip
    """Returns token ids, the expected answer, and how many tokens it may take. Only seed, length and depth decide, so
    every policy gets the same prompt. text: the haystack, repeated if it is too short; None: the usual filler.
    """
    encode, n_bos = partial(model.tokenizer.encode, add_special=False), len(bos := model.tokenizer.encode(""))
    rng = np.random.default_rng([seed, asked.length, asked.depth_index])
    question = TASKS[task].make(rng, asked.depth)
    if task == "kv":
        prompt = build_json_prompt(encode, question, asked.length - n_bos, pairs(rng))
    else:
        haystack = encode(text or FILLER)
        ends = _sentence_ends(model, haystack) if text else ()
        prompt = build_prompt(encode, question, asked.length - n_bos, haystack, ends)
    return [*bos, *prompt], question.expected, question.n_answer


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
    progress: Callable[[int], AbstractContextManager[OnProgress | None]] = lambda _: nullcontext(),
) -> Iterator[RetrievalResult]:
    """Yields the answer to each question. progress(n_tokens): yields a callback for the reading of a prompt.

    Raises InputError for a length without room for the question.
    """
    for each in asked:
        prompt, expected, n_answer = prompt_of(model, task, each, seed, text)
        with model.session(memory) as session:
            start = time.perf_counter()
            with progress(len(prompt)) as tell:
                logits = session.prefill(prompt, on_progress=tell)
            read = time.perf_counter()
            tokens = []
            for _ in range(n_answer):
                tokens.append(int(logits.argmax()))
                logits = session.decode(tokens[-1])
            done = time.perf_counter()
            answer = model.tokenizer.decode(tokens)
            found, share = judged(answer, expected)
            yield RetrievalResult(
                task=task,
                kv=memory.kv,
                length=each.length,
                n_tokens=len(prompt),
                depth=each.depth,
                expected=expected,
                answer=answer,
                found=found,
                share=share,
                prompt_ms=1e3 * (read - start),
                decode_ms=1e3 * (done - read) / n_answer,
                kv_stats=session.stats(),
            )


def judged(answer: str, expected: str) -> tuple[bool, float]:
    """Returns `found` and `share` of RetrievalResult."""
    answer, expected = (" ".join(text.split()) for text in (answer, expected))
    found = expected in answer
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
