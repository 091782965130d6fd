"""Asks the questions of ruler_tasks.py and scores the answers as RULER does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import groupby, takewhile
from typing import Any

import numpy as np

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError
from pyggml_repkv.lab.eval.asking import Progress, answers
from pyggml_repkv.lab.eval.ruler_tasks import TASKS, Document, Question, RulerTask, Source
from pyggml_repkv.memory.config import MemoryConfig


@dataclass(frozen=True, slots=True)
class RulerResult:
    """One answer. length: the most tokens of prompt and answer; n_tokens: the prompt's; score: the share of `expected`
    that the answer contains, 0 to 1; the rest as in asking.Answer.
    """

    task: str
    kv: str
    length: int
    sample: int
    n_tokens: int
    expected: list[str]
    answer: str
    score: float
    n_shared: int
    shared_ms: float
    prompt_ms: float
    decode_ms: float
    kv_stats: dict[str, object]


@dataclass(frozen=True, slots=True)
class Sample:
    """Identifies a question: number `sample` of a task. Neighbours share a document where the task says so."""

    length: int
    sample: int


def run_ruler(
    model: Model,
    memory: MemoryConfig,
    task: str,
    samples: Sequence[Sample],
    seed: int,
    text: str | None = None,
    progress: Progress = lambda _: nullcontext(),
) -> Iterator[RulerResult]:
    """Yields the answers to samples in ascending order. text: what documents are made from, where the task needs it.

    Raises InputError for a length that is too short for the task, and as `answers` does.
    """
    what = TASKS[task]
    for (length, number), shared in groupby(samples, lambda each: (each.length, each.sample // what.n_shared)):
        document = fitted(model, what, Source(text or "", length), [seed, [*TASKS].index(task), length, number])
        picked = [(each, document.questions[each.sample % what.n_shared]) for each in shared]
        haystack, tails = split_prompts(model, document.text, [question for _, question in picked])
        given = answers(model, memory, haystack, [(tail, what.n_answer) for tail in tails], progress)
        for (each, question), tail, answer in zip(picked, tails, given, strict=True):
            yield RulerResult(
                task=task,
                kv=memory.kv,
                length=length,
                sample=each.sample,
                n_tokens=len(haystack) + len(tail),
                expected=list(question.expected),
                answer=answer.text,
                score=score(answer.text, question.expected),
                n_shared=answer.n_shared,
                shared_ms=answer.shared_ms,
                prompt_ms=answer.prompt_ms,
                decode_ms=answer.decode_ms,
                kv_stats=answer.kv_stats,
            )


# A question's tokens may be so many more beside its text than alone.
BESIDE = 2


def fitted(model: Model, task: RulerTask, source: Source, seed: Sequence[int]) -> Document:
    """Returns a document that, with its longest question and answer, has at most source.length tokens, and nearly as
    many. Raises InputError where not even one without haystack fits.
    """

    def made(n: int) -> Document:
        return task.make(np.random.default_rng(seed), source, n)

    def n_tokens(n: int) -> int:
        document = made(n)
        longest = max(
            document.questions[: task.n_shared], key=lambda each: len(model.tokenizer.encode(each.text + each.prefix))
        )
        return len(prompt_tokens(model, document.text, longest)) + task.n_answer + BESIDE

    # The least document that has a question for each sample.
    n_least = task.n_shared if task.n_shared > len(made(0).questions) else 0
    return made(_most(lambda n: n_tokens(n_least + n), source.length) + n_least)


def _most(n_tokens: Callable[[int], int], budget: int) -> int:
    """Returns a number near the largest n for which n_tokens(n), nearly a line, is at most the budget."""
    least = n_tokens(0)
    if least > budget:
        raise InputError(f"--lengths {budget} is too short: example, question and answer alone take {least} tokens")
    n = 64
    for _ in range(3):
        n = n * (budget - least) // max(n_tokens(n) - least, 1)
        if n == 0:
            return 0
    while n_tokens(n) > budget:
        n -= 1 + n // 256
    return n


def prompt_tokens(model: Model, text: str, question: Question | None) -> list[int]:
    """Returns the prompt in the model's chat template, if it has one, with the beginning of the answer."""
    message = text + (question.text if question else "")
    prefix = question.prefix if question else ""
    if model.chat_template is None:
        return model.tokenizer.encode(f"{message} {prefix}" if prefix else message)
    prompt = model.chat_prompt([{"role": "user", "content": message}]).tokens
    return [*prompt, *model.tokenizer.encode(prefix, add_special=False)]


def split_prompts(
    model: Model, text: str, questions: Sequence[Question]
) -> tuple[list[int], list[list[int]]]:  # fmt: skip
    """Returns the tokens that the prompts begin with before their questions, and the rest of each."""
    prompts = [prompt_tokens(model, text, question) for question in questions]
    columns = zip(*prompts, prompt_tokens(model, text, None), strict=False)
    n_same = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return prompts[0][:n_same], [prompt[n_same:] for prompt in prompts]


def score(answer: str, expected: Sequence[str]) -> float:
    """Returns the share of the expected strings that the answer contains, in whichever case."""
    answer = re.sub(r"[\x00-\x1f]", "\n", answer).lower()
    return sum(each.lower() in answer for each in expected) / len(expected)


def summary(results: Sequence[RulerResult]) -> dict[str, Any]:
    """Returns the object of `--json`: scores in percent by task, policy and length; their averages; every result."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for r in results:
        found.setdefault(r.task, {}).setdefault(r.kv, {}).setdefault(str(r.length), []).append(100 * r.score)
    scores = {
        task: {kv: {length: _mean(each) for length, each in by_length.items()} for kv, by_length in by_kv.items()}
        for task, by_kv in found.items()
    }
    (first, *_) = scores.values()
    average = {
        kv: {length: _mean([by_kv[kv][length] for by_kv in scores.values()]) for length in by_length}
        for kv, by_length in first.items()
    }
    return {"task": "ruler", "scores": scores, "average": average, "results": [asdict(r) for r in results]}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def table(done: dict[str, Any]) -> str:
    """Returns the scores of `summary` as lines: a row for each task, a column for each policy and length."""
    columns = [(kv, length) for kv, by_length in done["average"].items() for length in by_length]
    rows = [("", *(f"{kv} {length}" for kv, length in columns))]
    for task, by_kv in {**done["scores"], "average": done["average"]}.items():
        rows.append((task, *(f"{by_kv[kv][length]:.1f}" for kv, length in columns)))
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "".join(
        f"{task:{first}s}{''.join(f'  {cell:>{n}s}' for cell, n in zip(cells, others, strict=True))}\n"
        for task, *cells in rows
    )
