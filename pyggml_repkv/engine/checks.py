"""What is asked before a step: are these tokens, do they fit, is there memory for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.engine import budget
from pyggml_repkv.errors import ContextFullError, InputError
from pyggml_repkv.memory.policy import Policy

# Tokens between two looks at how much memory is left: reading it takes some 50 microseconds.
CHECK_EVERY = 2048


def check_tokens(tokens: Sequence[int], n_vocab: int) -> NDArray[np.int32]:
    """Token ids as int32 [n]. Raises InputError for anything else."""
    try:
        ids = np.asarray(tokens)
    except ValueError:  # ragged
        ids = np.empty(0)
    if ids.ndim != 1 or len(ids) == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError("tokens must be a non-empty sequence of token ids")
    # ggml aborts the process on a row that is not there.
    if ids.min() < 0 or ids.max() >= n_vocab:
        bad = int(ids.min() if ids.min() < 0 else ids.max())
        raise InputError(f"token id {bad} is not in the vocabulary (0 to {n_vocab - 1})")
    return ids.astype(np.int32)


def check_fits(policy: Policy, n_tokens: int, n_past: int, n_ctx_train: int) -> None:
    """Raises ContextFullError where n_tokens more are too many."""
    if n_past + n_tokens > policy.n_ctx:
        remedy = larger_context(policy.bounded, policy.n_ctx, n_ctx_train)
        raise ContextFullError(f"{n_tokens} tokens do not fit: {n_past} of {policy.n_ctx} are used; {remedy}")


def larger_context(bounded: bool, n_ctx: int, n_ctx_train: int) -> str:
    """What holds more tokens than a context of n_ctx; bounded: of a memory that goes on past the trained one."""
    return "a larger -c holds more" + ("" if bounded or n_ctx < n_ctx_train else ", or --kv repkv")


class Room:
    """Linux promises memory that it does not have and kills the process that uses it, so ask first."""

    def __init__(self) -> None:
        self._checked_up_to = 0

    def check(self, policy: Policy, n_past: int, n_tokens: int) -> None:
        """Raises ComputeError where there is too little for a memory to grow from n_past tokens to n_tokens."""
        if n_tokens <= self._checked_up_to:
            return
        now, then = policy.bytes_at(n_past), policy.bytes_at(n_tokens + CHECK_EVERY)
        budget.check({part: then[part] - now.get(part, 0) for part in then}, n_tokens + CHECK_EVERY - n_past)
        self._checked_up_to = n_tokens + CHECK_EVERY
