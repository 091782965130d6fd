"""Where a bounded memory sees older tokens: at their true positions, all from one distance (far positions), or side by
side in their order (ordered positions).

With far and ordered positions stored keys are as before RoPE. Queries that meet far ones are rotated by one distance,
n_local; so no stored key is ever rotated again however long the sequence grows. Ordered ones are rotated when they are
attended: the n that a key head attends stand at the n positions before the window, so only distances between tokens
that are attended count, and these stay small.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.ffi.context import Tensor
from pyggml_repkv.ffi.library import native, native_ffi
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.store.arenas import as_rows
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.rope import RopeTable

# Positions whose table is made at once: it is made in float64.
_AT_ONCE = 4096


class Rotation:
    """`far_at` is n_past when keys began to be stored before RoPE: 0 from the start, -1 not yet. Tables are [rope_dim]:
    cosines, then sines. order: a struct repkv_order, as far back as `order_from` was asked for; None: positions are not
    ordered.
    """

    def __init__(
        self, config: ModelConfig, memory: MemoryConfig, rope: RopeTable, long: bool | None, *, far: bool | None = None
    ) -> None:
        """long: whether the sequence will outgrow the trained context; far: from the start; None: as settings say."""
        self._config, self._memory, self._rope = config, memory, rope
        # Pass keys were found less often where the first part of a text was read in one way and the rest in the other.
        self.long = memory.positions == "auto" and memory.n_ctx > config.n_ctx_train if long is None else long
        self.far = memory.positions in ("far", "ordered") or self.long if far is None else far
        self.far_at = 0 if self.far else -1
        self.order = native_ffi.new("struct repkv_order *") if memory.positions == "ordered" else None
        self._order_keys = np.empty((0, config.rope_dim), np.float32)
        self._order_query = np.empty(config.rope_dim, np.float32)

    def order_from(self, position: int, n_older: int) -> None:
        """Older tokens stand before `position` in the next step, at most n_older of them."""
        if self.order is None:
            return
        if n_older > len(self._order_keys):
            n = max(n_older, 2 * len(self._order_keys))
            self._order_keys = np.ascontiguousarray(self._rope(-1 - np.arange(n)).T)
        # Near queries have YaRN's factor already; cos(0) is it.
        self._order_query[...] = self.near_table(-position) / self.near_table(0)[0]
        self.order.keys = native_ffi.cast("float *", self._order_keys.ctypes.data)
        self.order.query = native_ffi.cast("float *", self._order_query.ctypes.data)

    def outgrown(self, n_tokens: int) -> bool:
        """Whether older tokens must be far from now on, for a sequence of n_tokens."""
        return not self.far and self._memory.positions == "auto" and n_tokens > self._config.n_ctx_train

    @cached_property
    def far_table(self) -> NDArray[np.float32]:
        """Of the one distance at which everything beyond the window is seen."""
        tables = self._rope(np.array([0, self._memory.n_local]))
        # Stored keys lack the factor that YaRN puts on both sides of a rotated product; cos(0) has it.
        return tables[:, 1] * tables[0, 0]

    def near_table(self, position: int) -> NDArray[np.float32]:
        """Of a token in the window."""
        return self._rope(np.array([position]))[:, 0]

    def older_table(self, position: int) -> NDArray[np.float32]:
        """By which the query at a position meets older tokens."""
        return self.far_table if self.far else self.near_table(position)

    def inverse(self, first: int, end: int) -> NDArray[np.float32]:
        """[n, rope_dim]: tables that turn stored keys of positions [first, end) back."""
        return np.concatenate([table for _, table in self._inverses(first, end)])

    def _inverses(self, first: int, end: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        half = self._config.rope_dim // 2
        for at in range(first, end, _AT_ONCE):
            table = np.ascontiguousarray(self._rope(np.arange(at, min(at + _AT_ONCE, end))).T)  # [n, rope_dim]
            table[:, half:] *= -1
            # cos(0) is YaRN's factor, 1 elsewhere: keys were multiplied by it and rotating back multiplies again.
            table /= self.near_table(0)[0] ** 2
            yield at, table

    def turn_back(self, arenas: list[Tensor], first: int, end: int, base: int) -> None:
        """Takes the rotation out of the keys of positions [first, end), at rows from first - base on of each arena."""
        for at, table in self._inverses(first, end):
            for arena in arenas:
                rotate_rows(self._config, arena, at - base, table)


def rotate_rows(config: ModelConfig, arena: Tensor, first: int, tables: NDArray[np.float32]) -> None:
    """Rotates the keys in an arena's rows from `first` on, by halves: one each of tables [n, rope_dim]."""
    rows, tables = as_rows(arena)[first : first + len(tables)], np.ascontiguousarray(tables, np.float32)
    scratch = np.empty(2 * config.n_embd_kv, np.float32)
    native.repkv_rotate_rows(
        native_ffi.cast("char *", rows.ctypes.data), int(arena.contents.type), rows.strides[0], len(rows),
        config.n_head_kv, config.head_dim, native_ffi.cast("float *", tables.ctypes.data), config.rope_dim,
        native_ffi.cast("float *", scratch.ctypes.data),
    )  # fmt: skip


def rotated(q: NDArray[np.float32], table: NDArray[np.float32]) -> NDArray[np.float32]:
    """q [..., d] by a table [rope_dim], or one each: pairs (i, i + rope_dim / 2)."""
    half = table.shape[-1] // 2
    a, b, rest = q[..., :half], q[..., half : 2 * half], q[..., 2 * half :]
    cosine, sine = table[..., :half], table[..., half:]
    return np.concatenate((a * cosine - b * sine, a * sine + b * cosine, rest), -1, dtype=np.float32)
