"""Measure the cost of evicted blocks on disk, against all blocks in RAM: decode deep in a text.

The first run reads the text with all blocks in RAM and saves the session to a directory, which later runs resume. Then
each --prefetch decodes the same tokens from the same place, in turn with the session in RAM, --rounds times; their
logits must be equal bit for bit. Reads bypass the page cache if the file system allows it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from _common import memory_of, model_path, run_tool, say, write_table

from pyggml_repkv.cli import output
from pyggml_repkv.cli.parser import HelpFormatter, Parser, byte_size, integer
from pyggml_repkv.cli.prompt import read_text_file
from pyggml_repkv.engine.model import Model
from pyggml_repkv.engine.session import Session
from pyggml_repkv.engine.threads import default_threads
from pyggml_repkv.errors import InputError
from pyggml_repkv.memory.config import PREFETCH, MemoryConfig
from pyggml_repkv.memory.repkv.memory import RepKVMemory

# Tokens that fill the slots before anything is timed.
N_WARM = 16
HEADER = (
    "blocks",
    "prefetch",
    "ms/token",
    "of all in RAM",
    "in RAM when needed",
    "reads hidden",
    "MB read/token",
    "logits",
)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="bench_disk.py", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("-m", "--model", metavar="MODEL", default="demo", help="GGUF file or name (default: demo)")
    parser.add_argument("-t", "--threads", metavar="N", type=integer(1, 512), default=default_threads())
    parser.add_argument("--text", metavar="FILE", required=True, help="a text of more than --tokens tokens")
    parser.add_argument("--session", metavar="DIR", required=True, help="the saved session; made if it is missing")
    parser.add_argument(
        "--ours", metavar="FLAGS", default="--kv repkv", help="`run`'s flags for the memory, in RAM and on disk"
    )
    parser.add_argument("--tokens", metavar="N", type=integer(4096, 2**20), default=65536)
    parser.add_argument("--kv-ram", metavar="SIZE", type=byte_size, help="default: a tenth of the keys and values")
    parser.add_argument(
        "-n", metavar="N", type=integer(1, 4096), default=64, help="tokens to time (default: %(default)s)"
    )
    parser.add_argument("--rounds", metavar="N", type=integer(1, 99), default=3, help="(default: %(default)s)")
    parser.add_argument("--prefetch", metavar="NAME,...", default=",".join(PREFETCH), help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def memory_in_ram(flags: str) -> MemoryConfig:
    """Returns the memory of these flags of `run`, without a length. Raises InputError unless it is repkv in RAM."""
    memory = memory_of(flags)
    if memory.kv != "repkv" or memory.on_disk or memory.kv_disk_max or memory.type_evicted:
        raise InputError(f"--ours {flags!r} must say --kv repkv, and nothing about disks")
    return memory


def main(argv: Sequence[str]) -> int:
    args = build_parser().parse_args(argv)
    predictors = args.prefetch.split(",")
    if not set(predictors) <= set(PREFETCH):
        raise InputError(f"--prefetch {args.prefetch} must be some of {', '.join(PREFETCH)}")
    memory = memory_in_ram(args.ours)
    with Model.load(model_path(args), threads=args.threads, repack=False) as model:
        tokens = _tokens(args, model)
        memory = replace(memory, n_ctx=len(tokens) + 1024)
        with model.session(memory) as in_ram:
            say(f"reading {args.tokens} tokens with all blocks in RAM")
            speed = _read(in_ram, tokens[: args.tokens])
            stats = in_ram.stats()
            kv_ram = args.kv_ram or int(stats["ram_bytes"]) // 10  # type: ignore[call-overload]
            memory = replace(memory, kv_ram=kv_ram)
            _prepare(args, model, memory, in_ram, tokens)
            done = _measure(args, model, memory, in_ram, tokens, predictors)
    result = {
        "ours": args.ours,
        "tokens": args.tokens,
        "kv_bytes": stats["ram_bytes"],
        "kv_ram": kv_ram,
        "prefill_per_second": speed,
        **done,
    }
    if args.json:
        output.write(json.dumps(result) + "\n")
    else:
        _print(result)
    return 0


def _tokens(args: argparse.Namespace, model: Model) -> list[int]:
    n_needed = args.tokens + args.rounds * (N_WARM + args.n)
    # So many characters are more than enough; tokenizing a library would take minutes.
    tokens = model.tokenizer.encode(read_text_file(args.text, "--text")[: 16 * n_needed])
    if len(tokens) < n_needed:
        raise InputError(f"--text {args.text} has {len(tokens)} tokens and {n_needed} are needed")
    return tokens[:n_needed]


def _read(session: Session, tokens: list[int]) -> float:
    start = time.perf_counter()
    session.prefill(tokens)
    return len(tokens) / (time.perf_counter() - start)


def _prepare(
    args: argparse.Namespace, model: Model, memory: MemoryConfig, in_ram: Session, tokens: list[int]
) -> None:  # fmt: skip
    """Saves the session if the directory has none, and checks that it holds the tokens. Raises InputError."""
    if not (Path(args.session) / "session.db").exists():
        say(f"saving the session into {args.session}")
        in_ram.save(args.session)
    with model.session(memory, directory=args.session) as session:
        if session.go_back_to(tokens[: args.tokens], lambda _: False).n_past != args.tokens:
            raise InputError(
                f"--session {args.session} has not read these {args.tokens} tokens: give another directory"
            )


def _measure(
    args: argparse.Namespace, model: Model, memory: MemoryConfig, in_ram: Session, tokens: list[int],
    predictors: list[str],
) -> dict[str, Any]:  # fmt: skip
    n = N_WARM + args.n
    runs: dict[str, list[dict[str, Any]]] = {"in RAM": [], **{name: [] for name in predictors}}
    want: np.ndarray | None = None
    resume_s = []
    for r in range(args.rounds):
        first = args.tokens + r * n
        runs["in RAM"].append({})
        logits = _decode(in_ram, tokens[first : first + n], runs["in RAM"][-1])
        want = logits if want is None else want
        for name in predictors:
            start = time.perf_counter()
            with model.session(replace(memory, prefetch=name), directory=args.session) as session:
                session.stop_saving()
                assert session.go_back_to(tokens[: args.tokens], lambda _: False).n_past == args.tokens
                resume_s.append(time.perf_counter() - start)
                run: dict[str, Any] = {}
                got = _decode(session, tokens[args.tokens : args.tokens + n], run)
                run["equal"] = bool(np.array_equal(got, want))
                runs[name].append(run)
        say(f"round {r + 1} of {args.rounds}")
    return {"resume_s": resume_s, "runs": runs}


def _decode(session: Session, tokens: list[int], run: dict[str, Any]) -> np.ndarray:
    """Decodes and returns the logits [n, n_vocab]; adds milliseconds and the store's counters to `run`."""
    logits = [session.decode(token).copy() for token in tokens[:N_WARM]]
    before = _counters(session)
    milliseconds = []
    for token in tokens[N_WARM:]:
        start = time.perf_counter()
        logits.append(session.decode(token).copy())
        milliseconds.append(1e3 * (time.perf_counter() - start))
    after = _counters(session)
    run |= {"ms": milliseconds, **{name: after[name] - before[name] for name in after}}
    return np.array(logits)


def _counters(session: Session) -> dict[str, float]:
    assert isinstance(session.policy, RepKVMemory)
    if session.policy.disk is None:
        return {}
    stats = session.policy.disk.io.stats
    names = ("required", "hits", "issued", "used", "late", "missed", "reads", "read_bytes", "wait_ms", "read_ms")
    return {name: getattr(stats, name) for name in names}


def _print(result: dict[str, Any]) -> None:
    in_ram = result["runs"]["in RAM"]
    rows = [("in RAM", "", f"{_median(in_ram):.2f}", "1.00", "", "", "", "")]
    for name, runs in result["runs"].items():
        if name == "in RAM":
            continue
        total = {key: sum(run[key] for run in runs) for key in ("required", "hits", "read_bytes", "wait_ms", "read_ms")}
        ratio = median(_median([a]) / _median([b]) for a, b in zip(runs, in_ram, strict=True))
        megabytes = total["read_bytes"] / sum(len(run["ms"]) for run in runs) / 1e6
        there = 100 * total["hits"] / total["required"]
        hidden = 100 * (1 - total["wait_ms"] / max(total["read_ms"], 1e-9))
        equal = "equal" if all(run["equal"] for run in runs) else "DIFFERENT"
        shares = f"{ratio:.2f}", f"{there:.1f} %", f"{hidden:.1f} %", f"{megabytes:.2f}"
        rows.append(("on disk", name, f"{_median(runs):.2f}", *shares, equal))
    output.write(
        f"{result['ours']}: {result['tokens']} tokens, {result['kv_bytes'] / 1e6:.0f} MB of keys and values, --kv-ram "
    )
    output.write(f"{result['kv_ram'] / 1e6:.0f} MB; read at {result['prefill_per_second']:.0f} tokens/s; ")
    output.write(f"resumed in {median(result['resume_s']):.2f} s\n\n")
    write_table(HEADER, rows, n_left=2)


def _median(runs: list[dict[str, Any]]) -> float:
    return median(ms for run in runs for ms in run["ms"])


if __name__ == "__main__":
    sys.exit(run_tool(main))
