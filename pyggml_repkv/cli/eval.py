"""`eval`: does the memory find what it should?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyggml_repkv.cli import output, report
from pyggml_repkv.cli.options import MAX_SEED, add_context_options, add_memory_options, add_model_options
from pyggml_repkv.cli.parser import HelpFormatter, integer
from pyggml_repkv.cli.prompt import read_text_file
from pyggml_repkv.cli.run import load_model, memory_config

if TYPE_CHECKING:
    from pyggml_repkv.eval.passkey import PasskeyResult

MAX_LENGTH = 2**20

EXAMPLES = """
examples:
  %(prog)s passkey --lengths 4096,16384 --depths 10 --kv repkv
  %(prog)s passkey --lengths 6000 --depths 5 --text book.txt --json
"""


def build_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds `eval` and its options."""
    parser = subparsers.add_parser(
        "eval",
        usage="%(prog)s TASK [options]",
        description="Measures what a KV memory retrieves. Tasks: passkey, a five-digit key hidden in a long text.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("task", choices=("passkey",), metavar="TASK", help="passkey")
    group = parser.add_argument_group("task")
    group.add_argument(
        "--lengths",
        metavar="N,...",
        type=_lengths(256, MAX_LENGTH),
        default=[4096],
        help="prompt lengths in tokens (default: 4096)",
    )
    group.add_argument(
        "--depths", metavar="N", type=integer(1, 1000), default=5, help="evenly spaced depths (default: %(default)s)"
    )
    group.add_argument(
        "--seed", metavar="N", type=integer(0, MAX_SEED), default=1, help="of the keys (default: %(default)s)"
    )
    group.add_argument("--text", metavar="FILE", help="the haystack (default: the task's usual filler)")
    group.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    add_model_options(parser)
    add_context_options(parser)
    add_memory_options(parser)


def main(args: argparse.Namespace) -> int:
    """Prints a line per question as it is answered, then how many were found."""
    text = read_text_file(args.text, "--text") if args.text else None
    args.quiet = args.json
    with load_model(args) as model:
        from pyggml_repkv.eval.passkey import run_passkey, summary

        n_ctx = args.ctx_size or (max(args.lengths) + 64)
        results = []
        for result in run_passkey(model, memory_config(args, n_ctx), args.lengths, args.depths, args.seed, text):
            results.append(result)
            if not args.json:
                output.write(_line(result))
        done = summary(results)
    if args.json:
        output.write(json.dumps({**done, "peak_rss_bytes": report.peak_rss_bytes()}) + "\n")
    else:
        for length in args.lengths:
            hits = [r.found for r in results if r.n_tokens == length]
            output.write(f"{length} tokens: {sum(hits)} of {len(hits)} found\n")
    return 0


def _line(result: PasskeyResult) -> str:
    found = "found" if result.found else "LOST "
    rate = 1e3 * result.n_tokens / result.prompt_ms
    return (
        f"{result.kv}  {result.n_tokens:7d} tokens  depth {result.depth:.2f}  {found}  "
        f"{rate:7.1f} tokens/s  {result.decode_ms:6.2f} ms/token\n"
    )


def _lengths(low: int, high: int) -> Callable[[str], list[int]]:
    parse = integer(low, high)

    def parse_all(text: str) -> list[int]:
        return [parse(part) for part in text.split(",")]

    return parse_all
