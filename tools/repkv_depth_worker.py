"""This project's engine as a worker of bench_depth.py, with any memory."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from time import perf_counter
from typing import Any

import _worker
from repkv_worker import RepkvEngine

from pyggml_repkv.cli.options import add_context_options, add_memory_options
from pyggml_repkv.cli.parser import Parser
from pyggml_repkv.cli.run import memory_config
from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError
from pyggml_repkv.memory.config import MemoryConfig

# Tokens that ours reads at a time, as llama.cpp does.
CHUNK = 512


class RepkvDepthEngine(RepkvEngine):
    """An Engine with the memory that options of `run` describe. It cannot rewind."""

    def __init__(self, model: str, n_threads: int, memory: str) -> None:
        self._memory = memory_of(memory)
        # As `run` does: memory other than `full` reads matrices as they lie in the file.
        self._model = Model.load(model, threads=n_threads, repack=self._memory.kv == "full")
        self.n_vocab = self._model.config.n_vocab

    def open(self, n_ctx: int, flash_attn: bool) -> None:
        if hasattr(self, "_session"):
            self._session.close()
        self._session = self._model.session(replace(self._memory, n_ctx=n_ctx, flash_attn=flash_attn))

    def read(self, tokens: Sequence[int]) -> list[tuple[int, float]]:
        """Reads a prompt -> after each chunk, the number of tokens read and the time in seconds."""
        marks = [(0, perf_counter())]
        self._session.prefill(tokens, on_progress=lambda n_done, _: marks.append((n_done, perf_counter())))
        return marks


def memory_of(text: str) -> MemoryConfig:
    """The options of `run` that say what ours remembers -> its MemoryConfig."""
    parser = Parser(prog="--ours", add_help=False)
    add_context_options(parser)
    add_memory_options(parser)
    try:
        options = parser.parse_args(shlex.split(text))
        memory = memory_config(options, options.ctx_size)
    except (InputError, ValueError) as error:
        reason = str(error).removesuffix(f" (see {parser.prog} --help)")
        raise InputError(f"--ours {text!r}: {reason}") from None
    if memory.n_ctx:
        raise InputError(f"--ours {text!r}: -c is what --depths needs and cannot be given")
    if memory.n_batch != CHUNK:
        raise InputError(f"--ours {text!r}: -b must be {CHUNK}, the chunk of llama.cpp")
    return memory


class RepkvDepthWorker(_worker.Worker):
    """What bench_depth.py can ask of ours."""

    _engine: RepkvDepthEngine

    def read(self, tokens: list[int]) -> dict[str, Any]:
        """Where each chunk of a prompt ends and its seconds; the context must be empty."""
        marks = self._engine.read(tokens)
        seconds = [after[1] - before[1] for before, after in pairwise(marks)]
        return {"ends": [n_done for n_done, _ in marks[1:]], "seconds": seconds}

    def decode(self, tokens: list[int]) -> dict[str, Any]:
        """Seconds of each token, one after the other."""
        # The first step has a graph to build.
        self._engine.decode(tokens[0])
        seconds = []
        for token in tokens:
            start = perf_counter()
            self._engine.decode(token)
            seconds.append(perf_counter() - start)
        return {"seconds": seconds}


if __name__ == "__main__":
    # What serve() makes.
    _worker.Worker = RepkvDepthWorker
    _worker.serve(RepkvDepthEngine)
