"""A store in RAM: every token has a row of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import InputError
from pyggml_repkv.ffi.context import Tensor
from pyggml_repkv.ffi.handles import Backend
from pyggml_repkv.ffi.library import g
from pyggml_repkv.memory.bounded.rotation import Rotation
from pyggml_repkv.memory.cache_types import GGML_CACHE_TYPES, to_float32
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.store.arenas import Arenas, Rows, as_array, as_rows
from pyggml_repkv.model.config import ModelConfig


class RamStore:
    """Row p of the arenas is the token at position p, as far as there are rows."""

    base = 0

    def __init__(
        self, arenas: Arenas, config: ModelConfig, memory: MemoryConfig, *, n_rows: int, max_units: int,
        sealed_end: Callable[[], int],
    ) -> None:  # fmt: skip
        """sealed_end: the position up to which tokens are in blocks, so that their rows will not change."""
        self._arenas, self._config, self._memory = arenas, config, memory
        shape = max(1, n_rows), config.n_embd_kv

        def rows(n_past: int) -> Rows:
            return Rows(min(sealed_end(), n_past, shape[0]), min(n_past, shape[0]))

        def arena(type_name: str, name: str) -> Tensor:
            return arenas.new(GGML_CACHE_TYPES[type_name], shape, name, rows=rows)

        self.k = [arena(memory.type_k, f"k_store-{i}") for i in range(config.n_layer)]
        self.v = [arena(memory.type_v, f"v_store-{i}") for i in range(config.n_layer)]
        self._places_tensor = arenas.new(g.GGML_TYPE_I32, (max(1, max_units), 3), "unit_places")
        self._places = as_array(self._places_tensor, np.int32).reshape(-1, 3)
        self._n_units = 0

    def places(self, layer: int) -> Tensor:
        return self._places_tensor

    def seal(self, block: int, begin: int, end: int, unit_ends: Sequence[int], *, rotated: bool, extra: bytes) -> None:
        """Makes a block of the tokens [begin, end), in units that end at these positions: where they lie."""
        for first, unit_end in pairwise((begin, *unit_ends)):
            self._places[self._n_units] = first, unit_end - first, first
            self._n_units += 1

    def make_room(self, n_past: int, n_tokens: int) -> None:
        """Every token has its row."""

    def new_hook(self, backend: Backend) -> None:
        """Blocks are always there."""

    def keys(self, layer: int, positions: NDArray[np.integer]) -> NDArray[np.float32]:
        if self._arenas.closed:
            raise InputError("the session is closed")
        return floats(as_rows(self.k[layer])[positions], self._config, self._memory)

    def rows(self, layer: int, block: int, begin: int, end: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Key and value rows of a block, the tokens [begin, end): uint8 [n, row bytes]."""
        return as_rows(self.k[layer])[begin:end], as_rows(self.v[layer])[begin:end]

    def turn_back(self, rotation: Rotation, n_past: int) -> None:
        n_rows: int = self.k[0].contents.ne[1]
        for tensor in self.k:
            self._arenas.thaw(tensor)
        rotation.turn_back(self.k, 0, min(n_past, n_rows), 0)

    def share_file(self) -> None:
        """There is none."""

    def new_file(self) -> None:
        """There is none."""

    def copy_from(self, other: Any) -> None:
        """The rest is in the arenas."""
        self._n_units = other._n_units

    def close(self) -> None:
        self._places = np.empty((0, 3), np.int32)


def floats(rows: NDArray[np.uint8], config: ModelConfig, memory: MemoryConfig) -> NDArray[np.float32]:
    """Rows of an arena of keys -> float32 [n, K, d]."""
    return to_float32(rows, memory.type_k).reshape(len(rows), config.n_head_kv, config.head_dim)
