"""What of a RepKV memory must be saved so that it can go on elsewhere: plain arrays, taken between two steps.

Blocks on disk are not part of it: each carries its own entries of the index (`pack_block`, `unpack_block`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import StoreError
from pyggml_repkv.graph.memory_ops import LANES
from pyggml_repkv.memory.arenas import as_rows
from pyggml_repkv.memory.block_file import BlockHeader
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.model.config import ModelConfig

if TYPE_CHECKING:
    from pyggml_repkv.memory.repkv import RepKVMemory


@dataclass(frozen=True, slots=True)
class RepKVState:
    """After n_past tokens. scores: float32 [n_layer, n_past - sealed_end, K]; far_at: n_past when older tokens began to
    be seen from one distance, 0 from the start, -1 not yet; warm: int32 [n_layer, n], blocks worth fetching first;
    kept: int32 [n_layer, 1 or K, 1 + n], what the last token selected if the next one holds on to it, else empty.
    """

    n_past: int
    sealed_end: int
    n_blocks: int
    far_at: int
    scores: NDArray[np.float32]
    warm: NDArray[np.int32]
    kept: NDArray[np.int32]


def entry_bytes(memory: RepKVMemory) -> int:
    """Bytes of a token's rows."""
    k_bytes, v_bytes = (as_rows(arena).shape[1] for arena in (memory.k_store[0], memory.v_store[0]))
    return memory.config.n_layer * (2 * k_bytes + v_bytes)


def extra_bytes(config: ModelConfig, memory: MemoryConfig) -> int:
    """Bytes that `pack_block` takes."""
    type_bytes = 4 if memory.type_k == "f32" else 2
    return config.n_layer * config.n_head_kv * memory.n_repr * (4 + config.head_dim * type_bytes)


def take_state(memory: RepKVMemory, n_past: int) -> RepKVState:
    """A copy."""
    end, n_layer = memory.blocks.sealed_end, memory.config.n_layer
    scores = np.stack([s[end:n_past] for s in memory.scores]) if n_past > end else np.empty((n_layer, 0, 0), np.float32)
    disk = memory.disk
    warm = np.stack([disk.store.resident(i) for i in range(n_layer)]) if disk else np.empty((n_layer, 0), np.int32)
    return RepKVState(n_past, end, memory.blocks.n_blocks, memory.far_at, scores, warm, memory.kept_selection)


def take_rows(memory: RepKVMemory, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Tokens that no block holds: uint8 [n, entry_bytes]."""
    rows = np.zeros((len(positions), entry_bytes(memory)), np.uint8)
    store = _store_rows(memory, positions)
    in_window = positions >= memory.local_base
    local = positions[in_window] - memory.local_base
    at = 0
    for k_store, v_store, k_local in zip(memory.k_store, memory.v_store, memory.k_local, strict=True):
        for arena in (k_store, v_store):
            values = as_rows(arena)
            rows[:, at : at + values.shape[1]] = values[store]
            at += values.shape[1]
        values = as_rows(k_local)
        rows[in_window, at : at + values.shape[1]] = values[local]
        at += values.shape[1]
    return rows


def put_rows(memory: RepKVMemory, first: int, rows: NDArray[np.uint8]) -> None:
    """The reverse, into store and, as far as they belong there, window."""
    positions = np.arange(first, first + len(rows))
    store = _store_rows(memory, positions)
    in_window = positions >= memory.local_base
    local = positions[in_window] - memory.local_base
    at = 0
    for i in range(memory.config.n_layer):
        k_bytes, v_bytes = (as_rows(a).shape[1] for a in (memory.k_store[i], memory.v_store[i]))
        k, v, rotated = np.split(rows[:, at : at + 2 * k_bytes + v_bytes], (k_bytes, k_bytes + v_bytes), axis=1)
        as_rows(memory.k_store[i])[store], as_rows(memory.v_store[i])[store] = k, v
        as_rows(memory.k_local[i])[local], as_rows(memory.v_local[i])[local] = rotated[in_window], v[in_window]
        at += 2 * k_bytes + v_bytes


def _store_rows(memory: RepKVMemory, positions: NDArray[np.integer]) -> NDArray[np.integer]:
    return np.where(positions < memory.memory.n_sink, positions, positions - memory.store_base)


def pack_block(memory: RepKVMemory, block: int) -> bytes:
    """What a block's header carries: its representatives, then its entries of the index, layer by layer."""
    keys = [index[block // LANES, ..., block % LANES].tobytes() for index in memory.index_arrays]
    return memory.chosen[block].tobytes() + b"".join(keys)


def unpack_block(memory: RepKVMemory, block: int, header: BlockHeader) -> None:
    """Puts them back. Raises StoreError where they do not fit."""
    n_layer, n_head_kv, n_repr, d = memory.config.n_layer, *memory.block_shape
    dtype = memory.index_arrays[0].dtype
    n_chosen = 4 * n_layer * n_head_kv * n_repr
    if len(header.extra) != n_chosen + n_layer * n_head_kv * n_repr * d * dtype.itemsize:
        raise StoreError(f"block {block} carries an index of another shape")
    memory.chosen[block] = np.frombuffer(header.extra[:n_chosen], np.int32).reshape(memory.chosen.shape[1:])
    keys = np.frombuffer(header.extra[n_chosen:], dtype).reshape(n_layer, n_head_kv, n_repr, d)
    for index, values in zip(memory.index_arrays, keys, strict=True):
        index[block // LANES, ..., block % LANES] = values
