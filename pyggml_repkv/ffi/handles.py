"""Owners of ggml objects: each frees its object once, after everything that was made from it."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from pyggml_repkv.errors import ComputeError
from pyggml_repkv.ffi.library import g, last_log, native, native_ffi


class Handle:
    """One owned pointer.

    `close()`, garbage collection or the interpreter's exit frees it. It holds its parents, so they outlive it; closing
    a parent closes its remaining children first.
    """

    def __init__(self, pointer: Any, free: Callable[[Any], object], *parents: Handle, keep: object = None) -> None:
        self._pointer = pointer
        self._parents = parents
        self._children: weakref.WeakSet[Handle] = weakref.WeakSet()
        # The finalizer holds `keep`: memory that C still points to must not die before the C object.
        self._finalizer = weakref.finalize(self, _free_then_release, free, pointer, keep)
        for parent in parents:
            parent._children.add(self)

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    @property
    def pointer(self) -> Any:
        """The pointer for ggml. Raises ComputeError after `close`."""
        if self.closed:
            raise ComputeError(f"{type(self).__name__} was used after it was closed")
        return self._pointer

    def close(self) -> None:
        for child in list(self._children):
            child.close()
        self._finalizer()


def _free_then_release(free: Callable[[Any], object], pointer: Any, keep: object) -> None:
    free(pointer)
    del keep


class Backend(Handle):
    """ggml's CPU backend with a fixed number of threads."""

    def __init__(self, n_threads: int) -> None:
        if not 1 <= n_threads <= g.GGML_MAX_N_THREADS:
            raise ComputeError(f"n_threads is {n_threads}; it must be between 1 and {g.GGML_MAX_N_THREADS}")
        pointer = g.ggml_backend_cpu_init()
        if not pointer:
            raise ComputeError(f"ggml could not start its CPU backend: {last_log()}")
        super().__init__(pointer, g.ggml_backend_free)
        self.n_threads = n_threads
        g.ggml_backend_cpu_set_n_threads(pointer, n_threads)
        self.compute_state = native_ffi.new("struct repkv_compute *")
        """Tells the nodes and hooks of a graph to stop; lives as long as this object."""
        # Sessions of one model share the threads, ggml's work buffer and the scratch: one step at a time.
        self.lock = threading.Lock()

    def compute(self, graph_address: Any, trace: Any = native_ffi.NULL) -> None:
        """Runs a graph (`GraphContext.native_graph`). trace: a struct repkv_node_trace that notes ggml's nodes.

        Raises KeyboardInterrupt on Ctrl-C, after the running node, and ComputeError on failure.
        """
        self._check(native.repkv_compute(self.compute_state, self._address, graph_address, trace))

    def compute_scheduled(self, scheduler_address: Any, graph_address: Any, trace: Any = native_ffi.NULL) -> None:
        """Runs a graph through ggml's scheduler (`Scheduler`), which calls its eval callback between nodes."""
        state = self.compute_state
        self._check(native.repkv_compute_scheduled(state, self._address, scheduler_address, graph_address, trace))

    def stop(self) -> None:
        """Stops the running compute, which then raises ComputeError. Any thread may call it, also the computing one."""
        native.repkv_request_abort(self.compute_state)

    @property
    def _address(self) -> Any:
        return native_ffi.cast("void *", int(self.pointer))

    def _check(self, status: int) -> None:
        if status == g.GGML_STATUS_SUCCESS:
            return
        if status == g.GGML_STATUS_ABORTED:
            if native.repkv_was_interrupted(self.compute_state):
                # Python's own handler saw the signal too. Even if it did not raise, the result is not valid.
                raise KeyboardInterrupt
            raise ComputeError("the compute was stopped")
        reason = last_log() or g.ggml_status_to_string(status).decode(errors="replace")
        raise ComputeError(f"ggml could not compute the graph: {reason}")


class Buffer(Handle):
    """Memory for tensors. base: its address; size: in bytes."""

    def __init__(self, pointer: Any, keep: object = None) -> None:
        super().__init__(pointer, g.ggml_backend_buffer_free, keep=keep)
        self.base: int = g.ggml_backend_buffer_get_base(pointer) or 0
        self.size: int = g.ggml_backend_buffer_get_size(pointer)

    @classmethod
    def over(cls, array: np.ndarray) -> Buffer:
        """Wraps a C-contiguous, 32-byte aligned array without a copy and keeps it alive. Raises ComputeError."""
        address = array.ctypes.data
        assert address % 32 == 0
        assert array.flags.c_contiguous
        pointer = g.ggml_backend_cpu_buffer_from_ptr(address, array.nbytes)
        if not pointer:
            raise ComputeError(f"ggml could not wrap {array.nbytes} bytes: {last_log()}")
        return cls(pointer, keep=array)

    @classmethod
    def allocate(cls, buffer_type: int, size: int) -> Buffer:
        pointer = g.ggml_backend_buft_alloc_buffer(buffer_type, size)
        if not pointer:
            raise ComputeError(f"not enough memory for a buffer of {size / 2**20:.0f} MiB")
        return cls(pointer)

    def place(self, tensor: Any, offset: int) -> None:
        """Puts a tensor at `offset` bytes. Raises ComputeError if it does not fit, where ggml would abort."""
        end = offset + g.ggml_backend_buffer_get_alloc_size(self.pointer, tensor)
        if offset < 0 or end > self.size:
            raise ComputeError(f"a tensor of {end - offset} bytes does not fit at {offset} of {self.size}")
        if g.ggml_backend_tensor_alloc(self.pointer, tensor, self.base + offset) != g.GGML_STATUS_SUCCESS:
            raise ComputeError(f"ggml could not place a tensor: {last_log()}")


def aligned_zeros(n_bytes: int) -> np.ndarray:
    """Returns zeroed, 64-byte aligned memory (uint8 [n_bytes]), whose pages cost nothing until written. Raises
    ComputeError.
    """
    try:
        raw = np.zeros(n_bytes + 64, np.uint8)
    except MemoryError:
        raise ComputeError(f"not enough memory for {n_bytes / 2**20:.0f} MiB") from None
    start = -raw.ctypes.data % 64
    return raw[start : start + n_bytes]


def return_free_memory() -> None:
    """Returns the C heap's free pages to the system, if the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class GraphAllocator(Handle):
    """One buffer for the intermediate tensors of several graphs, reused from graph to graph and within each."""

    def __init__(self, *parents: Handle) -> None:
        super().__init__(g.ggml_gallocr_new(g.ggml_backend_cpu_buffer_type()), g.ggml_gallocr_free, *parents)

    @property
    def size(self) -> int:
        return g.ggml_gallocr_get_buffer_size(self.pointer, 0)

    def allocate(self, graph: Any) -> bool:
        """Places a graph. Returns True if the buffer moved, which invalidates graphs placed before. Raises
        ComputeError.
        """
        before = self.size
        if not g.ggml_gallocr_alloc_graph(self.pointer, graph):
            raise ComputeError("not enough memory for the compute buffer; a smaller batch (-b) needs less")
        return self.size != before


def tensor_array(tensor: Any) -> np.ndarray:
    """Returns a writable numpy view of a contiguous, allocated tensor, outermost dimension first; not for quantised
    types.
    """
    t = tensor.contents
    assert g.ggml_is_contiguous(tensor)
    shape = tuple(t.ne[i] for i in reversed(range(g.ggml_n_dims(tensor))))
    dtype = np.dtype(_NUMPY_TYPES[t.type])
    n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if t.data is None:
        raise ComputeError(f"tensor {t.name.decode()} was not allocated")
    memory: Any = (ctypes.c_char * n_bytes).from_address(t.data)
    return np.frombuffer(memory, dtype).reshape(shape)


_NUMPY_TYPES = {
    g.GGML_TYPE_F32: np.float32,
    g.GGML_TYPE_F16: np.float16,
    g.GGML_TYPE_I32: np.int32,
    g.GGML_TYPE_I64: np.int64,
}
