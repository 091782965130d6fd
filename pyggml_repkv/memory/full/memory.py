"""`--kv full`: every token is kept and attended, as llama.cpp does."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import ComputeError, InputError
from pyggml_repkv.ffi.context import Tensor
from pyggml_repkv.ffi.library import g
from pyggml_repkv.memory.bounded.rotation import rotate_rows
from pyggml_repkv.memory.cache_types import GGML_CACHE_TYPES, check_cache_types
from pyggml_repkv.memory.centres import KeyCentres
from pyggml_repkv.memory.config import MEMORY_FIELDS, context_length
from pyggml_repkv.memory.full.attention import ChunkAttention, FlashAttention, OneAttention, SoftmaxAttention
from pyggml_repkv.memory.policy import (
    NO_DISK,
    DiskNeed,
    Form,
    PolicyInputs,
    StepAttention,
    StepCost,
    StepShape,
    even_split,
)
from pyggml_repkv.memory.store.arenas import Arenas, Rows, as_rows
from pyggml_repkv.ops.makers import Ops

# llama.cpp's padding of the attended length: ggml's kernels split their work by it, so equal padding is what makes the
# sums come out bit for bit the same.
N_KV_STEP = 256


class FullMemory:
    """One arena of keys and one of values per layer, [n_cells, K * d]; the token at position p lives in row p.

    Without flash attention values are kept transposed, [K * d, n_cells], so that they are multiplied where they lie.
    """

    name: ClassVar[str] = "full"
    forms: ClassVar[frozenset[Form]] = frozenset(("ggml", "one", "packed"))
    bounded: ClassVar[bool] = False
    rewinds: ClassVar[bool] = True
    evicts: ClassVar[bool] = False
    ignores: ClassVar[frozenset[str]] = frozenset(MEMORY_FIELDS)
    precise_rope: ClassVar[bool] = False
    writes = frozenset(("cache_k", "cache_v"))

    def __init__(self, inputs: PolicyInputs) -> None:
        memory, config = inputs.memory, inputs.config
        self._inputs, self.config = inputs, config
        self.n_ctx = context_length(memory, config.n_ctx_train, bounded=False)
        # Rows beyond n_ctx are never written; they pad the attended length.
        self.n_cells = -(-self.n_ctx // N_KV_STEP) * N_KV_STEP
        self._flash = memory.flash_attn
        check_cache_types(config, memory)
        types = GGML_CACHE_TYPES[memory.type_k], GGML_CACHE_TYPES[memory.type_v]
        self._bytes_per_token = config.n_layer * sum(g.ggml_row_size(t, config.n_embd_kv) for t in types)
        _check_memory(self._bytes_per_token * self.n_cells, self.n_ctx)
        self.centres = KeyCentres(config, memory, inputs.rope, inputs.key_biases, self.n_cells)
        self._arenas = inputs.arenas or Arenas(2 * config.n_layer)
        k_shape = (self.n_cells, config.n_embd_kv)
        v_shape = k_shape if self._flash else k_shape[::-1]

        def arena(type_: int, shape: tuple[int, int], name: str) -> Tensor:
            return self._arenas.new(type_, shape, name, rows=lambda n_past: Rows(n_past, n_past))

        self.k_arenas = [arena(types[0], k_shape, f"cache_k_l{i}") for i in range(config.n_layer)]
        self.v_arenas = [arena(types[1], v_shape, f"cache_v_l{i}") for i in range(config.n_layer)]

    def split(self, n_tokens: int, n_batch: int) -> list[int]:
        return even_split(n_tokens, n_batch)

    def begin_step(self, tokens: NDArray[np.int32], n_past: int) -> None:
        """Nothing to do: the rows are there."""

    def step_shape(self, n_past: int, n_tokens: int, preferred: Form) -> StepShape:
        if self._flash and preferred != "ggml":
            # The fused ops read exactly the rows there are, so one graph serves every length.
            return StepShape(n_tokens, preferred, None)
        n_kv = -(-(n_past + n_tokens) // N_KV_STEP) * N_KV_STEP
        return StepShape(n_tokens, "ggml", min(n_kv, self.n_cells))

    def build(self, ops: Ops, shape: StepShape) -> StepAttention:
        if shape.form == "one":
            return OneAttention(self, ops)
        if shape.form == "packed":
            return ChunkAttention(self, ops, shape.n_tokens)
        assert isinstance(shape.memory, int)
        kind = FlashAttention if self._flash else SoftmaxAttention
        return kind(self, ops, shape.n_tokens, shape.memory)

    def cost(self, n_past: int, n_tokens: int) -> StepCost:
        return StepCost(n_past + (n_tokens + 1) // 2)

    def undo_step(self, n_past: int) -> None:
        """Nothing to do: rows beyond n_past are written again before they are read."""

    def bytes_at(self, n_tokens: int) -> dict[str, int]:
        return {"keys and values": self._bytes_per_token * min(n_tokens, self.n_ctx)}

    def disk_need(self, n_tokens: int) -> DiskNeed | None:
        return None

    def repeat(self, n: int, n_past: int) -> None:
        """For benchmarks: the first n rows, over and over, up to n_past. Keys less their bias are rotated to their new
        positions, where their bias is added; others keep the rotation that they have.
        """
        source = np.arange(n, n_past) % n
        for keys in self.k_arenas if not self._flash else self.k_arenas + self.v_arenas:
            rows = as_rows(keys)
            rows[n:n_past] = rows[source]
        for values in self.v_arenas if not self._flash else ():
            columns = as_rows(values).reshape(self.config.n_embd_kv, self.n_cells, -1)
            columns[:, n:n_past] = columns[:, source]
        centred = [keys for layer, keys in enumerate(self.k_arenas) if self.centres.of(layer)]
        for first in range(n, n_past, n) if centred else ():
            table = self._inputs.rope(np.array([first])) / self._inputs.rope(np.zeros(1))[0, 0]  # YaRN's factor is in
            for keys in centred:
                rotate_rows(self.config, keys, first, np.tile(table[:, 0], (min(n, n_past - first), 1)))

    def stats(self, n_past: int) -> dict[str, object]:
        return {
            "policy": self.name,
            "blocks": 0,
            "selected": 0,
            "resident_bytes": self._bytes_per_token * n_past,
            "ram_bytes": 0,
            **NO_DISK,
        }

    def checkpoint(self) -> None:
        """Such a session cannot be kept."""

    def rewind(self, n_past: int) -> None:
        # Rows that a fork shares are written again.
        for arena in (*self.k_arenas, *self.v_arenas):
            self._arenas.thaw(arena)

    def fresh(self) -> FullMemory:
        return type(self)(replace(self._inputs, arenas=None))

    def fork(self, n_past: int) -> FullMemory:
        if not self._flash:
            raise InputError("-fa off keeps values transposed, which cannot be forked: leave it out")
        return type(self)(replace(self._inputs, arenas=self._arenas.fork(n_past)))

    def close(self) -> None:
        self._arenas.close()


def _check_memory(n_bytes: int, n_ctx: int) -> None:
    """Linux promises memory that it does not have and kills the process that uses it, so ask first."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if n_bytes > total:
        raise ComputeError(
            f"keys and values of {n_ctx} tokens need {n_bytes / 2**30:.1f} GiB and this machine has "
            f"{total / 2**30:.1f}: use a smaller -c, or -ctk q8_0 -ctv q8_0"
        )
