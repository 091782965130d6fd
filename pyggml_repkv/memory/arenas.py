"""Tensors that outlive the graphs: keys, values, scores, indices."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyggml_repkv.ffi.context import Tensor, TensorContext
from pyggml_repkv.ffi.handles import Buffer, lazy_zeros
from pyggml_repkv.ffi.library import g, native_ffi

# Pages are given back in such portions, because each call stops other threads for a moment.
RELEASE_BYTES = 2**16


class Arenas:
    """Makes and owns at most n_tensors of them. They are zero, and resident only where they were written."""

    def __init__(self, n_tensors: int) -> None:
        self._context = TensorContext(n_tensors + 8)
        self._buffers: list[Buffer] = []
        # By name: the mapping, and up to where its pages were released.
        self._memory: dict[bytes, tuple[Any, int]] = {}

    def new(self, type_: int, shape: Sequence[int], name: str) -> Tensor:
        """Raises ComputeError where there is not even address space."""
        tensor = self._context.new(type_, shape, name)
        array = lazy_zeros(g.ggml_nbytes(tensor))
        view: Any = array.base  # a memoryview of the mapping
        self._memory[tensor.contents.name] = view.obj, 0
        buffer = Buffer.over(array)
        buffer.place(tensor, 0)
        self._buffers.append(buffer)
        return tensor

    def release_rows(self, tensor: Tensor, n_rows: int) -> None:
        """Gives back the pages of the first rows, which nobody reads any more; they are zero then."""
        memory, done = self._memory[tensor.contents.name]
        end = n_rows * tensor.contents.nb[1] // mmap.PAGESIZE * mmap.PAGESIZE
        if end - done >= RELEASE_BYTES:
            memory.madvise(mmap.MADV_DONTNEED, done, end - done)
            self._memory[tensor.contents.name] = memory, end

    @property
    def closed(self) -> bool:
        return self._context.closed

    def close(self) -> None:
        self._memory.clear()
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
