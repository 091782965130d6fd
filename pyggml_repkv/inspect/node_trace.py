"""Notes when every node of a step was computed.

Nodes of ours note it themselves, for two looks at the clock each. A graph of ggml's nodes is computed node by node with
a C function of ours between them (native/node_trace.h), which costs ggml a start of its threads each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import ComputeError
from pyggml_repkv.ffi.graph_reader import RawGraph, address_of, noting_nodes, read_graph
from pyggml_repkv.ffi.library import native, native_ffi
from pyggml_repkv.graph.plan import Plan
from pyggml_repkv.memory.bounded_attention import hook_points_of
from pyggml_repkv.memory.disk_tier import StepHook
from pyggml_repkv.memory.policy import EvalHook


@dataclass(frozen=True, slots=True)
class StepTrace:
    """times: int64 [n_nodes, 2], begin and end of each node in nanoseconds of the monotonic clock, as noted: 0 for
    nodes that note nothing (see NodeTracer.times).
    """

    plan: Plan
    times: NDArray[np.int64]


class NodeTracer:
    """Give it to `Session.traced`; `steps` grows by one a compute. graphs: what each plan consists of."""

    traces_ops = True

    def __init__(self) -> None:
        self.steps: list[StepTrace] = []
        self.graphs: dict[Plan, RawGraph] = {}
        self._noting: dict[Plan, list[Any]] = {}

    def hook_of(self, plan: Plan) -> EvalHook | None:
        return _TracedHook(plan) if plan.key.shape.form == "ggml" else plan.hook

    def computed(self, plan: Plan) -> None:
        if isinstance(plan.hook, _TracedHook):
            times = plan.hook.times.copy()
        else:
            # Found once: what is done here is part of a step.
            if plan not in self._noting:
                self._noting[plan] = noting_nodes(plan.context)
            spans = [(0, 0) if p is None else (p.begin_ns, p.end_ns) for p in self._noting[plan]]
            times = np.array(spans, np.int64)
        if plan not in self.graphs:
            self.graphs[plan] = read_graph(plan.context)
        self.steps.append(StepTrace(plan, times))

    def times(self, step: StepTrace) -> NDArray[np.int64]:
        """Of a step, one after another: a node lasts until the next begins, but for those after which a hook runs.
        ggml's own nodes among ours have none of their own and last no time.
        """
        if step.plan not in self._noting:
            return step.times
        hooked = {address_of(point.node) for point in hook_points_of(step.plan.attention)}
        nodes, times = self.graphs[step.plan].nodes, step.times.copy()
        following = int(times[:, 1].max())
        for i in reversed(range(len(times))):
            if times[i, 0] == 0:
                times[i] = following
                continue
            if nodes[i].address not in hooked:
                times[i, 1] = following
            following = int(times[i, 0])
        return times


class OuterHook:
    """Runs where a plan's own hook would, and lets that run too."""

    callback: int
    userdata: int

    def __init__(self, plan: Plan) -> None:
        self._inner = plan.hook

    def begin(self) -> None:
        if self._inner is not None:
            self._inner.begin()

    def check(self) -> None:
        if self._inner is not None:
            self._inner.check()

    def check_complete(self) -> None:
        if self._inner is not None:
            self._inner.check_complete()


class _TracedHook(OuterHook):
    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        n = plan.context.n_nodes
        self.times = np.zeros((n, 2), np.int64)
        trace: Any = native_ffi.new("struct repkv_node_trace *")
        trace.times, trace.n_max = native_ffi.cast("struct repkv_node_time *", self.times.ctypes.data), n
        if isinstance(self._inner, StepHook):
            trace.hooks = native_ffi.cast("struct repkv_hooks *", self._inner.userdata)
        self._trace = trace
        self.callback = int(native_ffi.cast("uintptr_t", native.repkv_node_trace_hook_address()))
        self.userdata = int(native_ffi.cast("uintptr_t", trace))

    def begin(self) -> None:
        self._trace.n = 0
        super().begin()

    def check_complete(self) -> None:
        super().check_complete()
        if self._trace.n != len(self.times):
            raise ComputeError(f"{self._trace.n} of {len(self.times)} nodes were traced")
