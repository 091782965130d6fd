"""Where the command line writes: text to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from pathlib import Path
from typing import TextIO, cast

from pyggml_repkv.errors import RepkvError


def prepare() -> None:
    """Makes both streams usable whatever the locale, and when the caller closed them."""
    # a process started with a closed descriptor has None here
    sys.stdout = cast("TextIO | None", sys.stdout) or _ClosedStream()
    sys.stderr = cast("TextIO | None", sys.stderr) or _nowhere()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")


class _ClosedStream(io.StringIO):
    """Stands for a stdout that the caller closed: what was asked for must not vanish with exit code 0."""

    def write(self, text: str, /) -> int:
        if text:
            raise OSError(errno.EBADF, "it is closed")
        return 0


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


def write(text: str) -> None:
    """Text to stdout, at once. Raises BrokenPipeError when the reader has gone, else RepkvError."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard(sys.stdout)
        raise RepkvError(f"cannot write to stdout: {error.strerror}") from error


def write_file(name: str, text: str) -> None:
    """Text to a file that a flag named, "-" is stdout. Raises RepkvError."""
    if name == "-":
        write(text)
        return
    try:
        Path(name).write_text(text, "utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RepkvError(f"{name}: {reason}") from None


def say(line: str) -> None:
    """One line to stderr, under the program's name."""
    log(f"pyggml_repkv: {line}\n")


def log(text: str) -> None:
    """Text to stderr; one that cannot be written is no reason to stop."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        discard(sys.stderr)


def flush() -> None:
    """Everything written reaches its reader, or the failure is raised as by `write`."""
    write("")


def discard(*streams: TextIO) -> None:
    """From here on the streams go nowhere, so that the interpreter's last flush cannot fail."""
    for stream in streams:
        # a stream without a descriptor, as under a test, has nothing to redirect
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
