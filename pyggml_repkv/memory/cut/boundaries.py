"""How well a sequence of tokens may be cut at a place: by the text there, then by how much the keys change."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# Tokens on each side of a boundary whose keys are compared; no score depends on more.
LOOKAHEAD = 16

# What ends at a boundary. Measured, boundaries add at most a point to what a selection captures, so the ranks are only
# an order, not fitted weights.
INSIDE_WORD, WORD_END, CLAUSE_END, SENTENCE_END, LINE_END, PARAGRAPH_END = range(6)

# The drop in similarity lies in [0, 2], so it adds at most half a rank: it decides only among ends of the same rank.
DROP_WEIGHT = 0.25

# Keys that are kept: most of a text is few different tokens, and this many of 512 float64 are 16 MiB.
N_CACHED_KEYS = 4096

_SENTENCE_MARKS, _CLAUSE_MARKS = ".!?…。！？．｡", ",;:，；：、､"
_CLOSERS = "\"')]}”’»」』）】》〉］｝〕"


def _any_of(characters: str) -> bytes:
    return b"|".join(re.escape(character.encode()) for character in characters)


def _mark_at_end(marks: str) -> re.Pattern[bytes]:
    return re.compile(rb"(%b)(?:%b)*(\s*)\Z" % (_any_of(marks), _any_of(_CLOSERS)))


_SENTENCE_AT_END, _CLAUSE_AT_END = _mark_at_end(_SENTENCE_MARKS), _mark_at_end(_CLAUSE_MARKS)
_CLOSER_OR_MARK = re.compile(_any_of(_CLOSERS + _SENTENCE_MARKS + _CLAUSE_MARKS))


class BoundaryScores:
    """Scores of the places between tokens, higher where a block should rather end.

    token_bytes(id): the text of a token, UTF-8 that may begin or end inside a character. token_key(id): its key before
    RoPE, finite float64 [d], a function of the id alone as in layer 0; None: the text alone counts.
    """

    def __init__(
        self, token_bytes: Callable[[int], bytes], token_key: Callable[[int], NDArray[np.float64]] | None
    ) -> None:
        self._bytes = token_bytes
        self._key = None
        if token_key is not None:
            self._key = lru_cache(N_CACHED_KEYS)(lambda token: np.array(token_key(token), dtype=np.float64))

    def score(self, tokens: Sequence[int], at: range) -> NDArray[np.float64]:
        """Scores of the boundaries before tokens[i], i in `at` -> float64 [len(at)].

        rank of what ends there + DROP_WEIGHT * (1 - cos(sum of the LOOKAHEAD keys before, sum of those after)); near
        the ends of `tokens`, of those there are. The same tokens around a boundary give the same bits, whatever else
        is in `tokens` and `at`. ValueError: `at` leaves [0, len(tokens)), or its step is not 1.
        """
        if at.step != 1 or not 0 <= at.start <= at.stop <= len(tokens):
            raise ValueError(f"boundaries {at} of {len(tokens)} tokens")
        return self._ranks(tokens, at) + DROP_WEIGHT * self._drops(tokens, at)

    def _ranks(self, tokens: Sequence[int], at: range) -> NDArray[np.float64]:
        first = max(0, at.start - 2)
        texts = [b"", b""][: first - at.start + 2] + [self._bytes(token) for token in tokens[first : at.stop]]
        return np.array([_rank(*texts[i : i + 3]) for i in range(len(at))], dtype=np.float64)

    def _drops(self, tokens: Sequence[int], at: range) -> NDArray[np.float64]:
        if self._key is None or not at:
            return np.zeros(len(at))
        first, stop = at.start - LOOKAHEAD, at.stop + LOOKAHEAD - 1
        inside = range(max(0, first), min(len(tokens), stop))
        known = np.array([self._key(token) for token in tokens[inside.start : inside.stop]])
        keys = np.zeros((stop - first, known.shape[1]))  # [n_at + 2 * LOOKAHEAD - 1, d]
        keys[inside.start - first : inside.stop - first] = known
        n_sums = len(at) + LOOKAHEAD
        sums = np.zeros((n_sums, keys.shape[1]))
        for offset in range(LOOKAHEAD):
            sums += keys[offset : offset + n_sums]
        before, after = sums[: len(at)], sums[LOOKAHEAD:]  # [n_at, d]
        norms = np.sqrt(_dot(before, before)) * np.sqrt(_dot(after, after))
        cosine = np.divide(_dot(before, after), norms, out=np.ones(len(at)), where=norms > 0)
        return 1 - np.clip(cosine, -1, 1)


def _dot(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Row by row, [n, d] -> [n]. `accumulate` adds in order; `sum`, einsum and BLAS may not, depending on n."""
    return np.add.accumulate(a * b, axis=1)[:, -1]


def _rank(before: bytes, last: bytes, after: bytes) -> int:
    """What ends between `last` and `after`; `before` precedes `last`, b"" where there is nothing."""
    text = before + last
    if b"\n" in last[len(last.rstrip()) :]:
        return PARAGRAPH_END if text[len(text.rstrip()) :].count(b"\n") > 1 else LINE_END
    if last.strip():
        for marks, rank in ((_SENTENCE_AT_END, SENTENCE_END), (_CLAUSE_AT_END, CLAUSE_END)):
            mark = marks.search(text)
            if mark is not None and _ends(mark[1], mark[2] + after):
                return rank
    return WORD_END if not after or after[:1].isspace() or last[-1:].isspace() else INSIDE_WORD


def _ends(mark: bytes, after: bytes) -> bool:
    """Not inside 3.14, a.b or `.)`; only after ASCII marks do words go with a space."""
    if _CLOSER_OR_MARK.match(after):
        return False
    return len(mark) > 1 or not after or after[:1].isspace() or after[0] >= 0x80
