"""What runs between the nodes of a step's graph: it waits for the blocks that layers selected (native/hooks.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from pyggml_repkv.errors import ComputeError
from pyggml_repkv.ffi.context import Tensor
from pyggml_repkv.ffi.handles import Backend
from pyggml_repkv.ffi.library import native, native_ffi
from pyggml_repkv.memory.policy import HookPoint
from pyggml_repkv.memory.store.block_store import BlockStore

_CHANGED = "a slot was given to another block while it was attended"


class StepHook:
    """The hook of one plan, an eval callback for ggml's scheduler.

    kept: kept-l of each layer, if any point needs them; backend: what computes the plan; reads_ahead: whether what a
    token keeps is read for the next.
    """

    def __init__(self, store: BlockStore, kept: Sequence[Tensor], backend: Backend, *, reads_ahead: bool) -> None:
        self._store, self._backend, self.reads_ahead = store, backend, reads_ahead
        self._points: list[HookPoint] = []
        self._hooks = native_ffi.new("struct repkv_hooks *")
        self._hooks.store, self._hooks.compute = store.pointer, backend.compute_state
        self._c_points: Any = None
        self._kept = native_ffi.new("void *[]", [_pointer(t) for t in kept])
        self._hooks.kept = self._kept
        self.callback = int(native_ffi.cast("uintptr_t", native.repkv_eval_hook_address()))
        self.userdata = int(native_ffi.cast("uintptr_t", self._hooks))

    @property
    def points(self) -> Sequence[HookPoint]:
        return self._points

    def add(self, point: HookPoint) -> None:
        """Runs there, too; in the order of the graph."""
        self._points.append(point)

    def begin(self) -> None:
        if self._c_points is None:
            self._observe()
        native.repkv_hooks_begin(self._hooks)

    def _observe(self) -> None:
        """Hands the points to C, once the graph is whole."""
        self._c_points = native_ffi.new("struct repkv_hook_point[]", len(self._points))
        for c_point, point in zip(self._c_points, self._points, strict=True):
            c_point.node, c_point.layer = _pointer(point.node), point.layer
            c_point.late, c_point.n_known = point.late, point.n_known
        self._hooks.points, self._hooks.n_points = self._c_points, len(self._points)

    def check(self) -> None:
        if self._hooks.status == native.REPKV_HOOK_CHANGED:
            raise ComputeError(_CHANGED)
        if self._hooks.status == -1:
            self._store.raise_error()

    def check_complete(self) -> None:
        if self._hooks.next != self._hooks.n_points:
            raise ComputeError(f"hooks ran at {self._hooks.next} of {self._hooks.n_points} nodes")
        if native.repkv_hooks_end(self._hooks) != 0:
            raise ComputeError(_CHANGED)


def _pointer(tensor: Tensor) -> Any:
    return native_ffi.cast("void *", ctypes.cast(tensor, ctypes.c_void_p).value or 0)
