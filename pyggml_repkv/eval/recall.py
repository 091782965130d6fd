"""Attention-mass recall: how much of what attention would give to older blocks do the selected blocks hold?

The engine reads a text as it always does; the queries it had and the relevance it gave to blocks are taken from its
graph, and the softmax over all tokens is computed beside it, in numpy, with keys and queries where the engine saw them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError
from pyggml_repkv.memory.blocks import parse_block
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.repkv import RepKVMemory

# Layers 0 and 1 attend almost evenly, and there is little to choose; published figures leave them out.
FIRST_LAYER = 2

# Of a chunk's queries, as many are enough for its mass.
N_QUERIES = 64

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RecallResult:
    """One step, for each k of the ranking's first k blocks; layers from FIRST_LAYER on.

    mass: [len(ks), n_layer, 3], the mass of the first k blocks, of the best k, and of all blocks.
    """

    step: str
    position: int
    n_blocks: int
    ks: tuple[int, ...]
    mass: Array


def run_recall(
    model: Model, memory: MemoryConfig, tokens: Sequence[int], ks: Sequence[int], n_chunks: int, n_decode: int
) -> Iterator[RecallResult]:
    """Reads tokens; yields recall in the last n_chunks whole chunks and in n_decode single tokens after them.

    ks: for how many blocks the ranking is judged; what is attended is the memory's matter.
    Raises InputError for another memory, and where there are too few tokens for any block to be chosen from.
    """
    n_read = (len(tokens) - n_decode) // memory.n_batch * memory.n_batch
    first_measured = n_read - n_chunks * memory.n_batch
    if memory.kv != "repkv":
        raise InputError(f"recall looks at the blocks of --kv repkv; --kv is {memory.kv}")
    n_needed = memory.n_sink + memory.n_local + 2 * parse_block(memory.block).max_size
    if first_measured < n_needed:
        n_needed += (n_chunks + 1) * memory.n_batch + n_decode
        raise InputError(f"{len(tokens)} tokens are too few for recall with these blocks: it takes {n_needed}")
    with model.session(memory) as session:
        policy = session.policy
        assert isinstance(policy, RepKVMemory)
        policy.observed = True
        for first in range(0, n_read, memory.n_batch):
            session.read(tokens[first : first + memory.n_batch])
            if first >= first_measured:
                yield _measure(policy, "chunk", tuple(ks))
        for token in tokens[n_read : n_read + n_decode]:
            session.decode(token)
            yield _measure(policy, "decode", tuple(ks))


def summary(results: Sequence[RecallResult]) -> dict[str, dict[str, dict[str, float]]]:
    """step -> k -> shares, over all steps and layers: `of_best`, what the first k hold / what the best k hold;
    `of_all`, / what all blocks hold; `of_best_by_layer`, the first as a mean of each layer's and step's share.
    """
    done: dict[str, dict[str, dict[str, float]]] = {}
    for step in dict.fromkeys(r.step for r in results):
        mass = np.stack([r.mass for r in results if r.step == step])  # [n, len(ks), n_layer, 3]
        first, best, everything = mass.sum((0, 2)).T
        by_layer = (mass[..., 0] / np.maximum(mass[..., 1], 1e-30)).mean((0, 2))
        done[step] = {
            str(k): {
                "of_best": float(first[i] / best[i]),
                "of_all": float(first[i] / everything[i]),
                "of_best_by_layer": float(by_layer[i]),
            }
            for i, k in enumerate(results[0].ks)
        }
    return done


def _measure(policy: RepKVMemory, name: str, ks: tuple[int, ...]) -> RecallResult:
    step = policy.last_step
    assert step is not None
    first, n_tokens = policy.regions[:2].tolist()
    start, n_blocks = policy.local_start(first), policy.blocks.n_blocks
    bounds = np.array(policy.blocks.bounds)
    queries = np.unique(np.linspace(0, n_tokens - 1, min(N_QUERIES, n_tokens)).astype(int))
    layers = range(FIRST_LAYER, policy.config.n_layer)
    mass = np.empty((len(ks), len(layers), 3), np.float32)
    for i, layer in enumerate(layers):
        near, far = step.observed_queries(layer)
        stored, local = policy.stored_keys(layer, np.arange(start)), policy.local_keys(layer, start, first + n_tokens)
        true = block_mass(near[queries], far[queries], queries + first, stored, local, bounds)
        weight = _weight(step.observed_relevance(layer), policy.memory.relevance)
        n_rows = policy.config.n_head_kv if policy.memory.per_head else 1
        rows = [(w.sum(0), m.sum(0)) for w, m in zip(np.split(weight, n_rows), np.split(true, n_rows), strict=True)]
        for j, k in enumerate(ks):
            chosen = sum(m[np.argsort(-w, kind="stable")[:k]].sum() for w, m in rows)
            best = sum(np.sort(m)[::-1][:k].sum() for _, m in rows)
            mass[j, i] = chosen, best, true.sum()
    return RecallResult(name, first, n_blocks, ks, mass)


def _weight(x: Array, relevance: str) -> Array:
    """Relevance [H, n_blocks] -> what block_topk adds up over heads."""
    if relevance != "lse":
        return x
    p = np.exp(x - x.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def block_mass(
    near: Array,
    far: Array,
    positions: NDArray[np.integer],
    stored: Array,
    local: Array,
    bounds: NDArray[np.integer],
) -> Array:
    """Probability that each block gets, summed over queries -> [H, n_blocks].

    near, far: scaled queries [n, H, d]; stored: keys [start, K, d] before the window; local: keys [., K, d] in it, up
    to the last of `positions`.
    """
    start = len(stored)
    n_head, group = near.shape[1], near.shape[1] // local.shape[1]
    hidden = start + np.arange(len(local)) > positions[:, None]
    mass = np.empty((n_head, len(bounds) - 1), np.float32)
    for h in range(n_head):
        s_far = far[:, h] @ stored[:, h // group].T
        s_near = np.where(hidden, -np.inf, near[:, h] @ local[:, h // group].T)
        most = np.maximum(s_far.max(1), s_near.max(1))[:, None]
        weights = np.exp(s_far - most)
        total = weights.sum(1) + np.exp(s_near - most).sum(1)
        share = (weights / total[:, None]).sum(0)
        mass[h] = np.diff(np.concatenate([[0.0], np.cumsum(share, dtype=np.float64)])[bounds])
    return mass
