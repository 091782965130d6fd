"""llama-bench's table and records, with further columns to the right."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from pyggml_repkv.engine.budget import size
from pyggml_repkv.lab.bench.measure import Case, Plan, Result, best_of
from pyggml_repkv.lab.inspect.peak import Peak

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class About:
    """What all records share. model_type: llama-bench's; step_bytes: bytes that a token moves, by (policy, depth)."""

    cpu: str
    model_filename: str
    model_type: str
    model_size: int
    model_n_params: int
    n_threads: int
    n_batch: int
    type_k: str
    type_v: str
    test_time: str
    peak: Peak
    step_bytes: dict[tuple[str, int], int]


def record(about: About, result: Result, others: Sequence[Result]) -> Record:
    """Returns llama-bench's fields and this project's. vs: a policy's speed over that of each llama.cpp, by round.

    others: all results of the same depth.
    """
    case, contender, memory = result.case, result.contender, result.memory
    ns = [round(1e9 * s) for s in result.seconds]
    return {
        "build": result.version,
        "cpu_info": about.cpu,
        "backends": "CPU",
        "model_filename": about.model_filename,
        "model_type": about.model_type,
        "model_size": about.model_size,
        "model_n_params": about.model_n_params,
        "n_batch": contender.load.get("n_batch", about.n_batch),
        "n_ubatch": about.n_batch,
        "n_threads": about.n_threads,
        "type_k": about.type_k,
        "type_v": about.type_v,
        "flash_attn": contender.flash_attn,
        "n_prompt": case.n_prompt,
        "n_gen": case.n_gen,
        "n_depth": case.depth,
        "test_time": about.test_time,
        "avg_ns": round(sum(ns) / len(ns)),
        "avg_ts": result.mean_rate,
        "stddev_ts": result.stddev_rate,
        "samples_ns": ns,
        "samples_ts": result.rates,
        "test": case.name,
        "engine": "pyggml_repkv" if contender.is_ours else "llama.cpp",
        "policy": contender.name,
        "median_ts": result.median_rate,
        "depths": result.depths,
        "depth_is": "repeated" if result.synthetic and case.depth else "read",
        "of_memory_bandwidth": _of_bandwidth(about, result),
        "resident_kv_bytes": memory.get("resident_bytes"),
        "ram_bytes": memory.get("ram_bytes"),
        "disk_bytes": memory.get("disk_bytes"),
        "prefetch_hit": result.prefetch_hit,
        "peak_rss_bytes": memory.get("peak_rss_bytes"),
        "peak_gflops": about.peak.gflops,
        "peak_gbytes_per_second": about.peak.gbytes_per_second,
        "spread": result.spread,
        "busy_cores": result.busy,
        "vs": _versus(result, others) if contender.is_ours else {},
    }


def _of_bandwidth(about: About, result: Result) -> float | None:
    """Returns the bytes that one token must read over those that memory delivers in its time; None if unknown."""
    n_bytes = about.step_bytes.get((result.contender.name, result.case.depth))
    if not result.case.n_gen or n_bytes is None:
        return None
    return n_bytes * result.median_rate / 1e9 / about.peak.gbytes_per_second


def _versus(result: Result, others: Sequence[Result]) -> dict[str, dict[str, float]]:
    found = {}
    for other in others:
        if other.case == result.case and not other.contender.is_ours:
            ratios = result.speedups(other)
            found[other.contender.name] = {"median": median(ratios), "min": min(ratios), "max": max(ratios)}
    return found


@dataclass(frozen=True, slots=True)
class _Column:
    """A column. width: the least width, because a row is printed before the next is measured."""

    name: str
    width: int
    value: Callable[[Record], str]
    is_text: bool = False

    def cell(self, text: str) -> str:
        return text.ljust(self.width) if self.is_text else text.rjust(self.width)

    @property
    def rule(self) -> str:
        return "-" * self.width if self.is_text else "-" * (self.width - 1) + ":"


class Table:
    """llama-bench's Markdown, row by row, without columns that would be empty in every row."""

    def __init__(self, plan: Plan, *, evicts: bool, on_disk: bool) -> None:
        names = [c.name for c in plan.contenders]
        wide = max(map(len, (case.name for case in plan.cases)))
        self._columns = [
            _Column("model", 20, lambda r: r["model_type"], is_text=True),
            _Column("size", 10, lambda r: f"{r['model_size'] / 2**20:.2f} MiB"),
            _Column("params", 8, lambda r: f"{r['model_n_params'] / 1e6:.2f} M"),
            _Column("backend", 7, lambda r: r["backends"], is_text=True),
            _Column("threads", 7, lambda r: str(r["n_threads"])),
            _Column("policy", max(6, *map(len, names)), lambda r: r["policy"], is_text=True),
            _Column("test", max(4, wide), lambda r: r["test"]),
            _Column("t/s", 15, lambda r: f"{r['avg_ts']:.2f} ± {r['stddev_ts']:.2f}"),
            _Column("median", 8, lambda r: f"{r['median_ts']:.2f}"),
        ]
        if any(case.n_gen for case in plan.cases):
            self._columns.append(_Column("of memory", 9, lambda r: _percent(r["of_memory_bandwidth"])))
        self._columns.append(_Column("KV", 7, lambda r: _size(r["resident_kv_bytes"])))
        if evicts:
            self._columns.append(_Column("RAM store", 9, lambda r: _size(r["ram_bytes"])))
        if on_disk:
            self._columns += [
                _Column("on disk", 7, lambda r: _size(r["disk_bytes"])),
                _Column("prefetch hit", 12, lambda r: _percent(r["prefetch_hit"], 1)),
            ]
        self._columns.append(_Column("peak RSS", 8, lambda r: _size(r["peak_rss_bytes"])))

    def header(self) -> str:
        """Returns the two lines of the header."""
        return _line(c.cell(c.name) for c in self._columns) + _line(c.rule for c in self._columns)

    def row(self, record: Record) -> str:
        return _line(c.cell(c.value(record)) for c in self._columns)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _percent(share: float | None, n_digits: int = 0) -> str:
    return "" if share is None else f"{100 * share:.{n_digits}f} %"


def _size(n_bytes: int | None) -> str:
    return size(n_bytes) if n_bytes else ""


def ratio_table(results: Sequence[Result]) -> str:
    """Returns Markdown that compares each policy with the faster llama.cpp; "" without llama.cpp."""
    rows = []
    for result in results:
        best = best_of(results, result.case)
        if not result.contender.is_ours or best is None:
            continue
        ratios = result.speedups(best)
        rows.append(
            f"| {result.case.name:>16} | {result.contender.name:17} | {best.contender.name:17} "
            f"| {median(ratios):6.2f} | {min(ratios):6.2f} | {max(ratios):6.2f} |\n"
        )
    if not rows:
        return ""
    head = f"| {'test':>16} | {'policy':17} | {'times as fast as':17} | {'median':>6} | {'min':>6} | {'max':>6} |\n"
    return f"\n{head}| {'-' * 15}: | {'-' * 17} | {'-' * 17} | {'-' * 5}: | {'-' * 5}: | {'-' * 5}: |\n{''.join(rows)}"


def csv_lines(records: Sequence[Record], *, with_header: bool) -> str:
    """Returns CSV; lists and objects are JSON in it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    if with_header:
        writer.writeheader()
    writer.writerows({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in r.items()} for r in records)
    return text.getvalue()


def json_lines(records: Iterable[Record]) -> str:
    return "".join(json.dumps(r, allow_nan=False) + "\n" for r in records)


def all_cases(prompts: Sequence[int], gens: Sequence[int], depths: Sequence[int]) -> list[Case]:
    """Returns all combinations, in llama-bench's order."""
    return [
        case for depth in depths for case in (
            *(Case(n, 0, depth) for n in prompts), *(Case(0, n, depth) for n in gens),
        )
    ]  # fmt: skip
