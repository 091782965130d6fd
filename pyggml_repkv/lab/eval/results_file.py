"""Results as JSON lines, written one by one, so that an interrupted evaluation continues where it stopped."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from pyggml_repkv.errors import InputError, RepkvError

_BEGINNING = '{"settings": '

T = TypeVar("T")

# What JSON makes of a field of each type.
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,), "bool": (bool,), "int": (int,), "float": (int, float), "dict[str, object]": (dict,),
    "list[str]": (list,),
}  # fmt: skip


class ResultsFile:
    """A file of results, locked until it is closed. Opening it keeps all results and drops a line that a crash cut off.

    Raises InputError for another kind of file, and if another process has it open.
    """

    def __init__(self, name: str) -> None:
        self._path = Path(name)
        self._found: dict[str, dict[str, Any]] = {}
        if self._path.exists() and not self._path.is_file():
            raise InputError(f"--out {name}: not a regular file")
        try:
            self._file = self._path.open("a+b")
        except OSError as error:
            raise InputError(f"--out {name}: {error.strerror}") from None
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def get(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Returns the result of these settings, or None."""
        return self._found.get(_key(settings))

    def add(self, settings: dict[str, Any], result: dict[str, Any]) -> None:
        """Appends a result. Raises RepkvError if writing fails."""
        line = json.dumps({"settings": settings, "result": result}) + "\n"
        try:
            self._file.write(line.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RepkvError(f"--out {self._path}: {error.strerror}") from None
        self._found[_key(settings)] = result

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        except OSError:
            # `add` has reported the line that could not be written.
            return

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                raise InputError(f"--out {self._path}: another process writes to it") from None
            # A file system without locks keeps no process out.

    def _read(self) -> None:
        self._file.seek(0)
        try:
            data = self._file.read()
            whole = data[: data.rfind(b"\n") + 1]
            lines = whole.decode("utf-8").split("\n")[:-1]
            rest = data[len(whole) :].decode("utf-8")
        except OSError as error:
            raise InputError(f"--out {self._path}: {error.strerror}") from None
        except UnicodeError:
            raise InputError(f"--out {self._path}: not a text; give a file that --out wrote") from None
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                self._found[_key(entry["settings"])] = dict(entry["result"])
            except (KeyError, TypeError, ValueError, RecursionError):
                raise InputError(
                    f"--out {self._path}: line {number} is no result; give a file that --out wrote"
                ) from None
        if not rest:
            return
        # Only a line that --out began may be dropped.
        if rest[: len(_BEGINNING)] != _BEGINNING[: len(rest)]:
            raise InputError(f"--out {self._path}: its last line is no result; give a file that --out wrote")
        try:
            self._file.truncate(len(whole))
        except OSError as error:
            raise RepkvError(f"--out {self._path}: {error.strerror}") from None


def restored(kind: type[T], result: dict[str, Any]) -> T:
    """Returns the dataclass `kind` that `asdict` turned into a result. Raises TypeError or ValueError for another."""
    values = kind(**result)
    for field in fields(kind):  # type: ignore[arg-type]
        if type(result[field.name]) not in _KINDS[str(field.type)]:
            raise ValueError(field.name)
    return values


def _key(settings: dict[str, Any]) -> str:
    """Returns the same key for the same settings, whatever their order."""
    return json.dumps(settings, sort_keys=True)
