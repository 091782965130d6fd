"""Saves a session whole where it was not kept as it went: from RAM, or from a file that dies with the process."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.engine.saver import ring_tokens
from pyggml_repkv.engine.session_store import Checkpoint, Commit, SessionStore
from pyggml_repkv.errors import ComputeError, InputError
from pyggml_repkv.memory.arenas import as_rows
from pyggml_repkv.memory.block_store import BlockStore, RecordLayout
from pyggml_repkv.memory.blocks import parse_block
from pyggml_repkv.memory.repkv import RepKVMemory
from pyggml_repkv.memory.repkv_state import entry_bytes, extra_bytes, pack_block, take_rows, take_state

Rows = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def check_can_copy(memory: RepKVMemory) -> None:
    """Raises ComputeError for a memory that was stopped halfway, InputError where a copy would not be the same."""
    if memory.torn:
        raise ComputeError("the memory was stopped while it was being rearranged: it is not saved")
    if memory.disk is not None and memory.disk.layout.file_types != memory.disk.layout.types:
        raise InputError("blocks of another --cache-type-evicted would be rounded again: give --session from the start")


def save_copy(
    memory: RepKVMemory, store: SessionStore, tokens: NDArray[np.int32], steps: NDArray[np.int32],
    logits: NDArray[np.float32] | None, extra: dict[str, Any],
) -> None:  # fmt: skip
    """Everything after `tokens`, which `steps` of these sizes read, into a directory that has no session yet.

    Raises StoreError or InputError where it cannot be written; nothing that `resume` takes up is left then.
    """
    n_past = len(tokens)
    blocks = _write_blocks(memory, store)
    state = take_state(memory, n_past)
    sinks = np.arange(min(memory.memory.n_sink, n_past))
    positions = np.concatenate((sinks, np.arange(max(state.sealed_end, len(sinks)), n_past)))
    n_ring = store.keep_meta("n_ring", ring_tokens(memory.memory))
    window = store.window(0, entry_bytes(memory), memory.memory.n_sink, n_ring)
    try:
        checkpoint = Checkpoint(state, 0, logits, extra)
        rows = take_rows(memory, positions)
        store.commit(
            Commit(checkpoint, positions, rows, 0, tokens, steps, 0, blocks), window, memory.memory.n_batch
        )  # fmt: skip
    finally:
        window.close()


def _write_blocks(memory: RepKVMemory, store: SessionStore) -> list[tuple[int, int, int, int]]:
    """-> (block, first position, tokens, offset) of each."""
    config, m, bounds = memory.config, memory.memory, memory.blocks.bounds
    types = m.type_k, m.type_v
    layout = RecordLayout(config, parse_block(m.block).max_size, types, types, extra_bytes(config, m))
    # It only writes: the one slot of each layer, and where blocks would lie, are never looked at.
    places = np.zeros((config.n_layer, max(1, memory.blocks.n_blocks), 2), np.int32)
    nowhere = [0] * config.n_layer
    writer = BlockStore(
        store.blocks, layout, n_slots=1, max_blocks=places.shape[1], n_threads=0, first_row=0, k_rows=nowhere,
        v_rows=nowhere, places=[p.ctypes.data for p in places], debug=False, memory=places,
    )  # fmt: skip
    try:
        for block in range(memory.blocks.n_blocks):
            begin, end = bounds[block : block + 2]
            rows = [_rows(memory, layer, block, begin, end) for layer in range(config.n_layer)]
            k_rows, v_rows = ([r[i].ctypes.data for r in rows] for i in (0, 1))
            writer.put(
                begin, end - begin, rotated=not memory.far, k_rows=k_rows, v_rows=v_rows,
                extra=pack_block(memory, block),
            )  # fmt: skip
        writer.flush()
        return [(b, bounds[b], bounds[b + 1] - bounds[b], offset) for b, offset in enumerate(writer.offsets)]
    finally:
        writer.close()


def _rows(memory: RepKVMemory, layer: int, block: int, begin: int, end: int) -> Rows:
    if memory.disk is not None:
        return memory.disk.store.read(layer, block, end - begin)
    return as_rows(memory.k_store[layer])[begin:end], as_rows(memory.v_store[layer])[begin:end]
