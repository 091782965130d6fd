"""Records when every node of a step is computed.

A native op notes its own time, at the cost of reading the clock twice. In graphs of ggml's nodes, ggml's first thread
notes the time where it asks whether to abort (native/node_trace.h). Neither changes what is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import ComputeError
from pyggml_repkv.ffi.library import native, native_ffi
from pyggml_repkv.graph.plan import Plan
from pyggml_repkv.lab.inspect.graph_reader import RawGraph, RawTensor, address_of, noting_nodes, read_graph
from pyggml_repkv.memory.policy import EvalHook, HookPoint


@dataclass(frozen=True, slots=True)
class StepTrace:
    """The noted times of a step. times: int64 [n, 2], begin and end in nanoseconds of the monotonic clock. In a fused
    form a row for each node of the plan, 0 if it notes nothing; in ggml's form a row for each compute of ggml (see
    NodeTracer.times).
    """

    plan: Plan
    times: NDArray[np.int64]


class NodeTracer:
    """A tracer for `Session.traced`. steps: one a compute; graphs: the nodes of each plan."""

    traces_ops = True

    def __init__(self) -> None:
        self.steps: list[StepTrace] = []
        self.graphs: dict[Plan, RawGraph] = {}
        self._noting: dict[Plan, list[Any]] = {}
        self._notes: dict[Plan, _Notes] = {}

    def hook_of(self, plan: Plan) -> EvalHook | None:
        if plan.hook is not None and _of_ggml(plan):
            return _TracedHook(plan, self.native_trace_of(plan))
        return plan.hook

    def native_trace_of(self, plan: Plan) -> Any:
        if not _of_ggml(plan):
            return native_ffi.NULL
        if plan not in self._notes:
            self._notes[plan] = _Notes(plan.context.n_nodes)
        return self._notes[plan].trace

    def computed(self, plan: Plan) -> None:
        if plan in self._notes:
            times = self._notes[plan].taken()
        else:
            # Cached, because this runs inside the traced step.
            if plan not in self._noting:
                self._noting[plan] = noting_nodes(plan.context)
            spans = [(0, 0) if p is None else (p.begin_ns, p.end_ns) for p in self._noting[plan]]
            times = np.array(spans, np.int64)
        if plan not in self.graphs:
            self.graphs[plan] = read_graph(plan.context)
        self.steps.append(StepTrace(plan, times))

    def times(self, step: StepTrace) -> NDArray[np.int64]:
        """Returns the begin and end of each node of a step, int64 [n_nodes, 2].

        In a fused form a native op lasts until the next begins, or to its own end if a hook follows; ggml's nodes among
        them last no time. In ggml's form a node lasts until the first thread is done, and that thread's wait for the
        others counts to the next node; views last no time, nor does a product fused with the norm before it.

        Raises ComputeError if ggml noted a number of computes that does not fit the graph.
        """
        nodes = self.graphs[step.plan].nodes
        hooked = {address_of(point.node) for point in step.plan.hook_points}
        if step.plan in self._notes:
            return _of_each_node(step.times, nodes, hooked)
        times = step.times.copy()
        following = int(times[:, 1].max())
        for i in reversed(range(len(times))):
            if times[i, 0] == 0:
                times[i] = following
                continue
            if nodes[i].address not in hooked:
                times[i, 1] = following
            following = int(times[i, 0])
        return times


def _of_ggml(plan: Plan) -> bool:
    return plan.key.shape.form == "ggml"


# ggml skips these without asking whether to abort.
_EMPTY_OPS = ("", "reshape", "view", "permute", "transpose")


def _of_each_node(noted: NDArray[np.int64], nodes: Sequence[RawTensor], hooked: set[int]) -> NDArray[np.int64]:
    """Returns times int64 [n_nodes, 2]. noted: int64 [n_computed, 2]."""
    computes = np.array([node.op not in _EMPTY_OPS for node in nodes])
    if len(noted) != computes.sum():
        computes[_fused(nodes, hooked)] = False
    if len(noted) != computes.sum():
        raise ComputeError(f"ggml noted {len(noted)} computes in a graph of {computes.sum()}")
    times = np.zeros((len(nodes), 2), np.int64)
    times[computes] = noted
    at = int(noted[0, 0])
    for span, own in zip(times, computes, strict=True):
        if not own:
            span[:] = at
        at = int(span[1])
    return times


def _fused(nodes: Sequence[RawTensor], hooked: set[int]) -> list[int]:
    """Returns the nodes that ggml computes with the node before: products with a norm that no other node reads."""
    n_users = Counter(source for node in nodes for source in node.sources)
    return [
        i
        for i, (norm, mul) in enumerate(pairwise(nodes), 1)
        if (norm.op, mul.op) == ("rms_norm", "mul")
        and norm.address in mul.sources
        and n_users[norm.address] == 1
        and norm.address not in hooked
        and not norm.is_output
    ]


class _Notes:
    """The times that ggml's first thread writes. trace: a struct repkv_node_trace, which lives as long as this."""

    def __init__(self, n_nodes: int) -> None:
        self._times = np.zeros((n_nodes, 2), np.int64)
        self.trace: Any = native_ffi.new("struct repkv_node_trace *")
        self.trace.times = native_ffi.cast("struct repkv_node_time *", self._times.ctypes.data)
        self.trace.n_max = n_nodes

    def taken(self) -> NDArray[np.int64]:
        """Returns a copy. Raises ComputeError if ggml noted more computes than there are nodes."""
        if self.trace.n > len(self._times):
            raise ComputeError(f"ggml noted {self.trace.n} computes in a graph of {len(self._times)} nodes")
        return self._times[: self.trace.n].copy()


class OuterHook:
    """A hook around a plan's own hook, which runs too."""

    callback: int
    userdata: int

    def __init__(self, plan: Plan) -> None:
        self._inner = plan.hook

    @property
    def points(self) -> Sequence[HookPoint]:
        return () if self._inner is None else self._inner.points

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
    """A plan's hook in C; its time counts to no node."""

    def __init__(self, plan: Plan, trace: Any) -> None:
        super().__init__(plan)
        assert self._inner is not None
        trace.hooks = native_ffi.cast("struct repkv_hooks *", self._inner.userdata)
        self.callback = int(native_ffi.cast("uintptr_t", native.repkv_node_trace_hook_address()))
        self.userdata = int(native_ffi.cast("uintptr_t", trace))
