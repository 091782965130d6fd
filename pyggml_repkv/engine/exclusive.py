"""What one call at a time uses, until it is closed."""

from __future__ import annotations

import contextlib
import functools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Concatenate, ParamSpec, Self, TypeVar

from pyggml_repkv.errors import InputError

E = TypeVar("E", bound="Exclusive")
P = ParamSpec("P")
R = TypeVar("R")


class Exclusive(ABC):
    """A session's turns: two calls at once would tear its state, of two threads or one within the other."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._user = 0  # the thread whose turn it is
        self._closing = threading.Event()

    @abstractmethod
    def _free(self) -> None:
        """Called when nobody uses it any more, perhaps more than once: frees everything that is not freed yet."""

    @property
    def _closed(self) -> bool:
        """Whether it is, or will be as soon as nobody uses it."""
        return self._closing.is_set()

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        if not self._turn.acquire(blocking=False):
            if self._user == threading.get_ident():
                raise InputError("this session is in use by the call that calls you back: wait for it to end")
            raise InputError("this session is in use by another thread: wait for it, or fork the session")
        self._user = threading.get_ident()
        try:
            check_open(self._closing)
            yield
        finally:
            self._end_turn()

    def _end_turn(self) -> None:
        try:
            if self._closed:
                self._free()
        finally:
            self._user = 0
            self._turn.release()

    def close(self) -> None:
        """Frees graphs and memory, once the step that runs in another thread is over: the call that it is part of ends
        with an InputError. In a callback, the call around it frees them as it ends.
        """
        self._closing.set()
        if self._user != threading.get_ident():
            self._turn.acquire()
            self._user = threading.get_ident()
            self._end_turn()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def check_open(closing: threading.Event) -> None:
    """Raises InputError once it is set."""
    if closing.is_set():
        raise InputError("the session is closed")


def alone(method: Callable[Concatenate[E, P], R]) -> Callable[Concatenate[E, P], R]:
    """Makes a method a turn of an Exclusive: during another one, and once it is closed, it raises InputError."""

    @functools.wraps(method)
    def call(self: E, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._in_turn():
            return method(self, *args, **kwargs)

    return call
