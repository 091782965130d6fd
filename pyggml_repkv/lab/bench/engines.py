"""The parent's side of a comparison: a worker process for each engine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pyggml_repkv.errors import InputError, RepkvError

LLAMA_WORKER = (str(Path(__file__).with_name("workers") / "llama_worker.py"),)
REPKV_WORKER = ("-m", "pyggml_repkv.lab.bench.workers.repkv_worker")
N_CTX_STEP = 256


class EngineProcess:
    """A worker (workers/_worker.py). It answers one request at a time and is idle in between."""

    def __init__(self, name: str, worker: Sequence[str], python: str = sys.executable) -> None:
        """worker: arguments of the interpreter: a script, or -m and a module."""
        self.name = name
        self.version = ""
        self.n_vocab = 0
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, __exit__ closes it
        try:
            self._process = subprocess.Popen(
                [python, *worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                encoding="utf-8", errors="replace",
            )  # fmt: skip
        except OSError as error:
            raise InputError(f"{python}: {error.strerror}; --llama-python takes a Python interpreter") from None

    def load(self, **options: Any) -> None:
        reply = self.ask("load", **options)
        self.version, self.n_vocab = reply["version"], reply["n_vocab"]

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Returns the reply to one request. Raises RepkvError with the worker's message, or with how it ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # If the worker has ended, its last messages can still be read.
        with suppress(BrokenPipeError):
            print(json.dumps({"op": op, **fields}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RepkvError(f"{self.name}: {self._ending()} during {op!r}: {self._last_error_line()}")
        reply = _as_reply(line)
        if reply is None or (op == "load" and not _is_loaded(reply)):
            raise RepkvError(f"{self.name}: the process is not a worker: it answered {line.strip()[:60]!r}")
        if "error" in reply:
            kind = InputError if reply.get("exit_code") == InputError.exit_code else RepkvError
            raise kind(f"{self.name}: {reply['error']}")
        return reply

    def _ending(self) -> str:
        code = self._process.wait()
        if code >= 0:
            return f"ended with exit code {code}"
        known = {s.value: s.name for s in signal.Signals}
        return f"killed by {known.get(-code, f'signal {-code}')}"

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


def _is_loaded(reply: dict[str, Any]) -> bool:
    return "error" in reply or {"version", "n_vocab"} <= reply.keys()


def _as_reply(line: str) -> dict[str, Any] | None:
    try:
        reply = json.loads(line)
    except ValueError:
        return None
    return reply if isinstance(reply, dict) else None


def start_llama(stack: ExitStack, name: str, python: str, **options: Any) -> EngineProcess:
    """Returns a worker that has loaded the model into llama.cpp; it lives until the stack closes."""
    engine = stack.enter_context(EngineProcess(name, LLAMA_WORKER, python))
    engine.load(**options)
    return engine


def start_repkv(stack: ExitStack, name: str, **options: Any) -> EngineProcess:
    """Returns a worker that has loaded the model into this engine; it lives until the stack closes."""
    engine = stack.enter_context(EngineProcess(name, REPKV_WORKER))
    engine.load(**options)
    return engine


def check_same_vocabulary(engines: Iterable[EngineProcess]) -> int:
    """Returns the size of the vocabulary. Raises RepkvError if the engines disagree."""
    sizes = {engine.name: engine.n_vocab for engine in engines}
    if len(set(sizes.values())) > 1:
        raise RepkvError(f"the engines disagree on the number of tokens: {sizes}")
    return next(iter(sizes.values()))


def context_size(n_tokens: int) -> int:
    """Returns the context for n_tokens, rounded up as llama.cpp does, so that every engine has the same."""
    return -(-n_tokens // N_CTX_STEP) * N_CTX_STEP


def random_tokens(n_tokens: int, n_vocab: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(n_vocab, size=n_tokens).tolist()
