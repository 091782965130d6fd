"""Saves a session as it goes: takes what is new between two steps, and writes it in a thread meanwhile."""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.engine.session_store import Checkpoint, Commit, SessionStore
from pyggml_repkv.errors import ComputeError, RepkvError, StoreError
from pyggml_repkv.memory.blocks import parse_block
from pyggml_repkv.memory.boundaries import LOOKAHEAD
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.disk_tier import DiskTier
from pyggml_repkv.memory.repkv import RepKVMemory
from pyggml_repkv.memory.repkv_state import entry_bytes, put_rows, take_rows, take_state
from pyggml_repkv.memory.window_file import WindowFile

log = logging.getLogger(__name__)

# Single tokens are saved so many at a time: a process that is killed loses at most these and those of the save before.
SAVE_EVERY = 32

# How far behind its end a session can go back to without reading everything again, at least.
N_BACK = 1024


def ring_tokens(m: MemoryConfig) -> int:
    """Of the window file: what the newest checkpoint needs must outlast what the next one writes; and what older ones
    need, N_BACK more.
    """
    return m.n_local + parse_block(m.block).max_size + LOOKAHEAD + 3 * max(m.n_batch, SAVE_EVERY) + N_BACK


class _Save(threading.Thread):
    """One save. Not a daemon, so that a process ends only when it is written; it holds nothing of the session."""

    def __init__(self, disk: DiskTier, store: SessionStore, commit: Commit, window: WindowFile, spacing: int) -> None:
        super().__init__(name="repkv-save")
        self._disk, self._store, self._commit = disk, store, commit
        self._window, self._spacing = window, spacing
        self.error: RepkvError | None = None

    def run(self) -> None:
        try:
            self._disk.store.flush()
            self._store.commit(self._commit, self._window, self._spacing)
        except RepkvError as error:
            self.error = error
        except Exception as error:
            self.error = StoreError(f"{self._store.folder}: {error}", lost=False)


class Saver:
    """Of one memory and one directory. `saved`: up to which token saves were begun."""

    def __init__(self, store: SessionStore, memory: RepKVMemory) -> None:
        assert memory.disk is not None
        self.store, self._memory, self._disk = store, memory, memory.disk
        self.saved = 0
        self._n_blocks_saved = 0
        self._window_number = 0
        self._far_at = memory.far_at
        self._window = self._open_window()
        self._save: _Save | None = None
        self._error: RepkvError | None = None

    def _open_window(self) -> WindowFile:
        m = self._memory.memory
        n_ring = self.store.keep_meta("n_ring", ring_tokens(m))
        return self.store.window(self._window_number, entry_bytes(self._memory), m.n_sink, n_ring)

    def restore(self, n_past: int, tokens: NDArray[np.int32]) -> Checkpoint:
        """Puts a checkpoint into the empty memory. Raises StoreError.

        What came after it is forgotten with the next save.
        """
        memory = self._memory
        checkpoint = self.store.load(n_past, memory.config.n_layer)
        state = checkpoint.state
        headers = self.store.headers(state.n_blocks, self._disk.layout.header_bytes)
        self._window.close()
        self._window_number = checkpoint.window
        self._window = self._open_window()
        n_sink = min(memory.memory.n_sink, n_past)
        parts = [(0, self._window.read(0, n_sink))] if n_sink else []
        if n_past > state.sealed_end:
            parts.append((state.sealed_end, self._window.read(state.sealed_end, n_past)))
        memory.restore(state, headers, tokens[state.sealed_end :].tolist())
        for first, rows in parts:
            put_rows(memory, first, rows)
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
        memory = self._memory
        if memory.torn:
            raise ComputeError("the memory was stopped while it was being rearranged: it is not saved")
        first_row = self.saved
        if memory.far_at != self._far_at:
            # All keys were turned back: the checkpoint before still needs the file that holds them as they were.
            self._window.close()
            self._window_number += 1
            self._window = self._open_window()
            self._far_at, first_row = memory.far_at, 0
        commit = self._take(n_past, first_row, tokens, steps, logits, extra)
        self._save = _Save(self._disk, self.store, commit, self._window, memory.memory.n_batch)
        self.saved, self._n_blocks_saved = n_past, memory.blocks.n_blocks
        self._save.start()
        return True

    def _take(
        self, n_past: int, first_row: int, tokens: NDArray[np.int32], steps: list[int],
        logits: NDArray[np.float32] | None, extra: dict[str, Any],
    ) -> Commit:  # fmt: skip
        memory = self._memory
        state = take_state(memory, n_past)
        # Sinks, and what no block holds.
        positions = np.arange(first_row, n_past)
        positions = positions[(positions < memory.memory.n_sink) | (positions >= state.sealed_end)]
        bounds, offsets = memory.blocks.bounds, self._disk.store.offsets
        first_block = self._n_blocks_saved
        blocks = [(b, bounds[b], bounds[b + 1] - bounds[b], offsets[b]) for b in range(first_block, state.n_blocks)]
        checkpoint = Checkpoint(state, self._window_number, logits, extra)
        rows = take_rows(memory, positions)
        return Commit(
            checkpoint, positions, rows, self.saved, tokens, np.array(steps, np.int32), first_block, blocks
        )  # fmt: skip

    def finish(self) -> None:
        """Waits for the last save. Raises StoreError where one failed."""
        if self._save is not None:
            # In portions, so that Ctrl-C is heard.
            while self._save.is_alive():
                self._save.join(0.2)
            self._error = self._error or self._save.error
            self._save = None
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
