"""What is taken from keys before they are stored quantised: the key bias of each head, rotated as the keys are.

Qwen2's key biases are large (its 0.5B model has one of 211 where keys less their bias stay below 10), and the largest
value of a quantised block sets the step of all its 32 values. RoPE is linear, so a key less its bias may be rotated,
turned back and moved like any key; the bias comes back where keys are read (native/keys.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.ffi.library import native, native_ffi
from pyggml_repkv.memory.bounded.rotation import rotated as rotated_by
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.rope import RopeTable

_STEP: int = native.CENTRE_STEP


class KeyCentres:
    """What is taken from the keys of each layer; nothing where keys are not quantised or have no bias."""

    def __init__(
        self, config: ModelConfig, memory: MemoryConfig, rope: RopeTable,
        biases: Sequence[NDArray[np.float32] | None], n_positions: int,
    ) -> None:  # fmt: skip
        """biases: float32 [K * d] of each layer, heads by halves, None: it has none; rope: float64 angles."""
        used = list(biases) if centres_keys(memory, biases) else [None] * config.n_layer
        self._config, self._rope, self._biases = config, rope, used
        self._tables = np.empty((0, config.rope_dim), np.float32)
        if self.in_use:
            steps, n_coarse = np.arange(_STEP), n_positions // _STEP**2 + 1
            factor = rope(np.zeros(1))[0, 0]  # YaRN's, 1 elsewhere
            fine, middle = rope(steps) / factor, rope(_STEP * steps) / factor
            tables = (fine, middle, rope(_STEP**2 * np.arange(n_coarse)))
            self._tables = np.ascontiguousarray(np.concatenate(tables, 1).T, np.float32)
        self._native = [self._params(bias) for bias in used]

    def _params(self, bias: NDArray[np.float32] | None) -> Any:
        if bias is None:
            return native_ffi.NULL
        tables, values = (native_ffi.cast("float *", array.ctypes.data) for array in (self._tables, bias))
        return native_ffi.new("struct repkv_key_centre *", {"bias": values, "tables": tables})

    @property
    def in_use(self) -> bool:
        """Whether any layer's keys are stored less their bias."""
        return any(bias is not None for bias in self._biases)

    def of(self, layer: int) -> Any:
        """A struct repkv_key_centre, valid as long as this object; NULL: the layer's keys are stored as they are."""
        return self._native[layer]

    def added(
        self, layer: int, keys: NDArray[np.float32], positions: NDArray[np.integer], *, rotated: bool
    ) -> NDArray[np.float32]:
        """Stored keys float32 [n, K, d] -> the keys that they stand for. rotated: whether they are."""
        bias = self._biases[layer]
        if bias is None:
            return keys
        centre = np.broadcast_to(bias.reshape(keys.shape[1:]), keys.shape)
        if rotated:
            centre = rotated_by(centre, self._rope(positions).T[:, None])  # tables [n, 1, rope_dim]
        return keys + centre


def centres_keys(memory: MemoryConfig, biases: Sequence[NDArray[np.float32] | None]) -> bool:
    """Whether keys are stored less their bias."""
    return "q8_0" in (memory.type_k, memory.type_evicted) and any(bias is not None for bias in biases)
