"""Saves a session whole where it was not kept as it went: from RAM, or from a file that dies with the process."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyggml_repkv.engine.saver import n_ring
from pyggml_repkv.engine.session_store import Checkpoint, Commit, SessionStore
from pyggml_repkv.engine.step import Stepper
from pyggml_repkv.memory.checkpoints import Checkpoints


def save_copy(checkpoints: Checkpoints, store: SessionStore, stepper: Stepper, extra: dict[str, Any]) -> None:
    """Everything that was read, into a directory that has no session yet.

    Raises StoreError or InputError where it cannot be written; nothing that `resume` takes up is left then.
    """
    n_past = stepper.n_past
    blocks = checkpoints.copy_blocks(store.blocks)
    window = store.window(
        0, checkpoints.entry_bytes, checkpoints.n_sink, store.keep_meta("n_ring", n_ring(checkpoints))
    )
    try:
        positions = checkpoints.open_positions(0, n_past)
        commit = Commit(
            Checkpoint(checkpoints.take(n_past), 0, stepper.logits, extra), positions, checkpoints.rows(positions),
            first_token=0, tokens=np.array(stepper.tokens[:n_past], np.int32), steps=np.array(stepper.sizes, np.int32),
            first_block=0, blocks=blocks,
        )  # fmt: skip
        store.commit(commit, window, checkpoints.n_batch)
    finally:
        window.close()
