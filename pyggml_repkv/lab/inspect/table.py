"""A snapshot as text: a table, Graphviz's DOT language, or SVG."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from pyggml_repkv.lab.inspect.snapshot import Snapshot, TensorInfo

HEADER = ("id", "name", "op", "type", "shape", "sources", "layer", "memory", "offset", "bytes", "Mflop", "effect")
_LEFT = frozenset(("id", "name", "op", "type", "shape", "sources", "memory", "effect"))

COLOURS = {"llama.cpp": "#dbe9f6", "ours": "#fde7c8", "effect": "#f7c9c4", "view": "#eeeeee"}
"""Fill colour of a node: an op of ggml, a native op, a node that writes memory, a view."""


def kind_of(node: TensorInfo) -> str:
    """Returns a key of COLOURS."""
    if node.writes:
        return "effect"
    if node.op.startswith("repkv."):
        return "ours"
    return "view" if node.op in ("view", "reshape", "permute", "transpose") else "llama.cpp"


def rows_of(snapshot: Snapshot, tensors: Iterable[TensorInfo]) -> list[tuple[str, ...]]:
    return [
        (
            t.id, t.name, t.op or t.kind, t.type, "x".join(map(str, t.shape)),
            " ".join(t.sources), "" if t.layer < 0 else str(t.layer), t.buffer,
            "" if t.offset < 0 else str(t.offset), str(t.bytes), f"{t.flops / 1e6:.2f}" if t.flops else "",
            effect_text(snapshot, t),
        )
        for t in tensors
    ]  # fmt: skip


def effect_text(snapshot: Snapshot, t: TensorInfo) -> str:
    """Returns a node's effect as text, such as `writes k_local-0, v_local-0`, or ""."""
    return "writes " + ", ".join(snapshot.by_id[w].name for w in t.writes) if t.writes else ""


def as_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: frozenset[str] = _LEFT) -> str:
    """Returns aligned columns; those in `left` are aligned left, the others right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = (
            cell.ljust(w) if name in left else cell.rjust(w) for cell, w, name in zip(row, widths, header, strict=True)
        )
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)


def as_dot(snapshot: Snapshot, nodes: Sequence[TensorInfo]) -> str:
    """Returns the nodes with edges from what they read, and dashed red edges to what they write."""
    shown = {t.id for t in nodes}
    lines = ["digraph ggml {", "  node [shape=box, style=filled, fontname=Helvetica, fontsize=10];"]
    leaves: dict[str, TensorInfo] = {}
    edges: list[str] = []
    for t in nodes:
        label = f"{t.id} {_quoted(t.name)}\\n{t.op} {'x'.join(map(str, t.shape))}"
        lines.append(f'  {t.id} [label="{label}", fillcolor="{COLOURS[kind_of(t)]}"];')
        roots = [snapshot.by_id[s] if s in shown else snapshot.root(s) for s in t.sources]
        leaves |= {root.id: root for root in roots if root.kind != "node"}
        edges.extend(f"  {root.id} -> {t.id};" for root in roots if root.id in shown or root.id in leaves)
        edges.extend(f'  {t.id} -> {w} [style=dashed, color="#c0392b"];' for w in t.writes)
    lines.extend(
        f'  {leaf.id} [label="{_quoted(leaf.name)}", shape=ellipse, fillcolor="white"];' for leaf in leaves.values()
    )
    return "\n".join([*lines, *dict.fromkeys(edges), "}", ""])


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


_ROW, _LEFT_EDGE, _BOX = 22, 12, 520


def as_svg(snapshot: Snapshot, nodes: Sequence[TensorInfo]) -> str:
    """Returns the nodes from top to bottom in the order of compute; arcs lead from a node to its readers."""
    at = {t.id: i for i, t in enumerate(nodes)}
    arcs, reach = [], 0
    for t in nodes:
        for source in dict.fromkeys(t.sources):
            if source not in at:
                continue
            a, b = at[source], at[t.id]
            if b - a == 1:
                continue
            out = 14 + 9 * min(b - a, 40)
            reach = max(reach, out)
            y0, y1 = (_ROW * i + _ROW / 2 for i in (a, b))
            x = _LEFT_EDGE + _BOX
            arcs.append(f'<path d="M{x} {y0} C{x + out} {y0} {x + out} {y1} {x} {y1}" class="arc"/>')
    width, height = _LEFT_EDGE + _BOX + reach + 12, _ROW * len(nodes) + 8
    boxes = []
    for i, t in enumerate(nodes):
        label = f"{t.id}  {t.name}   {t.op}  {'x'.join(map(str, t.shape))}"
        title = escape(
            f"{label}\nsources: {', '.join(snapshot.by_id[s].name for s in t.sources)}\n{effect_text(snapshot, t)}"
        )
        boxes.append(
            f'<g><title>{title}</title><rect x="{_LEFT_EDGE}" y="{_ROW * i + 2}" width="{_BOX}" height="{_ROW - 4}" '
            f'rx="3" fill="{COLOURS[kind_of(t)]}" stroke="#999"/>'
            f'<text x="{_LEFT_EDGE + 6}" y="{_ROW * i + 15}">{escape(label)}</text></g>'
        )
    style = "text{font:11px ui-monospace,monospace}.arc{fill:none;stroke:#888;stroke-width:1}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    return f"{head}<style>{style}</style>{''.join(arcs)}{''.join(boxes)}</svg>\n"
