"""An index whose units are smaller than its blocks, and of uneven sizes."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, cycle, takewhile

from pyggml_repkv.memory.cut.blocks import parse_block
from pyggml_repkv.memory.index.representatives import Representatives
from pyggml_repkv.memory.repkv.memory import RepKVMemory

SIZES = 7, 9


class UnitRepresentatives(Representatives):
    """Each unit has representatives of its own, in the places that blocks have otherwise. blocks[b]: its units."""

    def __init__(self, parts):
        n_units = len(self.unit_ends(0, parse_block(parts.memory.block).max_size))
        units = {"max_blocks": parts.max_blocks * n_units, "n_blocks": lambda: len(parts.unit_bounds) - 1}
        super().__init__(replace(parts, **units))
        self.unit_packed = self.n_packed
        self.max_unit, self.max_units, self.n_packed = max(SIZES), n_units, n_units * self.n_packed
        self.blocks = []

    def unit_ends(self, begin, end):
        return [*takewhile(lambda at: at < end, accumulate(cycle(SIZES), initial=begin)), end][1:]

    def add(self, n_units):
        n = len(self._parts.unit_bounds) - 1
        self.blocks.append(range(n - n_units, n))

    def seal(self, block, begin, end):
        self.add(len(self.unit_ends(begin, end)))
        bounds = self._parts.unit_bounds
        for unit in self.blocks[block]:
            super().seal(unit, *bounds[unit : unit + 2])
        assert (bounds[self.blocks[block][0]], bounds[-1]) == (begin, end)

    def renew(self, block, begin, end):
        for unit in self.blocks[block]:
            super().renew(unit, *self._parts.unit_bounds[unit : unit + 2])

    def pack(self, block):
        return b"".join(super(UnitRepresentatives, self).pack(unit) for unit in self.blocks[block])

    def unpack(self, block, data):
        n, whole = self.unit_packed, self.n_packed
        self.add(len(data) // n)
        self.n_packed = n
        for at, unit in enumerate(self.blocks[block]):
            super().unpack(unit, data[at * n : (at + 1) * n])
        self.n_packed = whole

    def copy_from(self, other):
        super().copy_from(other)
        self.blocks = other.blocks.copy()


@contextmanager
def index_of(make_index):
    """Memories that are made meanwhile have this index."""
    before, RepKVMemory.make_index = RepKVMemory.make_index, make_index
    try:
        yield
    finally:
        RepKVMemory.make_index = before
