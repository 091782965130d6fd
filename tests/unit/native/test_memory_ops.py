"""Choosing representatives and blocks: ties, NaN, empty and full cases, against plain numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyggml_repkv.ffi.library import g, native, native_ffi
from tests.unit.native.op_bench import Bench, config

# Few distinct values, so that ties are common.
few = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, float("nan"), float("-inf")])


def repr_topk(scores: np.ndarray, begin: int, end: int, n_repr: int, head_dim: int = 4) -> np.ndarray:
    """The tokens whose keys were copied, [K, n_repr]; key values tell the token."""
    n_tokens, n_head_kv = scores.shape
    store = np.repeat(np.arange(n_tokens, dtype=np.float32), n_head_kv * head_dim).reshape(n_tokens, -1).copy()
    out = np.empty((n_head_kv, n_repr, head_dim), np.float32)
    native.repkv_repr_topk(
        native_ffi.cast("char *", out.ctypes.data),
        native_ffi.cast("char *", store.ctypes.data),
        store.strides[0],
        native_ffi.cast("float *", np.ascontiguousarray(scores).ctypes.data),
        begin,
        end,
        n_head_kv,
        n_repr,
    )
    assert (out == out[:, :, :1]).all()
    return out[:, :, 0].astype(int)


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
    assert repr_topk(scores[1:], 0, 4, 2).tolist() == [[1, 3]]


def topk(relevance: np.ndarray, n_top: int) -> list[int]:
    n_blocks, n_head = relevance.shape
    bench = Bench(config(n_head=n_head, n_head_kv=n_head), 2)
    regions = np.zeros(8, np.int32)
    regions[6] = n_blocks
    tensors = bench.tensor(relevance.astype(np.float32)), bench.tensor(regions, g.GGML_TYPE_I32)
    node = bench.ops.block_topk(bench.graph, *tensors, n_top)
    found = bench.compute(node).ravel().view(np.int32)
    return found[1 : 1 + found[0]].tolist()


@given(data=st.data(), n_blocks=st.integers(1, 40), n_head=st.integers(1, 4), n_top=st.integers(0, 20))
@settings(max_examples=150, deadline=None)
def test_blocks_are_those_with_the_most_softmax_mass(data, n_blocks, n_head, n_top):
    values = st.lists(st.integers(-3, 3), min_size=n_blocks * n_head, max_size=n_blocks * n_head)
    x = np.array(data.draw(values), np.float32).reshape(n_blocks, n_head)
    p = np.exp(x - x.max(0))
    p = (p / p.sum(0, dtype=np.float32)).astype(np.float32)
    weights = np.zeros(n_blocks, np.float32)
    for h in range(n_head):
        weights += p[:, h]
    got = topk(x, n_top)
    assert got == sorted(set(got))
    assert len(got) == min(n_top, n_blocks)
    # Sums may differ in the last bit, so what was chosen must be as good as the best, not the same.
    best = np.sort(weights)[::-1][: len(got)]
    assert np.allclose(np.sort(weights[got])[::-1], best, atol=1e-5)


def test_of_equal_blocks_the_first_are_chosen():
    assert topk(np.zeros((9, 2)), 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_poisoned_relevance_still_selects(poison):
    x = np.zeros((9, 2))
    x[4, 0] = poison
    chosen = topk(x, 4)
    assert len(chosen) == 4
    assert chosen == sorted(set(chosen))
    assert all(0 <= b < 9 for b in chosen)
