"""Results as JSON lines, one by one as they are found, so that an evaluation that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pyggml_repkv.errors import InputError, RepkvError

_BEGINNING = '{"settings": '


class ResultsFile:
    """What is there is kept, less a line that a crash cut off. Raises InputError for another kind of file."""

    def __init__(self, name: str) -> None:
        self._path = Path(name)
        self._found: dict[str, dict[str, Any]] = {}
        text = self._read()
        whole = text[: text.rfind("\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self._found[_key(entry["settings"])] = dict(entry["result"])
            except (KeyError, TypeError, ValueError):
                raise InputError(f"--out {name}: line {number} is no result; give a file that --out wrote") from None
        rest = text[len(whole) :]
        if rest:
            # Whatever else it is, is not ours to drop.
            if rest[: len(_BEGINNING)] != _BEGINNING[: len(rest)]:
                raise InputError(f"--out {name}: its last line is no result; give a file that --out wrote")
            self._write(whole, "w")

    def get(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The result of these settings, if it is known."""
        return self._found.get(_key(settings))

    def add(self, settings: dict[str, Any], result: dict[str, Any]) -> None:
        """Raises RepkvError where it cannot be written."""
        self._found[_key(settings)] = result
        self._write(json.dumps({"settings": settings, "result": result}) + "\n", "a")

    def _read(self) -> str:
        try:
            return self._path.read_text("utf-8")
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise InputError(f"--out {self._path}: {error.strerror}") from None
        except UnicodeError:
            raise InputError(f"--out {self._path}: not a text; give a file that --out wrote") from None

    def _write(self, text: str, mode: str) -> None:
        try:
            with self._path.open(mode, encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RepkvError(f"--out {self._path}: {error.strerror}") from None


def _key(settings: dict[str, Any]) -> str:
    """The same for the same settings, whatever their order."""
    return json.dumps(settings, sort_keys=True)
