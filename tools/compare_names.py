"""List the nodes of llama.cpp's graph and of --exact-graph side by side.

A callback of ggml's scheduler sees llama.cpp's nodes in a run; those of --exact-graph are the nodes of `graph dump`.
The list omits nodes that compute nothing, such as views. Where llama.cpp gives a node no name, any name matches.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from difflib import SequenceMatcher
from itertools import zip_longest

from _common import add_common_options, model_path, run_tool, say, write_json, write_table

from pyggml_repkv.cli import output
from pyggml_repkv.cli.parser import HelpFormatter, Parser, integer
from pyggml_repkv.lab.bench.engines import start_llama
from pyggml_repkv.lab.inspect.builder import BuiltGraph, Wanted
from pyggml_repkv.memory.config import MemoryConfig

NO_WORK = {"none", "view", "reshape", "permute", "transpose"}
# Name and op.
Node = tuple[str, str]

# Ops for which ggml's description is more specific than its name of the op.
DESCRIBED = {"swiglu": "glu"}
UNNAMED = re.compile(r"node_\d+")
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


def our_nodes(args: argparse.Namespace) -> list[Node]:
    memory = MemoryConfig(n_ctx=256, n_batch=args.tokens, flash_attn=args.flash_attn == "on")
    phase = "decode" if args.tokens == 1 else "prefill"
    with BuiltGraph(args.model, Wanted(phase, memory, n_threads=args.threads, exact=True)) as graph:
        return [(t.name, t.op) for t in graph.snapshot().nodes if t.op not in NO_WORK]


def llama_nodes(args: argparse.Namespace) -> list[Node]:
    with ExitStack() as stack:
        engine = start_llama(stack, "llama.cpp", args.llama_python, model=str(args.model), n_threads=args.threads)
        reply = engine.ask("node_names", tokens=[1] * args.tokens, flash_attn=args.flash_attn == "on")
    nodes = [(name, DESCRIBED.get(op.lower(), op.lower())) for name, op in reply["nodes"]]
    return [(name, op) for name, op in nodes if op not in NO_WORK]


def same(theirs: Node, ours: Node) -> bool:
    """Returns whether two nodes are the same. A node that llama.cpp left unnamed matches by op and place alone."""
    return theirs[1] == ours[1] and (theirs[0] == ours[0] or bool(UNNAMED.fullmatch(theirs[0])))


def aligned(theirs: list[Node], ours: list[Node]) -> Iterator[tuple[str, ...]]:
    """Yields the rows under HEADER; a node that only one graph has stands alone."""
    ops = [op for _, op in theirs], [op for _, op in ours]
    for _, a0, a1, b0, b1 in SequenceMatcher(None, *ops, autojunk=False).get_opcodes():
        for a, b in zip_longest(theirs[a0:a1], ours[b0:b1], fillvalue=("", "")):
            yield (*a, *b, "" if same(a, b) else "differs")


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    ours, theirs = our_nodes(args), llama_nodes(args)
    rows = list(aligned(theirs, ours))
    n_off = sum(bool(row[-1]) for row in rows)
    if args.json:
        write_json({"llama.cpp": theirs, "ours": ours, "differ": n_off})
    else:
        suffix = "" if args.layer is None else f"-{args.layer}"
        shown = [r for r in rows if args.layer is None or r[0].endswith(suffix) or r[2].endswith(suffix)]
        write_table(HEADER, shown)
        output.write(f"{len(theirs)} nodes of llama.cpp, {len(ours)} of --exact-graph; {n_off} differ\n")
    if n_off:
        say(f"error: {n_off} nodes differ from llama.cpp's")
    return 1 if n_off else 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
