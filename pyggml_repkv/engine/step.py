"""One step: begin, plan, fill, compute, read."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.ffi.handles import Backend
from pyggml_repkv.graph.decoder import Outputs
from pyggml_repkv.graph.plan import GraphModel, PlanCache, Tracer
from pyggml_repkv.memory.policy import Policy


class Stepper:
    """A memory, the graphs of its steps, and what was read into it.

    `n_past` tokens have been read; the next one has that position. `tokens` are those tokens and `sizes` the numbers of
    tokens of the steps that read them: the same tokens in the same steps give the same memory. `logits` float32
    [n_vocab] are the last token's, None where the last step had none.
    """

    def __init__(
        self, model: GraphModel, backend: Backend, make_policy: Callable[[], Policy], policy: Policy | None = None
    ) -> None:
        """make_policy: makes an empty memory, also in place of one whose blocks were lost; policy: to begin with."""
        self._model, self._backend, self._make_policy = model, backend, make_policy
        self._open(make_policy() if policy is None else policy)

    def _open(self, policy: Policy) -> None:
        self.policy = policy
        self.plans = PlanCache(self._model, policy, self._backend)
        self.n_past = 0
        self.tokens, self.sizes = array("i"), array("i")
        self.logits: NDArray[np.float32] | None = None

    def step(self, tokens: NDArray[np.int32], outputs: Outputs) -> NDArray[np.float32] | None:
        """Reads tokens -> their logits, the caller's own: float32 [n_outputs, n_vocab], None where there are none.

        A step that raises, wherever it was stopped, counts as not done.
        """
        with self._backend.lock:
            # Another thread may have closed the session while this one waited.
            self.plans.check_open()
            n_past = self.n_past
            try:
                self.policy.begin_step(tokens, n_past)
                plan = self.plans.of_step(n_past, len(tokens), outputs)
                plan.fill(tokens, n_past)
                plan.compute(self._backend)
                logits = plan.read()
                self._count(tokens, logits)
                return logits
            except BaseException:
                if self.n_past == n_past:
                    self.policy.undo_step()
                    while sum(self.sizes) > n_past:
                        self.sizes.pop()
                raise

    def _count(self, tokens: NDArray[np.int32], logits: NDArray[np.float32] | None) -> None:
        self.tokens[self.n_past :] = array("i", tokens.tolist())
        self.sizes.append(len(tokens))
        self.logits = None if logits is None else logits[-1].copy()
        self.n_past += len(tokens)

    def rewind(self, n_past: int) -> None:
        """Forgets what was read from position n_past on; for memories that can (`Policy.rewinds`)."""
        del self.tokens[n_past:]
        self.sizes = array("i", [n_past] if n_past else [])
        self.n_past = n_past

    def restored(self, tokens: Sequence[int], sizes: Sequence[int], logits: NDArray[np.float32] | None) -> None:
        """Takes note of what a memory was restored from elsewhere with."""
        self.tokens, self.sizes, self.logits = array("i", tokens), array("i", sizes), logits
        self.n_past = len(tokens)

    def fork(self, make_policy: Callable[[], Policy]) -> Stepper:
        """Another one that has read the same tokens. Raises as Policy.fork does."""
        with self._backend.lock:
            self.plans.check_open()
            policy = self.policy.fork(self.n_past)
        other = Stepper(self._model, self._backend, make_policy, policy)
        other.restored(self.tokens[: self.n_past], self.sizes, None if self.logits is None else self.logits.copy())
        return other

    def read_again(self, tokens: Sequence[int], sizes: Sequence[int]) -> None:
        """Makes the memory again from tokens, in steps of these sizes. Raises what reading raises."""
        ids, steps = np.array(tokens, np.int32), list(sizes)
        with self._backend.lock:
            self.close()
        self._open(self._make_policy())
        for i, size in enumerate(steps, 1):
            outputs: Outputs = "all" if size == 1 else "last" if i == len(steps) else "none"
            self.step(ids[self.n_past : self.n_past + size], outputs)

    def trace(self, tracer: Tracer | None) -> None:
        """Steps from now on run in graphs of which a tracer watches every node; None: nobody does any more."""
        with self._backend.lock:
            self.plans.trace(tracer)

    def prepare(self, n_tokens: int, outputs: Outputs) -> None:
        """Plans a first step, so that the size of the compute buffer is known before anything is computed."""
        with self._backend.lock:
            self.plans.of_step(0, n_tokens, outputs)

    def close(self) -> None:
        """With the backend's lock held."""
        self.plans.close()
        self.policy.close()
