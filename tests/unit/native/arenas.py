"""Arenas with known contents, and what an op must leave of them."""

from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as QT
from gguf.quants import dequantize, quantize
from hypothesis import strategies as st

from tests.unit.native.op_bench import Bench, assert_close, tensor_bytes

CACHES = {"f32": QT.F32, "f16": QT.F16, "bf16": QT.BF16, "q8_0": QT.Q8_0}
# Relative to the largest value: what storing costs.
ROUNDING = {"f32": 1e-6, "f16": 1e-3, "bf16": 5e-3, "q8_0": 5e-3}

cache_names = st.sampled_from(sorted(CACHES))


def fitting_cache(name: str, head_dim: int) -> str:
    """`name`, or f16 where its blocks do not divide a head."""
    return "f16" if head_dim % GGML_QUANT_SIZES[CACHES[name]][0] else name


class Arena:
    """[n_cells, K * d] of random values where the numpy index `filled` says; all other cells hold bytes that spell NaN,
    or `elsewhere`, for ops that let a NaN vanish.
    """

    def __init__(
        self, bench: Bench, rng: np.random.Generator, cache: str, n_cells: int, filled: Any,
        elsewhere: float | None = None,
    ) -> None:  # fmt: skip
        c = bench.config
        self.cache, self.shape = cache, (n_cells, c.n_head_kv, c.head_dim)
        kind, width = CACHES[cache], c.n_head_kv * c.head_dim
        block, size = GGML_QUANT_SIZES[kind]
        others = np.ones(n_cells, bool)
        others[filled] = False
        values = rng.standard_normal((n_cells, width)).astype(np.float32)
        values[others] = elsewhere or 0.0
        self.before = (
            np.ascontiguousarray(quantize(values, kind)).view(np.uint8).reshape(n_cells, width // block * size)
        )
        if elsewhere is None:
            self.before[others] = 0xFF
        self.tensor = bench.tensor(self.before, kind, (n_cells, width))

    def values(self) -> np.ndarray:
        """What the arena holds now, float64 [n_cells, K, d]."""
        raw, kind = tensor_bytes(self.tensor), CACHES[self.cache]
        if kind in (QT.F32, QT.F16):
            raw = raw.view(np.float32 if kind == QT.F32 else np.float16)
        return dequantize(raw, kind).reshape(self.shape).astype(np.float64)

    def assert_written(self, first: int, want: np.ndarray, n_roundings: int = 1) -> None:
        """Cells from `first` on hold `want` [T, K, d] as far as there are cells; every other byte is what it was."""
        after, end = tensor_bytes(self.tensor), min(first + len(want), len(self.before))
        assert np.array_equal(after[:first], self.before[:first])
        assert np.array_equal(after[max(first, end) :], self.before[max(first, end) :])
        if end > first:
            assert_close(self.values()[first:end], want[: end - first], n_roundings * ROUNDING[self.cache])
