"""Proofs about a static graph: its effects happen, in order, and nothing is overwritten while it is needed.

ggml computes nodes in the order in which they were added and drops those that no result needs. So a write to memory
that outlives the graph is safe only if edges alone force it: the rules below look at edges, not at the order that a
graph happens to have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from pyggml_repkv.lab.inspect.snapshot import Snapshot, TensorInfo

# Ops that ggml's allocator computes in place (ggml_op_can_inplace of ggml-alloc.c).
IN_PLACE = frozenset(
    (
        "add",
        "add_id",
        "add1",
        "sub",
        "mul",
        "div",
        "sqr",
        "sqrt",
        "log",
        "unary",
        "rope",
        "scale",
        "rms_norm",
        "soft_max",
    )
)

_VIEWS = frozenset(("view", "reshape", "permute", "transpose"))


@dataclass(frozen=True, slots=True)
class Finding:
    """A broken rule. rule: a key of RULES; ids: the tensors at fault."""

    rule: str
    message: str
    ids: tuple[str, ...]


class _Graph:
    """The ancestors and users of each node. ancestors: bit sets over positions in the graph."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot, self.nodes = snapshot, snapshot.nodes
        self.position = {node.id: i for i, node in enumerate(self.nodes)}
        self.ancestors: list[int] = []
        for node in self.nodes:
            bits = 0
            for id_ in self.sources(node):
                i = self.position[id_]
                if i < len(self.ancestors):
                    bits |= self.ancestors[i] | 1 << i
            self.ancestors.append(bits)
        self.users: dict[str, list[int]] = {node.id: [] for node in self.nodes}
        for i, node in enumerate(self.nodes):
            for id_ in self.sources(node):
                self.users[id_].append(i)

    def sources(self, node: TensorInfo) -> list[str]:
        """Returns the ids of the nodes that `node` reads or is a view of."""
        found = (*node.sources, node.view_of) if node.view_of else node.sources
        return [id_ for id_ in dict.fromkeys(found) if id_ in self.position]

    def leads_to(self, first: int, then: int) -> bool:
        return bool(self.ancestors[then] >> first & 1)

    def last_use(self, node: TensorInfo) -> int:
        """Returns the position of the last node that reads `node`, also through views; its own if none does."""
        last = self.position.get(node.id, -1)
        for user in self.users.get(node.id, ()):
            view = self.nodes[user]
            last = max(last, user, self.last_use(view) if view.op in _VIEWS else user)
        return last


def verify(snapshot: Snapshot) -> list[Finding]:
    """Returns every broken rule, in the order of RULES; an empty list is the proof."""
    graph = _Graph(snapshot)
    return [finding for rule in RULES.values() for finding in rule(graph)]


def _order(g: _Graph) -> Iterator[Finding]:
    """Every node comes after its sources."""
    for i, node in enumerate(g.nodes):
        late = [id_ for id_ in g.sources(node) if g.position[id_] >= i]
        if late:
            yield Finding("order", f"{_name(node)} is computed before what it reads", (node.id, *late))


def _present(g: _Graph) -> Iterator[Finding]:
    """Each layer writes every memory that its policy requires."""
    about = g.snapshot.about
    expected = set(about["writes"])
    if about["phase"] == "decode" and any(t.base_name == "kept" for t in g.snapshot.leaves):
        expected.add("kept")
    written: dict[int, set[str]] = {}
    for node in g.nodes:
        for id_ in node.writes:
            memory = g.snapshot.by_id[id_]
            written.setdefault(memory.layer, set()).add(memory.base_name)
    for layer in range(about["n_layer"]):
        missing = expected - written.get(layer, set())
        if missing:
            yield Finding("present", f"no node of layer {layer} writes {', '.join(sorted(missing))}", ())


def _consumed(g: _Graph) -> Iterator[Finding]:
    """Every node has a user, is a result, or has a hook: ggml drops all others, whatever their effect."""
    hooked = {hook.node for hook in g.snapshot.hooks}
    for node in g.nodes:
        if not g.users[node.id] and not node.is_output and node.id not in hooked:
            verb = "waits for what" if node.writes else "reads"
            yield Finding("consumed", f"nobody {verb} {_name(node)}{' writes' if node.writes else ''}", (node.id,))


def _effects(g: _Graph) -> Iterator[Finding]:
    """Where two nodes touch the same memory and one writes it, edges lead from one to the other."""
    touched: dict[str, list[int]] = {}
    for i, node in enumerate(g.nodes):
        for id_ in dict.fromkeys((*node.reads, *node.writes)):
            touched.setdefault(id_, []).append(i)
    for id_, positions in touched.items():
        for n, j in enumerate(positions):
            for i in positions[:n]:
                a, b = g.nodes[i], g.nodes[j]
                if (id_ in a.writes or id_ in b.writes) and not g.leads_to(i, j):
                    verbs = ("writes" if id_ in a.writes else "reads"), ("writes" if id_ in b.writes else "reads")
                    what = g.snapshot.by_id[id_].name
                    message = (
                        f"no edge orders {_name(a)}, which {verbs[0]} {what}, before {_name(b)}, which {verbs[1]} it"
                    )
                    yield Finding("effects", message, (a.id, b.id))


def _hooks(g: _Graph) -> Iterator[Finding]:
    """Hook points are in order, and a hook waits for a layer's blocks before a node attends them."""
    hooks = g.snapshot.hooks
    for a, b in pairwise(hooks):
        if g.position.get(a.node, -1) >= g.position.get(b.node, -1):
            yield Finding("hooks", f"the hooks of layers {a.layer} and {b.layer} are not in order", (a.node, b.node))
    if not hooks:
        return
    selected = {h.layer + i: h.node for h in hooks for i in range(h.n_layers)}
    for hook in hooks:
        if hook.node not in g.position:
            yield Finding("hooks", f"the hook of layer {hook.layer} has no node in the graph", (hook.node,))
    for i, node in enumerate(g.nodes):
        if node.op != "repkv.locate" and not node.op.startswith("repkv.attend_memory"):
            continue
        layer = next((g.snapshot.by_id[m].layer for m in node.reads), -1)
        at = g.position.get(selected.get(layer, ""), -1)
        if at < 0 or not g.leads_to(at, i):
            yield Finding("hooks", f"{_name(node)} takes blocks that no hook waited for", (node.id,))


def _memory(g: _Graph) -> Iterator[Finding]:
    """No node overwrites a tensor of the compute buffer that another node will still read."""
    end = len(g.nodes)
    live: list[tuple[int, int, int, int, TensorInfo]] = []  # offset, end, born, dies
    everything = [
        t for t in (*g.snapshot.leaves, *g.nodes) if t.buffer == "compute" and not t.view_of and t.offset >= 0
    ]
    everything.sort(key=lambda t: g.position.get(t.id, -1))
    users: dict[str, int] = {}
    for i, node in enumerate(g.nodes):
        for id_ in node.sources:
            root = g.snapshot.root(id_)
            users[root.id] = max(users.get(root.id, -1), i)
    for t in everything:
        born = g.position.get(t.id, -1)
        dies = end if t.is_output else users.get(t.id, born)
        mine = t.offset, t.offset + t.bytes
        still = []
        for other in live:
            first, last, _, other_dies, tensor = other
            if other_dies < born:
                continue
            still.append(other)
            if mine[0] >= last or mine[1] <= first:
                continue
            sources = {g.snapshot.root(s).id for s in t.sources}
            if other_dies == born and tensor.id in sources and t.op in IN_PLACE:
                continue
            yield Finding("memory", f"{_name(t)} overwrites {_name(tensor)} while it is needed", (tensor.id, t.id))
        live = [*still, (*mine, born, dies, t)]


def _names(g: _Graph) -> Iterator[Finding]:
    """A name belongs to one tensor, or to the stages of one (as llama.cpp's Qcur). Norms before their weights, all of
    which llama.cpp calls `norm`, have no name of their own.
    """
    named: dict[str, list[int]] = {}
    for i, node in enumerate(g.nodes):
        if node.op not in _VIEWS and node.base_name != "norm":
            named.setdefault(node.name, []).append(i)
    for name, positions in named.items():
        for i, j in pairwise(positions):
            if name and not g.leads_to(i, j):
                yield Finding("names", f"two nodes are called {name}", (g.nodes[i].id, g.nodes[j].id))


def _layers(g: _Graph) -> Iterator[Finding]:
    """All layers but the last, which omits what no result needs, have the same ops on their way to a result."""
    counts: dict[int, Counter[str]] = {}
    needed = 0
    for i, node in enumerate(g.nodes):
        if node.is_output or node.writes:
            needed |= g.ancestors[i] | 1 << i
    for i, node in enumerate(g.nodes):
        # A node that ggml named after a source may be of another layer.
        if node.layer >= 0 and not node.name.endswith(")") and needed >> i & 1:
            counts.setdefault(node.layer, Counter())[node.op] += 1
    n_layer = g.snapshot.about["n_layer"]
    for i in range(1, n_layer - 1):
        if counts.get(i) != counts.get(0):
            a, b = counts.get(0, Counter()), counts.get(i, Counter())
            other = ", ".join(f"{op} {a[op]} and {b[op]}" for op in sorted(set(a) | set(b)) if a[op] != b[op])
            yield Finding("layers", f"layers 0 and {i} differ: {other}", ())


RULES = {
    "order": _order,
    "present": _present,
    "consumed": _consumed,
    "effects": _effects,
    "hooks": _hooks,
    "memory": _memory,
    "names": _names,
    "layers": _layers,
}


def _name(t: TensorInfo) -> str:
    return f"{t.id} ({t.name or t.op})"
