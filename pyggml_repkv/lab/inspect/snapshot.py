"""A static graph as data, which `graph dump` prints, `graph diff` compares and `graph verify` checks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pyggml_repkv.lab.inspect.cost import Step, bytes_of, flops_of
from pyggml_repkv.lab.inspect.graph_reader import RawGraph, RawTensor, address_of, info_of
from pyggml_repkv.memory.policy import HookPoint

SCHEMA = 2

_LAYER = re.compile(r"^blk\.(\d+)\.|-(\d+)(?: \(.*\))?$|_l(\d+)$")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A node of the graph (ids n0, n1, ... in the order of compute), or a leaf, which no node makes (t0, t1, ...).

    kind: node, input (filled before each compute), weight, or memory (outlives the graph: keys, scores, the index);
    sources: ids; reads, writes: ids of memories whose rows a node reads or writes; view_of: id of the tensor whose
    memory it shares, or ""; buffer: compute, weights or memory; offset: bytes from the buffer's start, or -1; flops,
    bytes_moved: of one compute.
    """

    id: str
    name: str
    kind: str
    op: str
    type: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    view_of: str
    layer: int
    buffer: str
    offset: int
    bytes: int
    flops: int
    bytes_moved: int
    is_output: bool

    @property
    def base_name(self) -> str:
        """The name without the layer."""
        return _LAYER.sub("", self.name) if self.kind != "weight" else self.name


@dataclass(frozen=True, slots=True)
class HookInfo:
    """A node after which a hook asks for blocks and waits for them. n_layers: for how many layers, from `layer` on."""

    node: str
    layer: int
    n_layers: int = 1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A static graph. about: model, policy, phase and whatever else identifies it."""

    about: dict[str, Any]
    nodes: tuple[TensorInfo, ...]
    leaves: tuple[TensorInfo, ...]
    hooks: tuple[HookInfo, ...] = ()
    compute_bytes: int = 0
    by_id: dict[str, TensorInfo] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.by_id.update({t.id: t for t in (*self.nodes, *self.leaves)})

    def root(self, id_: str) -> TensorInfo:
        """Returns the tensor that owns the bytes: the tensor itself, or the one it is a view of."""
        tensor = self.by_id[id_]
        return self.by_id[tensor.view_of] if tensor.view_of else tensor

    def as_json(self) -> dict[str, Any]:
        """Returns the JSON object; docs/graph.md has its schema."""
        tensors = [*self.nodes, *self.leaves]
        return {
            "schema": SCHEMA,
            **self.about,
            "n_nodes": len(self.nodes),
            "compute_bytes": self.compute_bytes,
            "nodes": [_plain(t) for t in self.nodes],
            "leaves": [_plain(t) for t in self.leaves],
            "hooks": [asdict(h) for h in self.hooks],
            "flops": sum(t.flops for t in tensors),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Snapshot:
        """Returns the graph of a dump. Raises KeyError, TypeError or ValueError if it is not a dump of this schema."""
        if data["schema"] != SCHEMA:
            raise ValueError(f"its schema is version {data['schema']}, this program reads version {SCHEMA}")
        known = {"schema", "n_nodes", "compute_bytes", "nodes", "leaves", "hooks", "flops"}
        tuples = ("shape", "sources", "reads", "writes")
        nodes, leaves = (
            tuple(TensorInfo(**{**t, **{k: tuple(t[k]) for k in tuples}}) for t in data[key])
            for key in ("nodes", "leaves")
        )
        about = {key: value for key, value in data.items() if key not in known}
        return cls(about, nodes, leaves, tuple(HookInfo(**h) for h in data["hooks"]), data["compute_bytes"])


def take_snapshot(
    raw: RawGraph, about: dict[str, Any], step: Step, hooks: Sequence[HookPoint] = (), compute_bytes: int = 0
) -> Snapshot:
    """Returns the graph as data. hooks: in the order in which they run."""
    leaf_kinds = {address: _kind(leaf) for address, leaf in raw.leaves.items()}
    ids = {node.address: f"n{i}" for i, node in enumerate(raw.nodes)}
    ids |= {address: f"t{i}" for i, address in enumerate(raw.leaves)}
    everything = {**raw.leaves, **{node.address: node for node in raw.nodes}}
    leaves = tuple(_info(leaf, leaf_kinds[a], ids, everything, leaf_kinds, step) for a, leaf in raw.leaves.items())
    nodes = tuple(_info(node, "node", ids, everything, leaf_kinds, step) for node in raw.nodes)
    points = tuple(HookInfo(ids[address_of(p.node)], p.layer, max(1, p.n_known)) for p in hooks)
    return Snapshot(about, nodes, leaves, points, compute_bytes)


def _info(
    t: RawTensor, kind: str, ids: dict[int, str], everything: dict[int, RawTensor], leaf_kinds: dict[int, str],
    step: Step,
) -> TensorInfo:  # fmt: skip
    info = info_of(t.op)
    sources = [everything[s] for s in t.sources]

    def memory(numbers: tuple[int, ...]) -> tuple[str, ...]:
        found = (t.sources[i] for i in numbers if i < len(t.sources))
        return tuple(ids[_root(everything[a])] for a in found if leaf_kinds.get(_root(everything[a])) == "memory")

    reads, writes = memory(info.reads), memory(info.writes)
    if t.op == "set_rows" and leaf_kinds.get(t.view_of) == "memory":
        writes = (ids[t.view_of],)
    if t.op != "set_rows" and t.op not in _NO_COMPUTE and not (info.reads or info.writes):
        # ggml's nodes, and native ops whose row of the table names no sources, read all of their sources.
        reads = tuple(dict.fromkeys(ids[_root(s)] for s in sources if leaf_kinds.get(_root(s)) == "memory"))
    root = _root(t)
    buffer = "compute" if kind in ("node", "input") else "weights" if kind == "weight" else "memory"
    if kind == "node" and root != t.address and root in leaf_kinds:
        buffer = {"weight": "weights", "memory": "memory"}.get(leaf_kinds[root], "compute")
    return TensorInfo(
        id=ids[t.address], name=t.name, kind=kind, op=t.op, type=t.type, shape=t.shape,
        sources=tuple(ids[s] for s in t.sources), reads=reads, writes=writes,
        view_of=ids[root] if root != t.address else "", layer=_layer(t.name),
        buffer=buffer, offset=t.offset, bytes=t.n_bytes,
        flops=flops_of(t, sources, step) if kind == "node" else 0,
        bytes_moved=bytes_of(t, sources, step) if kind == "node" else 0, is_output=t.is_output,
    )  # fmt: skip


_NO_COMPUTE = frozenset(("view", "reshape", "permute", "transpose", ""))


def _root(t: RawTensor) -> int:
    return t.view_of or t.address


def _kind(leaf: RawTensor) -> str:
    if leaf.is_input:
        return "input"
    return "weight" if leaf.name.endswith((".weight", ".bias")) or leaf.name.startswith("blk.") else "memory"


def _layer(name: str) -> int:
    match = _LAYER.search(name)
    return next(int(n) for n in match.groups() if n is not None) if match else -1


def _plain(t: TensorInfo) -> dict[str, Any]:
    return asdict(t)
