"""The text of docs/RESULTS.md, from stored JSON. It omits what is not stored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from _report_stored import POLICIES, TASKS, Record, Stored, counts_of, recalls_of

FIDELITY = ("window", "4", "8", "16", "32")


def page(stored: Stored, commands: Sequence[str]) -> str:
    parts = [
        "# Results\n\n`make report TEXT=FILE` writes this page from the commands' output in `results/`.\n",
        *(_about(stored), _speed(stored), _retrieval(stored), _perplexity(stored)),
        *(_fidelity(stored), _recall(stored), _disk(stored)),
        "## Commands\n\n```\n" + "\n".join(commands) + "\n```\n",
    ]
    return "\n".join(part for part in parts if part)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _about(stored: Stored) -> str:
    machine, text, speed = stored.get("machine"), stored.get("text"), stored.speed
    lines = []
    if speed:
        r = speed[0]
        builds = ", ".join(dict.fromkeys(r["build"] for r in speed))
        lines.append(
            f"{builds}; {r['model_filename']} ({r['model_type']}), {r['n_threads']} threads, {r['test_time'][:10]}."
        )
    if text:
        lines.append(f"Text: {text['name']}, {text['bytes']:,} bytes, SHA-256 {text['sha256'][:16]}...")
    if not machine:
        return "\n".join([*lines, ""]) if lines else ""
    lines.append(
        f"Machine: {machine['cpu_info']}, {machine['n_threads']} threads: {stored.peak_gbytes_per_second:.1f} GB/s "
        f"from memory (the best of all runs), {machine['peak_gflops']:.0f} GFLOP/s of F32 multiply-adds. ggml's own "
        "matrix products by weight type:\n\n"
    )
    rows = [(t["type"], f"{t['gflops']:.0f}", f"{t['gbytes_per_second']:.1f}") for t in machine["types"]]
    return "\n".join(lines) + table(("weights", "GFLOP/s, 512 tokens", "GB/s, one token"), rows)


def _speed(stored: Stored) -> str:
    if not stored.speed:
        return ""
    text = (
        "## Speed at depth\n\nNumbers are medians of the rounds; a prompt is read in chunks of 512 tokens. `of "
        "memory`: the bytes that a token must read, over the bytes that memory can deliver in its time. The last two "
        "columns say how many times as fast the policy is as the better of llama.cpp's `-fa on` and `-fa off` (median "
        "of the rounds, least to most). Contexts marked * repeat the keys and values of 512 tokens; `window` and "
        "`repkv` always read their prompt.\n\n![Cost against the length of the context](results_cost.png)\n\n"
    )
    rows = []
    for depth in sorted({r["n_depth"] for r in stored.speed}):
        at = [r for r in stored.speed if r["n_depth"] == depth]
        for policy in dict.fromkeys(r["policy"] for r in at):
            chunk, token = (_one(at, policy, kind) for kind in ("n_prompt", "n_gen"))
            if chunk is None or token is None:
                continue
            share = token["of_memory_bandwidth"]
            if share is not None:
                share *= token["peak_gbytes_per_second"] / stored.peak_gbytes_per_second
            rows.append((
                f"{depth:,}{'*' if token['depth_is'] == 'repeated' else ''}", f"`{policy}`",
                f"{chunk['median_ts']:.0f}",
                f"{1e3 / token['median_ts']:.1f}", "" if share is None else f"{100 * share:.0f} %",
                _mb(token["resident_kv_bytes"]), _mb(token["peak_rss_bytes"]), _versus(chunk, at), _versus(token, at),
            ))  # fmt: skip
    header = (
        "depth", "policy", "prefill, tokens/s", "ms a token", "of memory", "KV resident", "peak RSS", "prefill, ratio",
        "token, ratio",
    )  # fmt: skip
    return text + table(header, rows)


def _one(records: Sequence[Record], policy: str, kind: str) -> Record | None:
    return next((r for r in records if r["policy"] == policy and r[kind]), None)


def _versus(own: Record, at: Sequence[Record]) -> str:
    theirs = [r for r in at if r["engine"] == "llama.cpp" and r["test"] == own["test"]]
    if not theirs or not own["vs"]:
        return ""
    ratio = own["vs"][max(theirs, key=lambda r: r["median_ts"])["policy"]]
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def _mb(n_bytes: int | None) -> str:
    return f"{n_bytes / 1e6:,.0f} MB" if n_bytes else ""


def _retrieval(stored: Stored) -> str:
    counts = counts_of(stored)
    if not counts:
        return ""
    lengths = sorted({length for _, _, length in counts})
    rows = []
    for task in TASKS:
        for policy in POLICIES:
            cells = [counts.get((task, policy, length)) for length in lengths]
            if any(cells):
                rows.append((f"`{task}`", f"`{policy}`", *("" if c is None else f"{c[0]} of {c[1]}" for c in cells)))
    return (
        "## What is found\n\nHow many questions, at evenly spaced depths, got the whole answer. Empty cells were not "
        "measured: `full` attends everything, so its cost grows with the square of the length. The demo model was "
        "trained on 8,192 tokens.\n\n![Answers by task and length](results_retrieval.png)\n\n"
        + table(("task", "policy", *(f"{n:,}" for n in lengths)), rows)
    )


def _perplexity(stored: Stored) -> str:
    found = {**((stored.get("perplexity_full") or {}).get("stretches", {})),
             **((stored.get("perplexity") or {}).get("stretches", {}))}  # fmt: skip
    if not found:
        return ""
    begins = sorted({s["begin"] for each in found.values() for s in each})
    ends = {s["begin"]: s["end"] for each in found.values() for s in each}
    by_begin = {policy: {s["begin"]: s for s in each} for policy, each in found.items()}
    policies = [p for p in POLICIES if p in found]
    rows = [
        (f"{b:,} to {ends[b]:,}", *(_perplexity_of(by_begin[p].get(b)) for p in policies)) for b in begins
    ]  # fmt: skip
    return (
        "## Perplexity of a long text\n\nPerplexity of the text's first tokens by position, read in one session in "
        "chunks of 512. `full` reads on past the 8,192 tokens that the model was trained on, as llama.cpp would.\n\n"
        + table(("tokens", *(f"`{p}`" for p in policies)), rows)
    )


def _perplexity_of(stretch: Record | None) -> str:
    return "" if stretch is None else f"{math.exp(stretch['nll']):.2f}"


def _fidelity(stored: Stored) -> str:
    rows = []
    for name in FIDELITY:
        found = stored.get(f"fidelity_{name}")
        if found is None:
            continue
        ((_, stretches),) = found["stretches"].items()
        budget = "`window`" if name == "window" else f"`repkv`, {128 * int(name):,} tokens"
        n_attended = 1088 + (0 if name == "window" else 128 * int(name))
        last = stretches[1:]
        weights = [s["end"] - s["begin"] for s in last]
        kl, top1 = (sum(s[k] * w for s, w in zip(last, weights, strict=True)) / sum(weights) for k in ("kl", "top1"))
        rows.append((budget, f"{n_attended:,}", f"{kl:.4f}", f"{100 * top1:.1f} %", *(f"{s['kl']:.4f}" for s in last)))
    if not rows:
        return ""
    heads = [f"KL, {s['begin']:,} to {s['end']:,}" for s in last]
    return (
        "## Distance from full attention\n\nKL divergence of the next-token distribution from that of `--kv full` "
        "(nats), and how often both find the same token most likely. All positions are within the trained context, "
        "where `full` is right. A token attends at most the first 64 tokens, the last 1,024, and so many older ones, "
        "which have far positions.\n\n" + table(("memory", "tokens attended", "KL", "same most likely", *heads), rows)
    )


def _recall(stored: Stored) -> str:
    rows = []
    for text, found in recalls_of(stored).items():
        for name, one in found["decode"]["indexes"].items():
            chunk, worst = found["chunk"]["indexes"][name], one["worst"]
            rows.append((
                f"{text}, {found['n_tokens']:,} tokens", f"`{name}`", _share(one["hits"]), _share(one["mass"]),
                "" if worst is None else f"{worst['hits']:.3f} ({worst['layer']})", _share(chunk["hits"]),
                _share(chunk["mass"]),
            ))  # fmt: skip
    if not rows:
        return ""
    return (
        "## What an index finds\n\nA case is sharp where one query head gives one evicted token more than a tenth of "
        "its attention. `hits`: the share of sharp cases whose token is in the selection; `mass`: the share of all "
        "attention to evicted tokens that selections hold; from layer 2 on. `exact` selects units, and `exact:blocks` "
        "whole blocks, by the true scores. The text was read with all of it attended; JSON is that of `kv`, with a "
        "question and its answer at the end.\n\n![By index](results_recall.png)\n\n"
        + table(("text", "index", "one token: hits", "mass", "worst layer", "chunk: hits", "mass"), rows)
    )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _disk(stored: Stored) -> str:
    rows = []
    for name, flags in (("", "default"), ("_late", "`--sticky 1.4 --late`")):
        found = stored.get(f"ram{name}"), stored.get(f"disk{name}")
        if not all(found):
            continue
        ram, disk = (records[0] for records in found)
        hit = disk["prefetch_hit"]
        rows.append((
            flags, f"{1e3 / ram['median_ts']:.1f}", f"{1e3 / disk['median_ts']:.1f}",
            "" if hit is None else f"{100 * hit:.1f} %", _mb(disk["ram_bytes"]), _mb(disk["disk_bytes"]),
            _mb(ram["peak_rss_bytes"]), _mb(disk["peak_rss_bytes"]),
        ))  # fmt: skip
    if not rows:
        return ""
    header = (
        "selection", "all in RAM, ms a token", "on disk, ms", "in RAM when needed", "RAM store", "on disk",
        "peak RSS, all in RAM", "peak RSS",
    )  # fmt: skip
    return (
        "## Blocks on disk\n\nThe cost of a token after 32,768 others, with `--kv-ram 75M` for the older ones. The "
        "picture shows a token of each selection: compute by layer, waits, and reads. The runs did not take turns, so "
        "their times include the machine's drift; [disk.md](disk.md) has runs in turn, at 65,536 tokens.\n\n"
        "![Reads beside compute](results_prefetch.png)\n\n" + table(header, rows)
    )
