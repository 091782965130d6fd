"""Keeps a session in a directory as it goes, and finds what an earlier process kept there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyggml_repkv.engine.saver import SAVE_EVERY, Saver
from pyggml_repkv.engine.session_store import SessionStore, common_prefix
from pyggml_repkv.engine.step import Stepper
from pyggml_repkv.errors import InputError, StoreError

MayResume = Callable[[dict[str, Any]], bool]

log = logging.getLogger(__name__)

# Tokens that another prompt may drop without being asked: the question after a document, not the document.
MAX_DROPPED = 512


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a session went on: tokens read, the logits of the last one if they were saved, and the caller's `extra`;
    read_again: whether the tokens had to be.
    """

    n_past: int
    logits: np.ndarray | None
    extra: dict[str, Any]
    read_again: bool = False


class Keeper:
    """Of one stepper and one directory. `enabled` False: nothing is saved, and what the directory has beyond this point
    may be overwritten.
    """

    def __init__(
        self, stepper: Stepper, store: SessionStore, n_vocab: int, extra: Callable[[], dict[str, object]]
    ) -> None:
        """n_vocab: of the model; extra: what goes with a save, as JSON."""
        self.store, self.enabled, self._n_vocab = store, True, n_vocab
        self._stepper, self._extra = stepper, extra
        self._n_steps_saved = 0
        self._saver = self._new_saver()

    def _new_saver(self) -> Saver:
        checkpoints = self._stepper.policy.checkpoint()
        if checkpoints is None:
            raise InputError(f"--kv {self._stepper.policy.name} cannot be kept in a directory")
        self._n_batch = checkpoints.n_batch
        return Saver(self.store, checkpoints)

    def stepped(self, n_tokens: int) -> None:
        """Called after each step: saves, where enough is new."""
        n_new = self._stepper.n_past - self._saver.saved
        if n_new >= (SAVE_EVERY if n_tokens == 1 else 1):
            # Waiting where the file could not take twice as much without losing what the save before needs.
            self.save(wait=n_new >= max(self._n_batch, SAVE_EVERY))

    def save(self, *, wait: bool, again: bool = False) -> None:
        """again: also where nothing was read since, because what goes with the save may be new. Raises StoreError."""
        stepper, saver = self._stepper, self._saver
        stepper.check_whole()
        if not self.enabled or (stepper.n_past == saver.saved and not again):
            return
        new = np.array(stepper.tokens[saver.saved : stepper.n_past], np.int32)
        sizes = stepper.sizes[self._n_steps_saved :].tolist()
        if saver.offer(stepper.n_past, new, sizes, stepper.logits, self._extra(), wait=wait):
            self._n_steps_saved = len(stepper.sizes)

    def finish(self) -> None:
        """Saves what was read, and waits until it is on disk. Raises StoreError."""
        if self._stepper.n_past > 0:
            self.save(wait=True, again=True)
        self._saver.finish()

    def read_again(self) -> None:
        """As Stepper.read_again; what the directory knows stays until the new memory has all tokens."""
        self._saver.close()
        self._stepper.read_again()
        self._n_steps_saved = 0
        self._saver = self._new_saver()

    def _last_prompt(self) -> tuple[np.ndarray, int]:
        """The directory's tokens, and how many of them are its prompt; the others were generated after it."""
        checkpoints = self.store.checkpoints()
        if not checkpoints:
            return np.empty(0, np.int32), 0
        tokens, _ = self._kept_tokens()
        n_prompt = checkpoints[0][2].get("n_prompt")
        # 0 where tokens were read that nobody called a prompt.
        return tokens, min(len(tokens), n_prompt) if isinstance(n_prompt, int) and n_prompt > 0 else len(tokens)

    def check_keeps(self, prompt: Sequence[int]) -> None:
        """Raises InputError where a prompt that lacks some of the last one would drop more than MAX_DROPPED tokens of
        that one, or as many that were generated after it and more than the two share.

        So a long answer makes way for another question about the same document, and for nothing else.
        """
        tokens, n_prompt = self._last_prompt()
        n_shared = common_prefix(tokens, np.asarray(prompt, np.int64))
        n_generated = len(tokens) - n_prompt
        n_dropped = n_prompt - n_shared
        if n_dropped > MAX_DROPPED or (n_dropped and n_generated > max(MAX_DROPPED, n_shared)):
            raise InputError(
                f"--session {self.store.folder} holds a prompt of {n_prompt} tokens, of which this one shares the "
                f"first {n_shared}, and {n_generated} generated after it: give another directory, or --session-new "
                "(drop=True in Python) to drop the others"
            )

    def start_over(self) -> None:
        """Called where a session is read into without going back. Raises as check_keeps does."""
        self.check_keeps(())
        self._say_dropped(0)

    def _say_dropped(self, n_kept: int) -> None:
        tokens, n_prompt = self._last_prompt()
        dropped = max(0, n_prompt - n_kept), len(tokens) - max(n_prompt, n_kept)
        if any(dropped):
            level = logging.WARNING if max(dropped) > MAX_DROPPED else logging.INFO
            log.log(level, "session: drops %d tokens of its prompt and %d generated ones", *dropped)

    def go_back_to(self, prompt: Sequence[int] | None, may_resume: MayResume, n_ctx: int) -> Resumed:
        """See Session.go_back_to."""
        tokens, sizes = self._kept_tokens()
        prefix = len(tokens) if prompt is None else common_prefix(tokens, np.asarray(prompt, np.int64))
        checkpoints = self.store.checkpoints()
        goes_on = prompt is not None and prefix == len(prompt) and bool(checkpoints) and may_resume(checkpoints[0][2])
        for n_past, has_logits, extra in checkpoints:
            fits = n_past <= prefix and (has_logits or prompt is None or n_past < len(prompt))
            if not fits and not (goes_on and has_logits):
                continue
            if n_past > len(tokens):
                raise InputError(f"--session {self.store.folder}: only {len(tokens)} of {n_past} tokens are known")
            if n_past > n_ctx:
                raise InputError(f"--session {self.store.folder} has {n_past} tokens: give -c {n_past} or more")
            again = not self._restore(tokens[:n_past], sizes)
            self._say_dropped(max(n_past, prefix))
            self._say_read_again(prefix - n_past)
            return Resumed(n_past, self._stepper.logits, extra, again)
        self._say_dropped(prefix)
        self._say_read_again(prefix)
        return Resumed(0, None, {})

    def _say_read_again(self, n_tokens: int) -> None:
        """Where it cannot go back far enough."""
        if n_tokens > MAX_DROPPED:
            log.warning("--session %s has %d more of the tokens, but no save there", self.store.folder, n_tokens)

    def _kept_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        tokens, sizes = self.store.tokens()
        # Its checksums hold against accidents; ggml aborts the process on a token that is not there.
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() < self._n_vocab and sizes.max() <= self._n_batch):
            raise InputError(f"--session {self.store.folder}: its tokens are none of this model, or its steps too long")
        return tokens, sizes

    def _restore(self, tokens: np.ndarray, all_sizes: np.ndarray) -> bool:
        """False: what was kept is damaged, and the tokens were read again."""
        n_past = len(tokens)
        sizes = all_sizes[: int(np.searchsorted(np.cumsum(all_sizes), n_past, side="right"))].tolist()
        if sum(sizes) != n_past:
            raise InputError(f"--session {self.store.folder}: no step ends at its token {n_past}")
        try:
            logits = self._saver.restore(n_past, tokens).logits
            if logits is not None and len(logits) != self._n_vocab:
                raise StoreError(f"{self.store.folder}: the logits after token {n_past} are damaged")
        except StoreError as error:
            if not error.lost:
                raise
            log.warning("%s: reading its %d tokens again", error, n_past)
            self._stepper.restored(tokens.tolist(), sizes, None)
            self.read_again()
            return False
        self._stepper.restored(tokens.tolist(), sizes, logits)
        self._n_steps_saved = len(sizes)
        return True

    def close(self) -> None:
        """Before the memory is closed."""
        self._saver.close()
