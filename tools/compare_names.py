"""List the nodes of llama.cpp's graph and of ours with --exact-graph side by side.

llama.cpp's are taken from a run, by a callback of ggml's scheduler; ours from `graph dump`. Nodes that compute nothing,
views and their like, are left out. Exit code 1 where a name or an op differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import zip_longest

from _engines import add_common_options, model_path, run_tool, say, start_llama, write_json, write_table

from pyggml_repkv.cli import output
from pyggml_repkv.cli.parser import HelpFormatter, Parser, integer
from pyggml_repkv.inspect.builder import BuiltGraph, Wanted
from pyggml_repkv.memory.config import MemoryConfig

NO_WORK = {"none", "view", "reshape", "permute", "transpose"}
HEADER = ("llama.cpp", "op", "--exact-graph", "op", "")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="compare_names.py",
        usage="%(prog)s [-m FILE] [options]",
        description=__doc__,
        epilog="exit codes: 0 the same, 1 something differs or a failure, 2 bad usage, 130 interrupted",
        formatter_class=HelpFormatter,
    )
    add_common_options(parser)
    parser.add_argument(
        "--tokens", metavar="N", type=integer(1, 256), default=1, help="tokens of the step (default: %(default)s)"
    )
    parser.add_argument("-fa", "--flash-attn", choices=("on", "off"), default="on", help="(default: %(default)s)")
    parser.add_argument("--layer", metavar="N", type=integer(0, 9999), help="print only this layer's nodes")
    args = parser.parse_args(argv)
    args.model = model_path(args)
    return args


def our_nodes(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Name and op of each node that computes."""
    memory = MemoryConfig(n_ctx=256, n_batch=args.tokens, flash_attn=args.flash_attn == "on")
    phase = "decode" if args.tokens == 1 else "prefill"
    with BuiltGraph(args.model, Wanted(phase, memory, n_threads=args.threads, exact=True)) as graph:
        return [(t.name, t.op) for t in graph.snapshot().nodes if t.op not in NO_WORK]


def llama_nodes(args: argparse.Namespace) -> list[tuple[str, str]]:
    with ExitStack() as stack:
        engine = start_llama(stack, "llama.cpp", args)
        reply = engine.ask("node_names", tokens=[1] * args.tokens, flash_attn=args.flash_attn == "on")
    return [(name, op.lower()) for name, op in reply["nodes"] if op.lower() not in NO_WORK]


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    ours, theirs = our_nodes(args), llama_nodes(args)
    rows = [
        (*a, *b, "" if a == b else "differs") for a, b in zip_longest(theirs, ours, fillvalue=("", ""))
    ]  # fmt: skip
    n_off = sum(bool(row[-1]) for row in rows)
    if args.json:
        write_json({"llama.cpp": theirs, "ours": ours, "differ": n_off})
    else:
        suffix = "" if args.layer is None else f"-{args.layer}"
        shown = [r for r in rows if args.layer is None or r[0].endswith(suffix) or r[2].endswith(suffix)]
        write_table(HEADER, shown)
        output.write(f"{len(theirs)} nodes of llama.cpp, {len(ours)} of ours; {n_off} differ\n")
    if n_off:
        say(f"error: {n_off} nodes are not llama.cpp's")
    return 1 if n_off else 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
