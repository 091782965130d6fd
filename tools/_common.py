"""Options, plain tables and one-line errors for the developers' scripts."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pyggml_repkv.cli import output, progress
from pyggml_repkv.cli.memory_flags import check_memory_flags, memory_config
from pyggml_repkv.cli.options import MAX_SEED, add_context_options, add_memory_options
from pyggml_repkv.cli.parser import Parser, integer
from pyggml_repkv.engine.threads import MAX_THREADS, default_threads
from pyggml_repkv.errors import InputError, RepkvError
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.model.names import find_model

MAX_TOKENS = 2**20


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Adds -m, -t, --seed, --llama-python and --json."""
    parser.add_argument("-m", "--model", metavar="MODEL", default="demo", help="GGUF file or name (default: demo)")
    parser.add_argument(
        "-t",
        "--threads",
        metavar="N",
        type=integer(1, MAX_THREADS),
        default=default_threads(),
        help="compute threads of each engine (default: %(default)s, the available physical cores)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=integer(0, MAX_SEED), default=1, help="seed of random tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--llama-python",
        metavar="FILE",
        default=sys.executable,
        help="interpreter that has llama-cpp-python and numpy (default: this one)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def integers(low: int, high: int = MAX_TOKENS) -> Callable[[str], tuple[int, ...]]:
    """Returns an argparse type: whole numbers between commas; an empty text gives none."""
    parse = integer(low, high)
    return lambda text: tuple(dict.fromkeys(map(parse, text.split(",")))) if text else ()


def memory_of(text: str) -> MemoryConfig:
    """Returns the MemoryConfig of --ours, which takes `run`'s flags of context and memory. Raises InputError."""
    parser = Parser(prog="--ours", add_help=False)
    add_context_options(parser)
    add_memory_options(parser)
    try:
        options = parser.parse_args(shlex.split(text))
        check_memory_flags(options, [options.kv])
        memory = memory_config(options, options.ctx_size)
    except (InputError, ValueError) as error:
        reason = str(error).removesuffix(f" (see {parser.prog} --help)")
        raise InputError(f"--ours {text!r}: {reason}") from None
    if memory.n_ctx:
        raise InputError(f"--ours {text!r}: the text decides the context; leave -c out")
    return memory


def run_tool(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Runs main(argv) (default: the arguments of the process) and returns its exit code. A user's error becomes one
    line.
    """
    try:
        output.prepare()
        code = main(sys.argv[1:] if argv is None else argv)
        output.flush()
    except RepkvError as error:
        say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        output.discard(sys.stdout)
        return 1
    return code


def say(line: str) -> None:
    """Writes one line to stderr."""
    output.log(f"{line}\n")


def model_path(args: argparse.Namespace) -> Path:
    """Returns the path of -m; a model that has a name is fetched if it is missing."""
    with progress.downloads(quiet=False) as move:
        return find_model(args.model, move)


def write_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, n_left: int = 1) -> None:
    """Writes aligned columns, the first n_left aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        sized = zip(row, widths, strict=True)
        cells = [cell.ljust(width) if i < n_left else cell.rjust(width) for i, (cell, width) in enumerate(sized)]
        output.write("  ".join(cells).rstrip() + "\n")


def write_json(report: object) -> None:
    output.write(json.dumps(report, allow_nan=False) + "\n")
