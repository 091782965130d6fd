"""Saves a session whole where it was not kept as it went: from RAM, or from a file that dies with the process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pyggml_repkv.engine.saver import n_ring
from pyggml_repkv.engine.session_store import Checkpoint, Commit, SessionStore
from pyggml_repkv.engine.step import Stepper
from pyggml_repkv.errors import InputError
from pyggml_repkv.memory.checkpoints import Checkpoints

OpenStore = Callable[[Path, Checkpoints], SessionStore]
"""Opens a directory for a memory."""


def is_kept_in(store: SessionStore | None, directory: str | os.PathLike[str]) -> bool:
    """Whether a directory is that of a store. Raises InputError for what is no name of one."""
    if not os.fspath(directory) or "\0" in os.fspath(directory):
        raise InputError(f"{os.fspath(directory)!r} is no name of a directory")
    return store is not None and Path(directory).resolve() == store.folder.resolve()


def save_copy(stepper: Stepper, folder: Path, open_store: OpenStore | None, extra: dict[str, Any]) -> None:
    """Everything that was read, into a directory that has no session yet.

    Raises InputError where that cannot be, StoreError where it cannot be written; then nothing is left that `resume`
    takes up.
    """
    checkpoints = stepper.policy.checkpoint()
    if checkpoints is None or open_store is None:
        raise InputError(f"--kv {stepper.policy.name} cannot be saved")
    stepper.check_whole()
    if stepper.n_past == 0:
        raise InputError("the session is empty: there is nothing to save")
    checkpoints.check_copy()
    with contextlib.closing(open_store(folder, checkpoints)) as store:
        if store.checkpoints():
            raise InputError(f"{folder} has a session already: give another directory")
        _write(checkpoints, store, stepper, extra)


def _write(checkpoints: Checkpoints, store: SessionStore, stepper: Stepper, extra: dict[str, Any]) -> None:
    n_past = stepper.n_past
    blocks = checkpoints.copy_blocks(store.blocks)
    ring = store.n_ring(n_ring(checkpoints))
    window = store.window(0, checkpoints.entry_bytes, checkpoints.n_sink, ring)
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
