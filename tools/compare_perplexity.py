"""Compare a text's perplexity with llama.cpp's, over the chunks of llama-perplexity.

--exact-graph must give llama.cpp's number, except on CPUs where the two ggml builds sum differently. The default graph
rounds less.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from _common import add_common_options, model_path, run_tool, say, write_json, write_table

from pyggml_repkv.cli.parser import HelpFormatter, Parser, integer
from pyggml_repkv.cli.prompt import read_text_file
from pyggml_repkv.engine.model import Model
from pyggml_repkv.lab.bench.engines import start_llama
from pyggml_repkv.lab.eval.likelihood import MIN_CHUNK, chunk_perplexity, chunks_of
from pyggml_repkv.memory.config import MemoryConfig

# A relative difference; llama-perplexity prints four decimals.
TOLERANCE = 1e-5
HEADER = ("engine", "tokens", "perplexity")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="compare_perplexity.py",
        usage="%(prog)s --text FILE [-m FILE] [options]",
        description=__doc__,
        epilog="exit codes: 0 the same, 1 --exact-graph differs or a failure, 2 bad usage, 130 interrupted",
        formatter_class=HelpFormatter,
    )
    add_common_options(parser)
    parser.add_argument("--text", metavar="FILE", required=True, help="the text to predict")
    parser.add_argument(
        "-c", "--chunk", metavar="N", type=integer(MIN_CHUNK, 2048), default=512,
        help="tokens of a chunk, of which the second half is judged (default: %(default)s)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    args.model = model_path(args)
    return args


def ours(args: argparse.Namespace, text: str, *, exact: bool) -> tuple[int, float]:
    """Returns the number of judged tokens and their perplexity, by this project."""
    memory = MemoryConfig(n_ctx=args.chunk, n_batch=min(512, args.chunk))  # as llama.cpp's n_ubatch
    with Model.load(args.model, threads=args.threads, exact_graph=exact) as model:
        *_, last = chunk_perplexity(model, memory, model.tokenizer.encode(text), args.chunk)
    return last


def llama(args: argparse.Namespace, text: str) -> tuple[int, float]:
    """Returns the number of judged tokens and their perplexity, by llama.cpp."""
    with Model.load(args.model, threads=args.threads) as model:
        chunks = list(chunks_of(model.tokenizer, model.tokenizer.encode(text), args.chunk))
    first = args.chunk // 2
    with ExitStack() as stack:
        engine = start_llama(stack, "llama.cpp", args.llama_python, model=str(args.model), n_threads=args.threads)
        engine.ask("open", n_ctx=args.chunk, flash_attn=True)
        total = sum(engine.ask("nll", tokens=chunk, first=first)["nll"] for chunk in chunks)
    n_judged = len(chunks) * (args.chunk - 1 - first)
    return n_judged, math.exp(total / n_judged)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    text = read_text_file(args.text, "--text")
    found = {
        "ours --exact-graph": ours(args, text, exact=True),
        "ours": ours(args, text, exact=False),
        "llama.cpp": llama(args, text),
    }
    if args.json:
        write_json({name: {"tokens": n, "perplexity": value} for name, (n, value) in found.items()})
    else:
        write_table(HEADER, [(name, str(n), f"{value:.4f}") for name, (n, value) in found.items()])
    if not math.isclose(found["ours --exact-graph"][1], found["llama.cpp"][1], rel_tol=TOLERANCE):
        say("error: --exact-graph has another perplexity than llama.cpp")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
