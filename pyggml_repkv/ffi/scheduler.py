"""ggml's scheduler for one graph: it computes ranges of nodes and calls an eval callback between them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from pyggml_repkv.errors import ComputeError
from pyggml_repkv.ffi.context import GraphContext
from pyggml_repkv.ffi.handles import Backend, Handle
from pyggml_repkv.ffi.library import g, native_ffi

Observer = Callable[[Any, bool], bool]


class Scheduler(Handle):
    """A scheduler for a graph whose tensors are placed; it dies with the graph.

    callback, userdata: addresses of a C function `ggml_backend_sched_eval_callback` and of its argument. ggml asks it
    first whether it wants to observe a node; if so, ggml calls it again as soon as the node is computed.
    """

    def __init__(self, backend: Backend, context: GraphContext, callback: int, userdata: int, keep: object) -> None:
        backends = (ctypes.c_void_p * 1)(backend.pointer)
        pointer = g.ggml_backend_sched_new(backends, None, 1, context.max_tensors, False, False)
        if not pointer:
            raise ComputeError("not enough memory for ggml's scheduler")
        super().__init__(pointer, g.ggml_backend_sched_free, context, keep=keep)
        self.graph = context.native_graph
        self.address = native_ffi.cast("void *", int(pointer))
        g.ggml_backend_sched_set_eval_callback(pointer, g.ggml_backend_sched_eval_callback(callback), userdata)
        if not g.ggml_backend_sched_alloc_graph(pointer, context.graph):
            self.close()
            raise ComputeError("ggml's scheduler could not take the graph")


def python_callback(observe: Observer) -> tuple[int, object]:
    """Returns the address of a C function that calls observe(node, ask) -> bool, and an object that keeps it alive."""
    function = g.ggml_backend_sched_eval_callback(lambda node, ask, _: bool(observe(node, bool(ask))))
    return ctypes.cast(function, ctypes.c_void_p).value or 0, function
