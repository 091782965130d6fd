"""This project's engine as a worker of the comparison tools."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from _worker import serve

from pyggml_repkv import __version__
from pyggml_repkv.engine.model import Model
from pyggml_repkv.engine.session import Session
from pyggml_repkv.memory.policy import MemoryConfig


class RepkvEngine:
    """An Engine with `--kv full`."""

    version = f"pyggml_repkv {__version__}"

    def __init__(self, model: str, n_threads: int, exact_graph: bool) -> None:
        self._model = Model.load(model, threads=n_threads, exact_graph=exact_graph)
        self.n_vocab = self._model.config.n_vocab
        self._session: Session

    def open(self, n_ctx: int, flash_attn: bool) -> None:
        if hasattr(self, "_session"):
            self._session.close()
        self._session = self._model.session(MemoryConfig(kv="full", n_ctx=n_ctx, flash_attn=flash_attn))

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        return self._session.prefill(tokens)

    def decode(self, token: int) -> np.ndarray:
        return self._session.decode(token)

    def rewind(self, n_past: int) -> None:
        # With every token kept in its own row, what lies beyond n_past is overwritten before it is read.
        self._session.n_past = n_past


if __name__ == "__main__":
    serve(RepkvEngine)
