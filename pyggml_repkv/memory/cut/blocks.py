"""How tokens that leave the local window are cut into blocks: plain ints."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pyggml_repkv.errors import InputError
from pyggml_repkv.memory.cut.boundaries import LOOKAHEAD, BoundaryScores

MIN_BLOCK, MAX_BLOCK = 16, 4096


@dataclass(frozen=True, slots=True)
class BlockScheme:
    """What `--block` asks for: kind is `fixed` or `semantic`, sizes are in tokens (equal for `fixed`)."""

    kind: str
    min_size: int
    max_size: int


class Blocks(Protocol):
    """Blocks one after another, from the end of the sinks on, each decided once and the same whatever the steps were.

    `bounds[b]` is the first token of block b, `bounds[b + 1]` the first one after it. What is in no block yet is the
    remainder.
    """

    bounds: list[int]

    @property
    def n_blocks(self) -> int:
        return len(self.bounds) - 1

    @property
    def sealed_end(self) -> int:
        """First token that no block holds."""
        return self.bounds[-1]

    def append(self, tokens: Sequence[int], first: int) -> None:
        """Tells the tokens from position `first` on; what was told of these positions before is forgotten."""

    def seal(self, end: int) -> list[tuple[int, int]]:
        """Makes blocks of the tokens before `end` -> the new ones' [first, end)."""
        ...

    def restore(self, bounds: Sequence[int], tokens: Sequence[int]) -> None:
        """Takes over blocks that were made elsewhere, and tells the tokens after them."""
        self.bounds[:] = bounds

    def copy_from(self, other: Any) -> None:
        """Takes over what blocks of the same scheme know."""
        self.bounds[:] = other.bounds


class FixedBlocks(Blocks):
    """Blocks of `size` tokens, whatever the tokens are."""

    def __init__(self, n_sink: int, size: int) -> None:
        self.size = size
        self.bounds = [n_sink]

    def append(self, tokens: Sequence[int], first: int) -> None:
        pass

    def seal(self, end: int) -> list[tuple[int, int]]:
        new = []
        while self.sealed_end + self.size <= end:
            new.append((self.sealed_end, self.sealed_end + self.size))
            self.bounds.append(self.sealed_end + self.size)
        return new


class SemanticBlocks(Blocks):
    """Blocks of `min_size` to `max_size` tokens that end at the highest boundary score; of equals, at the earliest.

    A block is decided as soon as all places where it may end are before `end` or at it and the LOOKAHEAD tokens after
    the last of them are known. Only the tokens that no block holds are kept.
    """

    def __init__(self, n_sink: int, min_size: int, max_size: int, scores: BoundaryScores) -> None:
        # No score looks back further than the block it would end, so the tokens of finished blocks can be dropped.
        assert LOOKAHEAD <= min_size <= max_size
        self.min_size, self.max_size, self.scores = min_size, max_size, scores
        self.bounds = [n_sink]
        self._tokens = array("i")  # from sealed_end on
        self._known_end = 0
        self._decided_by = 0

    def append(self, tokens: Sequence[int], first: int) -> None:
        """As in Blocks. ValueError: a gap before `first`, or a block was decided by tokens from `first` on."""
        if not self._decided_by <= first <= self._known_end:
            raise ValueError(f"tokens from {first} on; expected from {self._decided_by} to {self._known_end}")
        del self._tokens[max(0, first - self.sealed_end) :]
        self._tokens.extend(tokens[max(0, self.sealed_end - first) :])
        self._known_end = first + len(tokens)

    def restore(self, bounds: Sequence[int], tokens: Sequence[int]) -> None:
        super().restore(bounds, tokens)
        self._tokens = array("i", tokens)
        self._known_end = self.sealed_end + len(tokens)
        self._decided_by = bounds[-2] + self.max_size + LOOKAHEAD if len(bounds) > 1 else 0

    def copy_from(self, other: SemanticBlocks) -> None:
        super().copy_from(other)
        self._tokens = array("i", other._tokens)
        self._known_end, self._decided_by = other._known_end, other._decided_by

    def seal(self, end: int) -> list[tuple[int, int]]:
        first = begin = self.sealed_end
        new = []
        while begin + self.max_size <= min(end, self._known_end - LOOKAHEAD):
            self._decided_by = begin + self.max_size + LOOKAHEAD
            tokens = self._tokens[begin - first : self._decided_by - first]
            scores = self.scores.score(tokens, range(self.min_size, self.max_size + 1))
            new.append((begin, begin + self.min_size + int(scores.argmax())))
            begin = new[-1][1]
            self.bounds.append(begin)
        del self._tokens[: begin - first]
        return new


def make_blocks(scheme: BlockScheme, n_sink: int, boundaries: Callable[[], BoundaryScores]) -> Blocks:
    """boundaries: asked for only where the scheme looks at the text."""
    if scheme.kind == "fixed":
        return FixedBlocks(n_sink, scheme.max_size)
    return SemanticBlocks(n_sink, scheme.min_size, scheme.max_size, boundaries())


def parse_block(text: str) -> BlockScheme:
    """`fixed:128` or `semantic:128-256`. Raises InputError."""
    match = re.fullmatch(r"(fixed):([0-9]{1,9})|(semantic):([0-9]{1,9})-([0-9]{1,9})", text)
    if match is not None:
        kind, low, high = (match[1], match[2], match[2]) if match[1] else match.group(3, 4, 5)
        scheme = BlockScheme(kind, int(low), int(high))
        if MIN_BLOCK <= scheme.min_size <= scheme.max_size <= MAX_BLOCK:
            return scheme
    raise InputError(
        f"--block is {text!r}; it must be fixed:N or semantic:N-M with N and M from {MIN_BLOCK} to {MAX_BLOCK}, N <= M"
    )
