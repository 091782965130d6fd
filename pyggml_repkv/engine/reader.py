"""Reads tokens for a session: where there is room, after what was lost is made again, and saved where it is kept."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.engine.checks import Room, check_fits
from pyggml_repkv.engine.exclusive import check_open
from pyggml_repkv.engine.keeper import Keeper
from pyggml_repkv.engine.step import Stepper
from pyggml_repkv.errors import InputError, StoreError
from pyggml_repkv.graph.decoder import Outputs
from pyggml_repkv.graph.head import slices

log = logging.getLogger(__name__)


class Reader:
    """Of one stepper, its keeper if it has one, and steps of at most n_batch tokens. `begun`: whether the memory has
    tokens, or had.
    """

    def __init__(
        self, stepper: Stepper, keeper: Keeper | None, n_ctx_train: int, n_batch: int, closing: threading.Event
    ) -> None:
        """n_ctx_train: of the model; closing: is set when no further step shall begin."""
        self._stepper, self._keeper, self._closing = stepper, keeper, closing
        self._n_ctx_train, self._n_batch = n_ctx_train, n_batch
        self.begun = stepper.n_past > 0
        self._room = Room()

    def step(
        self, chunk: NDArray[np.int32], outputs: Outputs, head_rows: Collection[int] = ()
    ) -> NDArray[np.float32] | None:
        """As Stepper.step. Raises InputError where the session is closed, ContextFullError before anything is read."""
        stepper = self._stepper
        check_open(self._closing)
        check_fits(stepper.policy, len(chunk), stepper.n_past, self._n_ctx_train)
        # One token's logits are cheaper than a second plan without them.
        outputs = "all" if len(chunk) == 1 else outputs
        self._room.check(stepper.policy, stepper.n_past, stepper.n_past + len(chunk))
        if self._keeper is not None and not self.begun:
            self._keeper.start_over()
        self.begun = True
        again = stepper if self._keeper is None else self._keeper
        if stepper.lost:
            again.read_again()
        try:
            made = stepper.step(chunk, outputs, head_rows)
        except StoreError as error:
            if not error.lost:
                raise
            log.warning("%s: reading its %d tokens again", error, stepper.n_past)
            again.read_again()
            made = stepper.step(chunk, outputs, head_rows)
        if outputs != "hidden":
            self._save(len(chunk))
        return made

    def _save(self, n_tokens: int) -> None:
        if self._keeper is not None:
            self._keeper.stepped(n_tokens)

    def slices(self, ids: NDArray[np.int32], first: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """See Session.prefill_slices."""
        return self._slices(ids, first, self._stepper.n_changes)

    def _slices(
        self, ids: NDArray[np.int32], first: int, n_changes: int
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:  # fmt: skip
        """n_changes: the stepper's, when it was judged that the tokens fit."""
        stepper = self._stepper
        for begin in range(0, len(ids), self._n_batch):
            chunk = ids[begin : begin + self._n_batch]
            skipped = max(0, first - begin)
            self._check_unchanged(n_changes)
            if skipped >= len(chunk):
                self.step(chunk, "none")
                n_changes = stepper.n_changes
                continue
            # A tracer sees a step as one graph.
            if len(chunk) == 1 or stepper.plans.traced:
                logits = self.step(chunk, "all")
                assert logits is not None
                n_changes = stepper.n_changes
                yield begin + skipped, logits[skipped:]
                continue
            parts = list(slices(len(chunk), skipped))
            hidden = self.step(chunk, "hidden", {end - start for start, end in parts})
            assert hidden is not None
            n_changes = stepper.n_changes
            for start, end in parts:
                self._check_unchanged(n_changes)
                rows = stepper.logits_of(hidden, start, end)
                if end == len(chunk):
                    # Only now, so that the save has the last token's.
                    self._save(len(chunk))
                at = max(start, skipped)
                yield begin + at, rows[at - start :]

    def _check_unchanged(self, n_changes: int) -> None:
        check_open(self._closing)
        if self._stepper.n_changes != n_changes:
            raise InputError("the session was used since the last slice")
