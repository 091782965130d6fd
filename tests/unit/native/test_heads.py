"""qk_norm in both layouts against plain numpy: norms, order, and values that it must not change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.native.op_bench import Bench, assert_close, config, normed, packed

sizes = {
    "n_head_kv": st.integers(1, 3),
    "group": st.integers(1, 4),
    "head_dim": st.sampled_from([2, 6, 16, 30, 64, 128]),
    "n_tokens": st.one_of(st.just(1), st.integers(1, 70)),
    "n_threads": st.integers(1, 4),
    "seed": st.integers(0, 1000),
}


@pytest.mark.parametrize("layout", ["rows", "packed"])
@pytest.mark.parametrize("arch", ["qwen2", "llama"])
@given(with_norms=st.booleans(), scale=st.sampled_from([1e-3, 1.0, 1e3]), **sizes)
@settings(max_examples=40)
def test_queries_and_keys_are_normed_and_by_halves(
    layout, arch, with_norms, scale, n_head_kv, group, head_dim, n_tokens, n_threads, seed
):
    rng, n_head = np.random.default_rng(seed), n_head_kv * group
    sizes = {"n_head": n_head, "n_head_kv": n_head_kv, "head_dim": head_dim, "arch": arch}
    bench = Bench(config(**sizes), n_threads)
    x = (scale * rng.standard_normal((n_tokens, (n_head + 2 * n_head_kv) * head_dim))).astype(np.float32)
    norms = rng.standard_normal((2, head_dim)).astype(np.float32)
    weights = [bench.tensor(norm) if with_norms else None for norm in norms]
    if layout == "rows":
        got = bench.compute(bench.ops.qk_norm(bench.tensor(x), *weights))
    else:
        got = bench.compute_packed(bench.ops.qk_norm_packed(bench.tensor(packed(x)), *weights), n_tokens)
    got = got.reshape(n_tokens, -1, head_dim)

    heads = x.reshape(got.shape)
    q, k, v = np.split(heads, [n_head, n_head + n_head_kv], axis=1)
    if with_norms:
        q, k = normed(q, norms[0]), normed(k, norms[1])
    want = np.concatenate((q, k), 1)
    if arch == "llama":
        want = np.concatenate((want[..., ::2], want[..., 1::2]), -1)
    assert np.array_equal(got[:, n_head + n_head_kv :], v)
    if with_norms:
        assert_close(got[:, : n_head + n_head_kv], want, 1e-5)
    else:
        assert np.array_equal(got[:, : n_head + n_head_kv], want)
