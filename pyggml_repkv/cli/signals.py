"""Ctrl-C and SIGTERM: the first stops the command, which saves what it can; a later one ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from types import FrameType
from typing import Any, NoReturn

# Signals that come together, as from an impatient finger or from two supervisors, are one.
_TOGETHER_S = 0.5

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# The first signal and when it came.
_stopped: tuple[int, float] | None = None
_over = False


class Stopped(KeyboardInterrupt):
    """What the first signal raises. CPython ends a process with SIGINT, whatever its exit code, once the plain one has
    passed through exec(), as on the way out of a dataclass.
    """


def install() -> None:
    """Takes the signals from now on. To be called in the main thread, by who owns the process."""
    sys.unraisablehook = _unraisable
    for number in _SIGNALS:
        # nohup's processes are to ignore them.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)


def ignore() -> None:
    """Called once the exit code is known: the interpreter's end has nothing that could be stopped."""
    global _over
    _over = True
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def taken() -> bool:
    """Whether a signal has come."""
    return _stopped is not None


def exit_code() -> int:
    """The status that a shell shows for a process which the first signal killed; for Ctrl-C where none has come."""
    return 128 + (signal.SIGINT if _stopped is None else _stopped[0])


def _on_signal(number: int, _: FrameType | None) -> None:
    global _stopped
    now = time.monotonic()
    if _over:
        return
    if _stopped is None:
        _stopped = number, now
        raise Stopped
    if now - _stopped[1] > _TOGETHER_S:
        _leave()


def _unraisable(found: Any) -> None:
    """Called for an exception that nobody can catch, as in a finalizer: then the command would go on."""
    if isinstance(found.exc_value, KeyboardInterrupt):
        _leave()
    sys.__unraisablehook__(found)


def _leave() -> NoReturn:
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr is not None and sys.stderr.isatty():
            os.write(sys.stderr.fileno(), b"\x1b[?25h")  # a progress bar hides the cursor
    os._exit(exit_code())
