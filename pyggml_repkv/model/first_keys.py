"""Layer 0's keys before RoPE: a function of the token alone, so the same in whatever steps a text is read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.gguf_file import GGUFFile
from pyggml_repkv.model.rows import Rows, layer_rows


class FirstLayerKeys:
    """token id -> key, float64 [K * d], each head in the order of the file's rows."""

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self._file, self._config = file, config
        self._embeddings = Rows.of(file, "token_embd.weight")
        rows = layer_rows(file, config, 0)
        self._weights = {
            part: rows[part].floats_in(file).astype(np.float64)
            for part in ("attn_norm", "attn_k", "attn_k_bias", "attn_k_norm")
            if part in rows
        }

    def __call__(self, token: int) -> NDArray[np.float64]:
        x = replace(self._embeddings, first=token, n=1).floats_in(self._file)[0].astype(np.float64)
        w = self._weights
        key: NDArray[np.float64] = w["attn_k"] @ self._normed(x, w["attn_norm"])
        if "attn_k_bias" in w:
            key = key + w["attn_k_bias"]
        if "attn_k_norm" in w:
            key = self._normed(key.reshape(self._config.n_head_kv, -1), w["attn_k_norm"]).ravel()
        return key

    def _normed(self, x: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
        """RMS norm over the last dimension."""
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self._config.norm_eps) * weight
