"""The last steps of a text that the engine reads: their queries, and the keys of their window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
class Step:
    """Tokens that were read, from position `first` on. local: where their window began; end: of evicted tokens; judged:
    rows of `far` and, one for each, of `near`: of each layer from FIRST_LAYER on, queries [., H, d]. keys: of the same
    layers, the window's [., K, d]: of a chunk all of it, of one token its own.
    """

    kind: str
    first: int
    local: int
    end: int
    judged: NDArray[np.integer]
    near: list[Array] = field(default_factory=list)
    far: list[Array] = field(default_factory=list)
    keys: list[Array] = field(default_factory=list)


def read_observed(
    session: Session, policy: RepKVMemory, blocks: Sequence[Blocks], tokens: Sequence[int],
    on_read: OnProgress | None = None,
) -> list[Step]:  # fmt: skip
    """Reads tokens, and returns the last whole chunk before the last N_DECODE, then each of these.

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
            kind = "decode" if end > end_chunk else "chunk"
            steps.append(_observed(policy, kind, min(each.sealed_end for each in blocks)))
    return steps


def _observed(policy: RepKVMemory, kind: str, end: int) -> Step:
    regions, last = policy.regions, policy.last_step
    assert last is not None
    step = Step(kind, regions.first, regions.local, end, np.arange(0, regions.n_tokens, EVERY))
    first = regions.first if kind == "decode" else regions.local
    for layer in range(FIRST_LAYER, policy.config.n_layer):
        near, far = last.observed_queries(layer)
        step.near.append(near[step.judged])
        step.far.append(far)
        step.keys.append(policy.local_keys(layer, first, regions.first + regions.n_tokens))
    return step
