"""Strict reader for GGUF version 2 and 3: every size in the header is checked, the data stays mapped.

gguf.GGUFReader makes several numpy arrays per string, seconds for a vocabulary, and trusts what it reads.
Format: the GGUF specification in ggml's docs/gguf.md.
"""

import contextlib
import mmap
import os
import stat
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGUF_VERSION,
    GGMLQuantizationType,
    GGUFValueType,
)

from pyggml_repkv.errors import ModelFileError

OLDEST_VERSION = 2
MAX_DIMS = 4
MAX_TENSOR_NAME = 63  # bytes; ggml cuts longer names
MAX_KEY = 65535  # bytes, by the specification
MIN_ALIGNMENT = 8

_DAMAGED = "the file is damaged or incomplete: download or convert it again"
_MIN_KEY_VALUE = 13  # bytes: empty key, type, one-byte value
_MIN_TENSOR_INFO = 32  # bytes: empty name, one dimension, type, offset

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "<u1",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
_DTYPES = {kind: np.dtype(code) for kind, code in _SCALARS.items()}
# Read as plain ints: building an enum member from an unknown number raises, and costs more than a dict.
_VALUE_TYPES = {int(kind): kind for kind in GGUFValueType}
_TENSOR_TYPES = {int(kind): kind for kind in GGML_QUANT_SIZES}


def printable(text: object, limit: int = 80) -> str:
    """`text` on one line: cut after `limit` characters, control characters and lone surrogates escaped."""
    shown = str(text)
    if len(shown) > limit:
        shown = shown[: limit - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)


def file_error(path: Path, what: str, remedy: str = _DAMAGED) -> ModelFileError:
    """The one-line error for the model file `path`."""
    return ModelFileError(f"{printable(path, 400)}: {what}; {remedy}")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `shape` in numpy order, `offset` from the start of the file, in bytes."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    n_bytes: int


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """A GGUF file whose header is parsed and whose data is mapped read-only.

    `metadata` holds Python scalars, list[str] for arrays of strings, np.ndarray for numeric arrays. Bytes
    that are not UTF-8 are decoded with "surrogateescape" in arrays, so that encoding likewise gives them
    back, and with "replace" in scalar strings. `value_spans` gives the bytes (start, end) that hold type and
    value of each key.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: np.memmap = field(repr=False)
    alignment: int
    value_spans: dict[str, tuple[int, int]] = field(repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "GGUFFile":
        """Map the file and parse its header; raises ModelFileError for anything but a sound GGUF file."""
        where = Path(path)
        data = _map(where)
        try:
            return _parse(where, data)
        except _UnsoundError as problem:
            raise file_error(where, problem.what, problem.remedy) from None

    def release_pages(self) -> None:
        """Lets go of the pages read so far; they come back from the file when they are next used."""
        mapping = self.data.base if isinstance(self.data.base, mmap.mmap) else None
        if mapping is not None:
            with contextlib.suppress(AttributeError, OSError):
                mapping.madvise(mmap.MADV_DONTNEED)

    def tensor_bytes(self, name: str) -> np.ndarray:
        """The mapped bytes of tensor `name`: uint8 [n_bytes], read-only; KeyError if absent."""
        info = self.tensors[name]
        return self.data[info.offset : info.offset + info.n_bytes].view(np.ndarray)


class _UnsoundError(Exception):
    def __init__(self, what: str, remedy: str = _DAMAGED) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy


def _map(path: Path) -> np.memmap:
    try:
        # Opening a FIFO would wait for a writer, so ask for the kind of file first.
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise file_error(path, "is a directory", "give the path of a .gguf file")
        if not stat.S_ISREG(status.st_mode):
            raise file_error(path, "is not a regular file", "give the path of a .gguf file")
        if status.st_size == 0:
            raise file_error(path, "is empty", "download or convert it again")
        return np.memmap(path, dtype=np.uint8, mode="r")
    except FileNotFoundError:
        raise file_error(path, "no such file", "give the path of a .gguf file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        what = f"cannot be opened: {printable(reason)}"
        raise file_error(path, what, "check the path and its permissions") from None


class _Cursor:
    """A position in the mapped header; every read is checked against the bytes that remain."""

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.at = 0
        self.end = len(view)

    def take(self, n_bytes: int, what: str) -> int:
        """Step over `n_bytes`; return where they start."""
        start = self.at
        if n_bytes > self.end - start:
            raise _UnsoundError(f"{what} at byte {start} needs {n_bytes} bytes, {self.end - start} remain")
        self.at = start + n_bytes
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.view, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.view, self.take(8, what))[0])

    def raw_string(self, what: str) -> memoryview:
        length = self.u64(what)
        start = self.take(length, what)
        return self.view[start : start + length]

    def name(self, what: str, limit: int) -> str:
        raw = self.raw_string(what)
        if len(raw) > limit:
            raise _UnsoundError(f"{what} has {len(raw)} bytes, at most {limit} are allowed")
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise _UnsoundError(f"{what} {printable(bytes(raw))} is not UTF-8") from None

    def numbers(self, kind: GGUFValueType, count: int, what: str) -> np.ndarray:
        dtype = _DTYPES[kind]
        start = self.take(count * dtype.itemsize, what)
        values = np.frombuffer(self.view, dtype, count, start)
        if kind is GGUFValueType.BOOL:
            if count and values.max() > 1:
                raise _UnsoundError(f"{what} holds {values.max()}, a boolean is 0 or 1")
            return values.astype(np.bool_)
        return values.copy()

    def strings(self, count: int, what: str) -> list[str]:
        view, at, end = self.view, self.at, self.end
        if count > (end - at) // 8:
            raise _UnsoundError(f"{what} claims {count} strings, {end - at} bytes remain")
        length_at = _U64.unpack_from
        items: list[str] = []
        for _ in range(count):
            start = at + 8
            if start > end:
                raise _UnsoundError(f"{what} is cut off after {len(items)} of {count} strings")
            at = start + length_at(view, at)[0]
            if at > end:
                raise _UnsoundError(f"string {len(items)} of {what} has {at - start} bytes, {end - start} remain")
            items.append(str(view[start:at], "utf-8", "surrogateescape"))
        self.at = at
        return items

    def value(self, key: str) -> Any:
        what = f"key {printable(key)}"
        kind = self._value_type(what)
        if kind is GGUFValueType.STRING:
            return str(self.raw_string(what), "utf-8", "replace")
        if kind is not GGUFValueType.ARRAY:
            return self.numbers(kind, 1, what)[0].item()
        kind = self._value_type(what)
        count = self.u64(what)
        if kind is GGUFValueType.ARRAY:
            raise _UnsoundError(f"{what} is an array of arrays", "convert the model again")
        return self.strings(count, what) if kind is GGUFValueType.STRING else self.numbers(kind, count, what)

    def _value_type(self, what: str) -> GGUFValueType:
        number = self.u32(what)
        kind = _VALUE_TYPES.get(number)
        if kind is None:
            raise _UnsoundError(f"{what} has the unknown value type {number}")
        return kind


def _parse(path: Path, data: np.memmap) -> GGUFFile:
    cursor = _Cursor(data.data)
    version, n_tensors, n_keys = _preamble(cursor)
    metadata: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for index in range(n_keys):
        key = cursor.name(f"the name of key {index}", MAX_KEY)
        if key in metadata:
            raise _UnsoundError(f"key {printable(key)} appears twice")
        start = cursor.at
        metadata[key] = cursor.value(key)
        spans[key] = (start, cursor.at)
    _refuse_split(metadata)
    alignment = _alignment(metadata)
    infos = [_tensor_info(cursor, index) for index in range(n_tensors)]
    data_start = -(-cursor.at // alignment) * alignment
    tensors = _place(infos, data_start, alignment, cursor.end)
    return GGUFFile(path, version, metadata, tensors, data, alignment, spans)


def _preamble(cursor: _Cursor) -> tuple[int, int, int]:
    magic = bytes(cursor.view[:4])
    if magic != _U32.pack(GGUF_MAGIC):
        if bytes(cursor.view[:23]) == b"version https://git-lfs":
            raise _UnsoundError("is a Git LFS pointer, not the model", "fetch the file itself with `git lfs pull`")
        raise _UnsoundError(f"is not a GGUF file: it starts with {magic!r}", "give a model in GGUF format")
    cursor.take(4, "the magic")
    version = cursor.u32("the version")
    if version & 0xFFFF == 0:
        raise _UnsoundError("is big-endian GGUF or damaged", "convert the model for a little-endian machine")
    if not OLDEST_VERSION <= version <= GGUF_VERSION:
        supported = f"versions {OLDEST_VERSION} to {GGUF_VERSION} are supported"
        raise _UnsoundError(f"is GGUF version {version}, {supported}", "convert the model again")
    n_tensors = cursor.u64("the tensor count")
    n_keys = cursor.u64("the key count")
    if n_tensors * _MIN_TENSOR_INFO + n_keys * _MIN_KEY_VALUE > cursor.end - cursor.at:
        raise _UnsoundError(f"claims {n_tensors} tensors and {n_keys} keys in a file of {cursor.end} bytes")
    return version, n_tensors, n_keys


def _refuse_split(metadata: dict[str, Any]) -> None:
    n_parts = metadata.get("split.count", 1)
    if isinstance(n_parts, int) and n_parts > 1:
        part = metadata.get("split.no")
        which = f"part {part + 1}" if isinstance(part, int) else "one part"
        raise _UnsoundError(
            f"is {which} of a model split into {n_parts} files",
            "merge them first with `llama-gguf-split --merge`",
        )


def _alignment(metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < MIN_ALIGNMENT or alignment & (alignment - 1):
        wanted = f"a power of two of at least {MIN_ALIGNMENT} is needed"
        raise _UnsoundError(f"general.alignment is {printable(alignment)}, {wanted}")
    return alignment


def _tensor_info(cursor: _Cursor, index: int) -> TensorInfo:
    name = cursor.name(f"the name of tensor {index}", MAX_TENSOR_NAME)
    what = f"tensor {printable(name)}"
    n_dims = cursor.u32(what)
    if not 1 <= n_dims <= MAX_DIMS:
        raise _UnsoundError(f"{what} has {n_dims} dimensions, 1 to {MAX_DIMS} are possible")
    ne = [cursor.u64(what) for _ in range(n_dims)]
    number = cursor.u32(what)
    offset = cursor.u64(what)
    kind = _TENSOR_TYPES.get(number)
    if kind is None:
        raise _UnsoundError(f"{what} has the unknown type {number}", "convert it to a type that ggml supports")
    if 0 in ne or prod(ne) >= 2**63:
        raise _UnsoundError(f"{what} has the impossible shape {ne[::-1]}")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if ne[0] % block:
        raise _UnsoundError(f"{what} has rows of {ne[0]}, {kind.name} needs a multiple of {block}")
    return TensorInfo(name, tuple(ne[::-1]), kind, offset, prod(ne) // block * block_bytes)


def _place(infos: list[TensorInfo], data_start: int, alignment: int, n_file: int) -> dict[str, TensorInfo]:
    """Make the offsets absolute, and prove that every tensor lies in the file and overlaps no other."""
    tensors: dict[str, TensorInfo] = {}
    for info in infos:
        what = f"tensor {printable(info.name)}"
        if info.name in tensors:
            raise _UnsoundError(f"{what} appears twice")
        if info.offset % alignment:
            raise _UnsoundError(f"{what} lies at offset {info.offset}, not a multiple of {alignment}")
        start = data_start + info.offset
        if start + info.n_bytes > n_file:
            raise _UnsoundError(f"{what} ends at byte {start + info.n_bytes} of a file of {n_file} bytes")
        tensors[info.name] = TensorInfo(info.name, info.shape, info.type, start, info.n_bytes)
    end, before = 0, ""
    for info in sorted(tensors.values(), key=lambda t: t.offset):
        if info.offset < end:
            raise _UnsoundError(f"tensors {printable(before)} and {printable(info.name)} overlap")
        end, before = info.offset + info.n_bytes, info.name
    return tensors
