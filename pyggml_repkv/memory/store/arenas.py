"""Tensors that outlive the graphs: keys, values, scores, indices."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pyggml_repkv.errors import ComputeError
from pyggml_repkv.ffi.context import Tensor, TensorContext
from pyggml_repkv.ffi.handles import Buffer
from pyggml_repkv.ffi.library import g, native, native_ffi

# Pages are given back in such portions, because each call stops other threads for a moment.
RELEASE_BYTES = 2**16

Used = Callable[[int], tuple[int, int]]
"""n_past -> rows of an arena, from the first on, that will never change again, and rows that hold anything."""


class _File:
    """Memory without a name, so that forks can map the same pages; closed when nobody holds it."""

    def __init__(self) -> None:
        try:
            self.fd = os.memfd_create("repkv", os.MFD_CLOEXEC)
        except OSError as error:
            raise ComputeError(f"no memory for keys and values: {error.strerror}") from None
        self.size = 0

    def take(self, n_bytes: int) -> int:
        """Room for n_bytes -> where. Raises ComputeError where there is not even address space."""
        at = self.size
        try:
            os.ftruncate(self.fd, at + n_bytes)
        except (OSError, OverflowError):
            raise ComputeError(f"not enough memory for {n_bytes / 2**20:.0f} MiB") from None
        self.size = at + n_bytes
        return at

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


@dataclass(frozen=True, slots=True)
class _Shared:
    """Bytes [start, end) of an arena that lie in a file from `offset` on, and are the same in every fork."""

    file: _File
    offset: int
    start: int
    end: int


@dataclass(slots=True)
class _Memory:
    """What an arena lies in: shared parts first, then, from `own` on, its own file at `offset` + own."""

    mapping: mmap.mmap
    file: _File
    offset: int
    row_bytes: int
    used: Used | None
    shared: list[_Shared] = field(default_factory=list)
    own: int = 0
    released: int = 0
    # Rows of shared parts were written, which are this arena's alone now.
    rewritten: bool = False

    @property
    def address(self) -> int:
        return int(native_ffi.cast("uintptr_t", native_ffi.from_buffer(self.mapping)))

    def share(self, n_past: int) -> None:
        """Makes the rows that will not change part of what is shared."""
        frozen = 0 if self.used is None or self.rewritten else self.used(n_past)[0]
        end = frozen * self.row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if end > self.own:
            part = _Shared(self.file, self.offset + self.own, self.own, end)
            # From now on a write here, as when positions become far, is seen by this arena only.
            _map(self.address, part, shared=False)
            self.shared.append(part)
            self.own = end


class Arenas:
    """Makes and owns at most n_tensors of them. They are zero, and resident only where they were written."""

    def __init__(self, n_tensors: int, source: dict[str, _Memory] | None = None, n_past: int = 0) -> None:
        """source: what other arenas hold after n_past tokens: new ones of the same names begin with it."""
        self._context = TensorContext(n_tensors + 8)
        self._n_tensors, self._file = n_tensors, _File()
        self._buffers: list[Buffer] = []
        self._memory: dict[str, _Memory] = {}
        self._source, self._n_past = source or {}, n_past

    def new(self, type_: int, shape: Sequence[int], name: str, *, used: Used | None = None) -> Tensor:
        """used: which rows a fork shares and copies; None: it copies all. Raises ComputeError for lack of memory."""
        tensor = self._context.new(type_, shape, name)
        n_bytes = -(-max(g.ggml_nbytes(tensor), 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        offset = self._file.take(n_bytes)
        row_bytes: int = tensor.contents.nb[1]
        memory = _Memory(_reserve(n_bytes), self._file, offset, row_bytes, used)
        _map(memory.address, _Shared(self._file, offset, 0, n_bytes), shared=True)
        if name in self._source:
            self._fill(memory, self._source[name])
        self._memory[name] = memory
        buffer = Buffer.over(np.frombuffer(memory.mapping, np.uint8, g.ggml_nbytes(tensor)))
        buffer.place(tensor, 0)
        self._buffers.append(buffer)
        return tensor

    def _fill(self, memory: _Memory, source: _Memory) -> None:
        memory.shared, memory.own, memory.rewritten = list(source.shared), source.own, source.rewritten
        copied_from = source.own
        if source.rewritten:
            memory.shared, memory.own, memory.rewritten, copied_from = [], 0, False, 0
        for part in memory.shared:
            _map(memory.address, part, shared=False)
        n_rows = len(source.mapping) // source.row_bytes if source.used is None else source.used(self._n_past)[1]
        end = min(n_rows * source.row_bytes, len(source.mapping))
        if end > copied_from:
            memory.mapping[copied_from:end] = source.mapping[copied_from:end]

    def fork(self, n_past: int) -> Arenas:
        """Arenas that begin with what these hold after n_past tokens, as far as tensors of the same names are made."""
        for memory in self._memory.values():
            memory.share(n_past)
        return Arenas(self._n_tensors, dict(self._memory), n_past)

    def rewrite(self, tensor: Tensor) -> None:
        """Called before rows are changed that `used` said would not be."""
        self._memory[tensor.contents.name.decode()].rewritten = True

    def release_rows(self, tensor: Tensor, n_rows: int) -> None:
        """Gives back the pages of the first rows, which nobody reads any more; they are zero then."""
        memory = self._memory[tensor.contents.name.decode()]
        end = n_rows * memory.row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        begin = max(memory.released, memory.own)
        if end - begin >= RELEASE_BYTES:
            with contextlib.suppress(OSError):
                memory.mapping.madvise(mmap.MADV_REMOVE, begin, end - begin)
            memory.released = end

    @property
    def closed(self) -> bool:
        return self._context.closed

    def close(self) -> None:
        self._memory.clear()
        self._source = {}
        self._context.close()
        for buffer in self._buffers:
            buffer.close()


def _reserve(n_bytes: int) -> mmap.mmap:
    """Addresses only; a mapping of the file itself would keep a descriptor each."""
    try:
        return mmap.mmap(-1, n_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError):
        raise ComputeError(f"not enough memory for {n_bytes / 2**20:.0f} MiB") from None


def _map(address: int, part: _Shared, *, shared: bool) -> None:
    """Puts a part of a file where an arena is. shared False: what is written there is not seen elsewhere."""
    n, at = part.end - part.start, native_ffi.cast("char *", address + part.start)
    if native.repkv_map(at, n, part.file.fd, part.offset, shared) != 0:
        raise ComputeError(f"not enough memory to map {n / 2**20:.0f} MiB")


def as_array(tensor: Tensor, dtype: type[np.generic]) -> np.ndarray:
    """All bytes of an arena, flat; only while the arena lives."""
    t = tensor.contents
    memory = native_ffi.buffer(native_ffi.cast("char *", t.data), g.ggml_nbytes(tensor))
    return np.frombuffer(memory, dtype)


def as_rows(tensor: Tensor) -> np.ndarray:
    """The bytes of an arena, uint8 [n_rows, bytes of a row]."""
    return as_array(tensor, np.uint8).reshape(tensor.contents.ne[1], tensor.contents.nb[1])
