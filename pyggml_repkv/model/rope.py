"""Rotary position embedding: the arguments of ggml's node, and the same angles for the extension's kernels."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.ffi.context import Rope
from pyggml_repkv.model.config import ModelConfig, RopeScaling


def rope_params(config: ModelConfig) -> Rope:
    scaling = config.rope_scaling
    return Rope(
        n_dims=config.rope_dim,
        n_ctx_orig=scaling.orig_context,
        freq_base=config.rope_base,
        freq_scale=scaling.freq_scale,
        ext_factor=scaling.ext_factor,
        attn_factor=_attn_factor(scaling),
        beta_fast=scaling.beta_fast,
        beta_slow=scaling.beta_slow,
    )


def _attn_factor(scaling: RopeScaling) -> float:
    """Returns ggml's argument. ggml multiplies it by 1 + 0.1 ln(factor), YaRN's attention temperature, whenever
    ext_factor is set; llama.cpp divides by that and multiplies by it again, which may cost the last bit.
    """
    given = np.float32(scaling.attn_factor)
    if scaling.ext_factor == 0.0:
        return float(given)
    one, tenth = np.float32(1.0), np.float32(0.1)
    temperature = one + tenth * np.float32(math.log(one / np.float32(scaling.freq_scale)))
    return float(temperature * (one / temperature) * given)


class RopeTable:
    """cos and sin, in the float32 steps that ggml takes, so both agree at any position.

    With `dtype` float64 angles stay right at positions where float32 ones drift (0.01 rad at about 160,000), for
    memories whose every key is rotated by this table. factors: what each of the n_dims / 2 frequencies is divided by.
    """

    def __init__(
        self, rope: Rope, dtype: type[np.floating] = np.float32, factors: NDArray[np.float32] | None = None
    ) -> None:
        self._dtype = dtype
        self._factors = None if factors is None else factors.astype(dtype)[:, None]
        half = rope.n_dims // 2
        self._steps = np.full(half, dtype(rope.freq_base) ** dtype(-2.0 / rope.n_dims), dtype)
        self._freq_scale = dtype(rope.freq_scale)
        self._attn_factor = dtype(rope.attn_factor)
        self._ramp: np.ndarray | None = None
        if rope.ext_factor != 0.0:
            low, high = (_correction_dim(rope, beta) for beta in (rope.beta_fast, rope.beta_slow))
            low, high = max(0.0, np.floor(low)), min(rope.n_dims - 1.0, np.ceil(high))
            y = (np.arange(half, dtype=dtype) - dtype(low)) / dtype(max(0.001, high - low))
            self._ramp = ((1 - np.clip(y, 0, 1)) * dtype(rope.ext_factor))[:, None]
            self._attn_factor *= dtype(1.0 + 0.1 * np.log(1.0 / rope.freq_scale))

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """positions [T] -> float32 [n_dims, T]: n_dims / 2 cosines, then as many sines."""
        steps = np.broadcast_to(self._steps[:, None], (len(self._steps), len(positions))).copy()
        steps[0] = positions
        theta = np.multiply.accumulate(steps, dtype=self._dtype)
        if self._factors is not None:
            theta = theta / self._factors
        angle = theta * self._freq_scale
        if self._ramp is not None:
            angle = angle * (1 - self._ramp) + theta * self._ramp
        table = np.concatenate((np.cos(angle), np.sin(angle))) * self._attn_factor
        return table.astype(np.float32, copy=False)


def _correction_dim(rope: Rope, n_rotations: float) -> float:
    """The dimension that turns n_rotations times over the original context (YaRN, arXiv 2309.00071, section 3.2)."""
    return rope.n_dims * np.log(rope.n_ctx_orig / (n_rotations * 2 * np.pi)) / (2 * np.log(rope.freq_base))
