"""Stops computes without a signal, which would reach the test runner too."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pyggml_repkv.ffi.handles import Backend


@contextmanager
def endless_requests(backend: Backend, seconds: float) -> Iterator[None]:
    """Runs a thread that stops the backend every `seconds`, and so every compute that takes longer."""
    end = threading.Event()

    def ask() -> None:
        while not end.wait(seconds):
            backend.stop()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
