"""Where the command line writes: text to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from pathlib import Path
from typing import TextIO, cast

from pyggml_repkv.errors import RepkvError


def prepare() -> None:
    """Makes stdout and stderr usable in any locale, and also where the caller closed them."""
    # Python sets a stream to None if its descriptor is closed at the start.
    sys.stdout = cast("TextIO | None", sys.stdout) or _ClosedStream()
    sys.stderr = cast("TextIO | None", sys.stderr) or _nowhere()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")


class _ClosedStream(io.StringIO):
    """A stdout that the caller closed. Writing raises OSError, so that output never vanishes with exit code 0."""

    def write(self, text: str, /) -> int:
        if text:
            raise OSError(errno.EBADF, "it is closed")
        return 0


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


def write(text: str) -> None:
    """Writes all of a text to stdout. Raises BrokenPipeError if the reader is gone, RepkvError otherwise."""
    try:
        _put(sys.stdout, text)
    except BrokenPipeError:
        raise
    except OSError as error:
        discard(sys.stdout)
        raise RepkvError(f"cannot write to stdout: {error.strerror}") from error


def _put(stream: TextIO, text: str) -> None:
    """Past Python's own streams: unbuffered ones (PYTHONUNBUFFERED) drop what a full disk or a pipe that does not block
    takes only in part, and report success.
    """
    stream.flush()
    try:
        descriptor = stream.fileno()
    except OSError:
        # A stream without a descriptor, as in tests.
        stream.write(text)
        stream.flush()
        return
    data = memoryview(text.encode(stream.encoding, stream.errors or "strict"))
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            poll.poll()


def write_file(name: str, text: str) -> None:
    """Writes text to the file `name`; "-" is stdout. Raises RepkvError."""
    if name == "-":
        write(text)
        return
    try:
        Path(name).write_text(text, "utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RepkvError(f"{name}: {reason}") from None


def say(line: str) -> None:
    """Writes one line to stderr, after the program's name."""
    log(f"pyggml_repkv: {line}\n")


def log(text: str) -> None:
    """Writes text to stderr. Failing to write is no reason to stop."""
    try:
        _put(sys.stderr, text)
    except OSError:
        discard(sys.stderr)


def flush() -> None:
    """Flushes stdout. Raises as `write` does."""
    write("")


def discard(*streams: TextIO) -> None:
    """Redirects the streams to the null device, so that the interpreter's last flush cannot fail."""
    for stream in streams:
        # A stream without a descriptor, as in tests, has nothing to redirect.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
