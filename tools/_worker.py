"""The child's side of the comparison with llama.cpp: one engine in one process.

Requests come as JSON lines on stdin, replies go as JSON lines to stdout, logits into .npy files. Only numpy is needed,
so that it runs in any interpreter that has llama-cpp-python.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from time import perf_counter
from typing import Any, Protocol

import numpy as np


class Engine(Protocol):
    """A loaded model with at most one open context. Logits are float32 [n_vocab], valid until the next call."""

    version: str
    n_vocab: int

    def open(self, n_ctx: int, flash_attn: bool) -> None:
        """An empty context, in place of the one before."""

    def prefill(self, tokens: Sequence[int]) -> np.ndarray: ...

    def decode(self, token: int) -> np.ndarray: ...

    def rewind(self, n_past: int) -> None:
        """Forgets every token from position n_past on."""


class Worker:
    """What the parent can ask for; every public method is a request."""

    def __init__(self, make_engine: Callable[..., Engine]) -> None:
        self._make_engine = make_engine
        self._engine: Engine
        self._read: list[int] = []

    def load(self, **options: Any) -> dict[str, Any]:
        self._engine = self._make_engine(**options)
        return {"n_vocab": self._engine.n_vocab, "version": self._engine.version}

    def open(self, n_ctx: int, flash_attn: bool) -> dict[str, Any]:
        self._read = []
        self._engine.open(n_ctx, flash_attn)
        return {}

    def logits(self, prompt: list[int], feed: list[int], n_decode: int, path: str) -> dict[str, Any]:
        """Logits after the prompt and after each of n_decode further tokens -> .npy, float32 [1 + n_decode, n_vocab].

        The further tokens are `feed`, and once that is used up the most likely ones; they are the reply.
        """
        self._seek([])
        rows = [self._engine.prefill(prompt).copy()]
        tokens = list(feed)
        for step in range(n_decode):
            if step == len(tokens):
                tokens.append(int(rows[-1].argmax()))
            rows.append(self._engine.decode(tokens[step]).copy())
        np.save(path, np.stack(rows))
        return {"tokens": tokens}

    def time_prefill(self, tokens: list[int]) -> dict[str, Any]:
        """Seconds to read the tokens from an empty context."""
        self._seek([])
        start = perf_counter()
        self._engine.prefill(tokens)
        seconds = perf_counter() - start
        self._read = tokens
        return {"seconds": seconds}

    def time_decode(self, tokens: list[int], depth: int) -> dict[str, Any]:
        """Seconds to read tokens[depth:] one by one after tokens[:depth]."""
        self._seek(tokens[:depth])
        # The first step may still have a graph to build.
        self._engine.decode(tokens[depth])
        self._engine.rewind(depth)
        start = perf_counter()
        for token in tokens[depth:]:
            self._engine.decode(token)
        return {"seconds": perf_counter() - start}

    def node_names(self, tokens: list[int], flash_attn: bool) -> dict[str, Any]:
        """Name and op of each node of the graph that reads the tokens; llama.cpp's only."""
        return {"nodes": self._engine.node_names(tokens, flash_attn)}  # type: ignore[attr-defined]

    def _seek(self, tokens: list[int]) -> None:
        """Makes the context hold exactly these tokens, computing those that it does not hold yet."""
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self._read, tokens, strict=False))
        n_same = len(list(same))
        self._engine.rewind(n_same)
        if n_same < len(tokens):
            self._engine.prefill(tokens[n_same:])
        self._read = tokens


def serve(make_engine: Callable[..., Engine]) -> None:
    """Answers requests until stdin ends. make_engine gets the options of `load`."""
    replies = os.fdopen(os.dup(1), "w")
    # What native code prints must not get between the replies.
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
