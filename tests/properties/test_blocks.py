"""Blocks do not depend on the steps, not even on failed ones."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pyggml_repkv.memory.cut.blocks import FixedBlocks, SemanticBlocks
from pyggml_repkv.memory.cut.boundaries import LOOKAHEAD, BoundaryScores

TEXTS = [b" the", b"ing", b".", b",", b"\n", b"\n\n", b" ", b"3", b'"', "。".encode(), b"\xe3", b""]
KEYS = np.random.default_rng(0).normal(size=(len(TEXTS), 6))
SCORES = BoundaryScores(TEXTS.__getitem__, KEYS.__getitem__)

sinks = st.integers(0, 70)
sizes = st.tuples(st.integers(16, 80), st.integers(0, 60)).map(lambda pair: (pair[0], sum(pair)))


def texts(n, seed):
    """n tokens; as in a text, most end no sentence."""
    weights = np.array([12, 8] + [1] * (len(TEXTS) - 2))
    return np.random.default_rng(seed).choice(len(TEXTS), n, p=weights / weights.sum()).tolist()


def naive_bounds(tokens, n_sink, min_size, max_size, end):
    scores = SCORES.score(tokens, range(len(tokens)))
    bounds = [n_sink]
    while bounds[-1] + max_size <= end and bounds[-1] + max_size + LOOKAHEAD <= len(tokens):
        candidates = range(bounds[-1] + min_size, bounds[-1] + max_size + 1)
        bounds.append(max(candidates, key=lambda i: (scores[i], -i)))
    return bounds


def check_partition(blocks, new, n_sink, end, min_size, max_size):
    """Asserts that every token that left the window is a sink, in one block, or in the remainder."""
    assert list(zip(blocks.bounds, blocks.bounds[1:], strict=False)) == new
    assert [token for first, last in new for token in range(first, last)] == list(range(n_sink, blocks.sealed_end))
    assert all(min_size <= last - first <= max_size for first, last in new)
    assert blocks.n_blocks == len(new)
    assert blocks.sealed_end <= max(end, n_sink)
    assert end - blocks.sealed_end < max_size


@given(n_sink=sinks, size=st.integers(16, 300), steps=st.lists(st.integers(0, 400), max_size=30))
def test_fixed_blocks_do_not_depend_on_the_steps(n_sink, size, steps):
    stepwise, at_once = FixedBlocks(n_sink, size), FixedBlocks(n_sink, size)
    new, end = [], 0
    for step in steps:
        end += step
        new += stepwise.seal(end)
        check_partition(stepwise, new, n_sink, end, size, size)
    assert new == at_once.seal(end)


@given(
    n_sink=sinks,
    sizes=sizes,
    n_local=st.integers(32, 100),
    seed=st.integers(0, 2**32 - 1),
    steps=st.lists(st.tuples(st.integers(1, 200), st.sampled_from(["read", "read", "failed", "other"])), max_size=25),
    seal_first=st.booleans(),
)
def test_semantic_blocks_do_not_depend_on_the_steps(n_sink, sizes, n_local, seed, steps, seal_first):
    """Steps of an engine; after a failed one, other pieces with the same tokens follow, or other tokens."""
    blocks = SemanticBlocks(n_sink, *sizes, SCORES)
    tokens, new = [], []
    for i, (n_tokens, outcome) in enumerate(steps):
        n_past, step = len(tokens), texts(n_tokens, seed + i * (outcome == "other"))
        end = max(0, n_past - n_local)
        if seal_first:
            new += blocks.seal(end)
        blocks.append(step, n_past)
        if not seal_first:
            new += blocks.seal(end)
        if outcome != "failed":
            tokens += step
        check_partition(blocks, new, n_sink, end, *sizes)
    end = max(0, len(tokens) - n_local)
    blocks.append([], len(tokens))
    new += blocks.seal(end)
    at_once = SemanticBlocks(n_sink, *sizes, SCORES)
    at_once.append(tokens, 0)
    assert at_once.seal(end) == new
    assert blocks.bounds == naive_bounds(tokens, n_sink, *sizes, end)


@given(
    n_sink=sinks,
    sizes=sizes,
    seed=st.integers(0, 2**32 - 1),
    calls=st.lists(st.tuples(st.sampled_from(["append", "seal"]), st.integers(0, 500)), max_size=25),
)
def test_semantic_blocks_wait_for_tokens_that_are_not_known(n_sink, sizes, seed, calls):
    tokens = texts(1500, seed)
    blocks, n_known, end, new = SemanticBlocks(n_sink, *sizes, SCORES), 0, 0, []
    for call, number in calls:
        if call == "append":
            blocks.append(tokens[n_known : n_known + number], n_known)
            n_known = min(n_known + number, len(tokens))
        else:
            new += blocks.seal(number * 3)
            end = max(end, number * 3)
    new += blocks.seal(end)
    assert blocks.bounds == naive_bounds(tokens[:n_known], n_sink, *sizes, end)
    assert new == list(zip(blocks.bounds, blocks.bounds[1:], strict=False))
