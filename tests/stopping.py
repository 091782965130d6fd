"""What stops a compute without a signal, which would hit the test runner too."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pyggml_repkv.ffi.handles import Backend


@contextmanager
def endless_requests(backend: Backend, seconds: float) -> Iterator[None]:
    """A thread that stops the backend every so many seconds: the next compute that takes longer is stopped."""
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
