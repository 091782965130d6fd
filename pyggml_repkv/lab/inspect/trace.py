"""Where the time of steps went: a table by kind of node, a share of the machine's peak, Chrome's trace format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from pyggml_repkv.lab.inspect.peak import Peak
from pyggml_repkv.lab.inspect.snapshot import Snapshot, TensorInfo
from pyggml_repkv.memory.store.block_store import Event


@dataclass(frozen=True, slots=True)
class TracedStep:
    """A step's nodes and when they ran. times: begin and end of each node, in microseconds since the first step began;
    begin, end: of the whole step, with the work around the graph; events: the block store's, on the same clock.
    """

    snapshot: Snapshot
    times: Sequence[tuple[float, float]]
    begin: float
    end: float
    events: Sequence[Event] = ()

    @property
    def node_us(self) -> float:
        return sum(end - begin for begin, end in self.times)

    @property
    def wait_us(self) -> float:
        """Microseconds of waiting for blocks between nodes."""
        return sum(1e3 * (e.end_ms - e.begin_ms) for e in self.events if e.kind == "wait")


@dataclass(frozen=True, slots=True)
class Row:
    """All nodes of one name in all layers, per step. us: microseconds of a step."""

    name: str
    op: str
    n: float
    us: float
    share: float
    gflops: float
    gbytes: float
    of_peak: float

    def cells(self) -> tuple[str, ...]:
        return (
            self.name, self.op, f"{self.n:g}", f"{self.us:.0f}", f"{100 * self.share:.1f} %", f"{self.us / self.n:.1f}",
            f"{self.gflops:.1f}", f"{self.gbytes:.1f}", f"{100 * self.of_peak:.0f} %",
        )  # fmt: skip


HEADER = ("name", "op", "nodes", "us", "share", "us each", "GFLOP/s", "GB/s", "of peak")


def rows(steps: Sequence[TracedStep], peak: Peak | None) -> list[Row]:
    """Returns a row for each name, the slowest first. of_peak: the least time that operations and bytes from memory
    allow, as a share of the time taken; more than 1 if a cache holds what the nodes read.
    """
    total = sum(step.node_us for step in steps)
    groups: dict[tuple[str, str], list[tuple[TensorInfo, float]]] = {}
    for step in steps:
        for node, (begin, end) in zip(step.snapshot.nodes, step.times, strict=True):
            groups.setdefault((node.base_name, node.op), []).append((node, end - begin))
    found = []
    for (name, op), members in groups.items():
        us = sum(t for _, t in members)
        flops, moved = (sum(getattr(node, what) for node, _ in members) for what in ("flops", "bytes_moved"))
        least = max(flops / peak.gflops, moved / peak.gbytes_per_second) / 1e3 if peak else 0.0
        n = len(steps)
        # Without a noted time there is no speed.
        rates = (flops / us / 1e3, moved / us / 1e3, least / us) if us > 0 else (0.0, 0.0, 0.0)
        found.append(Row(name, op, len(members) / n, us / n, us / total, *rates))
    return sorted(found, key=lambda row: -row.us)


def node_times(steps: Sequence[TracedStep]) -> dict[str, float]:
    """Returns microseconds by id of the last step's nodes: the median over all steps with the same graph."""
    nodes = [node.id for node in steps[-1].snapshot.nodes]
    alike = [step for step in steps if [node.id for node in step.snapshot.nodes] == nodes]
    spans = zip(*([end - begin for begin, end in step.times] for step in alike), strict=True)
    return {id_: median(times) for id_, times in zip(nodes, spans, strict=True)}


def layer_rows(steps: Sequence[TracedStep]) -> dict[int, float]:
    """Returns the microseconds per step in each layer; -1 is for nodes outside all layers."""
    times: dict[int, float] = {}
    for step in steps:
        layer = -1
        for node, (begin, end) in zip(step.snapshot.nodes, step.times, strict=True):
            layer = node.layer
            times[layer] = times.get(layer, 0.0) + end - begin
    return {layer: us / len(steps) for layer, us in sorted(times.items())}


def roofline(steps: Sequence[TracedStep], peak: Peak) -> dict[str, float]:
    """Returns over all steps: achieved GFLOP/s and GB/s, the peaks, and the least time as a share of the time taken."""
    us = sum(step.node_us for step in steps)
    nodes = [node for step in steps for node in step.snapshot.nodes]
    flops, moved = sum(n.flops for n in nodes), sum(n.bytes_moved for n in nodes)
    least = sum(max(n.flops / peak.gflops, n.bytes_moved / peak.gbytes_per_second) for n in nodes) / 1e3
    return {
        "gflops": flops / us / 1e3,
        "gbytes_per_second": moved / us / 1e3,
        "peak_gflops": peak.gflops,
        "peak_gbytes_per_second": peak.gbytes_per_second,
        "of_peak": least / us,
    }


def chrome_trace(steps: Sequence[TracedStep]) -> dict[str, Any]:
    """Returns JSON for Perfetto or chrome://tracing: rows of steps, layers, nodes, waits, and overlapping reads."""
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "pyggml_repkv"}}]
    events += [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": tid, "args": {"name": name}}
        for tid, name in ((1, "steps"), (2, "layers"), (3, "nodes"), (4, "waiting for blocks"))
    ]
    n_lanes = 0
    for i, step in enumerate(steps):
        events.append(_event(1, f"step {i}: {step.snapshot.about['n_tokens']} tokens", step.begin, step.end))
        events += _layers(step)
        for node, (begin, end) in zip(step.snapshot.nodes, step.times, strict=True):
            args = {"id": node.id, "op": node.op, "shape": "x".join(map(str, node.shape)), "flops": node.flops,
                    "bytes": node.bytes_moved}  # fmt: skip
            events.append(_event(3, node.name or node.op, begin, end, args))
        events += [
            _event(4, f"layer {e.layer}", 1e3 * e.begin_ms, 1e3 * e.end_ms) for e in step.events if e.kind == "wait"
        ]
        lanes: list[float] = []
        for e in sorted((e for e in step.events if e.kind in ("read", "staged", "write")), key=lambda e: e.begin_ms):
            lane = next((n for n, end in enumerate(lanes) if end <= e.begin_ms), len(lanes))
            lanes[lane : lane + 1] = [e.end_ms]
            ahead = " ahead" if e.ahead else ""
            name = f"{e.kind} block {e.block} of layer {e.layer}{ahead}"
            args = {"lane": e.lane, "units": e.n_units}
            events.append(_event(10 + lane, name, 1e3 * e.begin_ms, 1e3 * e.end_ms, args))
        n_lanes = max(n_lanes, len(lanes))
    events += [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 10 + n, "args": {"name": f"disk {n + 1}"}}
        for n in range(n_lanes)
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _layers(step: TracedStep) -> Iterable[dict[str, Any]]:
    spans: dict[int, tuple[float, float]] = {}
    for node, (begin, end) in zip(step.snapshot.nodes, step.times, strict=True):
        if node.layer >= 0 and not node.name.endswith(")"):
            first, last = spans.get(node.layer, (begin, end))
            spans[node.layer] = min(first, begin), max(last, end)
    return [_event(2, f"layer {layer}", begin, end) for layer, (begin, end) in sorted(spans.items())]


def _event(tid: int, name: str, begin: float, end: float, args: dict[str, Any] | None = None) -> dict[str, Any]:
    event: dict[str, Any] = {
        "ph": "X", "pid": 1, "tid": tid, "name": name, "ts": round(begin, 3), "dur": round(end - begin, 3)
    }  # fmt: skip
    return event | ({"args": args} if args else {})
