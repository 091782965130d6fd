"""Custom ops written in Python, with their exceptions carried past C to the caller."""

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

    ctypes prints and drops an exception inside a callback, and ggml would report success. This class keeps the first
    exception and stops the compute; `reraise` raises it.
    """

    def __init__(self, backend: Backend) -> None:
        """backend: the one that computes the graphs."""
        self._backend = backend
        self._error: BaseException | None = None

    def add(
        self, context: GraphContext, shape: tuple[int, ...], sources: list[Tensor], function: PythonOpFunction
    ) -> Tensor:
        """Returns a node of `shape` (F32) whose value is function(*source arrays); it runs on one thread."""

        def run(dst: Any, ith: int, nth: int, userdata: Any) -> None:
            if ith != 0 or self._error is not None:
                return
            try:
                arrays = [tensor_array(dst.contents.src[i]) for i in range(len(sources))]
                tensor_array(dst)[...] = np.reshape(function(*arrays), shape)
            except BaseException as error:  # reraise() carries it to the caller
                self._error = error
                self._backend.stop()

        context.reserve()
        callback = g.ggml_custom_op_t(run)
        context.keep_alive(callback)
        args = (ctypes.POINTER(g.ggml_tensor) * len(sources))(*sources)
        ne = [*reversed(shape), 1, 1, 1][:4]
        return g.ggml_custom_4d(context.pointer, g.GGML_TYPE_F32, *ne, args, len(sources), callback, 1, None)

    def reraise(self) -> None:
        """Raises the first exception of an op, if any. Call it after compute, also if compute raised."""
        error, self._error = self._error, None
        if error is not None:
            raise error
