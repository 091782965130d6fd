"""A session: tokens in, logits out, and the memory between them."""

from __future__ import annotations

import contextlib
import logging
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pyggml_repkv.engine import budget
from pyggml_repkv.engine.generate import Begun, Generation, GenerationConfig
from pyggml_repkv.engine.saver import SAVE_EVERY, Saver
from pyggml_repkv.engine.session_copy import check_can_copy, save_copy
from pyggml_repkv.engine.session_store import SessionStore, common_prefix
from pyggml_repkv.errors import ContextFullError, InputError, StoreError
from pyggml_repkv.ffi.handles import Backend
from pyggml_repkv.graph.plan import GraphModel, Outputs, PlanCache, Tracer
from pyggml_repkv.memory.policy import DiskNeed, MemoryConfig, Policy
from pyggml_repkv.memory.repkv import RepKVMemory
from pyggml_repkv.model.tokenizer import Tokenizer

OnProgress = Callable[[int, int], None]
MayResume = Callable[[dict[str, Any]], bool]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a session went on: tokens read, the logits of the last one if they were saved, and the caller's `extra`."""

    n_past: int
    logits: np.ndarray | None
    extra: dict[str, Any]


# Tokens between two looks at how much memory is left: reading it takes some 50 microseconds.
CHECK_EVERY = 2048


class Session:
    """`n_past` tokens have been read; the next one has that position.

    A step that fails or is interrupted leaves n_past where it was: what it wrote beyond is overwritten by the next.
    Only if it was stopped while the memory was being rearranged must a new session be started; the next step says so.
    """

    def __init__(
        self,
        graph: GraphModel,
        backend: Backend,
        tokenizer: Tokenizer,
        memory: MemoryConfig,
        weight_bytes: int,
        make_policy: Callable[[], Policy],
        store: SessionStore | None = None,
        open_store: Callable[[Path, bool], SessionStore] | None = None,
    ) -> None:
        """make_policy: makes an empty memory, also in place of one whose blocks were lost; store: where it is kept;
        open_store: opens another directory for it, given whether it is far from the start.
        """
        self.n_past = 0
        self.n_batch = memory.n_batch
        self._graph, self._backend, self._make_policy = graph, backend, make_policy
        self.policy = make_policy()
        self.config, self._tokenizer = graph.config, tokenizer
        self._plans = PlanCache(graph, self.policy, backend)
        # What was read, and in steps of how many tokens: reading it again gives the same memory.
        self._tokens, self._steps = array("i"), array("i")
        self._store, self._open_store = store, open_store
        self._saver = Saver(store, self.policy) if store and isinstance(self.policy, RepKVMemory) else None
        self._n_steps_saved = self._prompt_end = 0
        # False: nothing is saved from now on; what the directory has beyond this point may be overwritten.
        self.saving = True
        self._logits: np.ndarray | None = None
        self._extra: Callable[[int], dict[str, object]] = lambda _: {}
        self._begun = False
        self._lock = backend.lock
        self._closed = False
        self._checked_up_to = 0
        self._weight_bytes = weight_bytes

    @property
    def tokens(self) -> list[int]:
        """What has been read."""
        return self._tokens[: self.n_past].tolist()

    @property
    def n_ctx(self) -> int:
        return self.policy.n_ctx

    @property
    def compute_bytes(self) -> int:
        """Bytes of the compute buffer so far."""
        return 0 if self._closed else self._plans.compute_bytes

    def budget(self, n_prompt: int, n_more: int = 0) -> dict[str, int]:
        """Bytes of RAM, part by part, once a prompt and n_more tokens have been read.

        Plans the first step, so that its buffer counts. Raises ComputeError where there is too little for the prompt.
        """
        sizes = self.policy.split(max(n_prompt, 1), self.n_batch)
        outputs: Outputs = "all" if sizes[0] == 1 else "none" if len(sizes) > 1 else "last"
        self._plans.prepare(outputs, sizes[0])
        need = self.disk_need(min(n_prompt + n_more, self.n_ctx))
        if need is not None:
            budget.check_disk(need, n_prompt + n_more)
        # Weights are there already, or file pages that the kernel takes back when it has to.
        budget.check({**self.policy.bytes_at(n_prompt), "compute": self.compute_bytes}, n_prompt)
        parts = self.policy.bytes_at(min(n_prompt + n_more, self.n_ctx))
        return {"weights": self._weight_bytes, **parts, "compute": self.compute_bytes}

    def disk_need(self, n_tokens: int) -> DiskNeed | None:
        """What n_tokens tokens need of the disk; None where nothing is written."""
        return self.policy.disk_need(n_tokens)

    def prefill(self, tokens: Sequence[int], *, on_progress: OnProgress | None = None) -> np.ndarray:
        """Reads tokens -> logits of the last one, float32 [n_vocab].

        on_progress(n_done, n_total) is called after each chunk of at most n_batch tokens.
        Raises ContextFullError, before anything is computed, if they do not all fit; InputError for a bad token.
        """
        ids = self._checked(tokens)
        logits: np.ndarray | None = None
        end = 0
        for size in self.policy.split(len(ids), self.n_batch):
            chunk = ids[end : end + size]
            end += size
            logits = self._step(chunk, "last" if end == len(ids) else "none")
            if on_progress is not None:
                on_progress(end, len(ids))
        assert logits is not None
        # A prompt's end is where the next one is most likely to part from it.
        self._prompt_end = self.n_past
        self._save(wait=True)
        return logits[0]

    def read(self, tokens: Sequence[int]) -> None:
        """Reads tokens in steps of n_batch and no smaller ones at the end, without logits. Raises as prefill does."""
        ids = self._checked(tokens)
        for start in range(0, len(ids), self.n_batch):
            self._step(ids[start : start + self.n_batch], "none")

    def prefill_all(self, tokens: Sequence[int]) -> np.ndarray:
        """Reads tokens -> logits of every one, float32 [n_tokens, n_vocab]. Raises as prefill does."""
        ids = self._checked(tokens)
        logits = np.empty((len(ids), self.config.n_vocab), np.float32)
        for start in range(0, len(ids), self.n_batch):
            chunk = ids[start : start + self.n_batch]
            logits[start : start + len(chunk)] = self._step(chunk, "all")
        return logits

    def decode(self, token: int) -> np.ndarray:
        """Reads one token -> its logits, float32 [n_vocab]. Raises as prefill does."""
        logits = self._step(self._checked((token,)), "all")
        assert logits is not None
        return logits[0]

    def generate(self, prompt: str | Sequence[int], config: GenerationConfig | None = None) -> Generation:
        """Continues a text (tokenized as by `run`) or token ids: iterate the result for pieces of text.

        Raises InputError for an empty prompt; iterating raises as prefill does.
        """
        tokens = self._tokenizer.encode(prompt, parse_special=True) if isinstance(prompt, str) else list(prompt)
        return Generation(self, self._tokenizer, tokens, config)

    def continue_text(self, prompt: Sequence[int], config: GenerationConfig | None = None) -> Generation:
        """`generate`, from what a kept session has of the prompt, or of a text after it that was cut off.

        Call it before anything was read; from then on saves hold the state of the text. `save` once it is over.
        """
        generation = Generation(self, self._tokenizer, list(prompt), config)
        resumed = self.go_back_to(prompt, generation.was_cut_off)
        text = tuple(self._tokens[len(prompt) : self.n_past])
        begun = Begun(
            min(resumed.n_past, len(prompt)), resumed.logits, text, resumed.extra["sampler"] if text else None
        )
        generation = Generation(self, self._tokenizer, list(prompt), config, begun=begun)
        self.save_also(generation.saved)
        return generation

    @contextlib.contextmanager
    def traced(self, tracer: Tracer) -> Iterator[None]:
        """Steps meanwhile run in graphs of which a tracer watches every node."""
        self._plans.trace(tracer)
        try:
            yield
        finally:
            self._plans.trace(None)

    def stats(self) -> dict[str, object]:
        """The `kv` object of `run --json`."""
        return self.policy.stats(self.n_past)

    def _step(self, chunk: np.ndarray, outputs: Outputs) -> np.ndarray | None:
        # One token's logits are cheaper than a second plan without them.
        if len(chunk) == 1:
            outputs = "all"
        self._check_room(self.n_past + len(chunk))
        logits = self._run(outputs, chunk)
        self._save_if_due(len(chunk))
        return logits

    def _save_if_due(self, n_tokens: int) -> None:
        if self._saver is None:
            return
        n_new = self.n_past - self._saver.saved
        if n_new >= (SAVE_EVERY if n_tokens == 1 else 1):
            # Waiting where the file could not take twice as much without losing what the save before needs.
            self._save(wait=n_new >= max(self.n_batch, SAVE_EVERY))

    def _run(self, outputs: Outputs, chunk: np.ndarray) -> np.ndarray | None:
        """One step, after reading everything again where blocks of it were lost."""
        self._begun = True
        try:
            return self._run_once(outputs, chunk)
        except StoreError as error:
            if not error.lost:
                raise
            log.warning("%s: reading its %d tokens again", error, self.n_past)
            self._read_again(self._tokens, self._steps)
            return self._run_once(outputs, chunk)

    def _run_once(self, outputs: Outputs, chunk: np.ndarray) -> np.ndarray | None:
        n_past = self.n_past
        try:
            logits = self._plans.run(outputs, chunk, n_past)
            self._tokens[n_past:] = array("i", chunk.tolist())
            self._steps.append(len(chunk))
            self._logits = None if logits is None else logits[-1].copy()
            self.n_past += len(chunk)
        except BaseException:
            # Interrupted between the compute and here, too, the step counts as not done.
            if self.n_past == n_past:
                self.policy.undo_step()
                while sum(self._steps) > n_past:
                    self._steps.pop()
            raise
        return logits

    def _read_again(self, tokens: Sequence[int], steps: Sequence[int]) -> None:
        """Makes the memory anew from tokens, in the same steps. Raises what reading raises.

        What the directory knows of them stays until the new memory has them all.
        """
        ids, sizes = np.array(tokens, np.int32), list(steps)
        if self._saver is not None:
            self._saver.close()
            self._saver = None
        with self._lock:
            self._plans.close()
            self.policy.close()
        if self._store is not None:
            self._store.start_anew()
        self.policy = self._make_policy()
        self._plans = PlanCache(self._graph, self.policy, self._backend)
        self.n_past, self._n_steps_saved = 0, 0
        self._tokens, self._steps = array("i"), array("i")
        for i, size in enumerate(sizes, 1):
            chunk = ids[self.n_past : self.n_past + size]
            self._run_once("all" if size == 1 else "last" if i == len(sizes) else "none", chunk)
        if self._store is not None and isinstance(self.policy, RepKVMemory):
            self._saver = Saver(self._store, self.policy)

    def _save(self, *, wait: bool, again: bool = False) -> None:
        """again: also where nothing was read since, because what goes with the save may be new."""
        if self._saver is None or not self.saving or (self.n_past == self._saver.saved and not again):
            return
        new = np.array(self._tokens[self._saver.saved : self.n_past], np.int32)
        steps = self._steps[self._n_steps_saved :].tolist()
        extra = {"n_prompt": self._prompt_end, **self._extra(self.n_past)}
        if self._saver.offer(self.n_past, new, steps, self._logits, extra, wait=wait):
            self._n_steps_saved = len(self._steps)

    def save(self, directory: str | os.PathLike[str] | None = None) -> None:
        """Saves what was read since the last save, and waits until it is on disk.

        directory: another than the session is kept in, if it is: a copy of it all, which `Model.resume` takes up.
        Raises InputError where there is no directory, or another session in it; StoreError where saving failed;
        ComputeError where the memory was stopped halfway, so that the save before is the last good one.
        """
        if self._closed:
            raise InputError("the session is closed")
        if directory is not None and not self._is_kept_in(directory):
            self._save_copy(Path(directory))
            return
        if self._saver is None:
            raise InputError("the session is not kept anywhere: say in which directory")
        if self.n_past > 0:
            self._save(wait=True, again=True)
        self._saver.finish()

    def _is_kept_in(self, directory: str | os.PathLike[str]) -> bool:
        if not os.fspath(directory) or "\0" in os.fspath(directory):
            raise InputError(f"{os.fspath(directory)!r} is no name of a directory")
        return self._store is not None and Path(directory).resolve() == self._store.folder.resolve()

    def _save_copy(self, folder: Path) -> None:
        if not isinstance(self.policy, RepKVMemory) or self._open_store is None:
            raise InputError(f"only sessions of --kv repkv can be saved; --kv is {self.policy.name}")
        if self.n_past == 0:
            raise InputError("the session is empty: there is nothing to save")
        check_can_copy(self.policy)
        with contextlib.closing(self._open_store(folder, self.policy.long)) as store:
            if store.checkpoints():
                raise InputError(f"{folder} has a session already: give another directory")
            extra = {"n_prompt": self._prompt_end, **self._extra(self.n_past)}
            tokens, steps = np.array(self._tokens[: self.n_past], np.int32), np.array(self._steps, np.int32)
            save_copy(self.policy, store, tokens, steps, self._logits, extra)

    def save_also(self, extra: Callable[[int], dict[str, object]]) -> None:
        """What extra(n_past) returns, as JSON, is part of every save from now on."""
        self._extra = extra

    def go_back_to(self, prompt: Sequence[int] | None, may_resume: MayResume) -> Resumed:
        """Restores the newest save from which a prompt can be read on; None: the newest of all.

        may_resume(extra of the newest): whether a save beyond the prompt may be taken, as when its text was being
        continued. Where nothing fits, the session is empty, and what was saved is forgotten with the next save. What
        cannot be restored is read again. Raises InputError where -c is too small for it.
        """
        if self._saver is None or self._store is None or self._begun:
            raise InputError("only a session that was opened with a directory can go back, and only before it reads")
        self._begun = True
        tokens, steps = self._store.tokens()
        prefix = len(tokens) if prompt is None else common_prefix(tokens, np.asarray(prompt, np.int64))
        checkpoints = self._store.checkpoints()
        goes_on = prompt is not None and prefix == len(prompt) and bool(checkpoints) and may_resume(checkpoints[0][2])
        for n_past, has_logits, extra in checkpoints:
            fits = n_past <= prefix and (has_logits or prompt is None or n_past < len(prompt))
            if not fits and not (goes_on and has_logits):
                continue
            if n_past > self.n_ctx:
                raise InputError(f"--session {self._store.folder} has {n_past} tokens: give -c {n_past} or more")
            self._restore(n_past, tokens[:n_past], steps, extra)
            return Resumed(n_past, self._logits, extra)
        return Resumed(0, None, {})

    def _restore(self, n_past: int, tokens: np.ndarray, steps: np.ndarray, extra: dict[str, object]) -> None:
        assert self._saver is not None
        sizes = steps[: int(np.searchsorted(np.cumsum(steps), n_past, side="right"))]
        prompt_end = extra.get("n_prompt")
        self._prompt_end = prompt_end if isinstance(prompt_end, int) else 0
        try:
            checkpoint = self._saver.restore(n_past, tokens)
        except StoreError as error:
            if not error.lost:
                raise
            log.warning("%s: reading its %d tokens again", error, n_past)
            self._read_again(tokens.tolist(), sizes.tolist())
            self._extra = lambda _: extra
            self._save(wait=True)
            return
        self.n_past, self._tokens, self._logits = n_past, array("i", tokens.tolist()), checkpoint.logits
        self._steps, self._n_steps_saved = array("i", sizes.tolist()), len(sizes)

    def _check_room(self, n_tokens: int) -> None:
        """Linux promises memory that it does not have and kills the process that uses it, so ask first."""
        if n_tokens <= self._checked_up_to:
            return
        now, then = self.policy.bytes_at(self.n_past), self.policy.bytes_at(n_tokens + CHECK_EVERY)
        budget.check({part: then[part] - now.get(part, 0) for part in then}, n_tokens + CHECK_EVERY - self.n_past)
        self._checked_up_to = n_tokens + CHECK_EVERY

    def _checked(self, tokens: Sequence[int]) -> np.ndarray:
        if self._closed:
            raise InputError("the session is closed")
        try:
            ids = np.asarray(tokens)
        except ValueError:  # ragged
            ids = np.empty(0)
        if ids.ndim != 1 or len(ids) == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise InputError("tokens must be a non-empty sequence of token ids")
        # ggml aborts the process on a row that is not there.
        if ids.min() < 0 or ids.max() >= self.config.n_vocab:
            bad = int(ids.min() if ids.min() < 0 else ids.max())
            raise InputError(f"token id {bad} is not in the vocabulary (0 to {self.config.n_vocab - 1})")
        if self.n_past + len(ids) > self.n_ctx:
            raise ContextFullError(
                f"{len(ids)} tokens do not fit: {self.n_past} of {self.n_ctx} are used; a larger -c holds more"
            )
        return ids.astype(np.int32)

    def close(self) -> None:
        """Frees graphs and memory, once the step that runs in another thread is over."""
        with self._lock:
            if not self._closed:
                self._closed = True
                if self._saver is not None:
                    self._saver.close()
                self._plans.close()
                self.policy.close()
                if self._store is not None:
                    self._store.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
