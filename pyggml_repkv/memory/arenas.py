"""Tensors that outlive the graphs: keys, values, scores, indices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyggml_repkv.ffi.context import Tensor, TensorContext
from pyggml_repkv.ffi.handles import Buffer, lazy_zeros
from pyggml_repkv.ffi.library import g, native_ffi


class Arenas:
    """Makes and owns at most n_tensors of them. They are zero, and resident only where they were written."""

    def __init__(self, n_tensors: int) -> None:
        self._context = TensorContext(n_tensors + 8)
        self._buffers: list[Buffer] = []

    def new(self, type_: int, shape: Sequence[int], name: str) -> Tensor:
        """Raises ComputeError where there is not even address space."""
        tensor = self._context.new(type_, shape, name)
        buffer = Buffer.over(lazy_zeros(g.ggml_nbytes(tensor)))
        buffer.place(tensor, 0)
        self._buffers.append(buffer)
        return tensor

    @property
    def closed(self) -> bool:
        return self._context.closed

    def close(self) -> None:
        self._context.close()
        for buffer in self._buffers:
            buffer.close()


def as_array(tensor: Tensor, dtype: type[np.generic]) -> np.ndarray:
    """All bytes of an arena, flat; only while the arena lives."""
    t = tensor.contents
    memory = native_ffi.buffer(native_ffi.cast("char *", t.data), g.ggml_nbytes(tensor))
    return np.frombuffer(memory, dtype)


def as_rows(tensor: Tensor) -> np.ndarray:
    """The bytes of an arena, uint8 [n_rows, bytes of a row]."""
    return as_array(tensor, np.uint8).reshape(tensor.contents.ne[1], tensor.contents.nb[1])
