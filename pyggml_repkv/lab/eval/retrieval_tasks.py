"""Needles hidden in a long text, one for each depth, and the questions about them.

`passkey`, `number` and `kv` are after InfiniteBench's Retrieve.PassKey, Retrieve.Number and Retrieve.KV (arXiv
2402.13718), the first originally Landmark Attention's (arXiv 2305.16300); `niah` is the needle in a haystack of prose;
`multikey` and `chain` are small forms of RULER's multi-key retrieval and variable tracking (arXiv 2404.06654); `latest`
and `first` need the order of what was said. All questions are about one text, so every needle has a name, which its
question asks for. The wording is this project's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_uppercase

import numpy as np

from pyggml_repkv.lab.eval import words
from pyggml_repkv.lab.eval.haystack import Needle

TASK = (
    "There is important info hidden in a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important info.\n\n"
)

# Version of the wording and of the places of needles: results of another version answer other questions.
VERSION = 3

N_KEYS = 4
N_HOPS = 2
N_VALUES = 2

DEEDS = (
    "feed the swans", "climb the old lighthouse", "taste the plum soup", "ride the yellow tram",
    "read under the chestnut trees", "count the bridges", "listen to the organ", "swim in the cold river",
    "paint the harbour", "dance on the market square",
)  # fmt: skip
TIMES = (
    "at noon", "at dawn", "by night", "in the rain", "on a Sunday", "with a friend", "before breakfast",
    "in early spring", "after a long walk", "when the bells ring",
)  # fmt: skip

# There are so many different deeds.
MAX_DEPTHS = len(DEEDS) * len(TIMES)


@dataclass(frozen=True, slots=True)
class Question:
    """A question. expected: what the answer, of n_answer tokens, must contain, and before any of `rivals`."""

    text: str
    expected: str
    n_answer: int
    rivals: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Quiz:
    """How a text begins, what is hidden in it, and a question for each depth."""

    head: str
    needles: tuple[Needle, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of question. make: returns a quiz for at most MAX_DEPTHS depths, in ascending order. needs_text: whether
    the haystack must be the user's text, not the usual filler.
    """

    what: str
    make: Callable[[np.random.Generator, Sequence[float]], Quiz]
    needs_text: bool = False


def passkey(rng: np.random.Generator, depths: Sequence[float]) -> Quiz:
    owners = [name for (name,) in words.groups_of_names(rng, len(depths))]
    return _keys("pass key", depths, owners, words.numbers(rng, len(depths)), 8)


def number(rng: np.random.Generator, depths: Sequence[float]) -> Quiz:
    """Hides ten digits at each depth, in runs of the same digit, which are harder to copy."""
    owners = [name for (name,) in words.groups_of_names(rng, len(depths))]
    return _keys("sequence of digits", depths, owners, words.different(len(depths), lambda: _runs(rng)), 14)


def multikey(rng: np.random.Generator, depths: Sequence[float]) -> Quiz:
    """Asks for one of N_KEYS keys whose names are alike; the others lie anywhere."""
    alike = words.groups_of_names(rng, len(depths), N_KEYS)
    others = [name for _, *rest in alike for name in rest]
    values = words.numbers(rng, len(depths) * N_KEYS)
    quiz = _keys("pass key", depths, [name for name, *_ in alike], values[: len(depths)], 8)
    decoys = _keys("pass key", rng.random(len(others)).tolist(), others, values[len(depths) :], 8)
    return Quiz(quiz.head, (*quiz.needles, *decoys.needles), quiz.questions)


def _keys(what: str, depths: Sequence[float], owners: Sequence[str], values: Sequence[str], n_answer: int) -> Quiz:
    needles, questions = [], []
    for depth, owner, value in zip(depths, owners, values, strict=True):
        said = f"The {what} of {owner} is"
        needles.append((depth, f"\n\n{said} {value}. Remember it. {value} is the {what} of {owner}.\n\n"))
        questions.append(Question(f"\n\nWhat is the {what} of {owner}? {said}", value, n_answer))
    return Quiz(TASK, tuple(needles), tuple(questions))


def _runs(rng: np.random.Generator) -> str:
    digits = ""
    while len(digits) < 10:
        digit = str(rng.integers(0 if digits else 1, 10))
        if not digits.endswith(digit):
            digits += digit * int(rng.integers(1, 4))
    return digits[:10]


def niah(rng: np.random.Generator, depths: Sequence[float]) -> Quiz:
    needles, questions = [], []
    deeds = rng.choice(MAX_DEPTHS, len(depths), replace=False)
    for depth, (name,), deed in zip(depths, words.groups_of_names(rng, len(depths)), deeds, strict=True):
        town = name.replace("-", " ").title()
        best, todo = f"The best thing to do in {town} is to", f"{DEEDS[deed % len(DEEDS)]} {TIMES[deed // len(DEEDS)]}"
        needles.append((depth, f"\n\n{best} {todo}.\n\n"))
        questions.append(Question(f"\n\nWhat is the best thing to do in {town}? {best}", todo, 16))
    return Quiz("", tuple(needles), tuple(questions))


def chain(rng: np.random.Generator, depths: Sequence[float]) -> Quiz:
    """Asks for a variable that is a copy of a copy of a value. The value lies at its depth, the copies after it."""
    needles, questions = [], []
    variables = iter(words.letters(rng, len(depths) * (N_HOPS + 1), 3, ascii_uppercase))
    for depth, value in zip(depths, words.numbers(rng, len(depths)), strict=True):
        names = [next(variables) for _ in range(N_HOPS + 1)]
        said = [f"VAR {names[0]} = {value}.", *(f"VAR {b} = VAR {a}." for a, b in pairwise(names))]
        needles += [(depth + (1 - depth) * i / len(said), f"\n\n{text}\n\n") for i, text in enumerate(said)]
        asked = f"value of VAR {names[-1]}"
        questions.append(Question(f"\n\nWhat is the {asked}? The {asked} is", value, 8))
    head = "Track the variables that are hidden in the following text.\n\n"
    return Quiz(head, tuple(needles), tuple(questions))


def latest(rng: np.random.Generator, depths: Sequence[float]) -> Quiz:
    """Asks for the last of N_VALUES values of a code. It lies at its depth, what is outdated before it."""
    needles, questions = [], []
    values = iter(words.numbers(rng, len(depths) * N_VALUES))
    for depth, (name,) in zip(depths, words.groups_of_names(rng, len(depths)), strict=True):
        *old, last = (next(values) for _ in range(N_VALUES))
        for i, value in enumerate((*old, last), 1):
            said = f"The code of {name} has changed. The new code of {name} is {value}."
            needles.append((depth * i / N_VALUES, f"\n\n{said}\n\n"))
        recent = f"most recent code of {name}"
        question = f"\n\nWhat is the {recent}, the last one in the text? The {recent} is"
        questions.append(Question(question, last, 8, tuple(old)))
    head = "Codes change in the following text. Remember the latest code of each name.\n\n"
    return Quiz(head, tuple(needles), tuple(questions))


def first(rng: np.random.Generator, depths: Sequence[float]) -> Quiz:
    """Asks which of two came first. That one lies at its depth, the other anywhere after it."""
    needles, questions = [], []
    arrivals = (name for (name,) in words.groups_of_names(rng, 2 * len(depths)))
    for depth, a, b in zip(depths, arrivals, arrivals, strict=True):
        later = depth + (1 - depth) * rng.uniform(0.2, 1)
        needles += [(depth, f"\n\nThen the {a} arrived.\n\n"), (later, f"\n\nThen the {b} arrived.\n\n")]
        x, y = (a, b) if rng.integers(2) else (b, a)
        question = f"\n\nWhich of the two arrived first, the {x} or the {y}? The one that arrived first is the"
        questions.append(Question(question, a, 12, (b,)))
    head = "Remember in which order they arrive in the following text.\n\n"
    return Quiz(head, tuple(needles), tuple(questions))


def kv(rng: np.random.Generator, depths: Sequence[float]) -> Quiz:
    """Asks for values of a large JSON object, whose other pairs are the haystack (`pairs`)."""
    needles, questions = [], []
    ids = iter(words.uuids(rng, 2 * len(depths)))
    for depth, key, value in zip(depths, ids, ids, strict=True):
        needles.append((depth, f'"{key}": "{value}", '))
        questions.append(Question(f'"end": ""}}\n\nKey: "{key}"\nThe value of this key is: "', value, 40))
    head = "Extract the value of the asked key from the JSON object below.\n\nJSON object:\n{"
    return Quiz(head, tuple(needles), tuple(questions))


def pairs(rng: np.random.Generator) -> Iterator[str]:
    """Yields other pairs, without end."""
    while True:
        key, value = words.uuids(rng, 2)
        yield f'"{key}": "{value}", '


TASKS = {
    "passkey": Task("a five-digit key hidden in a long text", passkey),
    "number": Task("ten digits hidden in a long text", number),
    "kv": Task("the value of a key in a large JSON object", kv),
    "niah": Task("a sentence hidden in your prose", niah, needs_text=True),
    "multikey": Task(f"one of {N_KEYS} keys with names that are alike", multikey),
    "chain": Task(f"a variable that was copied {N_HOPS} times", chain),
    "latest": Task(f"the last of {N_VALUES} values of a code", latest),
    "first": Task("which of two came first", first),
}
