"""A bar on stderr while a long prompt is read."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter


def wanted() -> bool:
    """Whether stderr is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


@contextmanager
def prompt_bar(n_tokens: int) -> Iterator[Callable[[int, int], None]]:
    """Yields what moves the bar: a function of the tokens read and of all. Afterwards the bar is gone."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    # drawn only when a batch is done: a refresh thread would take a core from the compute threads
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
    with bar:
        task = bar.add_task("", total=n_tokens, speed="")
        begun = perf_counter()

        def move(n_done: int, n_total: int) -> None:
            per_second = n_done / max(perf_counter() - begun, 1e-9)
            minutes, seconds = divmod(round((n_total - n_done) / max(per_second, 1e-9)), 60)
            left = f"{per_second:.1f} tokens/s, {minutes}:{seconds:02d} left" if n_done else ""
            bar.update(task, completed=n_done, total=n_total, speed=left, refresh=True)

        move(0, n_tokens)
        yield move
