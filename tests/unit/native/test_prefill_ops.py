"""Each packed op against plain numpy, on random shapes, weight types and thread counts.

Lanes without a token hold NaN at the start, so a finite and right result does not depend on them.
"""

from itertools import accumulate

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as QT
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.native.arenas import Arena, cache_names, fitting_cache
from tests.unit.native.op_bench import (
    Bench,
    assert_close,
    config,
    matrix,
    normed,
    packed,
    rotated,
    silu,
)

TYPES = [QT.F32, QT.F16, QT.BF16, QT.Q4_0, QT.Q4_1, QT.Q8_0, QT.Q4_K, QT.Q6_K]
# A block has 2048 columns: exactly one block, part of a second, part of a third.
WIDTHS = [32, 64, 160, 256, 1024, 2048, 2304, 4352]
# Weights are dequantised and sums are F32, so every type has the same precision.
PRECISION = 1e-5

token_counts = st.one_of(st.integers(1, 100), st.sampled_from([1, 31, 32, 33, 64, 65]))
common = {"n_tokens": token_counts, "n_threads": st.integers(1, 4), "seed": st.integers(0, 1000)}


def fitting(kind: QT, n_in: int) -> QT:
    """`kind`, or F32 where its blocks do not divide a row."""
    return QT.F32 if n_in % GGML_QUANT_SIZES[kind][0] else kind


def tokens(rng, n_tokens, n):
    return rng.standard_normal((n_tokens, n)).astype(np.float32)


@given(n=st.integers(1, 200), **common)
@settings(max_examples=30)
def test_pack(n, n_tokens, n_threads, seed):
    bench = Bench(config(), n_threads)
    x = tokens(np.random.default_rng(seed), n_tokens, n)
    got = bench.compute(bench.ops.pack(bench.tensor(x)))
    assert np.array_equal(got.ravel(), packed(x, padding=0.0).ravel())


@given(n=st.integers(1, 300), scale=st.sampled_from([1e-3, 1.0, 1e3]), **common)
@settings(max_examples=30)
def test_norm_packed(n, scale, n_tokens, n_threads, seed):
    rng = np.random.default_rng(seed)
    bench = Bench(config(), n_threads)
    x, weight = tokens(rng, n_tokens, n) * np.float32(scale), tokens(rng, 1, n)[0]
    got = bench.compute_packed(bench.ops.norm_packed(bench.tensor(packed(x)), bench.tensor(weight)), n_tokens)
    assert_close(got, normed(x, weight), PRECISION)


@given(rows=st.lists(st.integers(1, 110), min_size=1, max_size=3), n_in=st.sampled_from(WIDTHS), data=st.data(),
       biased=st.booleans(), **common)  # fmt: skip
@settings(max_examples=40)
def test_matmul(rows, n_in, data, biased, n_tokens, n_threads, seed):
    rng = np.random.default_rng(seed)
    bench = Bench(config(), n_threads)
    kinds = [fitting(data.draw(st.sampled_from(TYPES), label="kind"), n_in) for _ in rows]
    x = tokens(rng, n_tokens, n_in)
    mats = [matrix(rng, (n, n_in), kind) for n, kind in zip(rows, kinds, strict=True)]
    biases = [tokens(rng, 1, n)[0] for n in rows] if biased else []
    weights = [bench.tensor(m[0], kind, (n, n_in)) for m, kind, n in zip(mats, kinds, rows, strict=True)]
    node = bench.ops.matmul(bench.tensor(packed(x)), weights, [bench.tensor(b) for b in biases])
    want = np.concatenate([x @ m[1].T for m in mats], -1) + (np.concatenate(biases) if biased else 0)
    assert_close(bench.compute_packed(node, n_tokens), want, PRECISION)


@given(kind=st.sampled_from(TYPES), n_rows=st.integers(1, 130), n_in=st.sampled_from(WIDTHS), **common)
@settings(max_examples=40)
def test_matmul_add(kind, n_rows, n_in, n_tokens, n_threads, seed):
    rng = np.random.default_rng(seed)
    bench = Bench(config(), n_threads)
    kind = fitting(kind, n_in)
    x, residual = tokens(rng, n_tokens, n_in), tokens(rng, n_tokens, n_rows)
    data, w = matrix(rng, (n_rows, n_in), kind)
    node = bench.ops.matmul_add(
        bench.tensor(packed(x)),
        bench.tensor(data, kind, (n_rows, n_in)),
        bench.tensor(packed(residual)),
    )
    assert_close(bench.compute_packed(node, n_tokens), x @ w.T + residual, PRECISION)


@given(kinds=st.tuples(*[st.sampled_from(TYPES)] * 2), n_rows=st.integers(1, 130), n_in=st.sampled_from(WIDTHS),
       size=st.sampled_from([1.0, 30.0, 1000.0]), **common)  # fmt: skip
@settings(max_examples=40)
def test_matmul_gate_up(kinds, n_rows, n_in, size, n_tokens, n_threads, seed):
    """size: takes the gates past both ends of the exponential."""
    rng = np.random.default_rng(seed)
    bench = Bench(config(), n_threads)
    x = tokens(rng, n_tokens, n_in) * np.float32(size)
    kinds = [fitting(kind, n_in) for kind in kinds]
    (gate_data, gate), (up_data, up) = (matrix(rng, (n_rows, n_in), kind) for kind in kinds)
    gate_t, up_t = (bench.tensor(d, k, (n_rows, n_in)) for d, k in zip((gate_data, up_data), kinds, strict=True))
    node = bench.ops.matmul_gate_up(bench.tensor(packed(x)), gate_t, up_t)
    got = bench.compute_packed(node, n_tokens)
    a, b = x @ gate.T, x @ up.T
    # Each factor's rounding is as large as its inputs, and the product carries it on.
    assert np.abs(got - silu(a) * b).max() <= PRECISION * size * (size + max(np.abs(a).max(), np.abs(b).max()))


def test_silu_is_good_to_a_few_ulp():
    """With one column of ones, only the exponential and one product round."""
    bench = Bench(config(), 1)
    x = np.linspace(-80, 80, 3201, dtype=np.float32)[:, None]
    one = np.ones((1, 1), np.float32)
    node = bench.ops.matmul_gate_up(bench.tensor(packed(x)), bench.tensor(one), bench.tensor(one))
    want = silu(x.astype(np.float64)) * x
    np.testing.assert_allclose(bench.compute_packed(node, len(x)), want, rtol=1e-6, atol=1e-30)


def attention(q, k, v, n_past):
    """q [T, H, d] (scaled), k and v [n_past + T, K, d] -> [T, H, d]; token t sees the cells up to n_past + t."""
    n_tokens, n_head, _ = q.shape
    group = n_head // k.shape[1]
    k, v = (np.repeat(x, group, 1) for x in (k, v))
    scores = np.einsum("thd,chd->htc", q, k)
    hidden = np.arange(len(k))[None, :] > n_past + np.arange(n_tokens)[:, None]
    scores[:, hidden] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("htc,chd->thd", p / p.sum(-1, keepdims=True), v)


@given(n_head_kv=st.integers(1, 3), group=st.integers(1, 5), head_dim=st.sampled_from([16, 32, 64, 80, 96, 128]),
       partly=st.booleans(), n_past=st.one_of(st.just(0), st.integers(1, 200)), sharp=st.sampled_from([1.0, 8.0]),
       caches=st.tuples(cache_names, cache_names), **common)  # fmt: skip
@settings(max_examples=80)
def test_store_kv_and_attend_chunk(n_head_kv, group, head_dim, partly, n_past, sharp, caches, n_tokens, n_threads,
                                   seed):  # fmt: skip
    """`partly`: only half of each head is rotated; `sharp`: large queries make softmax one-sided."""
    rng = np.random.default_rng(seed)
    n_head = n_head_kv * group
    rope_dim = head_dim // 2 if partly else head_dim
    bench = Bench(config(n_head=n_head, n_head_kv=n_head_kv, head_dim=head_dim, rope_dim=rope_dim), n_threads)
    caches = [fitting_cache(name, head_dim) for name in caches]
    k_arena, v_arena = (Arena(bench, rng, name, n_past + n_tokens + 3, slice(n_past)) for name in caches)
    qkv = tokens(rng, n_tokens, (n_head + 2 * n_head_kv) * head_dim)
    qkv[:, : n_head * head_dim] *= np.float32(sharp)
    angle = rng.uniform(0, 6, (n_tokens, rope_dim // 2))
    bench.rotate_by(packed(np.concatenate((np.cos(angle), np.sin(angle)), -1)))
    cells = bench.integers(n_past, n_tokens)

    arenas = k_arena.tensor, v_arena.tensor
    q_node = bench.ops.store_kv(bench.tensor(packed(qkv)), *arenas, cells)
    node = bench.ops.attend_chunk(q_node, *arenas, cells)
    got = bench.compute_packed(node, n_tokens).reshape(n_tokens, n_head, head_dim)

    heads = qkv.reshape(n_tokens, -1, head_dim).astype(np.float64)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    q, k, v = np.split(heads, list(accumulate((n_head, n_head_kv))), axis=1)
    k_arena.assert_written(n_past, rotated(k, cos, sin))
    v_arena.assert_written(n_past, v)
    # Attention reads the stored values, so the cache's rounding allows no further error.
    n_seen = n_past + n_tokens
    want = attention(rotated(q, cos, sin) / np.sqrt(head_dim), k_arena.values()[:n_seen], v_arena.values()[:n_seen],
                     n_past)  # fmt: skip
    assert_close(got, want, 2e-5 * sharp)


def attend_chunk(qkv):
    """qkv [T, 8 * 32] of 4 query and 2 key/value heads, unrotated, from cell 0 -> [T, 4 * 32]."""
    bench = Bench(config(), 2)
    n_tokens = len(qkv)
    bench.rotate_by(packed(np.repeat(np.float32([[1, 0]]), 16, 1).repeat(n_tokens, 0)))
    arenas = [Arena(bench, np.random.default_rng(0), "f32", 80, slice(0)).tensor for _ in "kv"]
    cells = bench.integers(0, n_tokens)
    q = bench.ops.store_kv(bench.tensor(packed(qkv)), *arenas, cells)
    return bench.compute_packed(bench.ops.attend_chunk(q, *arenas, cells), n_tokens)


def test_what_is_hidden_weighs_exactly_nothing():
    """The second token's values are so large that even a weight of e^-87 would show."""
    qkv = tokens(np.random.default_rng(7), 2, 8 * 32)
    qkv[1, 6 * 32 :] = 1e38
    first = qkv[0, 6 * 32 :].reshape(2, 32)
    assert np.array_equal(attend_chunk(qkv)[0], first.repeat(2, 0).ravel())


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_poisoned_token_spoils_no_panel_before_its_own(poison):
    """Token 40 of 70 is bad. It may spoil its panel (0 times NaN is NaN), not the first 32 tokens or the process."""
    qkv = tokens(np.random.default_rng(6), 70, 8 * 32)
    good = attend_chunk(qkv)
    qkv[40] = poison
    bad = attend_chunk(qkv)
    assert np.array_equal(bad[:32], good[:32])
    assert not np.isfinite(bad[40]).any()
