"""The speed of ggml's own matrix products on this machine, by weight type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pyggml_repkv.ffi.handles import Backend, aligned_zeros
from pyggml_repkv.ffi.library import g
from pyggml_repkv.lab.inspect.peak import READ_BYTES, best_seconds

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")

# Rows and columns of the matrix that multiplies 512 tokens: 4.3 GFLOP.
SIDE = 2048
N_TOKENS = 512

# Columns of the matrix that multiplies one token; it has as many rows as READ_BYTES hold.
N_COLUMNS = 4096

# In every type, numbers made of this byte are neither denormal nor infinite.
FILL = 0x3C


@dataclass(frozen=True, slots=True)
class TypeSpeed:
    """ggml's products with a matrix of this type. gflops: with 512 tokens; gbytes_per_second: of the matrix, with one
    token.
    """

    type: str
    gflops: float
    gbytes_per_second: float


def measure_types(backend: Backend) -> Iterator[TypeSpeed]:
    """Yields the speed of each type, the best of a few runs. Raises ComputeError if there is too little memory."""
    data = aligned_zeros(READ_BYTES)
    data[:] = FILL
    for name in TYPES:
        type_ = getattr(g, f"GGML_TYPE_{name}")
        chunk = _seconds(backend, data, type_, SIDE, SIDE, N_TOKENS)
        n_rows = READ_BYTES // g.ggml_row_size(type_, N_COLUMNS)
        one = _seconds(backend, data, type_, n_rows, N_COLUMNS, 1)
        n_bytes = n_rows * g.ggml_row_size(type_, N_COLUMNS)
        yield TypeSpeed(name, 2 * SIDE * SIDE * N_TOKENS / chunk / 1e9, n_bytes / one / 1e9)


def _seconds(backend: Backend, data: np.ndarray, type_: int, n_rows: int, n_columns: int, n_tokens: int) -> float:
    x = aligned_zeros(4 * n_tokens * n_columns)
    x.view(np.float32)[:] = 0.5
    leaves = [(data, type_, (n_rows, n_columns)), (x, g.GGML_TYPE_F32, (n_tokens, n_columns))]
    return best_seconds(backend, leaves, lambda context, sources: context.linear(*sources))
