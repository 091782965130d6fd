"""Representative scores, of a chunk and of one token, against plain numpy.

Large numbers stand in the lanes of no token, and in cells of the window's arena that no query may score.
"""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyggml_repkv.ffi.handles import tensor_array
from pyggml_repkv.memory.centres import KeyCentres
from tests.unit.native.arenas import Arena, cache_names, fitting_cache
from tests.unit.native.op_bench import Bench, assert_close, config, packed, rotated
from tests.unit.native.test_keys import centres_of

DOT, PROBABILITY = "score_acc", "score_attention"

Scores = tuple[np.ndarray, np.ndarray]
"""What an op added to scores that were not 0, [first + T, K], and the same by numpy."""


@dataclass(frozen=True)
class Step:
    """n_tokens queries from position `first` on; the window begins at `local`, its arena at `base`."""

    first: int
    n_tokens: int
    n_score: int
    local: int
    base: int

    def scored(self, kind: str, position: int) -> range:
        """Keys that the query at a position scores."""
        begin = max(self.base if kind == DOT else self.local, position - self.n_score, 0)
        return range(begin, position + (kind == PROBABILITY))


@st.composite
def steps(draw, most_tokens: int) -> Step:
    first = draw(st.one_of(st.integers(0, 5), st.integers(0, 200)))
    local = draw(st.integers(0, first))
    base = max(0, local - draw(st.sampled_from([0, 1, 7])))
    return Step(first, draw(st.integers(1, most_tokens)), draw(st.integers(1, 150)), local, base)


def added(kind: str, step: Step, q: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """q [T, H, d] rotated, keys [n, K, d] of the positions from `base` on -> what is added, [first + T, K]."""
    n_head_kv, d = keys.shape[1:]
    score = np.zeros((step.first + step.n_tokens, n_head_kv))
    for t, heads in enumerate(q):
        of = step.scored(kind, step.first + t)
        group = heads.reshape(n_head_kv, -1, d)
        s = np.einsum("kgd,mkd->kgm", group, keys[of.start - step.base : of.stop - step.base])
        if kind == PROBABILITY:
            s = np.exp(s / np.sqrt(d) - (s / np.sqrt(d)).max(-1, keepdims=True))
            s /= s.sum(-1, keepdims=True)
        score[of.start : of.stop] += s.sum(1).T / (step.n_score if kind == DOT else 1)
    return score


def chunk(
    kind: str, step: Step, bench: Bench, cache: str, seed: int, sharp: float = 1.0, centres: KeyCentres | None = None
) -> Scores:
    """The step as a chunk: its own keys are in the arena. centres: what the keys there lack."""
    c, rng = bench.config, np.random.default_rng(seed)
    q = sharp * rng.standard_normal((step.n_tokens, c.n_head, c.head_dim))
    arena = arena_of(kind, step, bench, cache, rng, step.n_tokens)
    q_tensor = bench.tensor(packed((q / np.sqrt(c.head_dim)).reshape(step.n_tokens, -1), padding=1e3))
    maker = getattr(bench.ops if centres is None else bench.ops.centred(centres.of(0)), kind)
    return run(bench, step, lambda score, regions: maker(q_tensor, arena.tensor, score, regions, step.n_score),
               added(kind, step, q, whole_keys(arena, step, centres)))  # fmt: skip


def one(
    kind: str, step: Step, bench: Bench, cache: str, seed: int, sharp: float = 1.0, centres: KeyCentres | None = None
) -> Scores:
    """The step of one token: its key is rotated here, and not in the arena yet."""
    c, rng = bench.config, np.random.default_rng(seed)
    q, own, value = (rng.standard_normal((n, c.head_dim)) for n in (c.n_head, c.n_head_kv, c.n_head_kv))
    qkv = np.concatenate((sharp * q, own, value)).astype(np.float32)
    arena = arena_of(kind, step, bench, cache, rng, 0)
    angle = rng.uniform(0, 6, (2, c.rope_dim // 2))  # the second is of the far distance
    rope = bench.tensor(np.concatenate((np.cos(angle), np.sin(angle)), -1).astype(np.float32))
    turned = rotated(qkv[: c.n_head + c.n_head_kv].astype(np.float64), np.cos(angle[0]), np.sin(angle[0]))
    keys = np.concatenate((whole_keys(arena, step, centres)[: step.first - step.base], turned[None, c.n_head :]))
    maker = getattr(bench.ops if centres is None else bench.ops.centred(centres.of(0)), f"{kind}_one")
    qkv_tensor = bench.tensor(qkv.ravel())
    return run(bench, step, lambda score, regions: maker(qkv_tensor, arena.tensor, score, rope, regions, step.n_score),
               added(kind, step, turned[None, : c.n_head], keys))  # fmt: skip


def whole_keys(arena: Arena, step: Step, centres: KeyCentres | None) -> np.ndarray:
    """The keys that those in an arena stand for, float64 [n, K, d]."""
    stored = arena.values()
    positions = np.arange(step.base, step.base + len(stored))
    return stored if centres is None else centres.added(0, stored, positions, rotated=True).astype(np.float64)


def arena_of(kind: str, step: Step, bench: Bench, cache: str, rng: np.random.Generator, n_own: int) -> Arena:
    begin = step.scored(kind, step.first).start - step.base
    n_filled = step.first + n_own - step.base
    return Arena(bench, rng, fitting_cache(cache, bench.config.head_dim), n_filled + 3, slice(begin, n_filled), 1e3)


def run(bench: Bench, step: Step, make, want: np.ndarray) -> Scores:
    """Also that every other score is left alone, and that the marker is 0."""
    n, n_head_kv = len(want), bench.config.n_head_kv
    before = np.random.default_rng(1).standard_normal((n + 4, n_head_kv)).astype(np.float32)
    before[n:] = np.nan
    score = bench.tensor(before)
    regions = bench.regions(first=step.first, n_tokens=step.n_tokens, local=step.local, local_base=step.base)
    assert bench.compute(make(score, regions)).tolist() == [0.0]
    after = tensor_array(score)
    untouched = np.r_[0 : step.base, n : n + 4]
    assert np.array_equal(after[untouched], before[untouched], equal_nan=True)
    return after[:n].astype(np.float64) - before[:n], want


sizes = {
    "n_head_kv": st.integers(1, 3),
    "group": st.integers(1, 5),
    "head_dim": st.sampled_from([16, 32, 48, 64, 80, 128]),
    "cache": cache_names,
    "sharp": st.sampled_from([1.0, 8.0]),
    "n_threads": st.integers(1, 6),
    "seed": st.integers(0, 999),
}


@pytest.mark.parametrize("kind", [DOT, PROBABILITY])
@given(step=steps(100), **sizes)
@settings(max_examples=60)
def test_a_chunk_scores_the_keys_before_it(kind, step, n_head_kv, group, head_dim, cache, sharp, n_threads, seed):
    bench = Bench(config(n_head=n_head_kv * group, n_head_kv=n_head_kv, head_dim=head_dim), n_threads)
    got, want = chunk(kind, step, bench, cache, seed, sharp)
    assert_close(got, want, 2e-5 * sharp)


@pytest.mark.parametrize("kind", [DOT, PROBABILITY])
@given(step=steps(1), partly=st.booleans(), **sizes)
@settings(max_examples=60)
def test_one_token_scores_the_keys_before_it(kind, step, partly, n_head_kv, group, head_dim, cache, sharp, n_threads,
                                             seed):  # fmt: skip
    """`partly`: only half of each head is rotated."""
    rope_dim = head_dim // 2 if partly else head_dim
    bench = Bench(
        config(n_head=n_head_kv * group, n_head_kv=n_head_kv, head_dim=head_dim, rope_dim=rope_dim), n_threads
    )
    got, want = one(kind, step, bench, cache, seed, sharp)
    assert_close(got, want, 2e-5 * sharp)


@pytest.mark.parametrize("kind", [DOT, PROBABILITY])
@pytest.mark.parametrize("local", range(98, 136))
def test_a_window_begins_at_any_lane_of_a_panel(kind, local):
    """Its first key is the oldest that a query scores, for one query of the 33 after another."""
    bench = Bench(config(n_head=2, n_head_kv=1, head_dim=16), 1)
    got, want = chunk(kind, Step(first=200, n_tokens=33, n_score=100, local=local, base=97), bench, "f32", local)
    assert_close(got, want, 2e-5)


@pytest.mark.parametrize("form", [chunk, one])
@pytest.mark.parametrize("kind", [DOT, PROBABILITY])
@pytest.mark.parametrize("n_score", [991, 992, 993, 1023, 1024, 1100])
def test_a_window_beyond_what_is_kept_between_passes(form, kind, n_score):
    """Scores of up to 1024 keys are computed once, those of more twice."""
    bench = Bench(config(n_head=2, n_head_kv=1, head_dim=16), 2)
    got, want = form(kind, Step(first=1200, n_tokens=1, n_score=n_score, local=50, base=40), bench, "f16", n_score)
    assert_close(got, want, 2e-5)


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("base", [0, 1, 63, 64, 97])
@pytest.mark.parametrize(("form", "n_tokens"), [(chunk, 1), (chunk, 33), (one, 1)])
@pytest.mark.parametrize("kind", [DOT, PROBABILITY])
def test_keys_less_their_bias_get_that_of_their_positions(kind, form, n_tokens, base, n_threads):
    """A window's arena begins at any position."""
    bench = Bench(config(n_head=4, n_head_kv=2, head_dim=32), n_threads)
    bias = (2 * np.random.default_rng(base).standard_normal(64)).astype(np.float32)
    step = Step(first=200, n_tokens=n_tokens, n_score=150, local=base + 3, base=base)
    centres, _ = centres_of(bench, bias, 300)
    got, want = form(kind, step, bench, "q8_0", base, centres=centres)
    assert_close(got, want, 5e-5)
    _, without = form(kind, step, Bench(bench.config, 1), "q8_0", base)
    assert np.abs(without - want).max() > 0.1 * np.abs(want).max()


@pytest.mark.parametrize("kind", [DOT, PROBABILITY])
def test_one_token_equals_a_chunk_of_one(kind):
    """store_kv rotates for the chunk, and puts the key into the arena."""
    rng = np.random.default_rng(3)
    bench = Bench(config(n_head=6, n_head_kv=2, head_dim=48), 3)
    qkv = rng.standard_normal((1, 10 * 48)).astype(np.float32)
    angle = rng.uniform(0, 6, 24)
    table = np.concatenate((np.cos(angle), np.sin(angle))).astype(np.float32)
    arenas = [Arena(bench, rng, "f32", 40, slice(37)) for _ in "kv"]
    scores = [bench.tensor(np.zeros((71, 2), np.float32)) for _ in range(2)]
    regions = bench.regions(first=70, n_tokens=1, local=35, local_base=33)

    rope = bench.tensor(np.stack((table, np.zeros_like(table))))
    marker = getattr(bench.ops, f"{kind}_one")(bench.tensor(qkv[0]), arenas[0].tensor, scores[0], rope, regions, 40)
    bench.graph.output(marker)
    bench.rotate_by(packed(table[None], padding=0))
    q = bench.ops.store_kv(bench.tensor(packed(qkv, padding=0)), *(a.tensor for a in arenas), bench.integers(37, 1))
    bench.compute(getattr(bench.ops, kind)(q, arenas[0].tensor, scores[1], regions, 40))
    one_token, of_chunk = (tensor_array(score) for score in scores)
    assert (one_token != 0).any()
    assert_close(one_token, of_chunk, 1e-5)
