"""The pictures of docs/RESULTS.md, from stored JSON. They omit what is not stored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from _report_stored import POLICIES, TASKS, Stored, counts_of, recalls_of

from pyggml_repkv.lab.eval import plotting

PICTURES = (
    "results_cost.png",
    "results_retrieval.png",
    "results_recall.png",
    "results_prefetch.png",
)
COLOURS = {
    "full": "#7a7a7a", "window": "#d98c3f", "repkv": "#2b6cb0", "llama.cpp -fa on": "#b03a3a",
    "llama.cpp -fa off": "#d08a8a",
}  # fmt: skip


def draw(stored: Stored, folder: Path) -> list[str]:
    """Draws every picture that has data, and returns their names. Raises InputError without matplotlib."""
    pyplot, drawn = plotting.pyplot(), []
    for name, paint in zip(PICTURES, _PAINTERS, strict=True):
        figure = paint(pyplot, stored)
        if figure is not None:
            figure.savefig(folder / name, dpi=100)
            pyplot.close(figure)
            drawn.append(name)
    return drawn


def _draw_cost(pyplot: Any, stored: Stored) -> Any:
    if not stored.speed:
        return None
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for policy in dict.fromkeys(r["policy"] for r in stored.speed):
        mine = sorted((r for r in stored.speed if r["policy"] == policy), key=lambda r: r["n_depth"])
        chunks, tokens = ([r for r in mine if r[kind]] for kind in ("n_prompt", "n_gen"))
        style = {"label": policy, "color": COLOURS.get(policy), "marker": "o", "markersize": 4}
        for axis, records, value in (
            (axes[0], chunks, lambda r: r["median_ts"]),
            (axes[1], tokens, lambda r: 1e3 / r["median_ts"]),
            (axes[2], tokens, lambda r: (r["peak_rss_bytes"] or math.nan) / 1e6),
        ):
            axis.plot([r["n_depth"] / 1024 for r in records], [value(r) for r in records], **style)
    for axis, title in zip(axes, ("prefill, tokens/s", "one token, ms", "peak RSS, MB"), strict=True):
        axis.set(title=title, xlabel="tokens in the context, thousands of 1,024")
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    for axis in axes[::2]:
        axis.set_ylim(0, None)
    axes[0].legend(frameon=False)
    return figure


def _draw_retrieval(pyplot: Any, stored: Stored) -> Any:
    counts = counts_of(stored)
    if not counts:
        return None
    lengths = sorted({length for _, _, length in counts})
    figure, axes = pyplot.subplots(1, len(POLICIES), figsize=(12, 2.6), sharey=True, layout="constrained")
    for axis, policy in zip(axes, POLICIES, strict=True):
        cells = [[counts.get((task, policy, n)) for n in lengths] for task in TASKS]
        axis.imshow([[c[0] / c[1] if c else math.nan for c in row] for row in cells], vmin=0, vmax=1, cmap="RdYlGn",
                    aspect="auto")  # fmt: skip
        for y, row in enumerate(cells):
            for x, c in enumerate(row):
                if c:
                    pale = 0.2 < c[0] / c[1] < 0.8
                    axis.text(x, y, f"{c[0]}/{c[1]}", ha="center", va="center", color="black" if pale else "white")
        axis.set_title(policy)
        axis.set_xticks(range(len(lengths)), [f"{n // 1000}k" for n in lengths])
        axis.set_yticks(range(len(TASKS)), TASKS)
        axis.set_xlabel("tokens")
    return figure


def _draw_recall(pyplot: Any, stored: Stored) -> Any:
    found = recalls_of(stored)
    if not found:
        return None
    figure, axes = pyplot.subplots(
        1, len(found), figsize=(6 * len(found), 3.4), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (text, recall) in zip(axes[0], found.items(), strict=True):
        indexes = recall["decode"]["indexes"]
        for i, (key, label) in enumerate((("hits", "sharp hits"), ("mass", "attention mass"))):
            heights = [math.nan if each[key] is None else each[key] for each in indexes.values()]
            axis.bar([x + 0.36 * (i - 0.5) for x in range(len(heights))], heights, 0.34, label=label)
        axis.set_xticks(range(len(indexes)), [name.replace(":", ":\n") for name in indexes], fontsize="small")
        axis.set(title=f"{text}, {recall['n_tokens']:,} tokens", ylim=(0, 1.02))
        axis.grid(alpha=0.3, axis="y")
    axes[0][0].set_ylabel("share in the selection of one token")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", frameon=False, ncols=2)
    return figure


# Thread ids in a trace (lab/inspect/trace.py): layers, waits, and the first disk lane.
LAYERS, WAITS, DISK = 2, 4, 10


def _draw_prefetch(pyplot: Any, stored: Stored) -> Any:
    traces = [
        (title, stored.get(name)) for name, title in (("trace", "default"), ("trace_late", "--sticky 1.4 --late"))
    ]
    traces = [(title, trace["traceEvents"]) for title, trace in traces if trace]
    if not traces:
        return None
    figure, axes = pyplot.subplots(len(traces), 1, figsize=(12, 2.6 * len(traces)), squeeze=False, sharex=True,
                                   layout="constrained")  # fmt: skip
    for axis, (title, events) in zip(axes[:, 0], traces, strict=True):
        spans = [e for e in events if e["ph"] == "X"]
        step = [e for e in spans if e["tid"] == 1][-1]
        mine = [e for e in spans if e["ts"] >= step["ts"] and e["ts"] < step["ts"] + step["dur"]]
        lanes = sorted({e["tid"] for e in mine if e["tid"] >= DISK})
        rows = {LAYERS: 0, WAITS: 1, **{tid: 2 + n for n, tid in enumerate(lanes)}}
        for tid, row in rows.items():
            at = [((e["ts"] - step["ts"]) / 1e3, e["dur"] / 1e3) for e in mine if e["tid"] == tid]
            colours = ["#2b6cb0", "#7fb0e0"] if tid == LAYERS else ["#c0392b"] if tid == WAITS else ["#4a9a5b"]
            axis.broken_barh(at, (row - 0.4, 0.8), color=[colours[i % len(colours)] for i in range(len(at))] or None)
        axis.set_yticks(list(rows.values()), ["layers", "waiting", *(f"disk {n + 1}" for n in range(len(lanes)))])
        axis.invert_yaxis()
        axis.set_title(f"{title}: a token in {step['dur'] / 1e3:.1f} ms", loc="left")
    axes[-1][0].set_xlabel("ms")
    return figure


_PAINTERS = (_draw_cost, _draw_retrieval, _draw_recall, _draw_prefetch)
