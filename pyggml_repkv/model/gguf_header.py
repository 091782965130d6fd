"""Strict parser of the header of one GGUF file, version 2 or 3: every size in it is checked.

gguf.GGUFReader makes several numpy arrays per string, seconds for a vocabulary, and trusts what it reads.
Format: the GGUF specification in ggml's docs/gguf.md.
"""

import struct
from dataclasses import dataclass, replace
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
_MIN_ARRAY = 12  # bytes: type, count

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
    """Where one tensor lies: `shape` in numpy order, `offset` in bytes from the start of the file, or of part `part` of
    a model split into several.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    n_bytes: int
    part: int = 0


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself. `metadata` and `value_spans` as in `GGUFFile`; `end`: where the last tensor ends."""

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    alignment: int
    value_spans: dict[str, tuple[int, int]]
    end: int


class UnsoundError(Exception):
    """What is wrong with a file that the caller knows by name."""

    def __init__(self, what: str, remedy: str = _DAMAGED) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy


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
            raise UnsoundError(f"{what} at byte {start} needs {n_bytes} bytes, {self.end - start} remain")
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
            raise UnsoundError(f"{what} has {len(raw)} bytes, at most {limit} are allowed")
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise UnsoundError(f"{what} {printable(bytes(raw))} is not UTF-8") from None

    def numbers(self, kind: GGUFValueType, count: int, what: str) -> np.ndarray:
        dtype = _DTYPES[kind]
        start = self.take(count * dtype.itemsize, what)
        values = np.frombuffer(self.view, dtype, count, start)
        if kind is GGUFValueType.BOOL:
            if count and values.max() > 1:
                raise UnsoundError(f"{what} holds {values.max()}, a boolean is 0 or 1")
            return values.astype(np.bool_)
        return values.copy()

    def strings(self, count: int, what: str) -> list[str]:
        view, at, end = self.view, self.at, self.end
        if count > (end - at) // 8:
            raise UnsoundError(f"{what} claims {count} strings, {end - at} bytes remain")
        length_at = _U64.unpack_from
        items: list[str] = []
        for _ in range(count):
            start = at + 8
            if start > end:
                raise UnsoundError(f"{what} is cut off after {len(items)} of {count} strings")
            at = start + length_at(view, at)[0]
            if at > end:
                raise UnsoundError(f"string {len(items)} of {what} has {at - start} bytes, {end - start} remain")
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
        return self._array(what)

    def _array(self, what: str, *, inner: bool = False) -> list[Any] | np.ndarray:
        kind = self._value_type(what)
        count = self.u64(what)
        if kind is GGUFValueType.STRING:
            return self.strings(count, what)
        if kind is not GGUFValueType.ARRAY:
            return self.numbers(kind, count, what)
        if inner:
            raise UnsoundError(f"{what} is an array of arrays of arrays", "convert the model again")
        if count > (self.end - self.at) // _MIN_ARRAY:
            raise UnsoundError(f"{what} claims {count} arrays, {self.end - self.at} bytes remain")
        return [self._array(what, inner=True) for _ in range(count)]

    def _value_type(self, what: str) -> GGUFValueType:
        number = self.u32(what)
        kind = _VALUE_TYPES.get(number)
        if kind is None:
            raise UnsoundError(f"{what} has the unknown value type {number}")
        return kind


def parse_header(data: memoryview) -> Header:
    """The header of the file whose bytes are `data`. Raises UnsoundError."""
    cursor = _Cursor(data)
    version, n_tensors, n_keys = _preamble(cursor)
    metadata: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for index in range(n_keys):
        key = cursor.name(f"the name of key {index}", MAX_KEY)
        if not key:
            raise UnsoundError(f"key {index} has no name")
        if key in metadata:
            raise UnsoundError(f"key {printable(key)} appears twice")
        start = cursor.at
        metadata[key] = cursor.value(key)
        spans[key] = (start, cursor.at)
    alignment = _alignment(metadata)
    infos = [_tensor_info(cursor, index) for index in range(n_tensors)]
    data_start = -(-cursor.at // alignment) * alignment
    tensors = _place(infos, data_start, alignment, cursor.end)
    end = max((info.offset + info.n_bytes for info in tensors.values()), default=cursor.at)
    return Header(version, metadata, tensors, alignment, spans, end)


def _preamble(cursor: _Cursor) -> tuple[int, int, int]:
    magic = bytes(cursor.view[:4])
    if magic != _U32.pack(GGUF_MAGIC):
        if bytes(cursor.view[:23]) == b"version https://git-lfs":
            raise UnsoundError("is a Git LFS pointer, not the model", "fetch the file itself with `git lfs pull`")
        raise UnsoundError(f"is not a GGUF file: it starts with {magic!r}", "give a model in GGUF format")
    cursor.take(4, "the magic")
    version = cursor.u32("the version")
    if version & 0xFFFF == 0:
        raise UnsoundError("is big-endian GGUF or damaged", "convert the model for a little-endian machine")
    if not OLDEST_VERSION <= version <= GGUF_VERSION:
        supported = f"versions {OLDEST_VERSION} to {GGUF_VERSION} are supported"
        raise UnsoundError(f"is GGUF version {version}, {supported}", "convert the model again")
    n_tensors = cursor.u64("the tensor count")
    n_keys = cursor.u64("the key count")
    if n_tensors * _MIN_TENSOR_INFO + n_keys * _MIN_KEY_VALUE > cursor.end - cursor.at:
        raise UnsoundError(f"claims {n_tensors} tensors and {n_keys} keys in a file of {cursor.end} bytes")
    return version, n_tensors, n_keys


def _alignment(metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < MIN_ALIGNMENT or alignment & (alignment - 1):
        wanted = f"a power of two of at least {MIN_ALIGNMENT} is needed"
        raise UnsoundError(f"general.alignment is {printable(alignment)}, {wanted}")
    return alignment


def _tensor_info(cursor: _Cursor, index: int) -> TensorInfo:
    name = cursor.name(f"the name of tensor {index}", MAX_TENSOR_NAME)
    what = f"tensor {printable(name)}"
    n_dims = cursor.u32(what)
    if not 1 <= n_dims <= MAX_DIMS:
        raise UnsoundError(f"{what} has {n_dims} dimensions, 1 to {MAX_DIMS} are possible")
    ne = [cursor.u64(what) for _ in range(n_dims)]
    number = cursor.u32(what)
    offset = cursor.u64(what)
    kind = _TENSOR_TYPES.get(number)
    if kind is None:
        raise UnsoundError(f"{what} has the unknown type {number}", "convert it to a type that ggml supports")
    if 0 in ne or prod(ne) >= 2**63:
        raise UnsoundError(f"{what} has the impossible shape {ne[::-1]}")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if ne[0] % block:
        raise UnsoundError(f"{what} has rows of {ne[0]}, {kind.name} needs a multiple of {block}")
    return TensorInfo(name, tuple(ne[::-1]), kind, offset, prod(ne) // block * block_bytes)


def _place(infos: list[TensorInfo], data_start: int, alignment: int, n_file: int) -> dict[str, TensorInfo]:
    """Make the offsets absolute, and prove that every tensor lies in the file and overlaps no other."""
    tensors: dict[str, TensorInfo] = {}
    for info in infos:
        what = f"tensor {printable(info.name)}"
        if info.name in tensors:
            raise UnsoundError(f"{what} appears twice")
        if info.offset % alignment:
            raise UnsoundError(f"{what} lies at offset {info.offset}, not a multiple of {alignment}")
        start = data_start + info.offset
        if start + info.n_bytes > n_file:
            raise UnsoundError(f"{what} ends at byte {start + info.n_bytes} of a file of {n_file} bytes")
        tensors[info.name] = replace(info, offset=start)
    end, before = 0, ""
    for info in sorted(tensors.values(), key=lambda t: t.offset):
        if info.offset < end:
            raise UnsoundError(f"tensors {printable(before)} and {printable(info.name)} overlap")
        end, before = info.offset + info.n_bytes, info.name
    return tensors
