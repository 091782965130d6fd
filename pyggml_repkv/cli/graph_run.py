"""The tasks of `graph` that compute: `trace` shows where time goes, `tensors` what nodes hold."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from pyggml_repkv.cli import output
from pyggml_repkv.cli.memory_flags import kind_of, memory_config
from pyggml_repkv.cli.model_file import load_model
from pyggml_repkv.cli.parser import filled_text, integer, number, text
from pyggml_repkv.cli.prompt import read_prompt
from pyggml_repkv.errors import InputError, RepkvError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyggml_repkv.engine.model import Model
    from pyggml_repkv.lab.inspect.recorder import Recorded, Traced

# The prompt where none is given. Values depend on it, times do not.
TEXT = "The sea was calm that morning, and the captain had gone below to write his letters. "
N_FIRST = 8


def add_trace_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("trace")
    _add_prompt(group)
    group.add_argument("-n", metavar="N", type=integer(1, 1000), default=16, help="steps traced (default: %(default)s)")
    group.add_argument(
        "--top", metavar="N", type=integer(1, 1000), default=20, help="rows shown (default: %(default)s)"
    )
    group.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=filled_text,
        help="write the steps in Chrome's trace format, for Perfetto",
    )
    group.add_argument(
        "--html", metavar="FILE", type=filled_text, help="write the page of `graph html`, with the time of each node"
    )
    group.add_argument("--no-peak", action="store_true", help="do not measure the machine's peak")
    group.add_argument("--json", action="store_true", help="print one JSON object")


def add_tensor_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tensors")
    _add_prompt(group)
    group.add_argument(
        "--name", metavar="GLOB", default="*", help="only nodes whose name matches, as 'Qcur-3' (default: all)"
    )
    group.add_argument("--save", metavar="FILE", type=filled_text, help="write all values to FILE.npz")
    group.add_argument("--npy", metavar="DIR", type=filled_text, help="write each node's values to a .npy file in DIR")
    group.add_argument(
        "--compare", metavar="FILE", type=filled_text, help="name the first node that differs from what --save wrote"
    )
    group.add_argument(
        "--tolerance", metavar="X", type=number(0, 1e30), default=0.0,
        help="differences to ignore, relative to a node's largest value (default: 0, equal to the bit)",
    )  # fmt: skip
    group.add_argument("--json", action="store_true", help="print one JSON object")


def _add_prompt(group: Any) -> None:
    group.add_argument(
        "-p", "--prompt", metavar="TEXT", type=text, help="the prompt; - reads stdin (default: a sentence)"
    )
    group.add_argument(
        "-f", "--file", metavar="FILE", type=filled_text, help="a prompt file (UTF-8); with -p, the file comes first"
    )


def trace(args: argparse.Namespace) -> int:
    """Runs `graph trace`: reads --depth tokens, then traces steps; returns the exit code."""
    from pyggml_repkv.lab.inspect.peak import measure_peak
    from pyggml_repkv.lab.inspect.recorder import n_traced_tokens, trace_steps
    from pyggml_repkv.lab.inspect.trace import chrome_trace

    args.quiet = True
    size = 1 if args.phase == "decode" else args.batch_size
    n_needed = args.depth + n_traced_tokens(size, args.n)
    with load_model(args) as model:
        tokens = _tokens(args, model, n_needed)
        memory = memory_config(args, args.ctx_size or (0 if kind_of(args.kv).bounded else n_needed))
        with model.session(memory) as session:
            if args.depth:
                session.read(tokens[: args.depth])
            done = trace_steps(session, memory, tokens[args.depth :], size, args.n)
        peak = None if args.no_peak else measure_peak(model.backend)
    if args.output:
        output.write_file(args.output, json.dumps(chrome_trace(done.steps)))
    if args.html:
        _write_page(args, done)
    result = _trace_result(args, done, peak)
    if args.json:
        output.write(json.dumps(result) + "\n")
    else:
        _print_trace(args, done, result)
    return 0


def _write_page(args: argparse.Namespace, done: Traced) -> None:
    from pyggml_repkv.lab.inspect.page import as_page
    from pyggml_repkv.lab.inspect.trace import node_times

    snapshot = done.steps[-1].snapshot
    about = {"model": Path(args.model or args.hf_repo or "demo").name, "phase": args.phase, **snapshot.about}
    # What this graph needs: the buffer was made for the largest graph.
    needed = max(t.offset + t.bytes for t in snapshot.nodes if t.buffer == "compute")
    shown = replace(snapshot, about=about, compute_bytes=needed, by_id={})
    output.write_file(args.html, as_page(shown, node_times(done.steps)))


def _tokens(args: argparse.Namespace, model: Model, n_needed: int) -> list[int]:
    """Returns n_needed tokens: the prompt, repeated as often as necessary."""
    prompt = read_prompt(args) if args.prompt is not None or args.file is not None else TEXT
    tokens = model.tokenizer.encode(prompt)
    if not tokens:
        raise InputError("the prompt is empty")
    return (tokens * (n_needed // len(tokens) + 1))[:n_needed]


def _trace_result(args: argparse.Namespace, done: Traced, peak: Any) -> dict[str, Any]:
    from pyggml_repkv.lab.inspect.trace import layer_rows, roofline, rows

    plain, traced = median(done.plain_us), median(done.traced_us)
    nodes = median(step.node_us for step in done.steps)
    table = rows(done.steps, peak)
    return {
        "phase": args.phase,
        "policy": args.kv,
        "n_tokens": done.steps[0].snapshot.about["n_tokens"],
        "n_past": done.steps[0].snapshot.about["n_past"],
        "steps": len(done.steps),
        "step_us": plain,
        "traced_us": traced,
        "overhead": traced / plain - 1,
        "nodes_us": nodes,
        "wait_us": median(step.wait_us for step in done.steps),
        "roofline": roofline(done.steps, peak) if peak else None,
        "top": [
            {"name": r.name, "op": r.op, "nodes": r.n, "us": r.us, "share": r.share, "gflops": r.gflops,
             "gbytes_per_second": r.gbytes, "of_peak": r.of_peak if peak else None}
            for r in table[: args.top]
        ],
        "layers_us": {str(layer): us for layer, us in layer_rows(done.steps).items()},
    }  # fmt: skip


def _print_trace(args: argparse.Namespace, done: Traced, result: dict[str, Any]) -> None:
    from pyggml_repkv.lab.inspect.table import as_table
    from pyggml_repkv.lab.inspect.trace import HEADER, Row

    rows = [
        Row(r["name"], r["op"], r["nodes"], r["us"], r["share"], r["gflops"], r["gbytes_per_second"], r["of_peak"] or 0)
        for r in result["top"]
    ]
    output.write(as_table(HEADER, [row.cells() for row in rows], frozenset(("name", "op"))))
    what = "token" if result["n_tokens"] == 1 else f"chunk of {result['n_tokens']} tokens"
    output.write(
        f"\na {what} after {result['n_past']} tokens: {result['step_us'] / 1e3:.2f} ms (median of {result['steps']}); "
        f"nodes {result['nodes_us'] / 1e3:.2f} ms, waiting for blocks {result['wait_us'] / 1e3:.2f} ms; "
        f"recording costs {100 * result['overhead']:+.1f} %\n"
    )
    if result["roofline"]:
        r = result["roofline"]
        output.write(
            f"{r['gflops']:.1f} of {r['peak_gflops']:.0f} GFLOP/s, {r['gbytes_per_second']:.1f} of "
            f"{r['peak_gbytes_per_second']:.0f} GB/s: {100 * r['of_peak']:.0f} % of what this machine can do\n"
        )
    if args.html:
        output.log(f"wrote {args.html}: the last step's nodes, with the median time of {result['steps']} steps\n")
    if args.output:
        output.log(f"wrote {args.output}: open it in https://ui.perfetto.dev or chrome://tracing\n")


def tensors(args: argparse.Namespace) -> int:
    """Runs `graph tensors`: shows the values of a prompt's last step; returns 1 if they differ from --compare's."""
    from pyggml_repkv.lab.inspect.recorder import record_tensors

    args.quiet = True
    before = _load(args.compare) if args.compare else None
    with load_model(args) as model:
        given = args.prompt is not None or args.file is not None
        tokens = model.tokenizer.encode(read_prompt(args) if given else TEXT)
        if len(tokens) < 2:
            raise InputError("the prompt must have at least two tokens")
        memory = memory_config(args, args.ctx_size)
        found = record_tensors(model, memory, tokens, args.name, decode=args.phase == "decode")
    recorded = found.recorded
    if args.save:
        _save(args.save, recorded)
    if args.npy:
        _save_each(args.npy, recorded)
    if before is not None:
        return _compare(args, recorded, before)
    rows = [_statistics(r) for r in recorded]
    if args.json:
        output.write(json.dumps({"tensors": rows, "skipped": found.skipped}) + "\n")
        return 0
    from pyggml_repkv.lab.inspect.table import as_table

    header = ("name", "type", "shape", "min", "max", "mean", "std", "NaN", "first values")
    cells = [
        (r["name"], r["type"], "x".join(map(str, r["shape"])), *(_number(r[k]) for k in ("min", "max", "mean", "std")),
         str(r["n_nan"]), " ".join(_number(v) for v in r["first"]))
        for r in rows
    ]  # fmt: skip
    output.write(as_table(header, cells, frozenset(("name", "type", "shape", "first values"))))
    if found.skipped:
        output.log(f"skipped, for their type: {', '.join(found.skipped)}\n")
    return 0


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _statistics(r: Recorded) -> dict[str, Any]:
    flat = r.values.astype(np.float64).ravel()
    finite = flat[np.isfinite(flat)]
    some = len(finite) > 0
    return {
        "name": r.key,
        "op": r.op,
        "type": r.type,
        "shape": list(r.values.shape),
        "min": float(finite.min()) if some else None,
        "max": float(finite.max()) if some else None,
        "mean": float(finite.mean()) if some else None,
        "std": float(finite.std()) if some else None,
        "n_nan": int(np.isnan(flat).sum()),
        "n_inf": int(np.isinf(flat).sum()),
        "first": [float(v) if np.isfinite(v) else None for v in flat[:N_FIRST]],
    }


def _compare(args: argparse.Namespace, recorded: Sequence[Recorded], before: dict[str, np.ndarray]) -> int:
    same, first = 0, None
    missing = [r.key for r in recorded if r.key not in before]
    for r in recorded:
        if r.key not in before:
            continue
        other = before[r.key]
        if other.shape != r.values.shape:
            difference = f"shape {'x'.join(map(str, other.shape))} -> {'x'.join(map(str, r.values.shape))}"
        else:
            difference = _difference(other, r.values, args.tolerance)
        if not difference:
            same += 1
        elif first is None:
            first = {"name": r.key, "what": difference}
    if args.json:
        output.write(json.dumps({"same": same, "first_difference": first, "missing": missing}) + "\n")
    elif first is not None:
        output.write(f"{first['name']} is the first that differs: {first['what']}; {_nodes(same)} the same\n")
    else:
        output.write(f"{_nodes(same)} the same" + (f", {len(missing)} new\n" if missing else "\n"))
    return 1 if first is not None or same == 0 else 0


def _nodes(n: int) -> str:
    return "1 node is" if n == 1 else f"{n} nodes are"


def _difference(a: np.ndarray, b: np.ndarray, tolerance: float) -> str:
    x, y = a.astype(np.float64), b.astype(np.float64)
    if np.array_equal(x, y, equal_nan=True):
        return ""
    off = ~((x == y) | (np.isnan(x) & np.isnan(y)))
    largest = float(np.nanmax(np.abs(x[np.isfinite(x)]), initial=0.0))
    with np.errstate(invalid="ignore"):
        distance = np.abs(x - y)
    worst = float(np.nanmax(distance[off], initial=0.0))
    if np.isfinite(distance[off]).all() and worst <= tolerance * largest:
        return ""
    at = tuple(int(i) for i in np.argwhere(off)[0])
    return (
        f"{int(off.sum())} of {x.size} values, by at most {worst:.3g} of {largest:.3g}; first at {list(at)}: "
        f"{x[at]:.6g} -> {y[at]:.6g}"
    )


def _load(name: str) -> dict[str, np.ndarray]:
    try:
        with np.load(name, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except OSError as error:
        raise InputError(f"--compare {name}: {error.strerror or error}; give a file that --save wrote") from None
    except (ValueError, KeyError, EOFError):
        raise InputError(f"--compare {name}: not an .npz; give a file that --save wrote") from None
    except Exception as error:  # zipfile.BadZipFile and whatever else a damaged archive raises
        raise InputError(f"--compare {name}: damaged ({error}); give a file that --save wrote") from None


def _save(name: str, recorded: Sequence[Recorded]) -> None:
    try:
        with Path(name).open("wb") as file:
            np.savez(file, **{r.key: r.values for r in recorded})  # type: ignore[arg-type]
    except OSError as error:
        raise RepkvError(f"--save {name}: {error.strerror or error}") from None


def _save_each(name: str, recorded: Sequence[Recorded]) -> None:
    try:
        folder = Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        for i, r in enumerate(recorded):
            safe = "".join(c if c.isalnum() or c in "-_#." else "_" for c in r.key)
            np.save(folder / f"{i:04d}-{safe}.npy", r.values)
    except OSError as error:
        raise RepkvError(f"--npy {name}: {error.strerror or error}") from None
