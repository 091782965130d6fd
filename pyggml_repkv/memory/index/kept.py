"""What the last token selected, where the next one holds on to it (`--sticky`) or attends it (`--late`)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import StoreError
from pyggml_repkv.ffi.library import g
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.store.arenas import Arenas, as_array
from pyggml_repkv.model.config import ModelConfig

_NOTHING = np.empty(0, np.int32)


class Kept:
    """`tensors`: kept-l of each layer, I32 [2, 1 or K, 1 + n_top], in two halves: one is written while the other is
    read, so that a step that fails can be taken back. None where nothing is held on to.
    """

    def __init__(self, arenas: Arenas, config: ModelConfig, memory: MemoryConfig, n_rows: int, n_top: int) -> None:
        self._shape = 2, n_rows, 1 + n_top
        layers = range(config.n_layer if memory.keeps else 0)
        self.tensors = [arenas.new(g.GGML_TYPE_I32, self._shape, f"kept-{i}") for i in layers]
        self._arrays = [as_array(t, np.int32).reshape(self._shape) for t in self.tensors]
        # The half that the last token wrote; -1: there is nothing to hold on to, as after a chunk.
        self._half = -1
        self._undo = -1

    def begin_step(self, *, one: bool) -> int:
        """-> the half that holds the last token's selection for a step, -1 for none."""
        self._undo = self._half
        if not self.tensors:
            return -1
        found = self._half if one else -1
        self._half = int(self._half == 0) if one else -1
        return found

    def settle(self) -> None:
        """Called when a step begins: what the last one would have taken back is settled."""
        self._undo = self._half

    def undo(self) -> None:
        self._half = self._undo

    def chose(self, half: int) -> bool:
        """Whether the token that wrote a half had a choice."""
        return half >= 0 and bool(self._arrays[0][half, 0, 0] > 0)

    def assume(self) -> None:
        """For a graph that is never computed: as if the token before had chosen."""
        for array in self._arrays:
            array[..., 0] = 1

    @property
    def selection(self) -> NDArray[np.int32]:
        """The last token's, int32 [n_layer, 1 or K, 1 + n_top]; empty where there is none."""
        return np.stack([a[self._half] for a in self._arrays]) if self._half >= 0 else _NOTHING

    def restore(
        self, selection: NDArray[np.int32], unit_bounds: Sequence[int], *, budget: int, n_most: int, even: bool
    ) -> None:
        """The reverse, where a token may select at most n_most of the units between these positions, of at most
        `budget` tokens; even: units have one size.

        Raises StoreError for what no step can have selected: C code takes it as it is.
        """
        self._half = self._undo = -1
        if not selection.size:
            return
        shape = (len(self._arrays), *self._shape[1:])
        if selection.size != np.prod(shape):
            raise StoreError("what the last token selected is of another shape")
        rows = selection.reshape(shape)
        counts = rows[..., 0]
        n_first = counts[0, 0]
        uneven = counts != n_first if even else (counts > 0) != (n_first > 0)
        had_choice = unit_bounds[-1] - unit_bounds[0] > budget
        if uneven.any() or (n_first > 0 and not had_choice):
            raise StoreError("what the last token selected is damaged")
        for n, *units in rows.reshape(-1, shape[-1]).tolist():
            ids = [-1, *units[: max(n, 0)], len(unit_bounds) - 1]
            in_order = 0 <= n <= n_most and all(a < b for a, b in pairwise(ids))
            if not in_order or sum(unit_bounds[u + 1] - unit_bounds[u] for u in ids[1:-1]) > budget:
                raise StoreError("what the last token selected is damaged")
        for array, selected in zip(self._arrays, rows, strict=True):
            array[0] = selected
        self._half = 0

    def copy_from(self, other: Kept) -> None:
        self._half = self._undo = other._half

    def close(self) -> None:
        self._arrays = []
