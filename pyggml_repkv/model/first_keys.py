"""Layer 0's keys before RoPE: a function of the token alone, so the same in whatever steps a text is read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.weights import Weights


class FirstLayerKeys:
    """token id -> key, float64 [K * d]."""

    def __init__(self, weights: Weights, config: ModelConfig) -> None:
        self._weights, self._eps = weights, config.norm_eps
        self._matrix = weights.floats("blk.0.attn_k.weight").astype(np.float64)
        self._bias = weights.floats("blk.0.attn_k.bias").astype(np.float64)
        self._norm = weights.floats("blk.0.attn_norm.weight").astype(np.float64)

    def __call__(self, token: int) -> NDArray[np.float64]:
        x = self._weights.floats("token_embd.weight", row=token).astype(np.float64)
        key: NDArray[np.float64] = self._matrix @ (x / np.sqrt((x * x).mean() + self._eps) * self._norm) + self._bias
        return key
