"""RULER's synthetic tasks (arXiv 2404.06654): numbers of needles, kinds of haystacks, keys and values, tokens to
generate and examples are those of its code. The wording is this project's, names and words come from other lists, and
the user's text replaces the essays.

A task makes a document of n units (lines, words, needles) of haystack, and the questions that can be asked about it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import cycle, islice, pairwise
from string import ascii_lowercase, ascii_uppercase

import numpy as np

from pyggml_repkv.errors import InputError
from pyggml_repkv.lab.eval import words
from pyggml_repkv.lab.eval.haystack import FILLER

# Version of the wording and of the draws: results of another version answer other questions.
VERSION = 1

Rng = np.random.Generator


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, how the answer begins, and the strings that it should contain."""

    text: str
    prefix: str
    expected: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """What is read, and the questions that may follow it, each alone."""

    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """What documents are made from: the user's text, and the length of prompt and answer in tokens."""

    text: str
    length: int


@dataclass(frozen=True, slots=True)
class RulerTask:
    """make(rng, source, n): returns a document with n units of haystack, and at least n_shared questions. n_answer:
    tokens to generate; n_shared: questions asked about one document. needs_text: whether it is made from the user's.
    """

    make: Callable[[Rng, Source, int], Document]
    n_answer: int
    n_shared: int = 1
    needs_text: bool = False


def needles(
    rng: Rng, source: Source, n: int, *, haystack: str, keys: str = "name", values: str = "number", n_keys: int = 1,
    n_values: int = 1, n_asked: int = 1,
) -> Document:  # fmt: skip
    """Hides n_values values of each of n_keys keys. haystack: "noise", "text", or "needles", n more of their kind, of
    which every one can be asked for.
    """
    n_owners = n_keys + (n if haystack == "needles" else 0)
    owners = _drawn(rng, keys, n_owners)
    drawn = iter(_drawn(rng, values, n_owners * n_values))
    owned = {owner: tuple(islice(drawn, n_values)) for owner in owners}
    said = [f"Among the hidden {values}s of {key} is {value}." for key in owners for value in owned[key]]
    rng.shuffle(said)
    if haystack == "text":
        context = " ".join(_between_sentences(rng, " ".join(islice(cycle(_split(source.text)), n)), said))
    else:
        noise = [FILLER.strip()] * (n + len(said))
        context = "\n".join(_scattered(rng, noise, said) if haystack == "noise" else said)
    one = n_asked * n_values == 1
    what, are, some, the = (values, "is", "A", "the") if one else (f"{values}s", "are", "Some", "all the")
    order = [owners[i] for i in rng.permutation(n_owners)]
    asked = [order[i : i + n_asked] for i in range(0, n_owners - n_asked + 1, n_asked)]
    return Document(
        f"{some} hidden {what} {are} to be found in the text below. Remember it: there will be a question about the "
        f"{what}.\n{context}\n",
        tuple(
            Question(
                f"What {are} {the} hidden {what} of {_listed(names)} in the text above?",
                f"By the text above, the hidden {what} of {_listed(names)} {are}",
                tuple(value for name in names for value in owned[name]),
            )
            for names in asked
        ),
    )


def _drawn(rng: Rng, kind: str, n: int) -> list[str]:
    if kind == "number":
        return words.numbers(rng, n, n_digits=7)
    return words.names(rng, n) if kind == "name" else words.uuids(rng, n)


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, and {items[-1]}"


@lru_cache(1)
def _split(text: str) -> list[str]:
    return text.split()


def _scattered(rng: Rng, lines: list[str], said: Sequence[str]) -> list[str]:
    """Returns the lines with what is said before different ones of them, in its order."""
    places = sorted(rng.choice(len(lines), len(said), replace=False))
    for i, (at, text) in enumerate(zip(places, said, strict=True)):
        lines.insert(at + i, text)
    return lines


# A needle in prose stands at one of so many evenly spaced depths, the ends included.
N_DEPTHS = 40


def _between_sentences(rng: Rng, text: str, said: Sequence[str]) -> list[str]:
    sentences = re.split(r"(?<=[.!?])\s+", text) if text else []
    depths = np.linspace(0, 1, N_DEPTHS).round(2)
    places = sorted(int(len(sentences) * depth) for depth in rng.choice(depths, len(said), replace=False))
    parts = sentences[: places[0]]
    for needle, (begin, end) in zip(said, pairwise([*places, len(sentences)]), strict=True):
        parts += [needle, *sentences[begin:end]]
    return parts


N_HOPS = 4


def variables(rng: Rng, _: Source, n: int) -> Document:
    """A chain of assignments in noise, after an example of one in ten lines of noise with shorter names."""
    example = _chain(rng, 10, 3)
    asked = _chain(rng, n + N_HOPS + 1, 5)
    (shown,) = example.questions
    return Document(
        f"{example.text}{shown.text} {shown.prefix} {' '.join(shown.expected)}\n\n{asked.text}", asked.questions
    )


def _chain(rng: Rng, n_lines: int, n_letters: int) -> Document:
    names, (value,) = words.letters(rng, N_HOPS + 1, n_letters, ascii_uppercase), words.numbers(rng, 1)
    said = [f"VAR {names[0]} = {value}.", *(f"VAR {b} = VAR {a}." for a, b in pairwise(names))]
    lines = _scattered(rng, [FILLER.strip() + "\n"] * n_lines, said)
    question = Question(
        f"Question: which variables have the value {value} in the text above? Find all of them.",
        f"Answer: by the assignments in the text above, {len(names)} variables have the value {value}:",
        tuple(names),
    )
    text = " ".join(lines).replace("\n ", "\n")
    return Document(f"Follow the chain of assignments to variables in the text below.\n\n{text}", (question,))


N_COMMON = 10


def common_words(rng: Rng, source: Source, n: int) -> Document:
    """A numbered list of words, ten of which come more often, after an example."""
    short = source.length < 4096
    example = _word_list(rng, source, 20, 3, 1) if short else _word_list(rng, source, 40, 10, 3)
    asked = _word_list(rng, source, N_COMMON + n, *((6, 1) if short else (30, 3)))
    (shown,) = example.questions
    return Document(
        f"{example.text}{shown.text} {shown.prefix} {_numbered(shown.expected)}\n{asked.text}", asked.questions
    )


def _word_list(rng: Rng, source: Source, n_words: int, n_common: int, n_rare: int) -> Document:
    known = _known_words(source.text)
    if n_words > len(known):
        raise InputError(f"cwe of {source.length} tokens takes {n_words} words, and --text has {len(known)}")
    picked = [known[i] for i in rng.choice(len(known), n_words, replace=False)]
    common, rare = picked[:N_COMMON], picked[N_COMMON:]
    listed = common * n_common + rare * n_rare
    rng.shuffle(listed)
    question = Question(
        f"Question: which {N_COMMON} words are the most common in the list above?",
        f"Answer: the {N_COMMON} words that are the most common in the list are:",
        tuple(common),
    )
    intro = "Here is a numbered list of words. Some come more often than others: remember those that come most often."
    return Document(f"{intro}\n{_numbered(listed)}\n", (question,))


def _numbered(items: Sequence[str]) -> str:
    return " ".join(f"{i}. {item}" for i, item in enumerate(items, 1))


@lru_cache(1)
def _known_words(text: str) -> list[str]:
    """Returns the words of a text that are written small, of 4 to 12 letters."""
    return sorted(set(re.findall(r"(?<![\w'-])[a-z]{4,12}(?![\w'-])", text)))


ALPHA = 2.0


def frequent_words(rng: Rng, source: Source, n: int) -> Document:
    """Coded words whose frequencies follow a zeta distribution: the first is noise, the next three are asked for."""
    coded = ["...", *words.letters(rng, max(source.length // 50, 4), 6, ascii_lowercase)]
    # zeta(2)
    share = 6 / math.pi**2
    listed = [word for rank, word in enumerate(coded, 1) for _ in range(int(n * share * rank**-ALPHA))]
    rng.shuffle(listed)
    question = Question(
        "Question: which three words are the most frequent in the coded text above? Leave out the dots '...', and "
        "explain nothing.",
        "Answer: the three most frequent words in the coded text above are:",
        tuple(coded[1:4]),
    )
    intro = "Read the coded text below and count how often each word comes: find the three most frequent words."
    return Document(f"{intro} {' '.join(listed)}\n", (question,))


def _needles(n_shared: int = 1, **settings: object) -> RulerTask:
    make = partial(needles, **settings)  # type: ignore[arg-type]
    return RulerTask(make, 128, n_shared, needs_text=settings["haystack"] == "text")


# Where each of several needles can be asked for, as many questions share a document.
N_SHARED = 10

TASKS = {
    "niah_single_1": _needles(haystack="noise"),
    "niah_single_2": _needles(haystack="text"),
    "niah_single_3": _needles(haystack="text", values="uuid"),
    "niah_multikey_1": _needles(haystack="text", n_keys=4, n_shared=4),
    "niah_multikey_2": _needles(haystack="needles", n_shared=N_SHARED),
    "niah_multikey_3": _needles(haystack="needles", keys="uuid", values="uuid", n_shared=N_SHARED),
    "niah_multivalue": _needles(haystack="text", n_values=4),
    "niah_multiquery": _needles(haystack="text", n_keys=4, n_asked=4),
    "vt": RulerTask(variables, 30),
    "cwe": RulerTask(common_words, 120, needs_text=True),
    "fwe": RulerTask(frequent_words, 50),
}
