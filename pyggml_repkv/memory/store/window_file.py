"""The file that holds the tokens no block holds yet: sinks, then a ring over the others, each with its own checksum.

A token's entry is its position and checksum (uint64 each), then for every layer its row of the store's keys, of the
store's values, and of the window's rotated keys (docs/block_file.md).
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import StoreError
from pyggml_repkv.memory.store.block_file import checksum

_PREFIX = 16
Rows = NDArray[np.uint8]


class WindowFile:
    """n_ring: how many tokens after the sinks fit before the first is overwritten. Raises OSError as open does."""

    def __init__(self, path: Path, *, entry_bytes: int, n_sink: int, n_ring: int) -> None:
        self.path, self.n_sink, self.n_ring = path, n_sink, n_ring
        self.entry_bytes = _PREFIX + entry_bytes
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.written_bytes = 0

    def write(self, positions: NDArray[np.int64], rows: Rows) -> None:
        """Tokens at rising positions, uint8 [n, entry_bytes of the constructor]. Raises StoreError."""
        entries = np.empty((len(rows), self.entry_bytes), np.uint8)
        entries[:, _PREFIX:] = rows
        head = entries[:, :_PREFIX].view(np.uint64)
        for i in range(len(rows)):
            head[i] = positions[i], checksum(entries[i, _PREFIX:])
        try:
            for begin, end in self._runs(positions):
                data = entries[begin:end].data.cast("B")
                done, at = 0, self._offset(int(positions[begin]))
                while done < len(data):
                    done += os.pwrite(self._fd, data[done:], at + done)
        except OSError as error:
            raise StoreError(f"{self.path}: could not be written: {error.strerror}", lost=False) from None
        self.written_bytes += entries.nbytes

    def read(self, first: int, end: int) -> Rows:
        """Rows of the tokens [first, end) as given to `write`. Raises StoreError where they are something else."""
        entries = np.zeros((end - first, self.entry_bytes), np.uint8)
        try:
            for a, b in self._runs(np.arange(first, end)):
                data = entries[a:b].data.cast("B")
                done, at = 0, self._offset(first + a)
                while done < len(data) and (got := os.preadv(self._fd, [data[done:]], at + done)):
                    done += got
        except OSError as error:
            raise StoreError(f"{self.path}: could not be read: {error.strerror}") from None
        head = entries[:, :_PREFIX].view(np.uint64)
        for i in range(len(entries)):
            if head[i, 0] != first + i or head[i, 1] != checksum(entries[i, _PREFIX:]):
                raise StoreError(f"{self.path}: token {first + i} is missing or damaged")
        return entries[:, _PREFIX:]

    def sync(self) -> None:
        """Raises StoreError."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror}", lost=False) from None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _offset(self, position: int) -> int:
        slot = position if position < self.n_sink else self.n_sink + (position - self.n_sink) % self.n_ring
        return slot * self.entry_bytes

    def _runs(self, positions: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Index ranges of tokens whose entries lie one after another."""
        if not len(positions):
            return []
        breaks = np.flatnonzero(np.diff([self._offset(int(p)) for p in positions]) != self.entry_bytes) + 1
        ends = [0, *breaks.tolist(), len(positions)]
        return list(pairwise(ends))
