"""Tensors that outlive the graphs: keys, values, scores, indices."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pyggml_repkv.errors import ComputeError
from pyggml_repkv.ffi.context import Tensor, TensorContext
from pyggml_repkv.ffi.handles import Buffer
from pyggml_repkv.ffi.library import g, native, native_ffi

# Pages are given back in such portions, because each call stops other threads for a moment.
RELEASE_BYTES = 2**16

# Beyond so many shared parts an arena copies them into one: each is a mapping, of which a process may have some 65,000.
MAX_PARTS = 8


class Rows(NamedTuple):
    """Of an arena, from the first on: rows that will not change but after `thaw`, and rows that hold anything."""

    frozen: int
    used: int


RowsOf = Callable[[int], Rows]
"""n_past -> what rows of an arena are."""


class _File:
    """Memory without a name; nobody writes to it once it is filled. It is closed when no arena holds it."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("repkv", os.MFD_CLOEXEC)
        self.size = 0

    def append(self, data: memoryview) -> int:
        """-> where it begins, a multiple of the page size."""
        at, done = self.size, 0
        while done < len(data):
            done += os.pwrite(self.fd, data[done : done + 2**30], at + done)
        self.size = at + -(-len(data) // mmap.PAGESIZE) * mmap.PAGESIZE
        return at

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes [start, end) of an arena, as they lie in a file from `offset` on."""

    file: _File
    offset: int
    start: int
    end: int


@dataclass(slots=True)
class _Memory:
    """What an arena lies in: private memory, of which [0, own) began as parts that forks share."""

    mapping: mmap.mmap
    row_bytes: int
    rows: RowsOf | None
    parts: list[_Part] = field(default_factory=list)
    own: int = 0
    released: int = 0

    @property
    def address(self) -> int:
        return int(native_ffi.cast("uintptr_t", native_ffi.from_buffer(self.mapping)))

    def put(self, part: _Part) -> None:
        """Maps a part: a write to it is seen by this arena only."""
        n, at = part.end - part.start, native_ffi.cast("char *", self.address + part.start)
        if native.repkv_map_private(at, n, part.file.fd, part.offset) != 0:
            raise ComputeError(f"{n / 2**20:.0f} MiB could not be mapped: {os.strerror(native_ffi.errno)}")
        self.parts.append(part)
        self.own = part.end

    def share(self, file: _File, n_past: int) -> None:
        """Moves rows that will not change into a file, and maps them from there."""
        frozen = 0 if self.rows is None else self.rows(n_past).frozen
        end = min(frozen * self.row_bytes, len(self.mapping)) // mmap.PAGESIZE * mmap.PAGESIZE
        if len(self.parts) > MAX_PARTS:
            self.thaw()
        begin = max(self.own, self.released)
        if end > begin:
            with memoryview(self.mapping) as view:
                offset = file.append(view[begin:end])
            self.put(_Part(file, offset, begin, end))

    def thaw(self) -> None:
        """From now on all of it is this arena's own."""
        self.parts, self.own = [], 0


class Arenas:
    """Makes and owns at most n_tensors of them. They are zero, and resident only where they were written."""

    def __init__(self, n_tensors: int) -> None:
        self._context = TensorContext(n_tensors + 8)
        self._n_tensors = n_tensors
        self._buffers: list[Buffer] = []
        self._memory: dict[str, _Memory] = {}
        # Of the arenas that these are a fork of, until tensors of their names are made; after n_past tokens.
        self._source: dict[str, _Memory] = {}
        self._n_past = 0

    def new(self, type_: int, shape: Sequence[int], name: str, *, rows: RowsOf | None = None) -> Tensor:
        """rows: which of them a fork shares, and which it copies; None: it copies all. Raises ComputeError where there
        is not even address space.
        """
        tensor = self._context.new(type_, shape, name)
        row_bytes: int = tensor.contents.nb[1]
        memory = _Memory(_reserve(g.ggml_nbytes(tensor)), row_bytes, rows)
        source = self._source.pop(name, None)
        if source is not None:
            _fill(memory, source, self._n_past)
        self._memory[name] = memory
        buffer = Buffer.over(np.frombuffer(memory.mapping, np.uint8, g.ggml_nbytes(tensor)))
        buffer.place(tensor, 0)
        self._buffers.append(buffer)
        return tensor

    def fork(self, n_past: int) -> Arenas:
        """Arenas whose tensors begin with what those of the same names hold here after n_past tokens.

        Raises ComputeError where memory, or the limit on the size of a file, forbids it.
        """
        try:
            file = _File()
            for memory in self._memory.values():
                memory.share(file, n_past)
        except OSError as error:
            raise ComputeError(f"the memory cannot be forked: {error.strerror}") from None
        other = Arenas(self._n_tensors)
        other._source, other._n_past = dict(self._memory), n_past
        return other

    def thaw(self, tensor: Tensor) -> None:
        """Called before rows are changed that were said not to change: later forks begin with what they are then."""
        self._memory[tensor.contents.name.decode()].thaw()

    def release_rows(self, tensor: Tensor, n_rows: int) -> None:
        """Gives back the pages of the first rows, which nobody reads any more; those that no fork shares are zero."""
        memory = self._memory[tensor.contents.name.decode()]
        begin = max(memory.released, memory.own)
        end = n_rows * memory.row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if end - begin >= RELEASE_BYTES:
            memory.mapping.madvise(mmap.MADV_DONTNEED, begin, end - begin)
            memory.released = end

    @property
    def memory(self) -> list[mmap.mmap]:
        """What the tensors so far lie in: it is there as long as somebody holds it."""
        return [memory.mapping for memory in self._memory.values()]

    @property
    def closed(self) -> bool:
        return self._context.closed

    def close(self) -> None:
        self._memory.clear()
        self._source.clear()
        self._context.close()
        for buffer in self._buffers:
            buffer.close()
        self._buffers.clear()


def _reserve(n_bytes: int) -> mmap.mmap:
    """Huge pages are declined: of many arenas used from their start, each would take 2 MiB at its first row."""
    try:
        memory = mmap.mmap(-1, max(n_bytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError):
        raise ComputeError(f"not enough memory for {n_bytes / 2**20:.0f} MiB") from None
    with contextlib.suppress(AttributeError, OSError):  # a kernel without huge pages refuses the hint
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def _fill(memory: _Memory, source: _Memory, n_past: int) -> None:
    for part in source.parts:
        memory.put(part)
    used = len(source.mapping) if source.rows is None else source.rows(n_past).used * source.row_bytes
    end = min(used, len(source.mapping))
    if end > memory.own:
        with memoryview(source.mapping) as old, memoryview(memory.mapping) as new:
            new[memory.own : end] = old[memory.own : end]


def as_array(tensor: Tensor, dtype: type[np.generic]) -> np.ndarray:
    """All bytes of an arena, flat; only while the arena lives."""
    t = tensor.contents
    memory = native_ffi.buffer(native_ffi.cast("char *", t.data), g.ggml_nbytes(tensor))
    return np.frombuffer(memory, dtype)


def as_rows(tensor: Tensor) -> np.ndarray:
    """The bytes of an arena, uint8 [n_rows, bytes of a row]."""
    return as_array(tensor, np.uint8).reshape(tensor.contents.ne[1], tensor.contents.nb[1])
