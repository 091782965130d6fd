"""A session: tokens in, logits out, and the memory between them."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Sequence, Sized
from pathlib import Path

import numpy as np

from pyggml_repkv.arguments import check_bool, check_callable, check_count, check_int, check_type
from pyggml_repkv.engine import budget
from pyggml_repkv.engine.checks import check_fits, check_tokens
from pyggml_repkv.engine.exclusive import Exclusive, alone, check_open
from pyggml_repkv.engine.generate import Begun, Generation, GenerationConfig
from pyggml_repkv.engine.keeper import Keeper, MayResume, Resumed
from pyggml_repkv.engine.reader import Reader
from pyggml_repkv.engine.session_copy import OpenStore, is_kept_in, save_copy
from pyggml_repkv.engine.session_store import SessionStore
from pyggml_repkv.engine.step import Stepper
from pyggml_repkv.errors import InputError
from pyggml_repkv.ffi.handles import Backend
from pyggml_repkv.graph.plan import GraphModel, Tracer
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.policy import DiskNeed, Policy, Repeatable
from pyggml_repkv.model.tokenizer import Tokenizer

OnProgress = Callable[[int, int], None]


class Session(Exclusive):
    """`n_past` tokens have been read; the next one has that position.

    A step that fails or is interrupted leaves n_past where it was: what it wrote beyond is overwritten by the next.
    Only if it was stopped while the memory was being rearranged must a new session be started; the next step says so.

    One call at a time: what reads, saves or goes back raises InputError while another thread does, and in a callback of
    a call that does. `fork` may come from any thread, and is made between two steps.
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
        open_store: OpenStore | None = None,
        on_fork: Callable[[Session], None] = lambda _: None,
    ) -> None:
        """make_policy: makes an empty memory; store: where the session is kept, if anywhere; open_store: opens another
        directory for a memory; on_fork: called with every fork.
        """
        self.config, self.n_batch = graph.config, memory.n_batch
        self._tokenizer, self._lock, self._weight_bytes = tokenizer, backend.lock, weight_bytes
        self._open_store, self._on_fork = open_store, on_fork
        stepper = Stepper(graph, backend, make_policy)
        try:
            keeper = None if store is None else Keeper(stepper, store, graph.config.n_vocab, self._saved_extra)
        except BaseException:
            stepper.close()
            raise
        self._begin(stepper, store, keeper)

    def _begin(self, stepper: Stepper, store: SessionStore | None = None, keeper: Keeper | None = None) -> None:
        super().__init__()
        self._stepper, self._store, self._keeper = stepper, store, keeper
        self._reader = Reader(stepper, keeper, self.config.n_ctx_train, self.n_batch, self._closing)
        self._extra: Callable[[int], dict[str, object]] = lambda _: {}
        self._prompt_end = 0
        self._freed = False

    @property
    def policy(self) -> Policy:
        """The memory."""
        return self._stepper.policy

    @property
    def n_past(self) -> int:
        return self._stepper.n_past

    @property
    def tokens(self) -> list[int]:
        """What has been read."""
        return self._stepper.tokens[: self.n_past].tolist()

    @property
    def n_ctx(self) -> int:
        return self.policy.n_ctx

    @property
    def n_ctx_train(self) -> int:
        """Tokens that the model was trained on."""
        return self.config.n_ctx_train

    @property
    def compute_bytes(self) -> int:
        """Bytes of the compute buffer so far."""
        return 0 if self._closed else self._stepper.plans.compute_bytes

    @alone
    def budget(self, n_prompt: int, n_more: int = 0) -> dict[str, int]:
        """Bytes of RAM, part by part, once a prompt and n_more tokens have been read.

        Plans the first step, so that its buffer counts. Raises ComputeError where there is too little for the prompt,
        ContextFullError where the prompt is longer than the context.
        """
        n_prompt, n_more = check_count("n_prompt", n_prompt), check_count("n_more", n_more)
        check_fits(self.policy, n_prompt, 0, self.n_ctx_train)
        sizes = self.policy.split(max(n_prompt, 1), self.n_batch)
        self._stepper.prepare(sizes[0], "all" if sizes[0] == 1 else "none" if len(sizes) > 1 else "last")
        need = self.disk_need(min(n_prompt + n_more, self.n_ctx))
        if need is not None:
            budget.check_disk(need, n_prompt + n_more)
        # Weights are there already, or file pages that the kernel takes back when it has to.
        budget.check({**self.policy.bytes_at(n_prompt), "compute": self.compute_bytes}, n_prompt)
        parts = self.policy.bytes_at(min(n_prompt + n_more, self.n_ctx))
        return {"weights": self._weight_bytes, **parts, "compute": self.compute_bytes}

    def disk_need(self, n_tokens: int) -> DiskNeed | None:
        """What n_tokens tokens need of the disk; None where nothing is written."""
        check_open(self._closing)
        n_tokens = check_count("n_tokens", n_tokens)
        return self.policy.disk_need(n_tokens)

    @alone
    def prefill(self, tokens: Sequence[int], *, on_progress: OnProgress | None = None) -> np.ndarray:
        """Reads tokens -> logits of the last one, float32 [n_vocab].

        on_progress(n_done, n_total) is called after each chunk of at most n_batch tokens.
        Raises ContextFullError, before anything is computed, if they do not all fit; InputError for a bad token.
        """
        check_callable("on_progress", on_progress)
        ids = self._checked(tokens)
        logits: np.ndarray | None = None
        end = 0
        for size in self.policy.split(len(ids), self.n_batch):
            chunk = ids[end : end + size]
            end += size
            logits = self._reader.step(chunk, "last" if end == len(ids) else "none")
            if on_progress is not None:
                on_progress(end, len(ids))
        assert logits is not None
        # A prompt's end is where the next one is most likely to part from it.
        self._prompt_end = self.n_past
        if self._keeper is not None:
            self._keeper.save(wait=True)
        return logits[0]

    @alone
    def read(self, tokens: Sequence[int]) -> None:
        """Reads tokens in steps of n_batch and no smaller ones at the end, without logits. Raises as prefill does."""
        ids = self._checked(tokens)
        for start in range(0, len(ids), self.n_batch):
            self._reader.step(ids[start : start + self.n_batch], "none")

    @alone
    def prefill_all(self, tokens: Sequence[int]) -> np.ndarray:
        """Reads tokens -> logits of every one, float32 [n_tokens, n_vocab]. Raises as prefill does.

        A chunk of n_batch tokens stays read where its logits fail or are interrupted.
        """
        ids = self._checked(tokens)
        logits = np.empty((len(ids), self.config.n_vocab), np.float32)
        for at, rows in self._reader.slices(ids, 0):
            logits[at : at + len(rows)] = rows
        return logits

    def prefill_slices(self, tokens: Sequence[int], first: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Reads tokens -> an iterator over the logits of tokens[first:], a slice at a time: (index of its first token,
        float32 [n, n_vocab]). Each chunk is read when its first slice is asked for, and other logits than the slice's
        are never in memory.

        Raises as prefill does, and InputError where something else was read or forgotten meanwhile. A chunk stays read
        where its logits fail or are not asked for.
        """
        ids = self._checked(tokens)
        made = self._reader.slices(ids, check_count("first", first))
        return iter(lambda: self._next_of(made), None)

    @alone
    def _next_of(self, made: Iterator[tuple[int, np.ndarray]]) -> tuple[int, np.ndarray] | None:
        return next(made, None)

    @alone
    def decode(self, token: int) -> np.ndarray:
        """Reads one token -> its logits, float32 [n_vocab]. Raises as prefill does."""
        logits = self._reader.step(self._checked((check_int("token", token),)), "all")
        assert logits is not None
        return logits[0]

    def generate(self, prompt: str | Sequence[int], config: GenerationConfig | None = None) -> Generation:
        """Continues a text (tokenized as by `run`) or token ids: iterate the result for pieces of text.

        Raises InputError for an empty prompt; iterating raises as prefill does.
        """
        if isinstance(prompt, str):
            return Generation(self, self._tokenizer, self._tokenizer.encode(prompt, parse_special=True), config)
        return Generation(self, self._tokenizer, self._prompt(prompt), config)

    def _prompt(self, tokens: Sequence[int]) -> list[int]:
        is_empty = isinstance(tokens, Sized) and not len(tokens)
        return [] if is_empty else check_tokens(tokens, self.config.n_vocab).tolist()

    def continue_text(
        self, prompt: Sequence[int], config: GenerationConfig | None = None, *, drop: bool = False
    ) -> Generation:
        """`generate`, from what a kept session has of the prompt, or of a text after it that was cut off.

        Call it before anything was read; from then on saves hold the state of the text. `save` once it is over.
        drop: as in go_back_to.
        """
        prompt = self._prompt(prompt)
        generation = Generation(self, self._tokenizer, prompt, config)
        resumed = self.go_back_to(prompt, generation.was_cut_off, drop=drop)
        text = tuple(self._stepper.tokens[len(prompt) : self.n_past])
        begun = Begun(
            min(resumed.n_past, len(prompt)), resumed.logits, text, resumed.extra.get("sampler") if text else None
        )
        generation = Generation(self, self._tokenizer, prompt, config, begun=begun)
        self.save_also(generation.saved)
        return generation

    def fork(self) -> Session:
        """A second session that has read the same tokens; each then goes its own way. It shares what was evicted and
        copies the rest, and is kept nowhere until it is saved.

        Raises InputError where the memory cannot be forked, ComputeError where it was stopped halfway.
        """
        check_open(self._closing)
        other = copy.copy(self)
        other._begin(self._stepper.fork())
        self._on_fork(other)
        return other

    @alone
    def rewind(self, n_past: int) -> None:
        """Forgets what was read from position n_past on. Raises InputError where the memory cannot."""
        if not self.policy.rewinds:
            raise InputError(f"--kv {self.policy.name} cannot go back to an earlier token")
        if not 0 <= check_int("n_past", n_past) <= self.n_past:
            raise InputError(f"position {n_past} is not among the {self.n_past} tokens that were read")
        self._stepper.rewind(n_past)

    @alone
    def repeat(self, n_past: int) -> None:
        """For benchmarks, in memories that can: as if what was read had been read over and over, up to position n_past.
        Keys may keep the rotations that they have, so only times mean anything afterwards.
        """
        n_past = check_int("n_past", n_past)
        if not isinstance(self.policy, Repeatable):
            raise InputError(f"--kv {self.policy.name} has no repeated tokens")
        if not 0 < self.n_past <= n_past <= self.n_ctx:
            raise InputError(f"{self.n_past} tokens cannot be repeated up to {n_past} of {self.n_ctx}")
        self._stepper.repeat(n_past)

    @contextlib.contextmanager
    def traced(self, tracer: Tracer) -> Iterator[None]:
        """Steps meanwhile run in graphs of which a tracer watches every node."""
        self._stepper.trace(tracer)
        try:
            yield
        finally:
            self._stepper.trace(None)

    def stats(self) -> dict[str, object]:
        """The `kv` object of `run --json`."""
        return self.policy.stats(self.n_past)

    @alone
    def save(self, directory: str | os.PathLike[str] | None = None) -> None:
        """Saves what was read since the last save, and waits until it is on disk.

        directory: another than the session is kept in, if it is: a copy of it all, which `Model.resume` takes up.
        Raises InputError where there is no directory, or another session in it; StoreError where saving failed;
        ComputeError where the memory was stopped halfway, so that the save before is the last good one.
        """
        if directory is not None:
            check_type("directory", directory, (str, os.PathLike), "a path")
        if directory is not None and not is_kept_in(self._store, directory):
            save_copy(self._stepper, Path(directory), self._open_store, self._saved_extra())
        elif self._keeper is None:
            raise InputError("the session is not kept anywhere: say in which directory")
        else:
            self._keeper.finish()

    def save_also(self, extra: Callable[[int], dict[str, object]]) -> None:
        """What extra(n_past) returns, as JSON, is part of every save from now on."""
        check_callable("extra", extra, needed=True)
        self._extra = extra

    def stop_saving(self) -> None:
        """Nothing is saved from now on; what the directory has beyond this point may be overwritten."""
        if self._keeper is not None:
            self._keeper.enabled = False

    @alone
    def go_back_to(self, prompt: Sequence[int] | None, may_resume: MayResume, *, drop: bool = False) -> Resumed:
        """Restores the newest save from which a prompt can be read on; None: the newest of all.

        may_resume(extra of the newest): whether a save beyond the prompt may be taken, as when its text was being
        continued. Where nothing fits, the session is empty, and what was saved is forgotten with the next save. What
        cannot be restored is read again. Raises InputError where -c is too small for it; and, before anything is
        changed, where more than MAX_DROPPED tokens of the last prompt are none of this one (drop: forgets them).
        """
        prompt = None if prompt is None else self._prompt(prompt)
        check_callable("may_resume", may_resume, needed=True)
        check_bool("drop", drop)
        if self._keeper is None or self._reader.begun:
            raise InputError("only a session that was opened with a directory can go back, and only before it reads")
        if prompt is not None and not drop:
            self._keeper.check_keeps(prompt)
        self._reader.begun = True
        resumed = self._keeper.go_back_to(prompt, may_resume, self.n_ctx)
        prompt_end = resumed.extra.get("n_prompt")
        self._prompt_end = prompt_end if isinstance(prompt_end, int) else 0
        if resumed.read_again:
            self._extra = lambda _: resumed.extra
            self._keeper.save(wait=True)
        return resumed

    def _saved_extra(self) -> dict[str, object]:
        return {"n_prompt": self._prompt_end, **self._extra(self.n_past)}

    def _checked(self, tokens: Sequence[int]) -> np.ndarray:
        check_open(self._closing)
        ids = check_tokens(tokens, self.config.n_vocab)
        check_fits(self.policy, len(ids), self.n_past, self.n_ctx_train)
        return ids

    def _free(self) -> None:
        if self._freed:
            return
        # Interrupted, it leaves everything to the next close: the save that it waits for still reads the memory.
        if self._keeper is not None:
            self._keeper.close()
        self._freed = True
        with contextlib.ExitStack() as stack:
            if self._store is not None:
                stack.callback(self._store.close)
            stack.enter_context(self._lock)
            stack.callback(self._stepper.close)
