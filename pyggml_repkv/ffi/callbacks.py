"""Python functions that ggml calls: kept alive, and their exceptions carried past C to the caller."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from pyggml_repkv.ffi.context import GraphContext, Tensor
from pyggml_repkv.ffi.handles import Backend, tensor_array
from pyggml_repkv.ffi.library import g

PythonOpFunction = Callable[..., np.ndarray]


class PythonOps:
    """Custom ops written in Python, for tests and inspection only: each call costs tens of microseconds.

    ctypes prints and drops an exception raised inside a callback, and ggml would report success. Here the first one is
    kept, compute is stopped, and `reraise` raises it.
    """

    def __init__(self, backend: Backend) -> None:
        """backend: where the graphs are computed."""
        self._backend = backend
        self._error: BaseException | None = None

    def add(
        self, context: GraphContext, shape: tuple[int, ...], sources: list[Tensor], function: PythonOpFunction
    ) -> Tensor:
        """A node whose value is function(*source arrays) -> float32 array of `shape`; runs on one thread."""

        def run(dst: Any, ith: int, nth: int, userdata: Any) -> None:
            if ith != 0 or self._error is not None:
                return
            try:
                arrays = [tensor_array(dst.contents.src[i]) for i in range(len(sources))]
                tensor_array(dst)[...] = np.reshape(function(*arrays), shape)
            except BaseException as error:  # carried to the caller by reraise()
                self._error = error
                self._backend.stop()

        context.reserve()
        callback = g.ggml_custom_op_t(run)
        context.keep_alive(callback)
        args = (ctypes.POINTER(g.ggml_tensor) * len(sources))(*sources)
        ne = [*reversed(shape), 1, 1, 1][:4]
        return g.ggml_custom_4d(context.pointer, g.GGML_TYPE_F32, *ne, args, len(sources), callback, 1, None)

    def reraise(self) -> None:
        """Call after compute, also when compute raised."""
        error, self._error = self._error, None
        if error is not None:
            raise error
