"""`eval`: does the memory find what it should?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyggml_repkv.cli import output, progress, report
from pyggml_repkv.cli.options import MAX_SEED, add_context_options, add_memory_options, add_model_options
from pyggml_repkv.cli.parser import HelpFormatter, integer
from pyggml_repkv.cli.prompt import read_text_file
from pyggml_repkv.cli.run import load_model, memory_config
from pyggml_repkv.errors import InputError

if TYPE_CHECKING:
    from pyggml_repkv.engine.model import Model
    from pyggml_repkv.eval.passkey import PasskeyResult

MAX_LENGTH = 2**20

# Steps that recall looks at: the last chunks of the text, and tokens after them.
N_CHUNKS, N_DECODE = 2, 48

TASKS = {
    "passkey": "a five-digit key hidden in a long text",
    "recall": "how much of the attention to older tokens the selected blocks hold, on a text of yours",
}
EXAMPLES = """
examples:
  %(prog)s passkey --lengths 4096,16384 --depths 10 --kv repkv
  %(prog)s passkey --lengths 6000 --depths 5 --text book.txt --json
  %(prog)s recall --lengths 6200 --text book.txt --kv repkv --positions far --block fixed:64
"""


def build_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds `eval` and its options."""
    parser = subparsers.add_parser(
        "eval",
        usage="%(prog)s TASK [options]",
        description="Measures what a KV memory retrieves.\n\ntasks:\n"
        + "\n".join(f"  {name:10s}{what}" for name, what in TASKS.items()),
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("task", choices=tuple(TASKS), metavar="TASK", help=", ".join(TASKS))
    group = parser.add_argument_group("task")
    group.add_argument(
        "--lengths",
        metavar="N,...",
        type=_integers(256, MAX_LENGTH),
        default=[4096],
        help="prompt lengths in tokens (default: 4096)",
    )
    group.add_argument(
        "--depths",
        metavar="N",
        type=integer(1, 1000),
        default=5,
        help="passkey: evenly spaced depths (default: %(default)s)",
    )
    group.add_argument(
        "--seed", metavar="N", type=integer(0, MAX_SEED), default=1, help="passkey: of the keys (default: %(default)s)"
    )
    group.add_argument(
        "--text", metavar="FILE", help="passkey: the haystack (default: the usual filler); recall: the text"
    )
    group.add_argument(
        "--blocks",
        metavar="N,...",
        type=_integers(1, 4096),
        default=[4, 8, 16],
        help="recall: how many of the ranking's first blocks are judged (default: 4,8,16)",
    )
    group.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    add_model_options(parser)
    add_context_options(parser)
    add_memory_options(parser)


def main(args: argparse.Namespace) -> int:
    """Prints results as they come, then a summary."""
    text = read_text_file(args.text, "--text") if args.text else None
    if args.task == "recall" and text is None:
        raise InputError("recall needs a text: --text FILE")
    if args.task == "recall" and args.kv != "repkv":
        raise InputError(f"recall looks at the blocks of --kv repkv; --kv is {args.kv}")
    args.quiet = args.json
    with load_model(args) as model, progress.notices(quiet=True):
        done = _passkey(args, model, text) if args.task == "passkey" else _recall(args, model, text or "")
    if args.json:
        output.write(json.dumps({**done, "peak_rss_bytes": report.peak_rss_bytes()}) + "\n")
    return 0


def _passkey(args: argparse.Namespace, model: Model, text: str | None) -> dict[str, object]:
    from pyggml_repkv.eval.passkey import run_passkey, summary

    n_ctx = args.ctx_size or (max(args.lengths) + 64)
    results = []
    for result in run_passkey(model, memory_config(args, n_ctx), args.lengths, args.depths, args.seed, text):
        results.append(result)
        if not args.json:
            output.write(_line(result))
    if not args.json:
        for length in args.lengths:
            hits = [r.found for r in results if r.n_tokens == length]
            output.write(f"{length} tokens: {sum(hits)} of {len(hits)} found\n")
    return summary(results)


def _recall(args: argparse.Namespace, model: Model, text: str) -> dict[str, object]:
    from pyggml_repkv.eval.recall import run_recall, summary

    tokens = model.tokenizer.encode(text)
    done: dict[str, object] = {"task": "recall", "text": args.text, "lengths": {}}
    for length in args.lengths:
        if length > len(tokens):
            raise InputError(f"--lengths {length}: {args.text} has only {len(tokens)} tokens")
        memory = memory_config(args, args.ctx_size or length)
        shares = summary(list(run_recall(model, memory, tokens[:length], args.blocks, N_CHUNKS, N_DECODE)))
        done["lengths"] = {**dict(done["lengths"]), str(length): shares}  # type: ignore[call-overload]
        if args.json:
            continue
        output.write(f"{length} tokens   blocks  of the best  of all  (of the best, mean of layers)\n")
        for step, by_k in shares.items():
            for k, share in by_k.items():
                output.write(
                    f"{step:>12s}  {k:>6s}  {share['of_best']:11.3f}  {share['of_all']:6.3f}  "
                    f"{share['of_best_by_layer']:11.3f}\n"
                )
    return done


def _line(result: PasskeyResult) -> str:
    found = "found" if result.found else "LOST "
    rate = 1e3 * result.n_tokens / result.prompt_ms
    return (
        f"{result.kv}  {result.n_tokens:7d} tokens  depth {result.depth:.2f}  {found}  "
        f"{rate:7.1f} tokens/s  {result.decode_ms:6.2f} ms/token\n"
    )


def _integers(low: int, high: int) -> Callable[[str], list[int]]:
    parse = integer(low, high)

    def parse_all(text: str) -> list[int]:
        return [parse(part) for part in text.split(",")]

    return parse_all
