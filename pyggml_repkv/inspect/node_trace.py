"""Notes when every node of a step was computed (native/node_trace.h), with little more than ggml's own time for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import ComputeError
from pyggml_repkv.ffi.graph_reader import RawGraph, read_graph
from pyggml_repkv.ffi.library import native, native_ffi
from pyggml_repkv.graph.plan import Plan
from pyggml_repkv.memory.disk_tier import StepHook
from pyggml_repkv.memory.policy import EvalHook


@dataclass(frozen=True, slots=True)
class StepTrace:
    """times: int64 [n_nodes, 2], begin and end of each node in nanoseconds of the monotonic clock."""

    plan: Plan
    times: NDArray[np.int64]


class NodeTracer:
    """Give it to `Session.traced`; `steps` grows by one a compute. graphs: what each plan consists of."""

    def __init__(self) -> None:
        self.steps: list[StepTrace] = []
        self.graphs: dict[Plan, RawGraph] = {}

    def hook_of(self, plan: Plan) -> EvalHook:
        return _TracedHook(self, plan)


class _TracedHook:
    def __init__(self, tracer: NodeTracer, plan: Plan) -> None:
        self._tracer, self._plan, self._inner = tracer, plan, plan.hook
        n = plan.context.n_nodes
        self._times = np.zeros((n, 2), np.int64)
        trace: Any = native_ffi.new("struct repkv_node_trace *")
        trace.times, trace.n_max = native_ffi.cast("struct repkv_node_time *", self._times.ctypes.data), n
        if isinstance(self._inner, StepHook):
            trace.hooks = native_ffi.cast("struct repkv_hooks *", self._inner.userdata)
        self._trace = trace
        self.callback = int(native_ffi.cast("uintptr_t", native.repkv_node_trace_hook_address()))
        self.userdata = int(native_ffi.cast("uintptr_t", trace))

    def begin(self) -> None:
        self._trace.n = 0
        if self._inner is not None:
            self._inner.begin()

    def check(self) -> None:
        if self._inner is not None:
            self._inner.check()

    def check_complete(self) -> None:
        if self._inner is not None:
            self._inner.check_complete()
        if self._trace.n != len(self._times):
            raise ComputeError(f"{self._trace.n} of {len(self._times)} nodes were traced")
        if self._plan not in self._tracer.graphs:
            self._tracer.graphs[self._plan] = read_graph(self._plan.context)
        self._tracer.steps.append(StepTrace(self._plan, self._times.copy()))
