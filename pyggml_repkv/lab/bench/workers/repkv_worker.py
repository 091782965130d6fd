"""A worker with this project's engine and any KV memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pyggml_repkv import __version__
from pyggml_repkv.engine.model import Model
from pyggml_repkv.engine.session import Session
from pyggml_repkv.ffi.lost_files import exit_on_lost_files
from pyggml_repkv.lab.bench.workers._worker import serve
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.registry import policy_kind
from pyggml_repkv.model.rope_options import RopeOptions

# Tokens that are read to fill a depth with repeated keys and values.
N_CELLS = 512


class RepkvEngine:
    """An Engine. memory: fields of MemoryConfig, by default `--kv full`; rope: fields of RopeOptions."""

    version = f"pyggml_repkv {__version__}"

    def __init__(
        self, model: str, n_threads: int, exact_graph: bool = False, repack: bool = True,
        memory: dict[str, Any] | None = None, rope: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._memory = MemoryConfig(**(memory or {}))
        self._model = Model.load(
            model, threads=n_threads, repack=repack, exact_graph=exact_graph, rope=RopeOptions(**(rope or {}))
        )
        self.n_vocab = self._model.config.n_vocab
        self.can_rewind = policy_kind(self._memory.kv).rewinds
        self._session: Session | None = None

    @property
    def session(self) -> Session:
        assert self._session is not None
        return self._session

    def open(self, n_ctx: int, flash_attn: bool) -> None:
        if self._session is not None:
            self._session.close()
        self._session = self._model.session(replace(self._memory, n_ctx=n_ctx, flash_attn=flash_attn))

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        return self.session.prefill(tokens)

    def decode(self, token: int) -> np.ndarray:
        return self.session.decode(token)

    def rewind(self, n_past: int) -> None:
        self.session.rewind(n_past)

    def place(self, tokens: Sequence[int], n_past: int) -> None:
        self.prefill(tokens[: min(N_CELLS, n_past)])
        self.session.repeat(n_past)

    def memory(self) -> dict[str, Any]:
        return self.session.stats()


if __name__ == "__main__":
    exit_on_lost_files("")  # the last line on stderr is what the command shows
    serve(RepkvEngine)
