"""What stops a compute without a signal, which would hit the test runner too."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pyggml_repkv.ffi.library import native


@contextmanager
def endless_requests(seconds: float) -> Iterator[None]:
    """A thread that asks to stop every so many seconds: the next compute that takes longer is stopped."""
    end = threading.Event()

    def ask() -> None:
        while not end.wait(seconds):
            native.repkv_request_abort()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
