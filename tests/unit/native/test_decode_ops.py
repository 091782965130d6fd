"""Each fused op against plain numpy, on random shapes, weight types and thread counts."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT
from hypothesis import given, settings
from hypothesis import strategies as st

from pyggml_repkv.ffi.handles import tensor_array
from tests.unit.native.op_bench import Bench, assert_close, config, matrix, normed, silu

TYPES = [QT.F32, QT.F16, QT.BF16, QT.Q4_0, QT.Q4_1, QT.Q8_0]


def tolerance(kind: QT) -> float:
    """ggml rounds the input row to F16, BF16 or 8 bits before the dot product. Of 80,000 random rows, 8 bits move one
    by 0.042, and one in a thousand by 0.028.
    """
    return {QT.F32: 1e-5, QT.F16: 2e-3, QT.BF16: 1e-2}.get(kind, 6e-2)


shapes = {
    "n_in": st.sampled_from([32, 64, 160, 256]),
    "seed": st.integers(0, 1000),
    "n_threads": st.integers(1, 3),
}


@given(rows=st.lists(st.integers(1, 50), min_size=1, max_size=3), kinds=st.lists(st.sampled_from(TYPES), min_size=3),
       biased=st.booleans(), **shapes)  # fmt: skip
@settings(max_examples=40)
def test_norm_linear(rows, kinds, biased, n_in, seed, n_threads):
    rng = np.random.default_rng(seed)
    bench = Bench(config(n_embd=n_in), n_threads)
    x, norm = rng.standard_normal((2, n_in)).astype(np.float32)
    mats = [matrix(rng, (n, n_in), kind) for n, kind in zip(rows, kinds, strict=False)]
    biases = [rng.standard_normal(n).astype(np.float32) for n in rows] if biased else []
    weights = [bench.tensor(m[0], kind, (n, n_in)) for m, kind, n in zip(mats, kinds, rows, strict=False)]
    node = bench.ops.norm_linear(bench.tensor(x), bench.tensor(norm), weights, [bench.tensor(b) for b in biases])
    got = bench.compute(node)
    want = np.concatenate([m[1] @ normed(x, norm) for m in mats])
    if biased:
        want = want + np.concatenate(biases)
    assert_close(got, want, max(tolerance(k) for k in kinds[: len(rows)]))


@given(kind=st.sampled_from(TYPES), n_rows=st.integers(1, 70), **shapes)
@settings(max_examples=40)
def test_linear_add(kind, n_rows, n_in, seed, n_threads):
    rng = np.random.default_rng(seed)
    bench = Bench(config(n_embd=n_rows, n_ff=n_in), n_threads)
    x, residual = rng.standard_normal(n_in).astype(np.float32), rng.standard_normal(n_rows).astype(np.float32)
    data, w = matrix(rng, (n_rows, n_in), kind)
    node = bench.ops.linear_add(bench.tensor(x), bench.tensor(data, kind, (n_rows, n_in)), bench.tensor(residual))
    assert_close(bench.compute(node), w @ x + residual, tolerance(kind))


@given(kinds=st.tuples(st.sampled_from(TYPES), st.sampled_from(TYPES)), n_rows=st.integers(1, 70), **shapes)
@settings(max_examples=40)
def test_gate_up(kinds, n_rows, n_in, seed, n_threads):
    rng = np.random.default_rng(seed)
    bench = Bench(config(n_embd=n_in, n_ff=n_rows), n_threads)
    x, norm = rng.standard_normal((2, n_in)).astype(np.float32)
    # Large gates reach the ends of the exponential.
    x *= np.float32(rng.choice([1.0, 30.0]))
    norm *= np.float32(rng.choice([1.0, 40.0]))
    (gate_data, gate), (up_data, up) = (matrix(rng, (n_rows, n_in), kind) for kind in kinds)
    gate_t, up_t = (bench.tensor(d, k, (n_rows, n_in)) for d, k in zip((gate_data, up_data), kinds, strict=True))
    got = bench.compute(bench.ops.gate_up(bench.tensor(x), bench.tensor(norm), gate_t, up_t))
    y = normed(x, norm)
    a, b = gate @ y, up @ y
    # The product carries the rounding of y in each factor, even if the other factor is small.
    size = max(1.0, np.sqrt((y * y).mean()))
    limit = 3 * max(tolerance(k) for k in kinds) * size * max(size, np.abs(a).max(), np.abs(b).max())
    assert np.abs(got - silu(a) * b).max() <= limit


@given(
    n_head_kv=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([16, 32, 64, 80, 96]),
    n_past=st.integers(0, 140),
    cache=st.sampled_from(["f32", "f16"]),
    n_threads=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80)
def test_attend_and_attn_out(n_head_kv, group, head_dim, n_past, cache, n_threads, seed):
    """It also writes only the new cell of the arenas, and never reads the cells beyond."""
    rng = np.random.default_rng(seed)
    n_head = n_head_kv * group
    c = config(n_embd=48, n_head=n_head, n_head_kv=n_head_kv, head_dim=head_dim)
    bench = Bench(c, n_threads)
    dtype = np.float32 if cache == "f32" else np.float16
    n_cells = n_past + 5
    width = n_head_kv * head_dim
    k_old, v_old = rng.standard_normal((2, n_cells, width)).astype(dtype)
    k_old[n_past:], v_old[n_past:] = np.nan, np.nan
    kind = QT.F32 if cache == "f32" else QT.F16
    k_arena, v_arena = bench.tensor(k_old, kind), bench.tensor(v_old, kind)
    qkv = rng.standard_normal((n_head + 2 * n_head_kv) * head_dim).astype(np.float32)
    angle = rng.uniform(0, 6, head_dim // 2)
    bench.rotate_by(np.stack((np.cos(angle), np.sin(angle))))
    cells = bench.integers(n_past, n_past)
    partials = bench.ops.attend(bench.tensor(qkv), k_arena, v_arena, cells)
    data, w = matrix(rng, (48, n_head * head_dim), QT.F32)
    residual = rng.standard_normal(48).astype(np.float32)
    node = bench.ops.attn_out(partials, bench.tensor(data), bench.tensor(residual))
    got = bench.compute(node)

    heads = qkv.reshape(-1, head_dim).astype(np.float64)
    half = head_dim // 2

    def rotate(x):
        a, b = x[..., :half], x[..., half:]
        return np.concatenate((a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)), -1)

    q, k_new, v_new = (
        rotate(heads[:n_head]),
        rotate(heads[n_head : n_head + n_head_kv]),
        heads[n_head + n_head_kv :],
    )
    k = np.concatenate((k_old[:n_past].astype(np.float64).reshape(n_past, n_head_kv, head_dim), k_new[None]))
    v = np.concatenate((v_old[:n_past].astype(np.float64).reshape(n_past, n_head_kv, head_dim), v_new[None]))
    out = np.empty((n_head, head_dim))
    for h in range(n_head):
        scores = k[:, h // group] @ q[h] / np.sqrt(head_dim)
        p = np.exp(scores - scores.max())
        out[h] = p / p.sum() @ v[:, h // group]
    assert_close(got, w @ out.ravel() + residual, 2e-5 if cache == "f32" else 2e-3)

    k_after, v_after = (
        tensor_array(k_arena).reshape(n_cells, width),
        tensor_array(v_arena).reshape(n_cells, width),
    )
    assert np.array_equal(k_after[:n_past], k_old[:n_past])
    assert np.isnan(k_after[n_past + 1 :]).all()
    assert np.allclose(k_after[n_past].reshape(n_head_kv, head_dim), k_new, atol=2e-3)
    assert np.allclose(v_after[n_past].reshape(n_head_kv, head_dim), v_new, atol=2e-3)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_attend_survives_poison(poison):
    """A NaN or infinite key may spoil the result, never the process."""
    bench = Bench(config(), 2)
    k = np.full((8, 64), poison, np.float32)
    bench.rotate_by(np.ones((2, 16), np.float32))
    cells = bench.integers(3, 3)
    qkv = bench.tensor(np.ones(8 * 32, np.float32))
    node = bench.ops.attend(qkv, bench.tensor(k), bench.tensor(k), cells)
    assert bench.compute(node).shape == (2, 4, 34)
