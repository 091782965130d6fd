"""A GGUF model: its file, or the parts of a split one, mapped; gguf_header.py reads what they say of themselves."""

import contextlib
import mmap
import os
import re
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGUF_MAGIC

from pyggml_repkv.ffi.lost_files import watch
from pyggml_repkv.model.gguf_header import Header, TensorInfo, UnsoundError, file_error, parse_header, printable

__all__ = ["GGUFFile", "TensorInfo", "file_error", "printable"]

_SPLIT_AGAIN = "download or split the model again"
_PART_NAME = re.compile(
    r"(?P<stem>.*)-(?P<number>[0-9]{5,})-of-(?P<count>[0-9]{5,})(?P<end>\.gguf)", re.DOTALL | re.IGNORECASE
)


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """A GGUF model whose headers are parsed and whose bytes are mapped read-only.

    path: of its only or first part. parts: the bytes of each file, uint8; `TensorInfo.part` counts them from 0.
    `metadata` holds Python scalars, list[str] for arrays of strings, np.ndarray for numeric arrays, lists of these for
    arrays of arrays. Bytes that are not UTF-8 are decoded with "surrogateescape" in arrays, so that encoding likewise
    gives them back, and with "replace" in scalar strings. `value_spans` gives the bytes (start, end) of the first part
    that hold type and value of each key.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    parts: tuple[np.memmap, ...] = field(repr=False)
    value_spans: dict[str, tuple[int, int]] = field(repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "GGUFFile":
        """Maps the file, and the others of a split model, whose first part `path` is; raises ModelFileError for
        anything but a sound GGUF model.
        """
        where = Path(path)
        data, head = _read(where)
        parts, tensors = _all_parts(where, data, head, _n_parts(where, head))
        return cls(where, head.version, head.metadata, tensors, parts, head.value_spans)

    @property
    def n_bytes(self) -> int:
        """Of all parts."""
        return sum(len(part) for part in self.parts)

    def release_pages(self) -> None:
        """Lets go of the pages read so far; they come back from the file when they are next used."""
        for part in self.parts:
            if isinstance(part.base, mmap.mmap):
                with contextlib.suppress(AttributeError, OSError):
                    part.base.madvise(mmap.MADV_DONTNEED)

    def tensor_bytes(self, name: str) -> np.ndarray:
        """The mapped bytes of tensor `name`: uint8 [n_bytes], read-only; KeyError if absent."""
        info = self.tensors[name]
        return self.parts[info.part][info.offset : info.offset + info.n_bytes].view(np.ndarray)


def _read(path: Path) -> tuple[np.memmap, Header]:
    data = _map(path)
    try:
        return data, parse_header(data.data)
    except UnsoundError as problem:
        raise file_error(path, problem.what, problem.remedy) from None


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
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except FileNotFoundError:
        raise file_error(path, "no such file", "give the path of a .gguf file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        what = f"cannot be opened: {printable(reason)}"
        raise file_error(path, what, "check the path and its permissions") from None
    watch(data, printable(path, 400))
    return data


def _n_parts(path: Path, head: Header) -> int:
    """Of how many files the model that begins here consists. Raises ModelFileError for a later part of one."""
    count = head.metadata.get("split.count", 1)
    if type(count) is not int or count < 0:
        raise file_error(path, f"split.count is {printable(repr(count))}, a number of files is needed", _SPLIT_AGAIN)
    # A count of 0 is no split, as in llama.cpp. A merged model may keep the keys of its parts, and has all tensors.
    merged = "general.architecture" in head.metadata and _number(head, "split.tensors.count") == len(head.tensors)
    if count <= 1 or merged:
        return 1
    number = _part_number(path, head)
    if number == 0:
        return count
    name = _PART_NAME.fullmatch(path.name)
    first = f", {printable(_part_path(path, name, 0, count), 400)}" if name else ""
    raise file_error(path, f"is part {number + 1} of a model split into {count} files", f"give the first part{first}")


def _part_number(path: Path, head: Header) -> int:
    number = _number(head, "split.no")
    if number is None or number < 0:
        what = f"split.no is {_shown(head, 'split.no')}, the number of the part is needed"
        raise file_error(path, what, _SPLIT_AGAIN)
    return number


def _number(head: Header, key: str) -> int | None:
    value = head.metadata.get(key)
    return value if type(value) is int else None


def _shown(head: Header, key: str) -> str:
    return printable(repr(head.metadata[key])) if key in head.metadata else "missing"


def _part_path(path: Path, name: re.Match[str], number: int, count: int) -> Path:
    """Of part `number`, from 0; path, name: of any part, and what _PART_NAME makes of its name."""
    return path.with_name(f"{name['stem']}-{number + 1:05}-of-{count:05}{name['end']}")


def _all_parts(
    first: Path, data: np.memmap, head: Header, n_parts: int
) -> tuple[tuple[np.memmap, ...], dict[str, TensorInfo]]:
    """The bytes of each part, and the tensors of all. Raises ModelFileError that names the part which is wrong."""
    if n_parts == 1:
        return (data,), head.tensors
    _refuse_joined(first, data, head)
    name = _PART_NAME.fullmatch(first.name)
    if name is None or (int(name["number"]), int(name["count"])) != (1, n_parts):
        what = f"is part 1 of a model split into {n_parts} files, and its name does not say where the others are"
        raise file_error(first, what, f"its name must end with -00001-of-{n_parts:05}.gguf, theirs likewise")
    parts, tensors = [data], dict(head.tensors)
    for number in range(1, n_parts):
        path = _part_path(first, name, number, n_parts)
        if not os.path.exists(path):
            raise file_error(path, f"part {number + 1} of {n_parts} is missing", "download it beside the first part")
        data, head_of_part = _read(path)
        _refuse_joined(path, data, head_of_part)
        if (_part_number(path, head_of_part), _number(head_of_part, "split.count")) != (number, n_parts):
            found = (
                f"split.no is {_shown(head_of_part, 'split.no')} and split.count {_shown(head_of_part, 'split.count')}"
            )
            raise file_error(path, f"{found}, not {number} and {n_parts}", _SPLIT_AGAIN)
        for info in head_of_part.tensors.values():
            if info.name in tensors:
                other = _part_path(first, name, tensors[info.name].part, n_parts).name
                what = f"tensor {printable(info.name)} is in {printable(other)} too"
                raise file_error(path, what, _SPLIT_AGAIN)
            tensors[info.name] = replace(info, part=number)
        parts.append(data)
    if _number(head, "split.tensors.count") != len(tensors):
        what = f"split.tensors.count is {_shown(head, 'split.tensors.count')}, its parts hold {len(tensors)} tensors"
        raise file_error(first, what, _SPLIT_AGAIN)
    return tuple(parts), tensors


def _refuse_joined(path: Path, data: np.memmap, head: Header) -> None:
    """The parts one after another are not a model: what follows the first begins like a file of its own."""
    aligned = -(-head.end // head.alignment) * head.alignment
    magic = GGUF_MAGIC.to_bytes(4, "little")
    if any(bytes(data[at : at + 4]) == magic for at in (head.end, aligned)):
        what = "holds a whole GGUF file behind its own tensors, as parts joined with `cat` do"
        raise file_error(path, what, "keep the parts apart, or merge them with `llama-gguf-split --merge`")
