"""Blocks do not depend on the steps, failed ones included; slots agree with a cache that recomputes every score."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pyggml_repkv.memory.blocks import FixedBlocks, SemanticBlocks
from pyggml_repkv.memory.boundaries import LOOKAHEAD, BoundaryScores
from pyggml_repkv.memory.slots import Slots

TEXTS = [b" the", b"ing", b".", b",", b"\n", b"\n\n", b" ", b"3", b'"', "。".encode(), b"\xe3", b""]
KEYS = np.random.default_rng(0).normal(size=(len(TEXTS), 6))
SCORES = BoundaryScores(TEXTS.__getitem__, KEYS.__getitem__)

sinks = st.integers(0, 70)
sizes = st.tuples(st.integers(16, 80), st.integers(0, 60)).map(lambda pair: (pair[0], sum(pair)))


def texts(n, seed):
    """n tokens; most end nothing, as in a text."""
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
    """Every token that left the window is a sink, in one block or in the remainder."""
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
    """Steps as an engine makes them; a failed one is read again in other pieces, or other tokens follow instead."""
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


class SlotsMachine(RuleBasedStateMachine):
    """Beside it: slot, score and last use of every resident block, all scores decayed in every call."""

    @initialize(n_slots=st.integers(0, 8), decay=st.sampled_from([0.5, 0.9, 0.999, 1.0]))
    def start(self, n_slots, decay):
        self.slots, self.decay, self.now = Slots(n_slots, decay), decay, 0
        self.where, self.score, self.last = {}, {}, {}

    @rule(data=st.data())
    def take(self, data):
        n_slots = self.slots.n_slots
        wanted = data.draw(st.lists(st.integers(0, 12), max_size=n_slots))
        self.now += 1
        self.score = {block: score * self.decay for block, score in self.score.items()}
        missing = [block for block in dict.fromkeys(wanted) if block not in self.where]
        idle = [block for block in self.where if block not in wanted]

        loads = self.slots.take(wanted)

        assert [block for block, _ in loads] == missing
        assert len({slot for _, slot in loads}) == len(loads)
        victims = [block for block in idle if self.slots.slot_of(block) is None]
        assert len(victims) == max(0, len(self.where) + len(missing) - n_slots)
        for victim in victims:
            for survivor in set(idle) - set(victims):
                # a rounding apart, either may go
                assert self.score[victim] <= self.score[survivor] * (1 + 1e-9)
                if self.score[victim] == self.score[survivor]:
                    assert self.tie_rank(victim) < self.tie_rank(survivor)
        for victim in victims:
            self.drop(victim)
        for block, slot in loads:
            assert slot not in self.where.values()
            self.where[block], self.score[block] = slot, 0.0
        for block in set(wanted):
            self.score[block] += 1
            self.last[block] = self.now
            assert self.slots.slot_of(block) == self.where[block]

    @precondition(lambda self: self.where)
    @rule(data=st.data())
    def forget(self, data):
        block = data.draw(st.integers(0, 12))
        self.slots.forget(block)
        if block in self.where:
            self.drop(block)

    @invariant()
    def the_same_blocks_lie_in_the_same_slots(self):
        if hasattr(self, "slots"):
            assert self.slots.resident == self.where
            assert len(set(self.where.values())) == len(self.where) <= self.slots.n_slots
            assert all(0 <= slot < self.slots.n_slots for slot in self.where.values())

    def tie_rank(self, block):
        return self.last[block], self.where[block]

    def drop(self, block):
        del self.where[block], self.score[block], self.last[block]


SlotsMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestSlots = SlotsMachine.TestCase
