"""The child's side of a comparison: one engine a process, because two copies of ggml in one process share symbols.

Requests come as JSON lines on stdin, replies go as JSON lines to stdout, logits go into .npy files. It needs only
numpy, so that it runs in any interpreter that has llama-cpp-python.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np

# A constant of Linux's prctl.
_PR_SET_PDEATHSIG = 1


class Engine(Protocol):
    """A loaded model with at most one open context. Logits are float32 [n_vocab], valid until the next call."""

    version: str
    n_vocab: int
    can_rewind: bool

    def open(self, n_ctx: int, flash_attn: bool) -> None:
        """Replaces the context by an empty one."""

    def prefill(self, tokens: Sequence[int]) -> np.ndarray: ...

    def decode(self, token: int) -> np.ndarray: ...

    def rewind(self, n_past: int) -> None:
        """Forgets every token from position n_past on."""

    def place(self, tokens: Sequence[int], n_past: int) -> None:
        """Fills the context with n_past tokens without reading them all, by repeating keys and values of `tokens`."""

    def memory(self) -> dict[str, Any]:
        """Returns what is known of keys and values: resident_bytes, ram_bytes, disk_bytes, prefetch hits, required."""


class Worker:
    """Answers the parent; every public method is a request."""

    def __init__(self, make_engine: Callable[..., Engine]) -> None:
        self._make_engine = make_engine
        self._engine: Engine
        self._opened: dict[str, Any] = {}
        # The tokens in the context; None if `place` made it, with _n_placed tokens.
        self._read: list[int] | None = []
        self._n_placed = 0

    def load(self, **options: Any) -> dict[str, Any]:
        self._engine = self._make_engine(**options)
        return {"n_vocab": self._engine.n_vocab, "version": self._engine.version}

    def open(self, n_ctx: int, flash_attn: bool) -> dict[str, Any]:
        self._opened = {"n_ctx": n_ctx, "flash_attn": flash_attn}
        self._read = []
        self._engine.open(n_ctx, flash_attn)
        return {}

    def logits(self, prompt: list[int], feed: list[int], n_decode: int, path: str) -> dict[str, Any]:
        """Writes the logits after the prompt and after each of n_decode further tokens to a .npy file, float32
        [1 + n_decode, n_vocab]. Replies with the further tokens: those of `feed`, then the most likely ones.
        """
        self._engine.rewind(0)
        self._read, self._n_placed = None, 0
        rows = [self._engine.prefill(prompt).copy()]
        tokens = list(feed)
        for step in range(n_decode):
            if step == len(tokens):
                tokens.append(int(rows[-1].argmax()))
            rows.append(self._engine.decode(tokens[step]).copy())
        np.save(path, np.stack(rows))
        return {"tokens": tokens}

    def reach(self, tokens: list[int], slack: int, synthetic: bool) -> dict[str, Any]:
        """Makes the context hold these tokens, reading those that it lacks; replies with its length.

        An engine that cannot rewind may keep up to `slack` tokens more, unless `tokens` is empty. synthetic: only the
        length matters, and an engine that can rewind repeats the keys and values of the first tokens.
        """
        if synthetic and tokens and self._engine.can_rewind:
            self._reach_placed(tokens)
        else:
            self._reach_read(tokens, slack)
        return {"n_past": self._n_past}

    def time_chunk(self, tokens: list[int]) -> dict[str, Any]:
        """Replies with the seconds to read the tokens at once, after those in the context."""
        start = perf_counter()
        self._engine.prefill(tokens)
        seconds = perf_counter() - start
        self._note(tokens)
        return {"seconds": seconds}

    def time_tokens(self, tokens: list[int]) -> dict[str, Any]:
        """Replies with the seconds to read the tokens one by one. Reads the first one before, untimed, to build the
        graph.
        """
        self._engine.decode(tokens[0])
        if self._engine.can_rewind:
            self._engine.rewind(self._n_past)
        else:
            self._note(tokens[:1])
        start = perf_counter()
        for token in tokens:
            self._engine.decode(token)
        seconds = perf_counter() - start
        self._note(tokens)
        return {"seconds": seconds}

    def memory(self) -> dict[str, Any]:
        return {**self._engine.memory(), "peak_rss_bytes": _peak_rss_bytes()}

    def node_names(self, tokens: list[int], flash_attn: bool) -> dict[str, Any]:
        """Replies with name and op of each node of the graph that reads the tokens; llama.cpp only."""
        return {"nodes": self._engine.node_names(tokens, flash_attn)}  # type: ignore[attr-defined]

    def nll(self, tokens: list[int], first: int) -> dict[str, Any]:
        """Replies with the sum of -log p, nats, of the tokens after positions `first` to the last but one, read at once
        into an empty context; llama.cpp only.
        """
        self._engine.rewind(0)
        self._read, self._n_placed = None, 0
        logits = self._engine.all_logits(tokens)[first : len(tokens) - 1].astype(np.float64)  # type: ignore[attr-defined]
        logits -= logits.max(1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return {"nll": -float(log_p[np.arange(len(log_p)), tokens[first + 1 :]].sum())}

    @property
    def _n_past(self) -> int:
        return self._n_placed if self._read is None else len(self._read)

    def _note(self, tokens: list[int]) -> None:
        if self._read is None:
            self._n_placed += len(tokens)
        else:
            self._read = self._read + tokens

    def _reach_read(self, tokens: list[int], slack: int) -> None:
        held = self._read
        same = 0
        if held is not None:
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(held, tokens, strict=False)))
        if self._engine.can_rewind:
            self._engine.rewind(same)
        elif tokens and held is not None and same == len(tokens) <= len(held) <= len(tokens) + slack:
            return
        elif held is None or same < len(held):
            self._engine.open(**self._opened)
            same = 0
        if same < len(tokens):
            self._engine.prefill(tokens[same:])
        self._read = list(tokens)

    def _reach_placed(self, tokens: list[int]) -> None:
        if self._read is None and self._n_placed >= len(tokens):
            self._engine.rewind(len(tokens))
        else:
            self._engine.rewind(0)
            self._engine.place(tokens, len(tokens))
            _forget_peak_rss()
        self._read, self._n_placed = None, len(tokens)


def _peak_rss_bytes() -> int | None:
    """Returns the peak, or None if unknown. getrusage's would begin with the parent's memory at the start."""
    try:
        lines = Path("/proc/self/status").read_text("ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def _forget_peak_rss() -> None:
    """Resets the peak to the present, so that copies which only `place` needs do not count."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "ascii")


def _end_with_the_parent() -> None:
    """Lets Linux kill this process when its parent ends: a worker that computes for minutes reads no pipe."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def serve(make_engine: Callable[..., Engine]) -> None:
    """Answers requests until stdin ends. make_engine gets the options of `load`."""
    _end_with_the_parent()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # Output of native code must not mix with the replies.
    os.dup2(2, 1)
    worker = Worker(make_engine)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(worker, request.pop("op"))(**request)
        except Exception as error:
            exit_code = getattr(error, "exit_code", None)
            name = "" if exit_code or type(error) is RuntimeError else f"{type(error).__name__}: "
            reply = {"error": f"{name}{error}", "exit_code": exit_code or 1}
        print(json.dumps(reply), file=replies, flush=True)
