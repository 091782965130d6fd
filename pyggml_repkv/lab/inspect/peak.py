"""The machine's peak, measured with the threads and the vector width that compute uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pyggml_repkv.ffi.context import GraphContext, Tensor, TensorContext
from pyggml_repkv.ffi.handles import Backend, Buffer, GraphAllocator, aligned_zeros
from pyggml_repkv.ffi.library import g, native, native_ffi
from pyggml_repkv.ops.table import OPS

# Larger than the caches of common machines.
READ_BYTES = 2**28
REPETITIONS = 10_000_000
N_RUNS = 3


@dataclass(frozen=True, slots=True)
class Peak:
    """The best of N_RUNS runs: gflops of F32 multiply-adds in registers, GB/s of reading memory."""

    gflops: float
    gbytes_per_second: float


def measure_peak(backend: Backend) -> Peak:
    """Measures for about a second. Raises ComputeError if there is too little memory."""
    data = aligned_zeros(READ_BYTES)
    # Pages never written all map to one page of zeros, which lies in the cache.
    data[::4096] = 1
    numbers = aligned_zeros(64)
    numbers[:4].view(np.int32)[0] = REPETITIONS
    read = _seconds(backend, "peak_read", data, g.GGML_TYPE_F32)
    fma = _seconds(backend, "peak_fma", numbers, g.GGML_TYPE_I32, n=1)
    flops = REPETITIONS * native.REPKV_PEAK_FLOPS * backend.n_threads
    return Peak(flops / fma / 1e9, READ_BYTES / read / 1e9)


def _seconds(backend: Backend, op: str, data: np.ndarray, type_: int, n: int = 0) -> float:
    params = native_ffi.new("struct repkv_op_params *")

    def build(context: GraphContext, sources: list[Tensor]) -> Tensor:
        return context.custom((backend.n_threads,), sources, OPS[op].address, params)

    return best_seconds(backend, [(data, type_, (n or len(data) // 4,))], build)


def best_seconds(
    backend: Backend,
    leaves: Sequence[tuple[np.ndarray, int, tuple[int, ...]]],
    build: Callable[[GraphContext, list[Tensor]], Tensor],
) -> float:
    """Returns the least seconds of N_RUNS computes of a node. build: makes it from the leaves, which are (aligned
    bytes, ggml's type, shape).
    """
    tensors, context = TensorContext(len(leaves) + 8), GraphContext(16)
    allocator, buffers = GraphAllocator(backend), [Buffer.over(data) for data, _, _ in leaves]
    try:
        sources: list[Tensor] = []
        for buffer, (_, type_, shape) in zip(buffers, leaves, strict=True):
            sources.append(tensors.new(type_, shape, f"data_{len(sources)}"))
            buffer.place(sources[-1], 0)
        context.output(build(context, sources))
        allocator.allocate(context.graph)
        times = []
        with backend.lock:
            for _ in range(N_RUNS):
                start = time.perf_counter()
                backend.compute(context.native_graph)
                times.append(time.perf_counter() - start)
        return min(times)
    finally:
        context.close()
        allocator.close()
        tensors.close()
        for buffer in buffers:
            buffer.close()
