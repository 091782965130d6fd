"""Choosing representatives and blocks: ties, NaN, empty and full cases, against plain numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyggml_repkv.ffi.library import g, native, native_ffi
from pyggml_repkv.memory.store.arenas import as_array
from pyggml_repkv.ops.kernels import LANES
from tests.unit.native.op_bench import Bench, assert_close, config, packed, rotated

# Few distinct values, so that ties are common.
few = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, float("nan"), float("-inf")])


def repr_topk(scores: np.ndarray, begin: int, end: int, n_repr: int) -> np.ndarray:
    """The chosen tokens, [K, n_repr]."""
    out = np.empty((scores.shape[1], n_repr), np.int32)
    native.repkv_repr_topk(
        native_ffi.cast("int32_t *", out.ctypes.data),
        native_ffi.cast("float *", np.ascontiguousarray(scores).ctypes.data),
        begin,
        end,
        scores.shape[1],
        n_repr,
    )
    return out


@given(data=st.data(), n_head_kv=st.integers(1, 3), n_tokens=st.integers(1, 40), n_repr=st.integers(1, 8))
@settings(max_examples=150)
def test_representatives_are_the_highest_and_of_equals_the_first(data, n_head_kv, n_tokens, n_repr):
    values = st.lists(few.filter(lambda x: x == x), min_size=n_tokens * n_head_kv, max_size=n_tokens * n_head_kv)
    scores = np.array(data.draw(values), np.float32).reshape(n_tokens, n_head_kv)
    begin = data.draw(st.integers(0, n_tokens - 1))
    got = repr_topk(scores, begin, n_tokens, n_repr)
    for kv in range(n_head_kv):
        best = sorted(range(begin, n_tokens), key=lambda t: (-scores[t, kv], t))[:n_repr]
        want = sorted(best)
        assert got[kv].tolist() == want + [want[-1]] * (n_repr - len(want))


def test_a_nan_score_never_leads():
    scores = np.array([[np.nan], [1.0], [3.0], [np.nan], [2.0]], np.float32)
    assert repr_topk(scores, 0, 5, 2).tolist() == [[2, 4]]
    assert repr_topk(scores, 0, 5, 4).tolist() == [[0, 1, 2, 4]]


LOWEST = np.float32(-3e38)
KINDS = ("lse", "mean", "max")


class Blocks:
    """Random representatives in the index's layout."""

    def __init__(
        self, rng: np.random.Generator, n_blocks: int, n_head_kv: int, n_repr: int, d: int, dtype: type
    ) -> None:
        self.n_blocks = n_blocks
        self.keys = rng.normal(size=(n_blocks, n_head_kv, n_repr, d)).astype(dtype)
        n_groups = -(-n_blocks // LANES) + 1
        self.index = np.zeros((n_groups, n_head_kv, n_repr, d, LANES), dtype)
        for b in range(n_blocks):
            self.index[b // LANES, ..., b % LANES] = self.keys[b]


def relevance_by_numpy(q: np.ndarray, keys: np.ndarray, kind: str) -> np.ndarray:
    """q [H, d], keys [B, K, R, d] -> [H, B]."""
    group = len(q) // keys.shape[1]
    s = np.einsum("hd,bhrd->hbr", q, np.repeat(keys.astype(np.float64), group, axis=1)) / np.sqrt(q.shape[1])
    return {"lse": np.log(np.exp(s).sum(2)), "mean": s.mean(2), "max": s.max(2)}[kind]


@given(
    n_blocks=st.integers(0, 40), n_head_kv=st.integers(1, 3), group=st.integers(1, 6), n_repr=st.integers(1, 5),
    d=st.sampled_from([32, 48, 64]), kind=st.sampled_from(KINDS), n_threads=st.integers(1, 4), half=st.booleans(),
    n_tokens=st.integers(1, 70), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_relevance_equals_numpy(n_blocks, n_head_kv, group, n_repr, d, kind, n_threads, half, n_tokens, seed):
    rng = np.random.default_rng(seed)
    blocks = Blocks(rng, n_blocks, n_head_kv, n_repr, d, np.float16 if half else np.float32)
    n_head = n_head_kv * group
    bench = Bench(config(n_head=n_head, n_head_kv=n_head_kv, head_dim=d), n_threads)
    index = bench.tensor(
        blocks.index.reshape(len(blocks.index), -1), g.GGML_TYPE_F16 if half else g.GGML_TYPE_F32,
        (len(blocks.index), blocks.index[0].size),
    )  # fmt: skip
    regions = bench.regions(n_tokens=n_tokens, n_units=n_blocks)
    marker = bench.tensor(np.zeros(1, np.float32))
    q = rng.normal(size=(n_tokens, n_head, d)).astype(np.float32)
    if n_tokens == 1:
        qkv = np.concatenate([q.ravel(), np.zeros(2 * n_head_kv * d, np.float32)])
        # The true position has no rotation, the far one a quarter turn.
        tables = np.stack([np.r_[np.ones(d // 2), np.zeros(d // 2)], np.r_[np.zeros(d // 2), np.ones(d // 2)]])
        rope = bench.tensor(tables.astype(np.float32))
        node = bench.ops.relevance_one(bench.tensor(qkv), index, rope, regions, marker, n_repr=n_repr, kind=kind)
        mean = rotated(q[0].astype(np.float64), np.zeros(d // 2), np.ones(d // 2))
    else:
        q_tensor = bench.tensor(packed(q.reshape(n_tokens, -1) * np.float32(d**-0.5)))
        node = bench.ops.relevance(q_tensor, index, regions, marker, n_repr=n_repr, kind=kind)
        mean = q.astype(np.float64).mean(0)
    got = bench.compute(node).ravel()[: n_head * LANES * len(blocks.index)].reshape(n_head, -1)[:, :n_blocks]
    if n_blocks:
        assert_close(got, relevance_by_numpy(mean, blocks.keys, kind), 2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_poisoned_representative_is_lowest_or_highest(poison, kind):
    """Block 4's second representative: NaN counts as lowest, and every other block is as if nothing had happened."""
    rng = np.random.default_rng(0)
    blocks = Blocks(rng, 20, 1, 2, 32, np.float32)
    clean = blocks.keys.copy()
    blocks.index[0, 0, 1, :, 4] = poison
    bench = Bench(config(n_head=1, n_head_kv=1, head_dim=32), 2)
    q = np.abs(rng.normal(size=(40, 32))).astype(np.float32)
    node = bench.ops.relevance(
        bench.tensor(packed(q * np.float32(32**-0.5))), bench.tensor(blocks.index.reshape(len(blocks.index), -1)),
        bench.regions(n_tokens=40, n_units=20), bench.tensor(np.zeros(1, np.float32)), n_repr=2, kind=kind,
    )  # fmt: skip
    got = bench.compute(node).ravel()[:20]
    want = relevance_by_numpy(q.astype(np.float64).mean(0)[None], clean, kind)[0]
    others = np.arange(20) != 4
    assert_close(got[others], want[others], 2e-5)
    assert np.isfinite(got).all()
    assert (got[4] == got.max()) == (poison == np.inf)


def topk(
    x: np.ndarray, n_top: int, kind: str = "lse", n_head_kv: int = 1, per_head: bool = False, n_threads: int = 2,
    n_wanted: int | None = None, kept: list | None = None, sticky: float = 0.0, sizes: np.ndarray | None = None,
    budget: int | None = None,
) -> list:  # fmt: skip
    """Returns the selected blocks, a list per row, for x [B, H], of which each thread has seen a part. kept: the last
    token's selection by row, ascending; the node must write its own beside it. n_wanted: how many blocks of 3 tokens
    the budget is for; or sizes [B] and the budget, for weights by size.
    """
    n_blocks, n_head = x.shape
    bench = Bench(config(n_head=n_head, n_head_kv=n_head_kv), n_threads)
    n_groups = -(-n_blocks // LANES) + 1
    flat = np.full((n_head, n_groups * LANES), LOWEST)
    flat[:, :n_blocks] = np.where(np.isnan(x), LOWEST, np.clip(x, LOWEST, -LOWEST)).T
    seen = np.zeros((n_threads, n_head, 2), np.float32)
    seen[..., 0] = LOWEST
    for t, part in enumerate(np.array_split(flat[:, :n_blocks], n_threads, axis=1)):
        if part.size:
            seen[t, :, 0] = part.max(1)
            seen[t, :, 1] = np.where(part <= LOWEST, 0, np.exp(part - part.max(1, keepdims=True))).sum(1)
    by_size, sizes = sizes is not None, np.full(n_blocks, 3) if sizes is None else sizes
    budget = 3 * (n_top if n_wanted is None else n_wanted) if budget is None else budget
    regions = bench.regions(n_units=n_blocks, budget=budget, kept=-1 if kept is None else 1)
    units = bench.integers(*np.concatenate(([5], 5 + np.cumsum(sizes))).tolist())
    n_rows = n_head_kv if per_head else 1
    halves = np.full((2, n_rows, 1 + n_top), -7, np.int32)
    for row, blocks in zip(halves[1], kept or [], strict=False):
        row[: 1 + len(blocks)] = [len(blocks), *blocks]
    kept_tensor = bench.tensor(halves, g.GGML_TYPE_I32)
    relevance = bench.tensor(np.concatenate([flat.ravel(), seen.ravel()]).astype(np.float32))
    node = bench.ops.block_topk(
        relevance,
        units,
        regions,
        n_top=n_top,
        kind=kind,
        n_rows=n_rows,
        n_lines=n_head // n_rows,
        n_padded=n_groups * LANES,
        by_size=by_size,
        sticky=sticky,
        kept=kept_tensor,
    )
    rows = bench.compute(node).view(np.int32).reshape(-1, 1 + n_top)
    after = as_array(kept_tensor, np.int32).reshape(halves.shape)
    assert (after[1] == halves[1]).all()
    chose = n_top > 0 and budget > 0 and (n_blocks > n_top or sizes.sum() > budget)
    for now, row in zip(after[0], rows, strict=True):
        assert now[: 1 + now[0]].tolist() == (row[: 1 + row[0]].tolist() if chose else [0])
    return [row[1 : 1 + row[0]].tolist() for row in rows]


@given(
    data=st.data(), n_blocks=st.integers(1, 40), n_head_kv=st.integers(1, 3), group=st.integers(1, 2),
    n_top=st.integers(0, 20), kind=st.sampled_from(KINDS), per_head=st.booleans(), n_threads=st.integers(1, 4),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_blocks_are_those_with_the_most_weight(data, n_blocks, n_head_kv, group, n_top, kind, per_head, n_threads):
    n_head = n_head_kv * group
    values = st.lists(st.integers(-3, 3), min_size=n_blocks * n_head, max_size=n_blocks * n_head)
    x = np.array(data.draw(values), np.float32).reshape(n_blocks, n_head)
    p = x
    if kind == "lse":
        p = np.exp(x - x.max(0))
        p = p / p.sum(0)
    weights = p.reshape(n_blocks, n_head_kv, group).sum(2) if per_head else p.sum(1)[:, None]
    rows = topk(x, n_top, kind, n_head_kv, per_head, n_threads)
    assert len(rows) == weights.shape[1] or n_head_kv == 1
    for got, weight in zip(rows, weights.T, strict=True):
        assert got == sorted(set(got))
        assert len(got) == min(n_top, n_blocks)
        # Sums may differ in the last bit, so the chosen blocks must be as good as the best, not the same.
        best = np.sort(weight)[::-1][: len(got)]
        assert np.allclose(np.sort(weight[got])[::-1], best, atol=1e-5)


@given(
    seed=st.integers(0, 999), n_blocks=st.integers(1, 60), n_top=st.integers(1, 20), n_wanted=st.integers(0, 25),
    per_head=st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_no_more_are_selected_than_the_step_wants(seed, n_blocks, n_top, n_wanted, per_head):
    x = np.random.default_rng(seed).permutation(n_blocks * 2).astype(np.float32).reshape(n_blocks, 2)
    weights = x.T if per_head else x.sum(1)[None]
    n_attended = min(n_top, n_wanted)
    for chosen, w in zip(topk(x, n_top, "max", 2, per_head, 2, n_wanted), weights, strict=True):
        order = np.argsort(-w, kind="stable").tolist()
        assert chosen == sorted(order[:n_attended])


@given(
    seed=st.integers(0, 999), n_blocks=st.integers(1, 60), n_top=st.integers(1, 20), kind=st.sampled_from(KINDS),
    per_head=st.booleans(), sticky=st.sampled_from([0.0, 0.4, 3.0, 50.0]), n_threads=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_kept_blocks_rank_higher(seed, n_blocks, n_top, kind, per_head, sticky, n_threads):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n_blocks, 4)).astype(np.float32)
    n_kept = min(n_top, n_blocks)
    kept = [sorted(rng.choice(n_blocks, rng.integers(0, n_kept + 1), replace=False).tolist()) for _ in range(2)]
    kept = kept[: 2 if per_head else 1]
    p = x.astype(np.float64)
    if kind == "lse":
        p = np.exp(p) / np.exp(p).sum(0)
    weights = p.reshape(n_blocks, 2, 2).sum(2).T if per_head else p.sum(1)[None]
    rows = topk(x, n_top, kind, 2, per_head, n_threads, kept=kept, sticky=sticky)
    for got, weight, before in zip(rows, weights, kept, strict=True):
        weight[before] = (
            weight[before] * np.exp(sticky) if kind == "lse" else weight[before] + sticky * 4 / len(weights)
        )
        best = np.sort(weight)[::-1][: len(got)]
        assert np.allclose(np.sort(weight[got])[::-1], best, rtol=1e-4, atol=1e-5)


@given(
    seed=st.integers(0, 999), n_blocks=st.integers(1, 400), n_top=st.integers(1, 60), budget=st.integers(0, 800),
    per_head=st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_units_are_those_with_the_most_weight_for_their_tokens(seed, n_blocks, n_top, budget, per_head):
    """The best n_top, from the best one on as far as they fit."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 33, n_blocks)
    # Multiples of the size: the quotients are exact, so that of equals the first must be chosen.
    x = (rng.integers(0, 100, (n_blocks, 2)) * sizes[:, None]).astype(np.float32)
    for chosen, weight in zip(
        topk(x, n_top, "mean", 2, per_head, 2, sizes=sizes, budget=budget),
        x.T if per_head else x.sum(1)[None],
        strict=True,
    ):
        want, left = [], budget
        if n_blocks <= n_top and sizes.sum() <= budget:
            want = list(range(n_blocks))
        else:
            for unit in np.argsort(-weight / sizes, kind="stable")[:n_top].tolist():
                if sizes[unit] <= left:
                    want.append(unit)
                    left -= sizes[unit]
        assert chosen == sorted(want)


@pytest.mark.parametrize("kind", KINDS)
def test_of_equal_blocks_the_first_are_chosen(kind):
    assert topk(np.zeros((9, 2)), 4, kind) == [[0, 1, 2, 3]]
    assert topk(np.zeros((90, 2)), 4, kind) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_poisoned_relevance_still_selects(poison, kind):
    x = np.zeros((9, 2))
    x[4, 0] = poison
    (chosen,) = topk(x, 4, kind)
    assert len(chosen) == 4
    assert chosen == sorted(set(chosen))
    assert all(0 <= b < 9 for b in chosen)
    assert (4 in chosen) == (poison == np.inf)


@given(
    n_planes=st.integers(1, 3), n_groups=st.integers(1, 3), n_units=st.integers(1, 40), n_top=st.integers(1, 6),
    n_threads=st.integers(1, 4), seed=st.integers(0, 999),
)  # fmt: skip
def test_units_are_located_in_the_plane_of_their_row(n_planes, n_groups, n_units, n_top, n_threads, seed):
    """Row r of a selection is looked up in plane r % n_planes; what a row has beyond its count has no meaning."""
    rng, n_rows = np.random.default_rng(seed), n_planes * n_groups
    bench = Bench(config(), n_threads)
    places = rng.integers(0, 2**31, (n_planes, n_units, 3), dtype=np.int32)
    selected = np.full((n_rows, 1 + n_top), -1, np.int32)
    for row in selected:
        row[0] = rng.integers(0, min(n_top, n_units) + 1)
        row[1 : 1 + row[0]] = np.sort(rng.permutation(n_units)[: row[0]])
    types = g.GGML_TYPE_I32
    got = bench.compute(bench.ops.locate(bench.tensor(selected, types), bench.tensor(places, types)))
    got = got.view(np.int32).reshape(n_rows, -1)
    for r, (n, *units) in enumerate(selected.tolist()):
        assert got[r, 0] == n
        assert np.array_equal(got[r, 1 : 1 + 3 * n].reshape(n, 3), places[r % n_planes, units[:n]])
