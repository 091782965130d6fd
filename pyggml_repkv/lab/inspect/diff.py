"""The differences between two graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pyggml_repkv.lab.inspect.snapshot import Snapshot, TensorInfo


@dataclass(frozen=True, slots=True)
class Change:
    """A node that differs. kind: added, removed or changed; name: without the layer; layers: those where it differs;
    what: its op, or how it changed.
    """

    kind: str
    name: str
    layers: tuple[int, ...]
    what: str

    def line(self) -> str:
        sign = {"added": "+", "removed": "-", "changed": "~"}[self.kind]
        return f"{sign} {self.name:28s} {_ranges(self.layers):14s} {self.what}\n"


def diff(a: Snapshot, b: Snapshot) -> list[Change]:
    """Returns the changes from a to b. It pairs nodes by name and layer, ignores views, and merges equal changes of
    several layers into one.
    """
    before, after = _by_name(a), _by_name(b)
    found: dict[tuple[str, str, str], list[int]] = {}
    for key in dict.fromkeys((*before, *after)):
        name, layer, _ = key
        x, y = before.get(key), after.get(key)
        if x is None and y is not None:
            change = "added", name, _describe(b, y)
        elif y is None and x is not None:
            change = "removed", name, _describe(a, x)
        else:
            assert x is not None
            assert y is not None
            differences = _differences(a, x, b, y)
            if not differences:
                continue
            change = "changed", name, "; ".join(differences)
        found.setdefault(change, []).append(layer)
    order = {"removed": 0, "changed": 1, "added": 2}
    changes = [Change(kind, name, tuple(layers), what) for (kind, name, what), layers in found.items()]
    return sorted(changes, key=lambda c: order[c.kind])


def summary(a: Snapshot, b: Snapshot) -> dict[str, tuple[int, int]]:
    """Returns numbers of both graphs: nodes, compute bytes, flops, and nodes by op."""
    ops = Counter(t.op for t in a.nodes), Counter(t.op for t in b.nodes)
    numbers = {
        "nodes": (len(a.nodes), len(b.nodes)),
        "compute_bytes": (a.compute_bytes, b.compute_bytes),
        "flops": (sum(t.flops for t in a.nodes), sum(t.flops for t in b.nodes)),
    }
    return numbers | {f"op {op}": (ops[0][op], ops[1][op]) for op in sorted(set(ops[0]) | set(ops[1]))}


def _by_name(snapshot: Snapshot) -> dict[tuple[str, int, int], TensorInfo]:
    """Returns nodes by (name without the layer, layer, number among those of the same name)."""
    found: dict[tuple[str, int, int], TensorInfo] = {}
    for t in snapshot.nodes:
        if t.op in ("view", "reshape", "permute", "transpose"):
            continue
        n = 0
        while (t.base_name, t.layer, n) in found:
            n += 1
        found[t.base_name, t.layer, n] = t
    return found


def _describe(snapshot: Snapshot, t: TensorInfo) -> str:
    effect = f" writes {', '.join(snapshot.by_id[w].base_name for w in t.writes)}" if t.writes else ""
    return f"{t.op} {'x'.join(map(str, t.shape))}{effect}"


def _differences(a: Snapshot, x: TensorInfo, b: Snapshot, y: TensorInfo) -> list[str]:
    pairs = (
        ("op", x.op, y.op),
        ("type", x.type, y.type),
        ("shape", "x".join(map(str, x.shape)), "x".join(map(str, y.shape))),
        ("reads", _names(a, x.sources), _names(b, y.sources)),
        ("writes", _names(a, x.writes), _names(b, y.writes)),
    )
    return [f"{what} {before or 'nothing'} -> {after or 'nothing'}" for what, before, after in pairs if before != after]


def _names(snapshot: Snapshot, ids: Sequence[str]) -> str:
    return ", ".join(snapshot.by_id[i].base_name for i in ids)


def _ranges(layers: Sequence[int]) -> str:
    """Returns layers as text: `layers 0-29`."""
    numbers = sorted(layer for layer in set(layers) if layer >= 0)
    if not numbers:
        return ""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return "layers " + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
