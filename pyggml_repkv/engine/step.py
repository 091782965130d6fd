"""One step: begin, plan, fill, compute, read."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import StoreError
from pyggml_repkv.ffi.handles import Backend
from pyggml_repkv.graph.decoder import Outputs
from pyggml_repkv.graph.plan import GraphModel, PlanCache, Tracer
from pyggml_repkv.memory.policy import Form, Policy, Repeatable


class Stepper:
    """A memory, the graphs of its steps, and what was read into it.

    `n_past` tokens have been read; the next one has that position. `tokens` are those tokens and `sizes` the numbers of
    tokens of the steps that read them: the same tokens in the same steps give the same memory. `logits` float32
    [n_vocab] are the last token's, None where the last step had none. `n_changes` rises with whatever changes what was
    read, a step that fails too. `lost`: the memory must be made again from the tokens (`read_again`) before the next
    step.
    """

    def __init__(
        self, model: GraphModel, backend: Backend, make_policy: Callable[[], Policy], policy: Policy | None = None
    ) -> None:
        """make_policy: makes an empty memory, also in place of one whose blocks were lost; policy: to begin with."""
        self._model, self._backend, self._make_policy = model, backend, make_policy
        self._open(make_policy() if policy is None else policy)
        self.n_past = 0
        self.tokens, self.sizes = array("i"), array("i")
        self.logits: NDArray[np.float32] | None = None
        self.n_changes = 0
        self._form: Form = "ggml"
        self.lost = False

    def _open(self, policy: Policy) -> None:
        plans = PlanCache(self._model, policy, self._backend)
        self.plans, self.policy = plans, policy

    def check_whole(self) -> None:
        """Raises StoreError where reading again was stopped, so that the memory has not all of the tokens."""
        if self.lost:
            raise StoreError("reading the tokens of a lost block again was stopped; the next step does it", lost=False)

    def step(
        self, tokens: NDArray[np.int32], outputs: Outputs, head_rows: Collection[int] = ()
    ) -> NDArray[np.float32] | None:
        """Reads tokens -> their logits, the caller's own: float32 [n_outputs, n_vocab], None where there are none; or
        their hidden states [n_tokens, E]. head_rows: of so many of these `logits_of` will be asked at a time; there is
        memory for that, or the step is not made.

        A step that raises, wherever it was stopped, counts as not done.
        """
        with self._backend.lock:
            # Another thread may have closed the session while this one waited.
            self.plans.check_open()
            before = self.n_past, self.logits, len(self.sizes)
            self.n_changes += 1
            try:
                made = self._compute(tokens, self.n_past, outputs, head_rows)
                self.tokens[self.n_past :] = array("i", tokens.tolist())
                self.sizes.append(len(tokens))
                self.logits = None if made is None or outputs == "hidden" else made[-1].copy()
                self.n_past += len(tokens)
                return made
            except BaseException:
                self.n_past, self.logits, n_sizes = before
                del self.sizes[n_sizes:]
                self.policy.undo_step(self.n_past)
                raise

    def _compute(
        self, tokens: NDArray[np.int32], n_past: int, outputs: Outputs, head_rows: Collection[int] = ()
    ) -> NDArray[np.float32] | None:
        self.policy.begin_step(tokens, n_past)
        plan = self.plans.of_step(n_past, len(tokens), outputs)
        self._form = plan.key.shape.form
        for n_rows in head_rows:
            self.plans.head(self._form, n_rows)
        # Where the buffer grew for a head, the plans before it are gone.
        plan = self.plans.of_step(n_past, len(tokens), outputs) if head_rows else plan
        plan.fill(tokens, n_past)
        plan.compute(self._backend)
        return plan.read()

    def logits_of(self, hidden: NDArray[np.float32], start: int, end: int) -> NDArray[np.float32]:
        """Logits of rows [start, end) of the hidden states that the last step gave: float32 [end - start, n_vocab]."""
        with self._backend.lock:
            self.plans.check_open()
            rows = self.plans.head(self._form, end - start).compute(self._backend, hidden[start:end])
            if end == len(hidden):
                self.logits = rows[-1].copy()
            return rows

    def rewind(self, n_past: int) -> None:
        """Forgets what was read from position n_past on; for memories that can (`Policy.rewinds`)."""
        with self._backend.lock:
            self.plans.check_open()
            self.policy.rewind(n_past)
            del self.tokens[n_past:]
            self.sizes = array("i", [n_past] if n_past else [])
            self.n_past, self.logits = n_past, None
            self.n_changes += 1

    def repeat(self, n_past: int) -> None:
        """For benchmarks: as Repeatable.repeat has it, up to position n_past; for such memories."""
        with self._backend.lock:
            self.plans.check_open()
            assert isinstance(self.policy, Repeatable)
            self.policy.repeat(self.n_past, n_past)
            self.restored(np.resize(self.tokens[: self.n_past], n_past).tolist(), [n_past], None)

    def restored(self, tokens: Sequence[int], sizes: Sequence[int], logits: NDArray[np.float32] | None) -> None:
        """Takes note of what a memory was restored from elsewhere with."""
        self.tokens, self.sizes, self.logits = array("i", tokens), array("i", sizes), logits
        self.n_past = len(tokens)
        self.n_changes += 1

    def fork(self) -> Stepper:
        """Another one that has read the same tokens. Raises as Policy.fork does."""
        with self._backend.lock:
            self.plans.check_open()
            self.check_whole()
            policy = self.policy.fork(self.n_past)
            other = Stepper(self._model, self._backend, policy.fresh, policy)
            logits = None if self.logits is None else self.logits.copy()
            other.restored(self.tokens[: self.n_past], self.sizes, logits)
            return other

    def read_again(self) -> None:
        """Makes the memory again from the tokens, in steps of the same sizes. Raises what reading raises; then it is to
        be called again before the next step.
        """
        self.lost = True
        ids, steps, at = np.array(self.tokens[: self.n_past], np.int32), self.sizes.tolist(), 0
        policy = self._make_policy()
        try:
            with self._backend.lock:
                self.plans.check_open()
                before = self.plans, self.policy
                self._open(policy)
                for part in before:
                    part.close()
        except BaseException:
            if self.policy is not policy:
                policy.close()
            raise
        logits = None
        for i, size in enumerate(steps, 1):
            outputs: Outputs = "all" if size == 1 else "last" if i == len(steps) else "none"
            with self._backend.lock:
                self.plans.check_open()
                logits = self._compute(ids[at : at + size], at, outputs)
            at += size
        self.logits = None if logits is None else logits[-1].copy()
        self.lost = False

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
