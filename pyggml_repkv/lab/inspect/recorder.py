"""Runs a prompt and records when nodes run (`trace_steps`), or what they hold (`record_tensors`)."""

from __future__ import annotations

import ctypes
import fnmatch
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.engine.model import Model
from pyggml_repkv.engine.session import Session
from pyggml_repkv.errors import InputError
from pyggml_repkv.ffi.library import g, native_ffi
from pyggml_repkv.ffi.scheduler import python_callback
from pyggml_repkv.graph.plan import Plan
from pyggml_repkv.lab.inspect.cost import Step
from pyggml_repkv.lab.inspect.node_trace import NodeTracer, OuterHook
from pyggml_repkv.lab.inspect.snapshot import take_snapshot
from pyggml_repkv.lab.inspect.trace import TracedStep
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.policy import EvalHook, OnDisk
from pyggml_repkv.memory.store.block_store import Event

# Steps that fill caches and build plans before recording begins.
N_WARM = 3

_NO_EVENTS: list[Event] = []

_TYPES = {
    g.GGML_TYPE_F32: np.float32,
    g.GGML_TYPE_F16: np.float16,
    g.GGML_TYPE_I32: np.int32,
    g.GGML_TYPE_I64: np.int64,
}


@dataclass(frozen=True, slots=True)
class Traced:
    """Traced steps. plain_us, traced_us: microseconds of each step without and with a tracer; their difference is the
    cost of recording.
    """

    steps: list[TracedStep]
    plain_us: list[float]
    traced_us: list[float]


def n_rounds(size: int, n: int) -> int:
    """Returns into how many rounds n steps are divided: a machine's speed drifts from one second to the next."""
    return min(4, n) if size == 1 else 1


def n_traced_tokens(size: int, n: int) -> int:
    """Returns how many tokens `trace_steps` reads."""
    return 2 * size * (N_WARM * n_rounds(size, n) + n)


def trace_steps(session: Session, memory: MemoryConfig, tokens: Sequence[int], size: int, n: int) -> Traced:
    """Reads `n_traced_tokens` tokens in steps of one size, n without and n with a tracer. Rounds of both take turns,
    and N_WARM steps that do not count begin each. Raises as Session does.
    """
    at = 0

    def step() -> tuple[int, int]:
        nonlocal at
        chunk = tokens[at : at + size]
        at += size
        begin = time.monotonic_ns()
        if size == 1:
            session.decode(chunk[0])
        else:
            session.read(chunk)
        return begin, time.monotonic_ns()

    plain: list[float] = []
    steps: list[TracedStep] = []
    first = time.monotonic_ns()
    rounds = n_rounds(size, n)
    for i in range(rounds):
        # The session rebuilds its plans for a tracer, and again without one: hence the warm-up of both.
        n_now = n // rounds + (i < n % rounds)
        plain += [(end - begin) / 1e3 for begin, end in [step() for _ in range(N_WARM + n_now)][N_WARM:]]
        steps += _trace_some(session, memory, step, n_now, first)
    return Traced(steps, plain, [step.end - step.begin for step in steps])


def _trace_some(
    session: Session, memory: MemoryConfig, step: Callable[[], tuple[int, int]], n: int, first: int
) -> list[TracedStep]:
    tracer, policy, spans = NodeTracer(), session.policy, []
    disk = policy.disk if isinstance(policy, OnDisk) else None
    with session.traced(tracer), disk.io.trace() if disk else nullcontext(_NO_EVENTS) as events:
        for _ in range(N_WARM + n):
            n_past = session.n_past
            spans.append((n_past, *step()))
    steps = []
    for trace, (n_past, begin, end) in list(zip(tracer.steps, spans, strict=True))[N_WARM:]:
        n_tokens = trace.plan.key.shape.n_tokens
        about = {
            "policy": memory.kv,
            "form": trace.plan.key.shape.form,
            "n_tokens": n_tokens,
            "n_past": n_past,
            "n_layer": session.config.n_layer,
        }
        snapshot = take_snapshot(
            tracer.graphs[trace.plan], about, Step(session.config, n_tokens, policy.cost(n_past, n_tokens)),
            trace.plan.hook_points,
        )  # fmt: skip
        times = ((tracer.times(trace) - first) / 1e3).tolist()
        mine = [_shifted(e, first) for e in events if begin <= 1e6 * e.begin_ms < end]
        steps.append(TracedStep(snapshot, times, (begin - first) / 1e3, (end - first) / 1e3, mine))
    return steps


def _shifted(event: Event, first_ns: int) -> Event:
    return replace(event, begin_ms=event.begin_ms - first_ns / 1e6, end_ms=event.end_ms - first_ns / 1e6)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A node's values, in its own shape. key: its name, numbered if it is not the first: `Qcur-0`, `Qcur-0#1`."""

    key: str
    op: str
    type: str
    values: NDArray[Any]


class TensorRecorder:
    """A tracer for `Session.traced`: copies the values of nodes whose name matches, in the order of compute."""

    traces_ops = False

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self.recorded: list[Recorded] = []
        self.skipped: list[str] = []

    def hook_of(self, plan: Plan) -> EvalHook:
        return _RecordingHook(self, plan)

    def native_trace_of(self, plan: Plan) -> Any:
        """Returns NULL: this tracer records values, no times."""
        return native_ffi.NULL

    def computed(self, plan: Plan) -> None:
        """Does nothing: the values were copied between nodes."""

    def wants(self, name: str) -> bool:
        return fnmatch.fnmatchcase(name, self._pattern)

    def take(self, node: Any) -> None:
        t = node.contents
        name = t.name.decode("utf-8", errors="replace")
        n = sum(r.key.split("#")[0] == name for r in self.recorded)
        key = f"{name}#{n}" if n else name
        values = _values(t)
        if values is None:
            self.skipped.append(key)
        else:
            op = g.ggml_op_name(t.op).decode().lower()
            self.recorded.append(Recorded(key, op, g.ggml_type_name(t.type).decode(), values))


class _RecordingHook(OuterHook):
    def __init__(self, recorder: TensorRecorder, plan: Plan) -> None:
        super().__init__(plan)
        self._recorder = recorder
        self._error: BaseException | None = None
        # The plan's own hook must still run.
        kind = g.ggml_backend_sched_eval_callback
        self._call = kind(self._inner.callback) if self._inner is not None else None
        self.callback, self._keep = python_callback(self._observe)
        self.userdata = 0

    def _observe(self, node: Any, ask: bool) -> bool:
        # ctypes swallows an exception that leaves a callback.
        try:
            wanted = self._recorder.wants(node.contents.name.decode("utf-8", errors="replace"))
            if ask:
                inner = bool(self._call(node, True, self._inner.userdata)) if self._call and self._inner else False
                return wanted or inner
            if wanted:
                self._recorder.take(node)
            return bool(self._call(node, False, self._inner.userdata)) if self._call and self._inner else True
        except BaseException as error:
            self._error = error
            return False

    def check_complete(self) -> None:
        if self._error is not None:
            raise self._error
        super().check_complete()


def _values(t: Any) -> NDArray[Any] | None:
    """Returns a copy in the tensor's shape, whatever its strides; None for a type that numpy lacks."""
    if t.type not in _TYPES or not t.data:
        return None
    shape, strides = tuple(int(n) for n in reversed(t.ne)), tuple(int(n) for n in reversed(t.nb))
    n_bytes = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + np.dtype(_TYPES[t.type]).itemsize
    memory: Any = (ctypes.c_char * n_bytes).from_address(t.data)
    array = np.ndarray(shape, _TYPES[t.type], memory, 0, strides).copy()
    while array.ndim > 1 and array.shape[0] == 1:
        array = array[0]
    return array


def record_tensors(
    model: Model, memory: MemoryConfig, tokens: Sequence[int], pattern: str, *, decode: bool
) -> TensorRecorder:
    """Reads tokens and records the last step; `decode`: this step reads the last token alone. Raises InputError if no
    node's name matches.
    """
    recorder = TensorRecorder(pattern)
    with model.session(memory) as session:
        n_before = len(tokens) - 1 if decode else (len(tokens) - 1) // memory.n_batch * memory.n_batch
        if n_before:
            session.read(tokens[:n_before])
        with session.traced(recorder):
            if len(tokens) - n_before == 1:
                session.decode(tokens[-1])
            else:
                session.prefill_all(tokens[n_before:])
    if not recorder.recorded and not recorder.skipped:
        raise InputError(f"--name {pattern} matches no node of this graph; `graph dump` lists them")
    return recorder
