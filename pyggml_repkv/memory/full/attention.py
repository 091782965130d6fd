"""The forms in which `full` attends: ggml's flash attention, plain softmax, and the fused ops.

Shapes: T tokens, H query heads, K key/value heads, d head size, n_kv attended rows (a multiple of the padding).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np

from pyggml_repkv.ffi.context import GraphContext, Tensor, set_name
from pyggml_repkv.ffi.handles import tensor_array
from pyggml_repkv.ffi.library import g
from pyggml_repkv.memory.centres import KeyCentres
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.ops.makers import Ops


class Arenas(Protocol):
    config: ModelConfig
    n_cells: int
    centres: KeyCentres
    k_arenas: list[Tensor]
    v_arenas: list[Tensor]


class _MaskedAttention(ABC):
    """What the two forms made of ggml's nodes share: where rows are written, and who sees whom.

    A read takes the result of its write as its source, so no order of nodes can turn them round.
    """

    hook = None
    mask_type: int

    def __init__(self, memory: Arenas, ops: Ops, n_tokens: int, n_kv: int) -> None:
        self._memory, self._ops, self._g = memory, ops, ops.g
        self._n_tokens, self._n_kv = n_tokens, n_kv
        ops.g.keep_alive(memory.centres)
        self._rows = ops.g.input(g.GGML_TYPE_I64, (n_tokens,), "kv_rows")
        self._mask: Tensor = None

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], layer: int) -> Tensor:
        q, k, v = qkv  # [T, H, d], [T, K, d], [T, K, d]
        if self._mask is None:
            self._mask = self._g.input(self.mask_type, (self._n_tokens, self._n_kv), "kq_mask")
        k_arena, v_arena = self._write(k, v, layer)
        q = self._g.swap_rows_and_heads(q)  # [H, T, d]
        return self._weigh(q, self._heads(self._read(k_arena, layer)), v_arena, layer)

    def store(self, qkv: tuple[Tensor, Tensor, Tensor], layer: int) -> None:
        _, k, v = qkv
        self._write(k, v, layer)

    def fill(self, n_past: int) -> None:
        assert n_past + self._n_tokens <= self._n_kv
        tensor_array(self._rows)[...] = np.arange(n_past, n_past + self._n_tokens)
        if self._mask is None:
            return
        mask = tensor_array(self._mask).reshape(self._n_tokens, self._n_kv)
        mask[:, :n_past] = 0
        mask[:, n_past:] = -np.inf
        # A token sees itself and all before it: a triangle after the rows that every token sees.
        for t in range(self._n_tokens):
            mask[t, n_past : n_past + t + 1] = 0

    @abstractmethod
    def _weigh(self, q: Tensor, keys: Tensor, v_arena: Tensor, layer: int) -> Tensor:
        """q [H, T, d], keys [K, n_kv, d] -> [T, H * d]."""

    def _write(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        k = _flat_rows(self._g, k, self._n_tokens, self._memory.config.n_embd_kv)
        centre = self._memory.centres.of(layer)
        if centre:
            k = self._ops.centred(centre).less_bias(self._g.contiguous(k), self._rows)  # [T, K * d]
            set_name(k, "k_less_bias", layer)
        k_written = self._g.expand(self._g.set_rows(self._memory.k_arenas[layer], k, self._rows))
        return k_written, self._write_values(self._memory.v_arenas[layer], v)

    def _read(self, k_arena: Tensor, layer: int) -> Tensor:
        """The written arena -> keys [at least n_kv, K * d]."""
        centre = self._memory.centres.of(layer)
        if not centre:
            return k_arena
        shape = self._n_kv, self._memory.config.n_embd_kv
        stored = self._g.view(k_arena, shape, (k_arena.contents.nb[1],), 0)
        keys = self._ops.centred(centre).with_bias(stored)
        set_name(keys, "k_with_bias", layer)
        return keys

    def _write_values(self, arena: Tensor, v: Tensor) -> Tensor:
        flat = _flat_rows(self._g, v, self._n_tokens, self._memory.config.n_embd_kv)
        return self._g.expand(self._g.set_rows(arena, flat, self._rows))

    def _heads(self, arena: Tensor) -> Tensor:
        """[n_cells, K * d] -> the first n_kv rows as [K, n_kv, d]."""
        config = self._memory.config
        head_bytes = g.ggml_row_size(arena.contents.type, config.head_dim)
        shape = (config.n_head_kv, self._n_kv, config.head_dim)
        return self._g.view(arena, shape, (head_bytes, arena.contents.nb[1]), 0)


class FlashAttention(_MaskedAttention):
    """ggml's flash attention: scores are never stored; its one-row form sums values in F16."""

    mask_type = g.GGML_TYPE_F16

    def _weigh(self, q: Tensor, keys: Tensor, v_arena: Tensor, layer: int) -> Tensor:
        config = self._memory.config
        out = self._g.flash_attn(q, keys, self._heads(v_arena), self._mask, config.head_dim**-0.5)  # [T, H, d]
        return self._g.reshape(out, (self._n_tokens, config.n_embd_q))


class SoftmaxAttention(_MaskedAttention):
    """Scores, softmax and weighted sum as three nodes (`-fa off`), in llama.cpp's form with transposed values."""

    mask_type = g.GGML_TYPE_F32

    def __init__(self, memory: Arenas, ops: Ops, n_tokens: int, n_kv: int) -> None:
        super().__init__(memory, ops, n_tokens, n_kv)
        self._elements = ops.g.input(g.GGML_TYPE_I64, (n_tokens * memory.config.n_embd_kv,), "v_elements")

    def fill(self, n_past: int) -> None:
        super().fill(n_past)
        n_cells, n_embd_kv = self._memory.n_cells, self._memory.config.n_embd_kv
        positions = np.arange(n_past, n_past + self._n_tokens)[:, None]
        tensor_array(self._elements)[...] = (np.arange(n_embd_kv) * n_cells + positions).ravel()

    def _write_values(self, arena: Tensor, v: Tensor) -> Tensor:
        # Rows of one element each: what a scattered write into a transposed arena comes down to.
        n_elements = self._n_tokens * self._memory.config.n_embd_kv
        flat = self._g.reshape(self._g.contiguous(v), (n_elements, 1))
        column = self._g.reshape(arena, (g.ggml_nelements(arena), 1))
        return self._g.expand(self._g.set_rows(column, flat, self._elements))

    def _weigh(self, q: Tensor, keys: Tensor, v_arena: Tensor, layer: int) -> Tensor:
        config, n_cells = self._memory.config, self._memory.n_cells
        kq = self._g.linear(keys, q)  # [H, T, n_kv]
        set_name(kq, "kq", layer)
        kq = self._g.softmax(kq, self._mask, config.head_dim**-0.5)
        set_name(kq, "kq_soft_max", layer)
        value_bytes = g.ggml_element_size(v_arena)
        strides = (value_bytes * n_cells * config.head_dim, value_bytes * n_cells)
        values = self._g.view(v_arena, (config.n_head_kv, config.head_dim, self._n_kv), strides, 0)  # [K, d, n_kv]
        kqv = self._g.linear(values, kq)  # [H, T, d]
        set_name(kqv, "kqv", layer)
        kqv = self._g.contiguous(self._g.swap_rows_and_heads(kqv))  # [T, H, d]
        set_name(kqv, "kqv_out", layer)
        return self._g.reshape(kqv, (self._n_tokens, config.n_embd_q))


class _FusedAttention:
    """The extension's ops: F32 sums, and each key and value is read once for all heads that share it."""

    hook = None

    def __init__(self, memory: Arenas, ops: Ops) -> None:
        self._memory, self._ops = memory, ops
        ops.g.keep_alive(memory.centres)
        self._cells = ops.g.input(g.GGML_TYPE_I32, (2,), "kv_cells")

    def _of(self, layer: int) -> Ops:
        return self._ops.centred(self._memory.centres.of(layer))

    def _arenas(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._memory.k_arenas[layer], self._memory.v_arenas[layer]


class OneAttention(_FusedAttention):
    """One token."""

    def attend(self, qkv: Tensor, layer: int) -> Tensor:
        return self._of(layer).attend(qkv, *self._arenas(layer), self._cells)

    def store(self, qkv: Tensor, layer: int) -> None:
        # One op does both.
        self._ops.g.expand(self.attend(qkv, layer))

    def fill(self, n_past: int) -> None:
        # The cell to write, and how many are before it.
        tensor_array(self._cells)[...] = (n_past, n_past)


class ChunkAttention(_FusedAttention):
    """A chunk, packed."""

    def __init__(self, memory: Arenas, ops: Ops, n_tokens: int) -> None:
        super().__init__(memory, ops)
        self._n_tokens = n_tokens

    def attend(self, qkv: Tensor, layer: int) -> Tensor:
        return self._of(layer).attend_chunk(self._store(qkv, layer), *self._arenas(layer), self._cells)

    def store(self, qkv: Tensor, layer: int) -> None:
        self._ops.g.expand(self._store(qkv, layer))

    def _store(self, qkv: Tensor, layer: int) -> Tensor:
        q = self._of(layer).store_kv(qkv, *self._arenas(layer), self._cells)  # [P, H * d, PANEL]
        set_name(q, "Qcur", layer)
        return q

    def fill(self, n_past: int) -> None:
        # The first cell to write, and the number of tokens.
        tensor_array(self._cells)[...] = (n_past, self._n_tokens)


def _flat_rows(context: GraphContext, x: Tensor, n_tokens: int, width: int) -> Tensor:
    """[T, K, d] -> [T, K * d] without moving data, also where x is a strided part of a wider row."""
    if g.ggml_is_contiguous(x):
        return context.reshape(x, (n_tokens, width))
    return context.view(x, (n_tokens, width), (x.contents.nb[2],), 0)
