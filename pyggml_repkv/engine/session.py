"""A session: tokens in, logits out, and the memory between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

import numpy as np

from pyggml_repkv.engine import budget
from pyggml_repkv.engine.generate import Generation, GenerationConfig
from pyggml_repkv.errors import ContextFullError, InputError
from pyggml_repkv.ffi.handles import Backend
from pyggml_repkv.graph.plan import GraphModel, Outputs, PlanCache
from pyggml_repkv.memory.policy import MemoryConfig, Policy
from pyggml_repkv.model.tokenizer import Tokenizer

OnProgress = Callable[[int, int], None]

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
        policy: Policy,
        memory: MemoryConfig,
        weight_bytes: int,
    ) -> None:
        self.n_past = 0
        self.n_batch = memory.n_batch
        self.policy = policy
        self._config, self._tokenizer = graph.config, tokenizer
        self._plans = PlanCache(graph, policy, backend)
        self._lock = backend.lock
        self._closed = False
        self._checked_up_to = 0
        self._weight_bytes = weight_bytes

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
        # Weights are there already, or file pages that the kernel takes back when it has to.
        budget.check({**self.policy.bytes_at(n_prompt), "compute": self.compute_bytes}, n_prompt)
        parts = self.policy.bytes_at(min(n_prompt + n_more, self.n_ctx))
        return {"weights": self._weight_bytes, **parts, "compute": self.compute_bytes}

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
        return logits[0]

    def read(self, tokens: Sequence[int]) -> None:
        """Reads tokens in steps of n_batch and no smaller ones at the end, without logits. Raises as prefill does."""
        ids = self._checked(tokens)
        for start in range(0, len(ids), self.n_batch):
            self._step(ids[start : start + self.n_batch], "none")

    def prefill_all(self, tokens: Sequence[int]) -> np.ndarray:
        """Reads tokens -> logits of every one, float32 [n_tokens, n_vocab]. Raises as prefill does."""
        ids = self._checked(tokens)
        logits = np.empty((len(ids), self._config.n_vocab), np.float32)
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

    def stats(self) -> dict[str, object]:
        """The `kv` object of `run --json`."""
        return self.policy.stats(self.n_past)

    def _step(self, chunk: np.ndarray, outputs: Outputs) -> np.ndarray | None:
        # One token's logits are cheaper than a second plan without them.
        if len(chunk) == 1:
            outputs = "all"
        self._check_room(self.n_past + len(chunk))
        logits = self._plans.run(outputs, chunk, self.n_past)
        self.n_past += len(chunk)
        return logits

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
        if ids.min() < 0 or ids.max() >= self._config.n_vocab:
            bad = int(ids.min() if ids.min() < 0 else ids.max())
            raise InputError(f"token id {bad} is not in the vocabulary (0 to {self._config.n_vocab - 1})")
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
                self._plans.close()
                self.policy.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
