"""Saves a session as it goes: takes what is new between two steps, and writes it in a thread meanwhile."""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.engine.session_store import Checkpoint, Commit, SessionStore
from pyggml_repkv.errors import RepkvError, StoreError
from pyggml_repkv.memory.checkpoints import Checkpoints
from pyggml_repkv.memory.store.window_file import WindowFile

log = logging.getLogger(__name__)

# Single tokens are saved so many at a time: a process that is killed loses at most these and those of the save before.
SAVE_EVERY = 32


def n_ring(checkpoints: Checkpoints) -> int:
    """How many open tokens the window file holds."""
    return checkpoints.n_ring(max(checkpoints.n_batch, SAVE_EVERY))


class _Save(threading.Thread):
    """One save. Not a daemon, so that a process ends only when it is written; it holds nothing of the session."""

    def __init__(self, checkpoints: Checkpoints, store: SessionStore, commit: Commit, window: WindowFile) -> None:
        super().__init__(name="repkv-save")
        self._flush, self._spacing = checkpoints.flush, checkpoints.n_batch
        self._store, self._commit, self._window = store, commit, window
        self.error: RepkvError | None = None

    def run(self) -> None:
        try:
            self._flush()
            self._store.commit(self._commit, self._window, self._spacing)
        except RepkvError as error:
            self.error = error
        except Exception as error:
            self.error = StoreError(f"{self._store.folder}: {error}", lost=False)


class Saver:
    """Of one memory and one directory. `saved`: up to which token saves were begun."""

    def __init__(self, store: SessionStore, checkpoints: Checkpoints) -> None:
        self.store, self._checkpoints = store, checkpoints
        self.saved = 0
        self._n_blocks_saved = 0
        self._window_number = 0
        self._far_at = checkpoints.far_at
        self._window = self._open_window()
        self._save: _Save | None = None
        self._error: RepkvError | None = None

    def _open_window(self) -> WindowFile:
        checkpoints = self._checkpoints
        ring = self.store.n_ring(n_ring(checkpoints))
        return self.store.window(self._window_number, checkpoints.entry_bytes, checkpoints.n_sink, ring)

    def restore(self, n_past: int, tokens: NDArray[np.int32]) -> Checkpoint:
        """Puts a checkpoint into the empty memory. Raises StoreError.

        What came after it is forgotten with the next save.
        """
        checkpoints = self._checkpoints
        checkpoint = self.store.load(n_past, checkpoints.n_layer)
        state = checkpoint.state
        headers = self.store.headers(state.n_blocks, checkpoints.header_bytes)
        self._window.close()
        self._window_number = checkpoint.window
        self._window = self._open_window()
        n_sink = min(checkpoints.n_sink, n_past)
        parts = [(0, self._window.read(0, n_sink))] if n_sink else []
        if n_past > state.sealed_end:
            parts.append((state.sealed_end, self._window.read(state.sealed_end, n_past)))
        checkpoints.restore(state, headers, tokens[state.sealed_end :].tolist())
        for first, rows in parts:
            checkpoints.put_rows(first, rows)
        self.saved = n_past
        self._n_blocks_saved, self._far_at = state.n_blocks, state.far_at
        return checkpoint

    def offer(
        self, n_past: int, tokens: NDArray[np.int32], steps: list[int], logits: NDArray[np.float32] | None,
        extra: dict[str, Any], *, wait: bool,
    ) -> bool:  # fmt: skip
        """Saves, if the save before is done or `wait` says to wait for it -> whether it did.

        tokens, steps: those read since `saved`; extra: what the caller wants to find again. Raises StoreError where a
        save failed, then and from then on; ComputeError where the memory was stopped halfway.
        """
        if self._save is not None and self._save.is_alive() and not wait:
            return False
        self.finish()
        checkpoints = self._checkpoints
        checkpoints.check()
        first_row = self.saved
        if checkpoints.far_at != self._far_at:
            # All keys were turned back: the checkpoint before still needs the file that holds them as they were.
            self._window.close()
            self._window_number += 1
            self._window = self._open_window()
            self._far_at, first_row = checkpoints.far_at, 0
        checkpoint = Checkpoint(checkpoints.take(n_past), self._window_number, logits, extra)
        positions = checkpoints.open_positions(first_row, n_past)
        commit = Commit(
            checkpoint, positions, checkpoints.rows(positions), self.saved, tokens, np.array(steps, np.int32),
            self._n_blocks_saved, checkpoints.blocks_from(self._n_blocks_saved),
        )  # fmt: skip
        self._save = _Save(checkpoints, self.store, commit, self._window)
        self.saved, self._n_blocks_saved = n_past, checkpoints.n_blocks
        self._save.start()
        return True

    def finish(self) -> None:
        """Waits for the last save. Raises StoreError where one failed."""
        save = self._save
        if save is not None:
            # In portions, so that Ctrl-C is heard.
            while save.is_alive():
                save.join(0.2)
            self._error, self._save = self._error or save.error, None
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Waits for the save that is on its way; one that failed without anybody having been told is logged."""
        told = self._error is not None
        try:
            self.finish()
        except RepkvError as error:
            if not told:
                log.warning("%s (what was read since the save before is not kept)", error)
        self._window.close()
