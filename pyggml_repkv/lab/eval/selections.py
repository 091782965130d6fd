"""What an index selects of evicted tokens, computed from queries and keys as the engine's ops do it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.cut.blocks import Blocks, Scheme
from pyggml_repkv.memory.index.representatives import top_scored
from pyggml_repkv.memory.index.tokens import code_keys
from pyggml_repkv.ops.kernels import MAX_SELECTED

Array = NDArray[np.float32]
Bounds = NDArray[np.integer]

# Rows of scores that are made at a time.
N_ROWS = 64


class Finder(ABC):
    """An index, of one layer at a time.

    blocks: the blocks that it selects from, or that are made of its units; n_dense: up to how many tokens the engine
    attends all. `size` is how many queries of a chunk share a selection, 0 for all of them.
    """

    by_size: ClassVar[bool]
    """Whether units compete by weight for a token."""

    size = 0

    def __init__(self, name: str, memory: MemoryConfig, scheme: Scheme, blocks: Blocks, n_dense: int) -> None:
        self.name, self.memory, self.blocks = name, memory, blocks
        most = max(memory.budget, memory.chunk_budget, n_dense) // scheme.smallest_unit
        self._n_top = min(most, MAX_SELECTED)

    @abstractmethod
    def enter(self, keys: Array, scores: Array | None) -> None:
        """Takes up a layer. keys: stored, of evicted tokens [n, K, d]; scores: of all tokens [n_positions, K], if the
        engine had them.
        """

    @abstractmethod
    def weights(self, far: Array, bounds: Bounds, size: int) -> Array:
        """Weights of units for queries [T, H, d], of which `size` share a selection: [n_groups, K or 1, n_units]."""

    def select(self, far: Array, judged: NDArray[np.integer], end: int, *, alone: bool) -> NDArray[np.bool_]:
        """Which of the evicted tokens before `end` the judged of the queries [T, H, d] attend: [n_judged, K or 1, n].

        alone: every query is a step; else all are a chunk.
        """
        bounds = np.array(self.blocks.unit_bounds)
        bounds = np.append(bounds[bounds < end], end)
        size = 1 if alone else self.size or len(far)
        budget = self.memory.budget if alone else self.memory.chunk_budget
        weights = self.weights(far, bounds, size)
        worth = weights / np.diff(bounds) if self.by_size else weights
        units = [[best_units(row, bounds, budget, self._n_top) for row in rows] for rows in worth]
        return np.repeat(np.array(units), np.diff(bounds), axis=2)[judged // size]


def best_units(worth: Array, bounds: Bounds, budget: int, n_top: int) -> NDArray[np.bool_]:
    """Which units are selected: of the n_top with the highest worth, from the best on, those that still fit."""
    sizes = np.diff(bounds)
    chosen, least = np.zeros(len(worth), bool), sizes.min()
    for unit in np.argsort(-worth, kind="stable")[:n_top].tolist():
        if sizes[unit] <= budget:
            chosen[unit] = True
            budget -= sizes[unit]
        if budget < least:
            break
    return chosen


class Masses(Finder):
    """Units by the attention that their tokens get: from keys that codes of `bits` stand for, or with 0 the stored
    ones. Every key head selects for itself, and every group of queries of a chunk, as for `--index tokens:BITS`.
    """

    by_size = True

    def __init__(
        self, name: str, memory: MemoryConfig, scheme: Scheme, blocks: Blocks, n_dense: int, bits: int = 0
    ) -> None:
        super().__init__(name, memory, scheme, blocks, n_dense)
        self.bits, self.size, self._stride, self._per_head = bits, memory.group, memory.stride, True
        self._keys = np.empty((0, 0, 0), np.float32)

    def enter(self, keys: Array, scores: Array | None) -> None:
        first, end, *_ = self.blocks.bounds
        known = code_keys(keys, self.bits, end - first) if self.bits else keys
        self._keys = np.ascontiguousarray(known.transpose(1, 0, 2))  # [K, n, d]

    def weights(self, far: Array, bounds: Bounds, size: int) -> Array:
        lasts = [min(first + size, len(far)) - 1 for first in range(0, len(far), size)]
        asked = np.concatenate([np.arange(last, last // size * size - 1, -self._stride) for last in lasts])
        group, n = far.shape[1] // len(self._keys), bounds[-1] - bounds[0]
        owners = np.repeat(asked // size, group)
        weights = np.zeros((len(lasts), len(self._keys), len(bounds) - 1), np.float32)
        for kv, keys in enumerate(self._keys[:, :n]):
            queries = far[asked, kv * group : (kv + 1) * group].reshape(-1, far.shape[2])
            for at in range(0, len(queries), N_ROWS):
                scores = queries[at : at + N_ROWS] @ keys.T
                scores -= scores.max(1, keepdims=True)
                mass = np.add.reduceat(np.exp(scores, out=scores), bounds[:-1] - bounds[0], axis=1)
                mass /= mass.sum(1, keepdims=True)
                for owner in np.unique(owners[at : at + N_ROWS]):
                    weights[owner, kv] += mass[owners[at : at + N_ROWS] == owner].sum(0)
        return weights if self._per_head else weights.sum(1, keepdims=True)


class BlockMasses(Masses):
    """The same of whole blocks, and of all queries of a chunk, as a bound for `--index representatives:N`."""

    by_size = False

    def __init__(self, name: str, memory: MemoryConfig, scheme: Scheme, blocks: Blocks, n_dense: int) -> None:
        super().__init__(name, memory, scheme, blocks, n_dense)
        self.size, self._stride, self._per_head = 0, 1, memory.per_head


class ByRepresentatives(Finder):
    """Whole blocks by n_repr keys of each, and a chunk by its mean query, as for `--index representatives:N`."""

    by_size = False

    def __init__(
        self, name: str, memory: MemoryConfig, scheme: Scheme, blocks: Blocks, n_dense: int, n_repr: int
    ) -> None:
        super().__init__(name, memory, scheme, blocks, n_dense)
        self._n_repr = n_repr
        self._keys = np.empty((0, 0, 0, 0), np.float32)

    def enter(self, keys: Array, scores: Array | None) -> None:
        assert scores is not None
        bounds = self.blocks.bounds
        chosen = np.array([top_scored(scores, *block, self._n_repr) for block in pairwise(bounds)]) - bounds[0]
        self._keys = keys[chosen, np.arange(keys.shape[1])[:, None]]  # [n_blocks, K, n_repr, d]

    def weights(self, far: Array, bounds: Bounds, size: int) -> Array:
        keys = self._keys[: len(bounds) - 1]
        _, n_head_kv, _, d = keys.shape
        means = np.array([far[first : first + size].mean(0) for first in range(0, len(far), size)])
        scores = np.einsum("tkgd,bkrd->tkgbr", means.reshape(len(means), n_head_kv, -1, d), keys)
        relevance = self.memory.relevance
        if relevance == "lse":
            mass = np.exp(scores - scores.max((3, 4), keepdims=True)).sum(4)
            weights = mass / mass.sum(3, keepdims=True)
        else:
            weights = scores.mean(4) if relevance == "mean" else scores.max(4)
        summed: Array = weights.sum(2) if self.memory.per_head else weights.sum((1, 2))[:, None]
        return summed
