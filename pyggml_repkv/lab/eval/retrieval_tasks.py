"""Questions whose answer is hidden in a long text: the needles, the question, and a prompt of a given length.

`passkey`, `number` and `kv` are InfiniteBench's Retrieve.PassKey, Retrieve.Number and Retrieve.KV (arXiv 2402.13718),
the first originally Landmark Attention's (arXiv 2305.16300); `niah` is the needle in a haystack of prose; `multikey`
and `chain` are small forms of RULER's multi-key retrieval and variable tracking (arXiv 2404.06654). The wording is this
project's.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pyggml_repkv.errors import InputError

Encode = Callable[[str], list[int]]

FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

INFO = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
TASK = INFO + "I will quiz you about the important information there.\n\n"

# Version of the wording and of the places of needles: results of another version answer other questions.
VERSION = 1

# A needle moves back by less than so many tokens to the end of a sentence.
NEAR = 100

# With so many repetitions of the haystack, a needle goes between two of them.
MANY = 20

N_KEYS = 4
N_HOPS = 2

CITIES = ("Lisbon", "Oslo", "Kyoto", "Cairo", "Lima", "Dublin", "Vienna", "Prague", "Quito", "Helsinki")
DEEDS = (
    "feed the swans on the lake",
    "climb the old lighthouse",
    "taste the plum soup at noon",
    "ride the yellow tram to the end",
    "read under the chestnut trees",
    "count the bridges by night",
    "listen to the organ at dusk",
    "swim in the cold river",
)


@dataclass(frozen=True, slots=True)
class Question:
    """A question. needles: (depth, text), where depth 0 is the beginning and 1 the end; expected: what the answer, of
    n_answer tokens, must contain.
    """

    head: str
    needles: tuple[tuple[float, str], ...]
    question: str
    expected: str
    n_answer: int


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of question. needs_text: whether the haystack must be the user's text, not the usual filler."""

    what: str
    make: Callable[[np.random.Generator, float], Question]
    needs_text: bool = False


def passkey(rng: np.random.Generator, depth: float) -> Question:
    key = str(rng.integers(10000, 100000))
    needle = f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
    return Question(TASK, ((depth, needle),), "\n\nWhat is the pass key? The pass key is", key, 8)


def number(rng: np.random.Generator, depth: float) -> Question:
    """Hides ten digits, in runs of the same digit, which are harder to copy."""
    digits = ""
    while len(digits) < 10:
        digit = str(rng.integers(0 if digits else 1, 10))
        if not digits.endswith(digit):
            digits += digit * int(rng.integers(1, 4))
    digits = digits[:10]
    needle = f"\n\nThe sequence of digits is {digits}. Remember it. {digits} is the sequence of digits.\n\n"
    question = "\n\nWhat is the sequence of digits? The sequence of digits is"
    return Question(TASK, ((depth, needle),), question, digits, 14)


def niah(rng: np.random.Generator, depth: float) -> Question:
    city, deed = str(rng.choice(CITIES)), str(rng.choice(DEEDS))
    best = f"The best thing to do in {city} is to"
    question = f"\n\nWhat is the best thing to do in {city}? {best}"
    return Question("", ((depth, f"\n\n{best} {deed}.\n\n"),), question, deed, 16)


def multikey(rng: np.random.Generator, depth: float) -> Question:
    """Asks for one of several keys; the others lie anywhere."""
    cities = [str(c) for c in rng.choice(CITIES, N_KEYS, replace=False)]
    keys = [str(k) for k in rng.choice(np.arange(10000, 100000), N_KEYS, replace=False)]
    depths = [depth, *rng.random(N_KEYS - 1).tolist()]
    needles = tuple(
        (at, f"\n\nThe pass key of {city} is {key}. Remember it. {key} is the pass key of {city}.\n\n")
        for at, city, key in zip(depths, cities, keys, strict=True)
    )
    question = f"\n\nWhat is the pass key of {cities[0]}? The pass key of {cities[0]} is"
    return Question(TASK, needles, question, keys[0], 8)


def chain(rng: np.random.Generator, depth: float) -> Question:
    """Asks for a variable that is a copy of a copy of a value. The value lies at `depth`, the copies evenly between it
    and the end.
    """
    names = [str(n) for n in rng.choice([*"ABCDEFGHJKLMNPQRSTUVWXYZ"], N_HOPS + 1, replace=False)]
    value = str(rng.integers(10000, 100000))
    said = [f"VAR {names[0]} = {value}.", *(f"VAR {b} = VAR {a}." for a, b in pairwise(names))]
    needles = tuple((depth + (1 - depth) * i / len(said), f"\n\n{text}\n\n") for i, text in enumerate(said))
    head = "Track the variables that are hidden in the following text.\n\n"
    question = f"\n\nWhat is the value of VAR {names[-1]}? The value of VAR {names[-1]} is"
    return Question(head, needles, question, value, 8)


def kv(rng: np.random.Generator, depth: float) -> Question:
    """Asks for a value of a large JSON object, whose other pairs are the haystack (`pairs`)."""
    key, value = _uuid(rng), _uuid(rng)
    head = "Extract the value of the asked key from the JSON object below.\n\nJSON object:\n{"
    question = f'"end": ""}}\n\nKey: "{key}"\nThe value of this key is: "'
    return Question(head, ((depth, f'"{key}": "{value}", '),), question, value, 40)


def pairs(rng: np.random.Generator) -> Iterator[str]:
    """Yields other pairs, without end."""
    while True:
        yield f'"{_uuid(rng)}": "{_uuid(rng)}", '


def _uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


TASKS = {
    "passkey": Task("a five-digit key hidden in a long text", passkey),
    "number": Task("ten digits hidden in a long text", number),
    "kv": Task("the value of a key in a large JSON object", kv),
    "niah": Task("a sentence hidden in your prose", niah, needs_text=True),
    "multikey": Task(f"one of {N_KEYS} keys hidden in a long text", multikey),
    "chain": Task(f"a variable that was copied {N_HOPS} times in a long text", chain),
}


def build_prompt(
    encode: Encode, question: Question, n_tokens: int, haystack: Sequence[int], ends: Container[int] = ()
) -> list[int]:
    """Returns exactly n_tokens token ids; the haystack is repeated as often as necessary.

    ends: tokens that end a sentence. A needle goes after the nearest of them before its depth, if one is less than NEAR
    tokens away. Raises InputError if the question does not fit.
    """
    head, tail = encode(question.head) if question.head else [], encode(question.question)
    needles = sorted((depth, encode(text)) for depth, text in question.needles)
    n_filler = n_tokens - len(head) - len(tail) - sum(len(needle) for _, needle in needles)
    if n_filler < 0:
        raise InputError(f"--lengths {n_tokens} is too short: the question alone has {n_tokens - n_filler} tokens")
    filler = (list(haystack) * (n_filler // len(haystack) + 1))[:n_filler]
    prompt, begin = head, 0
    for depth, needle in needles:
        at = int(n_filler * depth)
        # Between two sentences where the filler repeats a few.
        at -= at % len(haystack) if MANY * len(haystack) < n_filler else 0
        at = next((i for i in range(at, max(begin, at - NEAR), -1) if filler[i - 1] in ends), at)
        prompt += [*filler[begin:at], *needle]
        begin = at
    return [*prompt, *filler[begin:], *tail]


def build_json_prompt(encode: Encode, question: Question, n_tokens: int, others: Iterator[str]) -> list[int]:
    """Returns token ids of a JSON object with as many whole pairs as fit into n_tokens.

    Raises InputError if the question does not fit.
    """
    head, tail = encode(question.head), encode(question.question)
    ((depth, text),) = question.needles
    needle = encode(text)
    room = n_tokens - len(head) - len(tail) - len(needle)
    if room < 0:
        raise InputError(f"--lengths {n_tokens} is too short: the question alone has {n_tokens - room} tokens")
    parts: list[list[int]] = []
    while room >= len(part := encode(next(others))):
        parts.append(part)
        room -= len(part)
    parts.insert(int(len(parts) * depth), needle)
    return [*head, *(token for part in parts for token in part), *tail]
