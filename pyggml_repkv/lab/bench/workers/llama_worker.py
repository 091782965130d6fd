"""A worker with llama.cpp, through llama-cpp-python's low-level bindings: a script for any interpreter."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from _llama_state import repeat_cells
from _worker import serve

# Values of enum ggml_type.
CACHE_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}

# Tokens that are read to fill a depth with repeated cells.
N_CELLS = 512


class LlamaEngine:
    """An Engine on the CPU, otherwise with llama.cpp's defaults. n_chunk: llama.cpp's n_ubatch; rope: fields of
    RopeOptions.
    """

    can_rewind = True

    def __init__(
        self,
        llama: ModuleType,
        model: str,
        n_threads: int,
        n_chunk: int = 512,
        n_batch: int = 2048,
        type_k: str = "f16",
        type_v: str = "f16",
        rope: dict[str, Any] | None = None,
    ) -> None:
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        self._llama, self._n_threads = llama, n_threads
        self._model = llama.llama_model_load_from_file(os.fsencode(model), params)
        if not self._model:
            raise RuntimeError(f"{model}: llama.cpp cannot load it")
        self.version = f"llama-cpp-python {llama.__version__}"
        self.n_vocab: int = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._n_chunk, self._n_batch, self._types = n_chunk, n_batch, (CACHE_TYPES[type_k], CACHE_TYPES[type_v])
        self._rope = rope or {}
        self._context: Any = None
        # The callback for each node; kept alive here.
        self._look: Any = None

    def open(self, n_ctx: int, flash_attn: bool) -> None:
        llama = self._llama
        if self._context:
            llama.llama_free(self._context)
        params = llama.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = min(self._n_batch, n_ctx)
        params.n_ubatch = min(self._n_chunk, n_ctx)
        params.type_k, params.type_v = self._types
        params.n_threads = params.n_threads_batch = self._n_threads
        params.offload_kqv = params.op_offload = False
        self._set_rope(params)
        on, off = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED, llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = on if flash_attn else off
        if self._look is not None:
            params.cb_eval = self._look
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {n_ctx} tokens")

    def _set_rope(self, params: Any) -> None:
        """As llama.cpp's flags do."""
        rope = self._rope
        if rope.get("scaling") is not None:
            params.rope_scaling_type = getattr(self._llama, f"LLAMA_ROPE_SCALING_TYPE_{rope['scaling'].upper()}")
        if rope.get("scale") is not None:
            params.rope_freq_scale = np.float32(1) / np.float32(rope["scale"])
        params.rope_freq_base = rope.get("freq_base") or 0.0
        params.yarn_orig_ctx = rope.get("orig_ctx") or 0

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        for start in range(0, len(tokens), self._n_batch):
            self._read(tokens[start : start + self._n_batch])
        return self._logits()

    def decode(self, token: int) -> np.ndarray:
        self._read((token,))
        return self._logits()

    def all_logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Reads tokens into an empty context and returns the logits after each, float32 [n_tokens, n_vocab], valid
        until the next call.
        """
        llama, n = self._llama, len(tokens)
        batch = llama.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
                batch.seq_id[i][0] = 0
            self._decode(batch, n)
        finally:
            llama.llama_batch_free(batch)
        return np.ctypeslib.as_array(llama.llama_get_logits(self._context), shape=(n * self.n_vocab,)).reshape(n, -1)

    def rewind(self, n_past: int) -> None:
        memory = self._llama.llama_get_memory(self._context)
        if not self._llama.llama_memory_seq_rm(memory, 0, n_past, -1):
            raise RuntimeError(f"llama.cpp cannot forget the tokens from {n_past} on")

    def place(self, tokens: Sequence[int], n_past: int) -> None:
        self.prefill(tokens[: min(N_CELLS, n_past)])
        self._restore(repeat_cells(self._state(), n_past), n_past)

    def memory(self) -> dict[str, Any]:
        """Returns nothing: llama.cpp does not say."""
        return {}

    def node_names(self, tokens: Sequence[int], flash_attn: bool) -> list[tuple[str, str]]:
        """Returns name and op of every node of the graph that reads these tokens, in the order of compute.

        The names come from the callback of ggml's scheduler.
        """
        from llama_cpp._ggml import libggml

        name, op = libggml.ggml_get_name, libggml.ggml_op_desc
        for function in (name, op):
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_char_p
        found: list[tuple[str, str]] = []

        def look(node: int, ask: bool, _: Any) -> bool:
            if ask:
                found.append((name(node).decode(), op(node).decode()))
            return False

        self._look = self._llama.ggml_backend_sched_eval_callback(look)
        self.open(256, flash_attn)
        found.clear()
        self._read(tokens)
        return found

    def _state(self) -> np.ndarray:
        """Returns the state of sequence 0, uint8 [n_bytes]."""
        state = np.empty(self._llama.llama_state_seq_get_size(self._context, 0), np.uint8)
        if self._llama.llama_state_seq_get_data(self._context, _bytes(state), len(state), 0) != len(state):
            raise RuntimeError("llama.cpp could not write its state")
        return state

    def _restore(self, state: np.ndarray, n_tokens: int) -> None:
        """Sets sequence 0 to a state of n_tokens tokens."""
        if self._llama.llama_state_seq_set_data(self._context, _bytes(state), len(state), 0) != len(state):
            raise RuntimeError(f"llama.cpp could not restore a state of {n_tokens} tokens")
        memory = self._llama.llama_get_memory(self._context)
        first = self._llama.llama_memory_seq_pos_min(memory, 0)
        last = self._llama.llama_memory_seq_pos_max(memory, 0)
        if (first, last) != (0, n_tokens - 1):
            raise RuntimeError(f"llama.cpp restored positions {first} to {last} instead of 0 to {n_tokens - 1}")

    def _read(self, tokens: Sequence[int]) -> None:
        array = (self._llama.llama_token * len(tokens))(*tokens)
        self._decode(self._llama.llama_batch_get_one(array, len(tokens)), len(tokens))

    def _decode(self, batch: Any, n_tokens: int) -> None:
        status = self._llama.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama.cpp could not read {n_tokens} tokens: llama_decode returned {status}")

    def _logits(self) -> np.ndarray:
        """Returns the last token's logits; waits for them."""
        row = self._llama.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(row, shape=(self.n_vocab,))


def _bytes(array: np.ndarray) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def make_engine(**options: Any) -> LlamaEngine:
    try:
        import llama_cpp
    except ImportError as error:
        raise RuntimeError(
            f"{error}: run `make bench`, pip install '.[bench]', or name an interpreter that has it with --llama-python"
        ) from None
    return LlamaEngine(llama_cpp, **options)


if __name__ == "__main__":
    serve(make_engine)
