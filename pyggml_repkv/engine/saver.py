"""Saves a session as it goes: takes what is new between two steps, and writes it in a thread of its own meanwhile."""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.engine.session_store import Checkpoint, Commit, SessionStore
from pyggml_repkv.errors import RepkvError, StoreError
from pyggml_repkv.memory.boundaries import LOOKAHEAD
from pyggml_repkv.memory.repkv import RepKVMemory
from pyggml_repkv.memory.repkv_state import entry_bytes, put_rows, take_rows, take_state
from pyggml_repkv.memory.window_file import WindowFile

log = logging.getLogger(__name__)

# Single tokens are saved so many at a time: a process that is killed loses at most these.
SAVE_EVERY = 32

# How far behind its end a session can go back to without reading everything again, at least.
N_BACK = 1024


class Saver:
    """Of one memory and one directory."""

    def __init__(self, store: SessionStore, memory: RepKVMemory) -> None:
        self.store, self._memory = store, memory
        self.saved = self._committed = 0
        self._n_blocks_saved = 0
        self._window_number = 0
        self._far_at = memory.far_at
        self._window = self._open_window()
        self._work: Commit | None = None
        self._wake = threading.Condition()
        self._error: RepkvError | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="repkv-saver", daemon=True)
        self._thread.start()

    def _open_window(self) -> WindowFile:
        m = self._memory.memory
        assert self._memory.disk is not None
        # What the newest checkpoint needs must outlast what the next one writes; and what older ones need, N_BACK more.
        n_ring = m.n_local + self._memory.disk.layout.max_tokens + LOOKAHEAD + 3 * max(m.n_batch, SAVE_EVERY) + N_BACK
        n_ring = self.store.keep_meta("n_ring", n_ring)
        return self.store.window(self._window_number, entry_bytes(self._memory), m.n_sink, n_ring)

    def restore(self, n_past: int, tokens: NDArray[np.int32]) -> Checkpoint:
        """Puts a checkpoint into the empty memory, and forgets what came after it. Raises StoreError."""
        memory = self._memory
        assert memory.disk is not None
        checkpoint = self.store.load(n_past, memory.config.n_layer)
        state = checkpoint.state
        headers = self.store.headers(state.n_blocks, memory.disk.layout.header_bytes)
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
        self.store.rewind(n_past, state.n_blocks)
        self.saved = self._committed = n_past
        self._n_blocks_saved, self._far_at = state.n_blocks, state.far_at
        return checkpoint

    def offer(
        self, n_past: int, tokens: NDArray[np.int32], steps: list[int], logits: NDArray[np.float32] | None,
        extra: dict[str, Any], *, wait: bool,
    ) -> bool:  # fmt: skip
        """Saves, if the save before is done or `wait` says to wait for it -> whether it did.

        tokens, steps: those read since `saved`; extra: what the caller wants to find again. Raises StoreError where a
        save failed.
        """
        with self._wake:
            self._raise_error()
            if self._work is not None:
                if not wait:
                    return False
                self._wait_idle()
            memory = self._memory
            first_row = self.saved
            if memory.far_at != self._far_at:
                # All keys were turned back: the checkpoint before still needs the file that holds them as they were.
                self._window.close()
                self._window_number += 1
                self._window = self._open_window()
                self._far_at, first_row = memory.far_at, 0
            self._work = self._take(n_past, first_row, tokens, steps, logits, extra)
            self.saved = n_past
            self._n_blocks_saved = memory.blocks.n_blocks
            self._wake.notify_all()
        return True

    def _take(
        self, n_past: int, first_row: int, tokens: NDArray[np.int32], steps: list[int],
        logits: NDArray[np.float32] | None, extra: dict[str, Any],
    ) -> Commit:  # fmt: skip
        memory = self._memory
        assert memory.disk is not None
        state = take_state(memory, n_past)
        # Sinks, and what no block holds.
        positions = np.arange(first_row, n_past)
        positions = positions[(positions < memory.memory.n_sink) | (positions >= state.sealed_end)]
        bounds, offsets = memory.blocks.bounds, memory.disk.store.offsets
        blocks = [
            (b, bounds[b], bounds[b + 1] - bounds[b], offsets[b]) for b in range(self._n_blocks_saved, state.n_blocks)
        ]
        checkpoint = Checkpoint(state, self._window_number, logits, extra)
        rows = take_rows(memory, positions)
        return Commit(checkpoint, positions, rows, self.saved, tokens, np.array(steps, np.int32), blocks)

    def finish(self) -> None:
        """Waits for the last save. Raises StoreError where it failed."""
        with self._wake:
            self._wait_idle()
            self._raise_error()

    def _wait_idle(self) -> None:
        while self._work is not None and self._error is None:
            self._wake.wait(0.1)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._wake:
                while self._work is None and not self._stopping:
                    self._wake.wait()
                if self._work is None:
                    return
                work = self._work
            try:
                assert self._memory.disk is not None
                self._memory.disk.store.flush()
                self.store.commit(work, self._window, self._memory.memory.n_batch)
                self._committed = work.checkpoint.state.n_past
            except RepkvError as error:
                self._error = error
            except Exception as error:
                self._error = StoreError(f"{self.store.folder}: {error}", lost=False)
            with self._wake:
                self._work = None
                self._wake.notify_all()

    def close(self) -> None:
        """Waits for the save that is on its way."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        self._thread.join()
        if self._error is not None:
            log.warning("%s (what was read after token %d is not kept)", self._error, self._committed)
        self._window.close()
