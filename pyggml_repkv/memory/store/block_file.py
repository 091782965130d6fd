"""The file that evicted blocks are written to: opening it, and the header before each block (docs/block_file.md)."""

from __future__ import annotations

import contextlib
import copy
import errno
import logging
import mmap
import os
import struct
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import InputError, StoreError
from pyggml_repkv.ffi.library import native, native_ffi

MAGIC = b"REPKVBLK"
VERSION = 2
ALIGN: int = native.REPKV_ALIGN

_HEADER = struct.Struct("<8sII IIQ IIII II QII Q")
_CHECKSUM_AT = _HEADER.size - 8
ROTATED = 1
_COPY_BYTES = 2**20

log = logging.getLogger(__name__)


def checksum(data: bytes | bytearray | memoryview | NDArray[np.uint8]) -> int:
    """XXH64 with seed 0."""
    buffer = native_ffi.from_buffer(data)
    return int(native.repkv_checksum(buffer, len(buffer)))


def aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGN) * ALIGN


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """What stands before the records of a block.

    unit_ends: where its units end, counted in tokens from its first; checksums: uint64 [n_units, n_layer, n_lanes], one
    for each record; extra: bytes that the memory wants to find again with the block.
    """

    block: int
    first_position: int
    unit_ends: tuple[int, ...]
    rotated: bool
    types: tuple[int, int]
    row_bytes: tuple[int, int]
    checksums: NDArray[np.uint64]
    extra: bytes

    @property
    def n_tokens(self) -> int:
        return self.unit_ends[-1]

    def pack(self, n_bytes: int) -> bytes:
        """n_bytes, a multiple of ALIGN, of which `header_bytes` says how many it takes."""
        n_units, n_layer, n_lanes = self.checksums.shape
        fields = (
            MAGIC, VERSION, n_bytes, self.block, self.n_tokens, self.first_position, n_layer, ROTATED * self.rotated,
            *self.types, *self.row_bytes, len(self.extra), n_lanes, n_units, 0,
        )  # fmt: skip
        ends = np.array(self.unit_ends, np.uint32).tobytes()
        body = bytearray(_HEADER.pack(*fields) + self.checksums.tobytes() + ends + self.extra)
        body += bytes(n_bytes - len(body))
        struct.pack_into("<Q", body, _CHECKSUM_AT, checksum(body))
        return bytes(body)

    @classmethod
    def unpack(cls, data: bytes) -> BlockHeader:
        """Raises StoreError for what is no header, was damaged, or is of a newer format."""
        if len(data) < _HEADER.size or data[:8] != MAGIC:
            raise StoreError("there is no block header")
        (
            _,
            version,
            n_bytes,
            block,
            n_tokens,
            first,
            n_layer,
            flags,
            type_k,
            type_v,
            row_k,
            row_v,
            n_extra,
            n_lanes,
            n_units,
            found,
        ) = _HEADER.unpack_from(data)
        if version != VERSION:
            raise StoreError(f"its format is version {version}, and this program reads version {VERSION}")
        n_records = n_units * n_layer * n_lanes
        start = _HEADER.size + 8 * n_records + 4 * n_units
        body = bytearray(data)
        body[_CHECKSUM_AT : _CHECKSUM_AT + 8] = bytes(8)
        if len(data) != n_bytes or start + n_extra > n_bytes or checksum(body) != found:
            raise StoreError("its header is damaged")
        sums = np.frombuffer(data, np.uint64, n_records, _HEADER.size).reshape(n_units, n_layer, n_lanes).copy()
        ends = tuple(np.frombuffer(data, np.uint32, n_units, _HEADER.size + 8 * n_records).tolist())
        if not ends or ends[-1] != n_tokens or any(a >= b for a, b in pairwise((0, *ends))):
            raise StoreError("its header is damaged")
        extra = data[start : start + n_extra]
        rotated = bool(flags & ROTATED)
        return cls(block, first, ends, rotated, (type_k, type_v), (row_k, row_v), sums, extra)


def header_bytes(n_units: int, n_lanes: int, n_extra: int) -> int:
    """Bytes that a header of so many units, each with a record in so many lanes of all layers, takes: a multiple of
    ALIGN.
    """
    return aligned(_HEADER.size + 8 * n_units * n_lanes + 4 * n_units + n_extra)


class BlockFile:
    """An open file, read and written directly where the file system can, so that the page cache does not hold it too.

    name: None makes a file that is gone as soon as it is closed, whatever happens to the process.
    Raises InputError where the folder cannot be used.
    """

    def __init__(self, folder: Path, name: str | None) -> None:
        self.folder, self.named = folder, name is not None
        self._room = _Room()
        self.path = folder if name is None else folder / name
        try:
            if name is None:
                folder.mkdir(0o700, parents=True, exist_ok=True)
            self.fd, self.direct = _open(folder, name)
        except OSError as error:
            raise InputError(
                f"{self.path}: {error.strerror}; the blocks need a directory that can be written"
            ) from None
        self._close = _closing(self)
        if not self.direct:
            log.info("%s has no direct I/O: evicted blocks fill the page cache as well", folder)

    def free_bytes(self) -> int:
        """What the file system could still take."""
        stat = os.fstatvfs(self.fd)
        return stat.f_bavail * stat.f_frsize

    def read(self, offset: int, n_bytes: int) -> bytes:
        """n_bytes from offset on, fewer where the file ends. Raises StoreError."""
        start = offset // ALIGN * ALIGN
        # Page-aligned memory, as direct reads want it.
        want = aligned(offset + n_bytes - start)
        array = np.empty(want + ALIGN, np.uint8)
        shift = -array.ctypes.data % ALIGN
        view = array[shift : shift + want].data
        done = 0
        try:
            while done < want and (got := os.preadv(self.fd, [view[done:]], start + done)):
                done += got
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror}") from None
        return bytes(view[offset - start : min(done, offset - start + n_bytes)])

    def sync(self) -> None:
        """Makes what was written survive a power cut. Raises StoreError."""
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror}", lost=False) from None

    @property
    def n_bytes(self) -> int:
        """Of all blocks in it that anybody holds."""
        return self._room.n_bytes

    def take(self, n_bytes: int) -> int:
        """Room for a block of n_bytes -> where it begins."""
        offset = self._room.end
        self.hold(offset, n_bytes)
        return offset

    def hold(self, offset: int, n_bytes: int) -> None:
        """Takes note of one more who reads the block there."""
        room = self._room
        room.end = max(room.end, offset + n_bytes)
        room.n_bytes += 0 if offset in room.holders else n_bytes
        room.holders[offset] += 1

    def let_go(self, offset: int, n_bytes: int) -> None:
        """The reverse. A block that nobody holds is gone, but from a file with a name, which keeps it."""
        room = self._room
        room.holders[offset] -= 1
        if room.holders[offset] == 0:
            del room.holders[offset]
            room.n_bytes -= n_bytes
            if not self.named and self._close.alive:
                # Where the file system cannot, the space comes back with the last handle.
                native.repkv_discard(self.fd, offset, n_bytes)

    def share(self, folder: Path) -> BlockFile:
        """For another store with the same blocks. A file without a name is shared. Of one with a name, which another
        process may have next, the bytes are copied into one without, in `folder`. Raises InputError, StoreError.
        """
        if self.named:
            other = BlockFile(folder, None)
            try:
                _copy(self.fd, other.fd, self._room.end)
            except OSError as error:
                other.close()
                raise StoreError(f"{folder}: {error.strerror}", lost=False) from None
            except BaseException:
                other.close()
                raise
            other._room.end = self._room.end
            return other
        other = copy.copy(self)
        other.fd = os.dup(self.fd)
        other._close = _closing(other)
        return other

    def close(self) -> None:
        self._close()


@dataclass(slots=True)
class _Room:
    """What everybody who shares a file knows of it: where the next block is written, and how many hold the block at an
    offset.
    """

    end: int = 0
    n_bytes: int = 0
    holders: Counter[int] = field(default_factory=Counter)


def _closing(file: BlockFile) -> weakref.finalize[[int], BlockFile]:
    """Closes a descriptor once, also where nobody says so."""
    close = weakref.finalize(file, os.close, file.fd)
    # At the end of the process threads may still write.
    close.atexit = False
    return close


def _copy(source: int, target: int, n_bytes: int) -> None:
    # Page-aligned memory, as direct reads and writes want it.
    with mmap.mmap(-1, _COPY_BYTES) as buffer, memoryview(buffer) as view:
        done = 0
        while done < n_bytes:
            n = os.preadv(source, [view], done) // ALIGN * ALIGN
            if n == 0:
                raise OSError(errno.EIO, "the file of blocks ends too early")
            written = 0
            while written < n:
                written += os.pwritev(target, [view[written:n]], done + written)
            done += n


def _open(folder: Path, name: str | None) -> tuple[int, bool]:
    """-> the descriptor and whether it is direct. A file system that cannot says so at once."""
    if name is not None:
        return _try_direct(lambda direct: os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | direct, 0o600))
    made, path = tempfile.mkstemp(prefix="repkv-", suffix=".blocks", dir=folder)
    try:
        return _try_direct(lambda direct: os.open(path, os.O_RDWR | os.O_CLOEXEC | direct))
    finally:
        os.close(made)
        with contextlib.suppress(OSError):
            os.unlink(path)


def _try_direct(open_with: Callable[[int], int]) -> tuple[int, bool]:
    direct = getattr(os, "O_DIRECT", 0)
    try:
        fd = open_with(direct)
    except OSError:
        if not direct:
            raise
        return open_with(0), False
    if not direct or _aligned_io_works(fd):
        return fd, bool(direct)
    os.close(fd)
    return open_with(0), False


def _aligned_io_works(fd: int) -> bool:
    """Some file systems take the flag and refuse the reads."""
    array = np.empty(2 * ALIGN, np.uint8)
    shift = -array.ctypes.data % ALIGN
    try:
        os.preadv(fd, [array[shift : shift + ALIGN].data], 0)
    except OSError:
        return False
    return True
