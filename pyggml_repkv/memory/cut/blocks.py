"""How tokens that leave the local window are cut into blocks: plain ints."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pyggml_repkv.errors import InputError
from pyggml_repkv.memory.cut.boundaries import LOOKAHEAD, BoundaryScores

MIN_BLOCK, MAX_BLOCK = 16, 4096
# Tokens of a unit, where units are not whole blocks (MAX_UNIT of native/scan_ops.h).
MAX_UNIT = 128


@dataclass(frozen=True, slots=True)
class BlockScheme:
    """What `--block` or `--unit` asks for: kind is `fixed` or `semantic`, sizes are in tokens (equal for `fixed`)."""

    kind: str
    min_size: int
    max_size: int


@dataclass(frozen=True, slots=True)
class Scheme:
    """How tokens are cut: into units, which are selected and attended, and of these into blocks, which are stored and
    written. A block has at least block.min_size tokens. unit: None where each block is one.
    """

    block: BlockScheme
    unit: BlockScheme | None = None

    @property
    def smallest_unit(self) -> int:
        return (self.unit or self.block).min_size

    @property
    def largest_unit(self) -> int:
        return (self.unit or self.block).max_size

    @property
    def most_units(self) -> int:
        """Of a block."""
        return 1 if self.unit is None else -(-self.largest_block // self.unit.min_size)

    @property
    def largest_block(self) -> int:
        """A block of units ends with the first unit that fills it."""
        whole = self.unit is None or self.unit.kind == "fixed"
        return self.block.max_size if whole else self.block.max_size + self.largest_unit - 1


class Blocks(Protocol):
    """Blocks one after another, from the end of the sinks on, each decided once and the same whatever the steps were.

    `bounds[b]` is the first token of block b, `bounds[b + 1]` the first one after it. What is in no block yet is the
    remainder.
    """

    bounds: list[int]

    @property
    def unit_bounds(self) -> list[int]:
        """The same of the units that blocks are made of, all of those in blocks and perhaps more."""
        return self.bounds

    def unit_ends(self, begin: int, end: int) -> list[int]:
        """Where the units of the block [begin, end) end."""
        bounds = self.unit_bounds
        return bounds[bisect_right(bounds, begin) : bisect_right(bounds, end)]

    @property
    def n_blocks(self) -> int:
        return len(self.bounds) - 1

    @property
    def n_units(self) -> int:
        """Units in blocks."""
        return self.n_blocks

    @property
    def sealed_end(self) -> int:
        """First token that no block holds."""
        return self.bounds[-1]

    def append(self, tokens: Sequence[int], first: int) -> None:
        """Tells the tokens from position `first` on; what was told of these positions before is forgotten."""

    def seal(self, end: int) -> list[tuple[int, int]]:
        """Makes blocks of the tokens before `end` -> the new ones' [first, end)."""
        ...

    def restore(self, bounds: Sequence[int], unit_bounds: Sequence[int], tokens: Sequence[int]) -> None:
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
        # A score looks back no further than to the start of what it would end: tokens before that can be dropped.
        assert min_size <= max_size
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

    def restore(self, bounds: Sequence[int], unit_bounds: Sequence[int], tokens: Sequence[int]) -> None:
        super().restore(bounds, unit_bounds, tokens)
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


class UnitBlocks(Blocks):
    """Blocks of whole units, each of the first units that together have at least `size` tokens."""

    def __init__(self, units: Blocks, size: int) -> None:
        self.units, self.size = units, size
        self.bounds = [units.sealed_end]
        self._n_units = 0

    @property
    def unit_bounds(self) -> list[int]:
        return self.units.bounds

    @property
    def n_units(self) -> int:
        return self._n_units

    def append(self, tokens: Sequence[int], first: int) -> None:
        self.units.append(tokens, first)

    def seal(self, end: int) -> list[tuple[int, int]]:
        new = []
        n_made = self.units.n_blocks
        open_units = self.units.bounds[self._n_units + 1 :]
        open_units += [unit_end for _, unit_end in self.units.seal(end)]
        assert len(open_units) == self.units.n_blocks - self._n_units >= n_made - self._n_units
        for n_units, unit_end in enumerate(open_units, self._n_units + 1):
            if unit_end - self.sealed_end >= self.size:
                new.append((self.sealed_end, unit_end))
                self.bounds.append(unit_end)
                self._n_units = n_units
        return new

    def restore(self, bounds: Sequence[int], unit_bounds: Sequence[int], tokens: Sequence[int]) -> None:
        super().restore(bounds, unit_bounds, tokens)
        self.units.restore(unit_bounds, unit_bounds, tokens)
        self._n_units = len(unit_bounds) - 1

    def copy_from(self, other: UnitBlocks) -> None:
        super().copy_from(other)
        self.units.copy_from(other.units)
        self._n_units = other._n_units


def make_blocks(scheme: Scheme, n_sink: int, boundaries: Callable[[], BoundaryScores]) -> Blocks:
    """boundaries: asked for only where the scheme looks at the text."""
    if scheme.unit is None:
        return _cut(scheme.block, n_sink, boundaries)
    return UnitBlocks(_cut(scheme.unit, n_sink, boundaries), scheme.block.min_size)


def _cut(scheme: BlockScheme, n_sink: int, boundaries: Callable[[], BoundaryScores]) -> Blocks:
    if scheme.kind == "fixed":
        return FixedBlocks(n_sink, scheme.max_size)
    return SemanticBlocks(n_sink, scheme.min_size, scheme.max_size, boundaries())


def parse_scheme(block: str, unit: str | None) -> Scheme:
    """unit: None where each block is one. Raises InputError."""
    if unit is None:
        return Scheme(parse_block(block))
    scheme = Scheme(parse_block(block), parse_unit(unit))
    if scheme.block.kind != "fixed":
        raise InputError(f"--block {block} is for --index representatives:N; with codes, give --unit semantic:N-M")
    if scheme.block.max_size % scheme.smallest_unit and parse_unit(unit).kind == "fixed":
        raise InputError(f"--block {block} is no multiple of --unit {unit}")
    return scheme


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


def parse_unit(text: str) -> BlockScheme:
    """`16` or `semantic:8-32`. Raises InputError."""
    match = re.fullmatch(r"([0-9]{1,9})|semantic:([0-9]{1,9})-([0-9]{1,9})", text)
    if match is not None:
        low, high = (match[1], match[1]) if match[1] else match.group(2, 3)
        scheme = BlockScheme("fixed" if match[1] else "semantic", int(low), int(high))
        if 1 <= scheme.min_size <= scheme.max_size <= MAX_UNIT:
            return scheme
    raise InputError(f"--unit is {text!r}; it must be N or semantic:N-M with N and M from 1 to {MAX_UNIT}, N <= M")
