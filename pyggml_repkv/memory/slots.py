"""Which block lies in which slot of a bounded cache: plain ints."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class _Resident:
    slot: int
    score: float  # in the call `last`; lower by `decay` with every call since
    last: int


class Slots:
    """LRU with score decay: a fetched block stays until it is replaced, so a stable selection costs no copying.

    A block scores 1 for each call that wanted it since it was loaded, times decay (0 < decay <= 1) for each call since.
    Replaced is the lowest score; of equals the least recently used, of these the lowest slot.
    """

    def __init__(self, n_slots: int, decay: float = 0.9) -> None:
        if n_slots < 0 or not 0 < decay <= 1:
            raise ValueError(f"{n_slots} slots with decay {decay}")
        self.n_slots, self.decay = n_slots, decay
        self._resident: dict[int, _Resident] = {}
        self._free = list(range(n_slots))
        self._now = 0

    @property
    def resident(self) -> dict[int, int]:
        """Block -> slot, a copy."""
        return {block: entry.slot for block, entry in self._resident.items()}

    def slot_of(self, block: int) -> int | None:
        entry = self._resident.get(block)
        return None if entry is None else entry.slot

    def take(self, wanted: Sequence[int]) -> list[tuple[int, int]]:
        """Makes the wanted blocks resident -> (block, slot) of those to load now, in the order wanted.

        A load that fails must be told with `forget`. ValueError, and nothing changes: more different blocks than slots.
        """
        blocks = dict.fromkeys(wanted)
        if len(blocks) > self.n_slots:
            raise ValueError(f"{len(blocks)} blocks wanted at once in {self.n_slots} slots")
        self._now += 1
        missing = [block for block in blocks if block not in self._resident]
        self._make_room(len(missing), blocks)
        loads = [(block, heapq.heappop(self._free)) for block in missing]
        for block in blocks.keys() & self._resident.keys():
            entry = self._resident[block]
            entry.score = entry.score * self.decay ** (self._now - entry.last) + 1
            entry.last = self._now
        for block, slot in loads:
            self._resident[block] = _Resident(slot, 1, self._now)
        return loads

    def forget(self, block: int) -> None:
        """Frees the block's slot, if it has one."""
        entry = self._resident.pop(block, None)
        if entry is not None:
            heapq.heappush(self._free, entry.slot)

    def _make_room(self, n_missing: int, keep: dict[int, None]) -> None:
        n_victims = n_missing - len(self._free)
        if n_victims <= 0:
            return
        # Logarithms, because the scores themselves underflow in blocks that nobody has wanted for long.
        rate = math.log(self.decay)
        victims = [
            (math.log(entry.score) + rate * (self._now - entry.last), entry.last, entry.slot, block)
            for block, entry in self._resident.items()
            if block not in keep
        ]
        heapq.heapify(victims)
        for _ in range(n_victims):
            self.forget(heapq.heappop(victims)[-1])
