"""The last tokens of a text that the engine reads: their queries, and the keys of their windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.engine.session import Session
from pyggml_repkv.memory.cut.blocks import Blocks
from pyggml_repkv.memory.repkv.memory import RepKVMemory

# Layers 0 and 1 attend almost evenly, so selection matters little there; published figures leave them out.
FIRST_LAYER = 2

# Tokens that are judged one by one, after the last chunk; of the chunk's tokens every so manyth is.
N_DECODE, EVERY = 48, 8

Array = NDArray[np.float32]
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Observed:
    """Tokens that were read one by one (alone), or a chunk. positions, starts, ends: int [n] of each token: its own,
    that where its window began, and that where evicted tokens in blocks ended. judged: which of them are.

    Of each layer from FIRST_LAYER on: near: queries of those that are judged, far: of all, [., H, d]; keys: rotated,
    [., K, d], of the tokens themselves and, for a chunk, of the window before them.
    """

    alone: bool
    positions: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    judged: NDArray[np.int64]
    near: list[Array]
    far: list[Array]
    keys: list[Array]


def read_observed(
    session: Session, policy: RepKVMemory, blocks: Sequence[Blocks], tokens: Sequence[int],
    on_read: OnProgress | None = None,
) -> tuple[Observed, Observed]:  # fmt: skip
    """Reads tokens, and returns the last whole chunk before the last N_DECODE, and these.

    blocks: cut at every step as the engine's are.
    """
    policy.observed = True
    steps, end_chunk = [], len(tokens) - N_DECODE
    bounds = [0, *range(end_chunk % session.n_batch, end_chunk, session.n_batch), *range(end_chunk, len(tokens) + 1)]
    for first, end in pairwise(bounds):
        if first == end:
            continue
        session.read(tokens[first:end])
        if on_read is not None:
            on_read(end, len(tokens))
        for each in blocks:
            each.append(tokens[first:end], first)
            each.seal(policy.regions.local)
        if end >= end_chunk:
            steps.append(_observed(policy, min(each.sealed_end for each in blocks), own=end > end_chunk))
    chunk, *singles = steps
    return chunk, _joined(singles)


def _observed(policy: RepKVMemory, end: int, *, own: bool) -> Observed:
    """own: keys without those of the window before."""
    regions, last = policy.regions, policy.last_step
    assert last is not None
    n, first = regions.n_tokens, regions.first
    step = Observed(
        n == 1, first + np.arange(n), np.full(n, regions.local), np.full(n, end), np.arange(0, n, EVERY), [], [], []
    )
    for layer in range(FIRST_LAYER, policy.config.n_layer):
        near, far = last.observed_queries(layer)
        step.near.append(near[step.judged])
        step.far.append(far)
        step.keys.append(policy.local_keys(layer, first if own else regions.local, first + n))
    return step


def _joined(steps: Sequence[Observed]) -> Observed:
    """Single tokens, all of them judged."""
    positions, starts, ends = (
        np.concatenate([getattr(step, name) for step in steps]) for name in ("positions", "starts", "ends")
    )
    near, far, keys = (
        [np.concatenate(layers) for layers in zip(*(getattr(step, name) for step in steps), strict=True)]
        for name in ("near", "far", "keys")
    )
    return Observed(True, positions, starts, ends, np.arange(len(steps)), near, far, keys)
