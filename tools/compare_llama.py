"""Compare this project's logits with llama.cpp's on the same machine, model and threads.

It compares the logits after a prompt and after each token decoded from there, for each attention kernel and prompt
length. llama.cpp chooses the tokens. With --exact-graph the logits must equal llama.cpp's; for the default graph the
table says how near they are. Prompts are random token ids, or those of a text (-f).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from _common import (
    MAX_TOKENS,
    add_common_options,
    integers,
    model_path,
    run_tool,
    say,
    write_json,
    write_table,
)

from pyggml_repkv.cli import output
from pyggml_repkv.cli.model_file import rope_options
from pyggml_repkv.cli.options import add_rope_options
from pyggml_repkv.cli.parser import HelpFormatter, Parser, integer
from pyggml_repkv.errors import InputError, RepkvError
from pyggml_repkv.lab.bench.engines import (
    EngineProcess,
    check_same_vocabulary,
    context_size,
    random_tokens,
    start_llama,
    start_repkv,
)
from pyggml_repkv.model.gguf_file import GGUFFile
from pyggml_repkv.model.tokenizer import Tokenizer

HEADER = (
    "prompt",
    "flash attention",
    "exact: prompt diff",
    "decode diff",
    "equal",
    "default: max diff",
    "min cosine",
    "same top-1",
)


@dataclass(frozen=True, slots=True)
class Row:
    """A comparison with llama.cpp for one prompt. Differences are the largest absolute ones of any logit.

    exact_*: with --exact-graph, after the prompt and over the decoded tokens; exact_equal: how many of the n_outputs
    vectors are equal. default_*: without it, also the smallest cosine, and how many vectors have the same top token.
    """

    n_prompt: int
    flash_attn: bool
    n_outputs: int
    exact_prompt_diff: float
    exact_decode_diff: float
    exact_equal: int
    default_diff: float
    default_min_cosine: float
    default_same_top1: int

    @property
    def is_exact(self) -> bool:
        return self.exact_prompt_diff == self.exact_decode_diff == 0.0

    def cells(self) -> tuple[str, ...]:
        return (
            f"{self.n_prompt} tokens",
            "on" if self.flash_attn else "off",
            f"{self.exact_prompt_diff:.3g}",
            f"{self.exact_decode_diff:.3g}",
            f"{self.exact_equal}/{self.n_outputs}",
            f"{self.default_diff:.3g}",
            f"{self.default_min_cosine:.7f}",
            f"{self.default_same_top1}/{self.n_outputs}",
        )


class Engines:
    """llama.cpp and this project's two graphs, each with the model loaded; they compute one after the other."""

    def __init__(self, stack: ExitStack, args: argparse.Namespace) -> None:
        options = {"model": str(args.model), "n_threads": args.threads, "rope": asdict(rope_options(args))}
        # llama.cpp starts last: it says less about a bad file.
        self.exact = start_repkv(stack, "ours --exact-graph", **options, exact_graph=True)
        self.default = start_repkv(stack, "ours", **options)
        self.llama = start_llama(stack, "llama.cpp", args.llama_python, **options)
        self.n_vocab = check_same_vocabulary(self.all)
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

    @property
    def all(self) -> tuple[EngineProcess, ...]:
        return self.llama, self.exact, self.default

    def open(self, n_ctx: int, flash_attn: bool) -> None:
        for engine in self.all:
            engine.ask("open", n_ctx=n_ctx, flash_attn=flash_attn)

    def logits(self, prompt: list[int], n_decode: int) -> list[np.ndarray]:
        """Returns the logits of llama.cpp, --exact-graph and the default graph, each float32 [1 + n_decode, n_vocab],
        for the same tokens.
        """
        results: list[np.ndarray] = []
        feed: list[int] = []
        for engine in self.all:
            path = self._folder / "logits.npy"
            reply = engine.ask("logits", prompt=prompt, feed=feed, n_decode=n_decode, path=str(path))
            feed = reply["tokens"]
            results.append(np.load(path))
            if not np.isfinite(results[-1]).all():
                raise RepkvError(f"{engine.name}: a prompt of {len(prompt)} tokens gives logits that are not finite")
        return results


def compare(n_prompt: int, flash_attn: bool, llama: np.ndarray, exact: np.ndarray, default: np.ndarray) -> Row:
    """Returns the row for three arrays of logits [n_outputs, n_vocab]; their first vectors come after the prompt."""
    diffs = np.abs(llama - exact).max(axis=1)
    wide, other = llama.astype(np.float64), default.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1) * np.linalg.norm(other, axis=1)
    return Row(
        n_prompt=n_prompt,
        flash_attn=flash_attn,
        n_outputs=len(llama),
        exact_prompt_diff=float(diffs[0]),
        exact_decode_diff=float(diffs[1:].max(initial=0.0)),
        exact_equal=int((diffs == 0.0).sum()),
        default_diff=float(np.abs(wide - other).max()),
        default_min_cosine=float(((wide * other).sum(axis=1) / norms).min()),
        default_same_top1=int((llama.argmax(axis=1) == default.argmax(axis=1)).sum()),
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="compare_llama.py",
        usage="%(prog)s [-m FILE] [options]",
        description=__doc__,
        epilog="exit codes: 0 equal, 1 an exact difference is not 0.0 or a failure, 2 bad usage, 130 interrupted",
        formatter_class=HelpFormatter,
    )
    add_common_options(parser)
    add_rope_options(parser)
    parser.add_argument(
        "--lengths",
        metavar="N,N",
        type=integers(1),
        default=(1, 7, 512, 513, 2048),
        help="prompt lengths in tokens (default: 1,7,512,513,2048)",
    )
    parser.add_argument(
        "-n",
        "--n-decode",
        metavar="N",
        type=integer(0, MAX_TOKENS),
        default=16,
        help="greedy tokens after each prompt (default: %(default)s)",
    )
    parser.add_argument(
        "-f", "--file", metavar="FILE", type=Path, help="take the tokens of this text (UTF-8), repeated if too few"
    )
    args = parser.parse_args(argv)
    if not args.lengths:
        raise InputError("--lengths is empty; give at least one prompt length")
    args.model = model_path(args)
    return args


def text_tokens(args: argparse.Namespace) -> list[int]:
    """Returns the tokens of -f, repeated to the longest prompt. Raises InputError."""
    try:
        text = args.file.read_text("utf-8")
    except (OSError, UnicodeError) as error:
        raise InputError(f"{args.file}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    tokens = Tokenizer.from_metadata(GGUFFile.open(args.model).metadata).encode(text)
    if not tokens:
        raise InputError(f"{args.file} has no tokens; give a text")
    return tokens * -(-max(args.lengths) // len(tokens))


def compare_all(args: argparse.Namespace, engines: Engines) -> list[Row]:
    longest = max(args.lengths)
    tokens = text_tokens(args) if args.file else random_tokens(longest, engines.n_vocab, args.seed)
    rows: list[Row] = []
    for flash_attn in (True, False):
        engines.open(context_size(longest + args.n_decode), flash_attn)
        rows += [compare(n, flash_attn, *engines.logits(tokens[:n], args.n_decode)) for n in args.lengths]
    return rows


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    with ExitStack() as stack:
        engines = Engines(stack, args)
        rows = compare_all(args, engines)
        versions = f"{engines.exact.version}, {engines.llama.version}"
    source = f"tokens of {args.file}" if args.file else f"random token ids, seed {args.seed}"
    n_unequal = sum(not row.is_exact for row in rows)
    if args.json:
        about = {"model": str(args.model), "n_threads": args.threads, "versions": versions, "prompts": source}
        write_json({**about, "equal": n_unequal == 0, "rows": [asdict(row) for row in rows]})
    else:
        output.write(f"{args.model.name}, -t {args.threads}, {versions}\n")
        output.write(f"prompts: {source}; after each {args.n_decode} tokens decoded\n")
        write_table(HEADER, [row.cells() for row in rows])
    if n_unequal:
        say(f"error: {n_unequal} of {len(rows)} prompts give logits with --exact-graph that are not llama.cpp's")
    return 1 if n_unequal else 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
