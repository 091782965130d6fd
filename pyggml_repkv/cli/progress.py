"""Progress on stderr while a long prompt is read or a model downloaded: a bar, or lines where none can be drawn."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import TYPE_CHECKING

from pyggml_repkv.cli import output

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def wanted() -> bool:
    """Returns whether stderr is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


# Seconds between lines where no bar can be drawn.
LINE_EVERY = 10.0

_console: Console | None = None


class _Notices(logging.Handler):
    """Shows the library's log records on stderr, above the bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if record.levelno >= logging.WARNING:
            line = f"warning: {line}"
        if _console is None:
            output.say(line)
        else:
            _console.print(f"pyggml_repkv: {line}", markup=False, highlight=False)


@contextmanager
def notices(*, quiet: bool) -> Iterator[None]:
    """Shows the package's log records on stderr. quiet: warnings only."""
    logger, handler = logging.getLogger("pyggml_repkv"), _Notices()
    level = logger.level
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def of_prompt(args: argparse.Namespace, n_tokens: int) -> AbstractContextManager[Callable[[int, int], None] | None]:
    """Yields a function that shows how much of a prompt is read, or None if nothing is shown."""
    # One step reads a prompt of one batch: a bar would only flicker.
    if n_tokens <= args.batch_size:
        return nullcontext()
    if wanted():
        return prompt_bar(n_tokens)
    return nullcontext() if args.quiet else prompt_lines()


def prompt_lines() -> AbstractContextManager[Callable[[int, int], None]]:
    """Yields a function of the tokens read and of all; it writes a line every LINE_EVERY seconds."""
    return lines("read {} of {} tokens, {:.0f} tokens/s")


@contextmanager
def lines(form: str) -> Iterator[Callable[[int, int], None]]:
    """The same of anything. form: of what is done, of all, and of how much a second."""
    begun = said = perf_counter()

    def tell(n_done: int, n_total: int) -> None:
        nonlocal said
        now = perf_counter()
        if now - said >= LINE_EVERY and n_done < n_total:
            said = now
            output.say(form.format(n_done, n_total, n_done / (now - begun)))

    yield tell


@contextmanager
def prompt_bar(n_tokens: int) -> Iterator[Callable[[int, int], None]]:
    """Yields a function of the tokens read and of all; it moves the bar. The bar disappears at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    # The bar is redrawn only after a batch: a refresh thread would take a core from the compute threads.
    bar = Progress(
        TextColumn("reading the prompt"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} tokens"),
        TextColumn("{task.fields[speed]}"),
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    global _console
    with bar:
        _console = bar.console
        task = bar.add_task("", total=n_tokens, speed="")
        begun = perf_counter()

        def move(n_done: int, n_total: int) -> None:
            per_second = n_done / max(perf_counter() - begun, 1e-9)
            minutes, seconds = divmod(round((n_total - n_done) / max(per_second, 1e-9)), 60)
            left = f"{per_second:.1f} tokens/s, {minutes}:{seconds:02d} left" if n_done else ""
            bar.update(task, completed=n_done, total=n_total, speed=left, refresh=True)

        move(0, n_tokens)
        try:
            yield move
        finally:
            _console = None


@contextmanager
def downloads(*, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Yields a function of the bytes that are here and of all; it shows them from its first call on.

    The library's notices are shown too. quiet: yields None, and shows warnings only.
    """
    if quiet:
        yield None
        return
    logger = logging.getLogger("pyggml_repkv")
    level = logger.level
    logger.setLevel(logging.INFO)
    shown = _DownloadBar() if wanted() else _DownloadLines()
    try:
        yield shown.move
    finally:
        shown.close()
        logger.setLevel(level)


class _DownloadBar:
    """A bar that appears with the first byte and disappears at the end."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def move(self, n_done: int, n_total: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        global _console
        if self._bar is None:
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            console = Console(stderr=True)
            self._bar = Progress(
                TextColumn("downloading"), *columns, console=console, auto_refresh=False, transient=True,
                redirect_stdout=False, redirect_stderr=False,
            )  # fmt: skip
            # What an earlier run has fetched is no speed of this one.
            self._bar.add_task("", total=n_total, completed=n_done)
            self._bar.start()
            _console = console
        self._bar.update(self._bar.task_ids[0], completed=n_done, total=n_total, refresh=True)

    def close(self) -> None:
        global _console
        if self._bar is not None:
            self._bar.stop()
            _console = None


class _DownloadLines:
    """A line every LINE_EVERY seconds."""

    def __init__(self) -> None:
        self._said = perf_counter()

    def move(self, n_done: int, n_total: int) -> None:
        now = perf_counter()
        if now - self._said >= LINE_EVERY and n_done < n_total:
            self._said = now
            output.say(f"downloaded {n_done / 1e6:.0f} of {n_total / 1e6:.0f} MB")

    def close(self) -> None:
        """Nothing is left on the terminal."""
