"""The scan of codes, against float64 sums over the keys that the codes stand for."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyggml_repkv.ffi.library import g
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.ops.kernels import LANES, PANEL
from tests.unit.native.coded import Codes, random_turn
from tests.unit.native.op_bench import Bench, assert_close, config, packed, rotated

LOWEST = np.float32(-3e38)
FIRST = 5
"""The position of the first token with a code."""

bit_widths = st.sampled_from([1, 2, 4])
head_dims = st.sampled_from([4, 20, 48, 64, 128])
unit_sizes = st.sampled_from(["1", "2", "4", "8", "16", "32", "48", "128", "16,32,48", "8-32", "1-128"])


def unit_bounds(rng: np.random.Generator, sizes: str, n_units: int) -> np.ndarray:
    """Positions where units begin, and where the last ends: of one size, of some, or of any between two."""
    if "-" in sizes:
        low, high = map(int, sizes.split("-"))
        lengths = rng.integers(low, high + 1, n_units)
    else:
        lengths = rng.choice([int(s) for s in sizes.split(",")], n_units)
    return np.concatenate(([0], np.cumsum(lengths))) + FIRST


def in_8_bits(q: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Queries [..., d] as the scan rounds them, turned. Raises AssertionError if one is near the middle of two."""
    turned = q.astype(np.float64) @ turn
    step = np.abs(turned).max(-1, keepdims=True) / 127
    ratio = turned / np.where(step > 0, step, 1)
    assert (np.abs(ratio % 1 - 0.5) > 2e-5).all()
    return np.rint(ratio) * step


def clear_queries(rng: np.random.Generator, shape: tuple[int, ...], turn: np.ndarray, back: np.ndarray) -> np.ndarray:
    """Random float32 queries [..., d] whose rounding is certain; `back` undoes what is done to them before `turn`."""
    n, d = int(np.prod(shape)), len(turn)
    found = np.empty((0, d), np.float32)
    while len(found) < n:
        q = rng.normal(size=(n, d)) * rng.uniform(0.1, 4, (n, 1))
        ratio = q @ turn
        ratio /= np.abs(ratio).max(-1, keepdims=True) / 127
        found = np.concatenate((found, q[(np.abs(ratio % 1 - 0.5) > 1e-4).all(-1)] @ back), dtype=np.float32)
    return found[:n].reshape(*shape, d)


@dataclass
class Case:
    """Codes of random keys in units; the lanes of tiles that hold no token are NaN."""

    config: ModelConfig
    n_threads: int
    rng: np.random.Generator
    bits: int
    bounds: np.ndarray
    codes: Codes
    n_padded: int

    @staticmethod
    def make(
        seed: int, bits: int, d: int, sizes: str, n_units: int, n_head_kv: int = 2, group: int = 2, n_threads: int = 2
    ) -> "Case":
        rng = np.random.default_rng(seed)
        bounds = unit_bounds(rng, sizes, n_units)
        n_tokens = int(bounds[-1]) - FIRST
        codes = Codes(max(n_tokens, 1), n_head_kv, d, bits, random_turn(rng, d))
        codes.centre[...] = rng.normal(size=codes.shape)
        codes.encode(0, rng.normal(size=(n_tokens, n_head_kv, d)) * rng.uniform(0.3, 3, (n_tokens, 1, 1)))
        c = config(n_head=n_head_kv * group, n_head_kv=n_head_kv, head_dim=d)
        return Case(c, n_threads, rng, bits, bounds, codes, (-(-n_units // LANES) + 1) * LANES)

    @property
    def n_units(self) -> int:
        return len(self.bounds) - 1

    def sources(self, bench: Bench) -> dict:
        bounds = np.full(self.n_padded + 1, -7, np.int32)
        bounds[: len(self.bounds)] = self.bounds
        return {
            "codes": bench.tensor(self.codes.rows, g.GGML_TYPE_I8),
            "units": bench.tensor(bounds, g.GGML_TYPE_I32),
            "turn": bench.tensor(self.codes.turn),
            "bits": self.bits,
            "n_padded": self.n_padded,
        }

    def scores(self, q: np.ndarray) -> np.ndarray:
        """Rounded queries [..., H, d] -> [..., H, n_tokens]."""
        keys = self.codes.decode(0, int(self.bounds[-1]) - FIRST).astype(np.float64)
        n_head_kv, d = self.codes.shape
        grouped = q.reshape(*q.shape[:-2], n_head_kv, -1, d)
        return np.einsum("...kgd,tkd->...kgt", grouped, keys).reshape(*q.shape[:-1], -1)

    def log_mass(self, scores: np.ndarray) -> np.ndarray:
        """[..., n_tokens] -> [..., n_units]."""
        parts = [scores[..., a - FIRST : b - FIRST] for a, b in zip(self.bounds, self.bounds[1:], strict=False)]
        tops = [part.max(-1) for part in parts]
        sums = [np.exp(part - top[..., None]).sum(-1) for part, top in zip(parts, tops, strict=True)]
        return np.stack([top + np.log(s) for top, s in zip(tops, sums, strict=True)], -1)

    def one(self, q: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Unscaled queries [H, d] before RoPE -> relevance [H, n_units], and its log-sum over all units [H]."""
        c, bench, far = self.config, Bench(self.config, self.n_threads), np.stack([np.concatenate((cosine, sine))] * 2)
        far[0] = np.nan
        qkv = np.concatenate((q.ravel(), np.full(2 * c.n_head_kv * c.head_dim, np.nan))).astype(np.float32)
        node = bench.ops.scan_tokens_one(
            bench.tensor(qkv), rope=bench.tensor(far.astype(np.float32)),
            regions=bench.regions(n_tokens=1, n_units=self.n_units), **self.sources(bench),
        )  # fmt: skip
        flat = bench.compute(node).ravel()
        x = flat[: c.n_head * self.n_padded].reshape(c.n_head, -1)[:, : self.n_units]
        top, total = flat[c.n_head * self.n_padded :].reshape(-1, c.n_head, 2).astype(np.float64).transpose(2, 0, 1)
        assert (total >= 0).all()
        with np.errstate(divide="ignore"):
            return x, np.log((total * np.exp(np.where(total > 0, top - top.max(0), 0))).sum(0)) + top.max(0)

    def chunk(self, q: np.ndarray, group: int, stride: int, padding: float = np.nan, n_idle: int = 0) -> np.ndarray:
        """Scaled queries [T, H, d] -> weights [n_groups, K, n_units]; n_idle: planned threads that do not run."""
        n_groups, bench = -(-len(q) // group) if group else 1, Bench(self.config, self.n_threads)
        n_planned = self.n_threads + n_idle
        bench.kernels.n_threads = n_planned
        node = bench.ops.scan_tokens(
            bench.tensor(packed(q.reshape(len(q), -1), padding)),
            regions=bench.regions(n_tokens=len(q), n_units=self.n_units), n_groups=n_groups, group=group,
            stride=stride, **self.sources(bench),
        )  # fmt: skip
        n_head_kv = self.config.n_head_kv
        lines = bench.compute(node).reshape(-1, self.n_padded)[: n_groups * n_head_kv * n_planned]
        return lines.reshape(n_groups, n_head_kv, n_planned, -1)[..., : self.n_units].astype(np.float64).sum(2)


def turned_by(angles: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cosines, sines, and the matrix that undoes the rotation."""
    cosine, sine = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return cosine, sine, np.linalg.inv(rotated(np.eye(2 * len(angles)), cosine.astype(np.float64), sine))


@given(
    bits=bit_widths, d=head_dims, sizes=unit_sizes, n_units=st.integers(1, 70), n_head_kv=st.integers(1, 3),
    group=st.sampled_from([1, 2, 4, 5, 7, 8, 9, 16, 17]), n_threads=st.integers(1, 3), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_relevance_of_one_token(bits, d, sizes, n_units, n_head_kv, group, n_threads, seed):
    case = Case.make(seed, bits, d, sizes, n_units, n_head_kv, group, n_threads)
    cosine, sine, back = turned_by(case.rng.uniform(0, 6, d // 2))
    q = clear_queries(case.rng, (n_head_kv * group,), case.codes.turn, back)
    far = rotated(q.astype(np.float64), cosine.astype(np.float64), sine.astype(np.float64)) * d**-0.5
    scores = case.scores(in_8_bits(far, case.codes.turn))
    got, total = case.one(q, cosine, sine)
    limit = 5e-6 + 1e-6 * np.abs(scores).max()
    assert np.abs(got - case.log_mass(scores)).max() < limit
    top = scores.max(-1)
    assert np.abs(total - top - np.log(np.exp(scores - top[:, None]).sum(-1))).max() < limit


@given(
    bits=bit_widths, d=head_dims, sizes=unit_sizes, n_units=st.integers(1, 40), n_head_kv=st.integers(1, 3),
    group=st.sampled_from([1, 3, 7, 17]), n_threads=st.integers(1, 3), n_tokens=st.integers(1, 100),
    n_shared=st.sampled_from([0, 32, 64]), stride=st.sampled_from([1, 3, 4, 8]), seed=st.integers(0, 999),
    n_idle=st.integers(0, 2),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_weights_of_a_chunk(
    bits, d, sizes, n_units, n_head_kv, group, n_threads, n_tokens, n_shared, stride, seed, n_idle
):  # fmt: skip
    n_shared = n_shared if n_shared < -(-n_tokens // PANEL) * PANEL else 0
    case = Case.make(seed, bits, d, sizes, n_units, n_head_kv, group, n_threads)
    q = clear_queries(case.rng, (n_tokens, n_head_kv * group), case.codes.turn, np.eye(d)) * np.float32(0.3)
    got = case.chunk(q, n_shared, stride, n_idle=n_idle)
    for g_, first in enumerate(range(0, n_tokens, n_shared or n_tokens)):
        last = min(n_tokens, first + (n_shared or n_tokens))
        asked = q[first:last][::-1][::stride]
        scores = case.scores(in_8_bits(asked, case.codes.turn))
        p = np.exp(case.log_mass(scores) - case.log_mass(scores).max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        want = p.reshape(len(asked), n_head_kv, group, -1).sum((0, 2))
        assert np.abs(got[g_] - want).max() < (1e-5 + 1e-6 * np.abs(scores).max()) * len(asked) * group
        assert np.allclose(got[g_].sum(-1), len(asked) * group, rtol=1e-5)


def test_one_token_before_anything_has_codes():
    _, total = Case.make(0, 4, 64, "16", 0).one(np.zeros((4, 64), np.float32), np.ones(32), np.zeros(32))
    assert (total < -1e38).all()


@pytest.mark.parametrize("sizes", ["16", "8-32", "4"])
@pytest.mark.parametrize("rising", [True, False])
def test_scores_far_apart(sizes, rising):
    """Keys that grow or shrink along the text: units far below the best one so far may vanish, others are right."""
    case = Case.make(0, 4, 64, sizes, 200, 1, 1)
    n = int(case.bounds[-1]) - FIRST
    case.codes.centre[...] = 0
    direction = case.rng.normal(size=64)
    strength = np.linspace(-4, 4, n) if rising else np.linspace(4, -4, n)
    case.codes.encode(0, strength[:, None, None] * direction)
    q = clear_queries(case.rng, (1,), case.codes.turn, np.eye(64)) * 0.01 + direction.astype(np.float32) * 30
    far = q.astype(np.float64) / 8
    try:
        rounded = in_8_bits(far, case.codes.turn)
    except AssertionError:
        pytest.skip("a rounding is not certain")
    scores = case.scores(rounded)
    assert np.ptp(scores) > 1000
    want = case.log_mass(scores)[0]
    got, total = case.one(q, np.ones(32), np.zeros(32))
    near = want > want.max() - 80
    assert np.abs(got[0, near] - want[near]).max() < 1e-6 * np.abs(want).max()
    vanished = got[0] == LOWEST
    # A unit that has nearly vanished has lost tokens.
    assert np.abs(got[0, ~vanished] - want[~vanished]).max() < np.log(32)
    assert abs(total[0] - want.max()) < 10
    p = np.exp(want - want.max())
    assert_close(case.chunk(far[None].astype(np.float32), 0, 1)[0, 0], p / p.sum(), 1e-4)


@pytest.mark.parametrize("sizes", ["16", "32", "8-32", "4"])
@pytest.mark.parametrize("bits", [1, 4])
def test_poisoned_keys_are_lowest_and_huge_ones_highest(sizes, bits):
    case = Case.make(1, bits, 64, sizes, 40, 1, 2)
    clean = case.log_mass(
        case.scores(in_8_bits(q := clear_queries(case.rng, (2,), case.codes.turn, np.eye(64)), case.codes.turn) / 8)
    )
    for poison, unit in ((np.nan, 7), (np.inf, 20)):
        first, n = case.bounds[unit] - FIRST, case.bounds[unit + 1] - case.bounds[unit]
        case.codes.encode(first, np.full((n, 1, 64), poison))
    others = ~np.isin(np.arange(40), (7, 20))
    got, _ = case.one(q, np.ones(32), np.zeros(32))
    assert_close(got[:, others], clean[:, others], 1e-5)
    assert (got[:, ~others] == LOWEST).all()
    weights = case.chunk(q[None] / 8, 0, 1)[0, 0]
    assert (weights[~others] == 0).all()
    assert abs(weights.sum() - 2) < 1e-4
    # A key of any size, in a unit with others.
    huge = np.sign(q[:1] @ case.codes.turn) @ case.codes.turn.T * 1e15
    case.codes.encode(case.bounds[30] - FIRST, huge[None])
    got, total = case.one(q, np.ones(32), np.zeros(32))
    assert np.isfinite(got).all()
    assert np.isfinite(total).all()
    assert got[0].argmax() == 30
    assert case.chunk(q[None] / 8, 0, 1)[0, 0, 30] > 0.99


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30, 3e38])
def test_a_poisoned_query_says_nothing_about_others(poison):
    case = Case.make(2, 4, 64, "16", 40, 1, 2)
    q = clear_queries(case.rng, (2,), case.codes.turn, np.eye(64))
    clean = case.log_mass(case.scores(in_8_bits(q, case.codes.turn) / 8))
    q[0, 3] = poison
    got, total = case.one(q, np.ones(32), np.zeros(32))
    assert np.isfinite(got).all()
    assert np.isfinite(total).all()
    assert_close(got[1], clean[1], 1e-5)
    weights = case.chunk(q[None] / 8, 0, 1)[0, 0]
    assert abs(weights.sum() - 2) < 1e-4
    if not np.isfinite(poison):
        assert np.allclose(got[0], np.log(16), atol=1e-5)


def test_any_number_of_threads_finds_the_same():
    cases = [Case.make(3, 4, 64, "16", 40, 2, 7, n_threads) for n_threads in (1, 2, 3)]
    q = clear_queries(cases[0].rng, (5, 14), cases[0].codes.turn, np.eye(64))
    want = cases[0].chunk(q, 0, 1)
    for case in cases[1:]:
        assert np.allclose(case.chunk(q, 0, 1), want, atol=1e-5)
