"""Attention-mass recall: how much of the attention to older blocks the selected blocks hold.

The engine reads a text as always. Its graph gives the queries and the relevance of blocks; numpy computes the softmax
over all tokens from them, with keys and queries at the positions where the engine had them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.cut.blocks import parse_block
from pyggml_repkv.memory.repkv.memory import RepKVMemory

# Layers 0 and 1 attend almost evenly, so selection matters little there; published figures leave them out.
FIRST_LAYER = 2

# So many queries of a chunk are enough to estimate its mass.
N_QUERIES = 64

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RecallResult:
    """Recall of one step, for each k: of the first k blocks in the ranking. Layers begin at FIRST_LAYER.

    mass: [len(ks), n_layer, 3], the mass of the first k blocks, of the best k, and of all blocks.
    ranked: int32 [n_layer, n_rows, n], block numbers, best first, up to twice the largest k; a row for each key head if
    each selects its own, else one.
    hits, required: with blocks on disk, how many of the step's blocks were in RAM when needed, and how many it needed.
    """

    step: str
    position: int
    n_blocks: int
    ks: tuple[int, ...]
    mass: Array
    ranked: NDArray[np.int32]
    hits: int = 0
    required: int = 0


def run_recall(
    model: Model, memory: MemoryConfig, tokens: Sequence[int], ks: Sequence[int], n_chunks: int, n_decode: int
) -> Iterator[RecallResult]:
    """Reads tokens; yields recall in the last n_chunks whole chunks and in n_decode single tokens after them.

    ks: the numbers of blocks for which the ranking is judged; the memory alone decides how many are attended.
    Raises InputError for a memory without blocks, and if the text is too short for a choice of blocks.
    """
    n_read = (len(tokens) - n_decode) // memory.n_batch * memory.n_batch
    first_measured = n_read - n_chunks * memory.n_batch
    n_needed = memory.n_sink + memory.n_local + 2 * parse_block(memory.block).max_size
    if first_measured < n_needed:
        n_needed += (n_chunks + 1) * memory.n_batch + n_decode
        raise InputError(f"{len(tokens)} tokens are too few for recall with these blocks: it needs {n_needed}")
    with model.session(memory) as session:
        policy = session.policy
        if not isinstance(policy, RepKVMemory):
            raise InputError(f"recall judges the blocks of --kv repkv; --kv is {memory.kv}")
        policy.observed = True
        for first in range(0, n_read, memory.n_batch):
            before = _prefetch(policy)
            session.read(tokens[first : first + memory.n_batch])
            if first >= first_measured:
                yield _measure(policy, "chunk", tuple(ks), before)
        for token in tokens[n_read : n_read + n_decode]:
            before = _prefetch(policy)
            session.decode(token)
            yield _measure(policy, "decode", tuple(ks), before)


def _prefetch(policy: RepKVMemory) -> tuple[int, int]:
    if policy.disk is None:
        return 0, 0
    stats = policy.disk.io.stats
    return int(stats.hits), int(stats.required)


def summary(results: Sequence[RecallResult]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns step -> k -> shares over all steps and layers. `of_best`: mass of the first k / mass of the best k;
    `of_all`: mass of the first k / mass of all blocks; `of_best_by_layer`: mean of `of_best` over layers and steps.
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


def layer_shares(results: Sequence[RecallResult]) -> dict[str, dict[str, list[float]]]:
    """Returns step -> k -> `of_best` of each layer from FIRST_LAYER on, over all steps."""
    done: dict[str, dict[str, list[float]]] = {}
    for step in dict.fromkeys(r.step for r in results):
        mass = np.stack([r.mass for r in results if r.step == step]).sum(0)  # [len(ks), n_layer, 3]
        shares = mass[..., 0] / np.maximum(mass[..., 1], 1e-30)
        done[step] = {str(k): shares[i].tolist() for i, k in enumerate(results[0].ks)}
    return done


def stability(results: Sequence[RecallResult]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns step -> k -> how much of the first k blocks was also among the first k of the previous step (`step`),
    among its first 2k (`step_2k`), and among the first k of the previous layer (`layer`): means over layers and steps.
    `there`: with blocks on disk, the share of blocks that were in RAM when needed.
    """
    done: dict[str, dict[str, dict[str, float]]] = {}
    for name in dict.fromkeys(r.step for r in results):
        steps = [r for r in results if r.step == name]
        required = sum(r.required for r in steps)
        done[name] = {}
        for k in results[0].ks:
            pairs = list(pairwise(steps))
            done[name][str(k)] = {
                "step": _mean([_overlap(b.ranked, a.ranked, k, k) for a, b in pairs]),
                "step_2k": _mean([_overlap(b.ranked, a.ranked, k, 2 * k) for a, b in pairs]),
                "layer": _mean([_overlap(r.ranked[1:], r.ranked[:-1], k, k) for r in steps]),
                **({"there": sum(r.hits for r in steps) / required} if required else {}),
            }
    return done


def _overlap(ranked: NDArray[np.int32], other: NDArray[np.int32], k: int, k_other: int) -> float:
    """How much of ranked[..., :k] is in other[..., :k_other], a mean over all rows."""
    first, pool = ranked[..., :k, None], other[..., None, :k_other]
    return float((first == pool).any(-1).mean()) if first.size else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _measure(policy: RepKVMemory, name: str, ks: tuple[int, ...], before: tuple[int, int]) -> RecallResult:
    step = policy.last_step
    assert step is not None
    first, n_tokens = policy.regions.first, policy.regions.n_tokens
    start, n_blocks = policy.local.start(first), policy.blocks.n_blocks
    bounds = np.array(policy.blocks.bounds)
    queries = np.unique(np.linspace(0, n_tokens - 1, min(N_QUERIES, n_tokens)).astype(int))
    layers = range(FIRST_LAYER, policy.config.n_layer)
    n_rows = policy.config.n_head_kv if policy.memory.per_head else 1
    mass = np.empty((len(ks), len(layers), 3), np.float32)
    ranked = np.empty((len(layers), n_rows, min(2 * max(ks), n_blocks)), np.int32)
    for i, layer in enumerate(layers):
        near, far = step.observed_queries(layer)
        stored, local = policy.stored_keys(layer, np.arange(start)), policy.local_keys(layer, start, first + n_tokens)
        true = block_mass(near[queries], far[queries], queries + first, stored, local, bounds)
        weight = _weight(step.observed_relevance(layer), policy.memory.relevance)
        rows = [(w.sum(0), m.sum(0)) for w, m in zip(np.split(weight, n_rows), np.split(true, n_rows), strict=True)]
        orders = [np.argsort(-w, kind="stable") for w, _ in rows]
        ranked[i] = [order[: ranked.shape[2]] for order in orders]
        for j, k in enumerate(ks):
            chosen = sum(m[order[:k]].sum() for order, (_, m) in zip(orders, rows, strict=True))
            best = sum(np.sort(m)[::-1][:k].sum() for _, m in rows)
            mass[j, i] = chosen, best, true.sum()
    hits, required = (now - then for now, then in zip(_prefetch(policy), before, strict=True))
    return RecallResult(name, first, n_blocks, ks, mass, ranked, hits, required)


def _weight(x: Array, relevance: str) -> Array:
    """Returns the weights that block_topk adds up over heads, for relevance [H, n_blocks]."""
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
    """Returns the probability that each block gets, summed over queries: [H, n_blocks].

    near, far: scaled queries [n, H, d]; stored: keys [start, K, d] before the window; local: keys [., K, d] in the
    window, up to the last of `positions`.
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
