"""The parent's side of the comparison with llama.cpp: worker processes, common options, plain tables, one-line errors.

Each engine has a process of its own, because two copies of ggml in one process share symbols.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pyggml_repkv.cli import output
from pyggml_repkv.cli.options import MAX_SEED
from pyggml_repkv.cli.parser import integer
from pyggml_repkv.engine.threads import MAX_THREADS, default_threads
from pyggml_repkv.errors import InputError, RepkvError
from pyggml_repkv.model.demo import demo_model_path

LLAMA_WORKER = Path(__file__).with_name("llama_worker.py")
REPKV_WORKER = Path(__file__).with_name("repkv_worker.py")
MAX_TOKENS = 2**20
N_CTX_STEP = 256


class EngineProcess:
    """A worker (see _worker.py). It answers one request at a time and rests in between."""

    def __init__(self, name: str, worker: Path, python: str = sys.executable) -> None:
        self.name = name
        self.version = ""
        self.n_vocab = 0
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, __exit__ closes it
        try:
            self._process = subprocess.Popen(
                [python, str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
            )
        except OSError as error:
            raise InputError(f"{python}: {error.strerror}; --llama-python takes a Python interpreter") from None

    def load(self, **options: Any) -> None:
        reply = self.ask("load", **options)
        self.version, self.n_vocab = reply["version"], reply["n_vocab"]

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """One request -> its reply. Raises RepkvError with what the worker says, or how it ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"op": op, **fields}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RepkvError(f"{self.name}: {self._ending()} during {op!r}: {self._last_error_line()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            kind = InputError if reply["exit_code"] == InputError.exit_code else RepkvError
            raise kind(f"{self.name}: {reply['error']}")
        return reply

    def _ending(self) -> str:
        code = self._process.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def _last_error_line(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().splitlines()
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def start_llama(stack: ExitStack, name: str, args: argparse.Namespace) -> EngineProcess:
    """llama.cpp with the model loaded, until the stack is left."""
    engine = stack.enter_context(EngineProcess(name, LLAMA_WORKER, args.llama_python))
    engine.load(model=str(args.model), n_threads=args.threads)
    return engine


def start_repkv(stack: ExitStack, name: str, args: argparse.Namespace, *, exact_graph: bool) -> EngineProcess:
    """Our engine with the model loaded, until the stack is left."""
    engine = stack.enter_context(EngineProcess(name, REPKV_WORKER))
    engine.load(model=str(args.model), n_threads=args.threads, exact_graph=exact_graph)
    return engine


def check_same_vocabulary(engines: Iterable[EngineProcess]) -> int:
    """Number of tokens. Raises RepkvError if the engines disagree."""
    sizes = {engine.name: engine.n_vocab for engine in engines}
    if len(set(sizes.values())) > 1:
        raise RepkvError(f"the engines disagree on the number of tokens: {sizes}")
    return next(iter(sizes.values()))


def context_size(n_tokens: int) -> int:
    """The context for n_tokens, rounded as llama.cpp rounds it, so that every engine has the same."""
    return -(-n_tokens // N_CTX_STEP) * N_CTX_STEP


def random_tokens(n_tokens: int, n_vocab: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(n_vocab, size=n_tokens).tolist()


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """-m, -t, --seed, --llama-python, --json."""
    parser.add_argument("-m", "--model", metavar="FILE", type=Path, help="GGUF file (default: the demo model)")
    parser.add_argument(
        "-t",
        "--threads",
        metavar="N",
        type=integer(1, MAX_THREADS),
        default=default_threads(),
        help="compute threads of each engine (default: %(default)s, the physical cores at hand)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=integer(0, MAX_SEED), default=1, help="of the random tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--llama-python",
        metavar="FILE",
        default=sys.executable,
        help="interpreter that has llama-cpp-python and numpy (default: the one that runs this)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def integers(low: int, high: int = MAX_TOKENS) -> Callable[[str], tuple[int, ...]]:
    """An argparse type: whole numbers with commas between; none at all for an empty text."""
    parse = integer(low, high)
    return lambda text: tuple(dict.fromkeys(map(parse, text.split(",")))) if text else ()


def run_tool(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """The exit code of main(argv), by default the process's own; an error that a user can cause becomes one line."""
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
    """One line to stderr."""
    output.log(f"{line}\n")


def model_path(args: argparse.Namespace) -> Path:
    """-m, or the demo model."""
    return args.model or demo_model_path(say)


def write_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, n_left: int = 1) -> None:
    """Columns as wide as what is in them: the first n_left to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        sized = zip(row, widths, strict=True)
        cells = [cell.ljust(width) if i < n_left else cell.rjust(width) for i, (cell, width) in enumerate(sized)]
        output.write("  ".join(cells).rstrip() + "\n")


def write_json(report: object) -> None:
    output.write(json.dumps(report, allow_nan=False) + "\n")
