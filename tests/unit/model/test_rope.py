"""The table of cosines and sines equals the formula, and ggml's own node, at any position."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyggml_repkv.ffi.context import GraphContext
from pyggml_repkv.ffi.handles import Backend, GraphAllocator, tensor_array
from pyggml_repkv.ffi.library import g
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.gguf_file import GGUFFile
from pyggml_repkv.model.rope import RopeTable, rope_params
from tests.oracle import rotate
from tests.tiny_models import TinySpec, write_tiny_model

SPECS = {
    "none": TinySpec(head_dim=64, rope_base=1e6, n_ctx=32768),
    "none, small base": TinySpec(head_dim=128, rope_base=1e4, n_ctx=4096),
    "part of a head": TinySpec(head_dim=64, rope_dim=32, n_ctx=4096),
    "linear": TinySpec(head_dim=64, scaling_kind="linear", scaling_factor=4.0, n_ctx=8192),
    "yarn": TinySpec(head_dim=128, rope_base=1e6, scaling_kind="yarn", scaling_factor=4.0, scaling_orig_ctx=32768),
    "yarn, odd": TinySpec(head_dim=80, rope_base=5e5, scaling_kind="yarn", scaling_factor=2.5, n_ctx=1000),
    "yarn by one": TinySpec(head_dim=64, scaling_kind="yarn", scaling_factor=1.0, n_ctx=2048),
}
POSITIONS = np.array([0, 1, 2, 31, 1000, 4095, 32767, 65536, 99_999, 100_000])


def rope_of(spec, folder):
    path = folder / "model.gguf"
    write_tiny_model(path, spec)
    return rope_params(ModelConfig.from_gguf(GGUFFile.open(path)))


def by_formula(spec, positions, factors=None):
    """Returns (cosines and sines [n, T], angles [n / 2, T]), float64."""
    n = spec.rope_dim or spec.head_dim
    x = np.zeros((len(positions), n))
    x[:, : n // 2] = 1  # (1, 0) turns into (cos, sin)
    return rotate(spec, x, positions, factors).T, positions * spec.rope_base ** (-2 * np.arange(n // 2) / n)[:, None]


def by_ggml(rope, positions, factors=None, *, pairs=False):
    """Returns [n, T], cosines first, from ggml's node on (1, 0) pairs."""
    graph = GraphContext(128)
    x = graph.input(g.GGML_TYPE_F32, (len(positions), 1, rope.n_dims), "x")
    inputs = graph.input(g.GGML_TYPE_I32, (len(positions),), "positions")
    divisors = None if factors is None else graph.input(g.GGML_TYPE_F32, factors.shape, "factors")
    node = graph.output(graph.rope(x, inputs, rope, divisors, pairs=pairs))
    allocator = GraphAllocator()
    allocator.allocate(graph.graph)
    tensor_array(x)[...] = 0
    first = slice(None, None, 2) if pairs else slice(rope.n_dims // 2)
    tensor_array(x)[..., first] = 1
    tensor_array(inputs)[...] = positions
    if divisors is not None:
        tensor_array(divisors)[...] = factors
    Backend(1).compute(graph.native_graph)
    turned = tensor_array(node).reshape(len(positions), rope.n_dims).T.copy()
    return np.concatenate((turned[::2], turned[1::2])) if pairs else turned


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_table_is_the_formula(spec, tmp_path):
    got = RopeTable(rope_of(spec, tmp_path))(POSITIONS)
    want, angles = by_formula(spec, POSITIONS)
    assert got.dtype == np.float32
    # An F32 angle has a relative error of 2^-24 per step that led to it.
    steps = 3 + np.arange(len(angles))[:, None]
    limit = 1e-6 + np.tile(steps * angles * 2.0**-24, (2, 1)) * 1.5
    assert (np.abs(got - want) <= limit).all()
    assert np.abs(got - want)[:, POSITIONS <= 31].max() < 2e-5


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_precise_table_does_not_drift(spec, tmp_path):
    positions = np.array([0, 1, 1000, 100_000, 2**20, 10**8])
    got = RopeTable(rope_of(spec, tmp_path), np.float64)(positions)
    assert got.dtype == np.float32
    # Only the rounding of the file's float32 constants and of the result remains.
    want, angles = by_formula(spec, positions)
    assert (np.abs(got - want) <= 2e-7 + np.tile(angles * 1e-13, (2, 1))).all()


def assert_like_ggml(spec, positions, folder):
    rope = rope_of(spec, folder)
    difference = np.abs(RopeTable(rope)(positions) - by_ggml(rope, positions))
    # YaRN's blend of two angles is a fused multiply-add in ggml: its last bit may differ.
    last_bit = by_formula(spec, positions)[1] * 2.0**-23 if spec.scaling_kind == "yarn" else 0
    assert (difference.reshape(2, -1, len(positions)) <= 1e-6 + last_bit).all()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_table_is_what_ggml_computes(spec, tmp_path):
    assert_like_ggml(spec, POSITIONS, tmp_path)


@given(
    half=st.integers(1, 64),
    base=st.floats(10.0, 1e7),
    scaling=st.sampled_from([("none", 1.0), ("linear", 8.0), ("yarn", 1.5), ("yarn", 32.0)]),
    original=st.sampled_from([0, 512, 40000]),
    positions=st.lists(st.integers(0, 2**20), min_size=1, max_size=5),
)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_table_is_what_ggml_computes_for_any_model(half, base, scaling, original, positions, tmp_path):
    kind, factor = scaling
    spec = TinySpec(
        n_layer=1, head_dim=2 * half, rope_base=base, scaling_kind=kind, scaling_factor=factor,
        scaling_orig_ctx=original if kind == "yarn" else 0,
    )  # fmt: skip
    assert_like_ggml(spec, np.array(positions), tmp_path)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["none", "linear", "yarn"])
def test_factors_divide_the_frequencies(name, dtype, pairs, tmp_path):
    """The table equals ggml's node, by halves and by pairs, and the formula."""
    spec, rope = SPECS[name], rope_of(SPECS[name], tmp_path)
    factors = np.random.default_rng(0).uniform(1, 8, spec.head_dim // 2).astype(np.float32)
    positions = np.array([0, 1, 31, 1000, 4095])
    got = RopeTable(rope, dtype, factors)(positions)
    want = by_formula(spec, positions, factors.astype(np.float64))[0]
    # The table is an exact one or drifts as ggml's, whose node is compared bit by bit elsewhere.
    assert np.abs(got - want).max() < (2e-7 if dtype is np.float64 else 2e-3)
    assert np.abs(got - by_ggml(rope, positions, factors, pairs=pairs)).max() < (2e-3 if dtype is np.float64 else 2e-6)


@pytest.mark.parametrize(("factor", "lost"), [(1.0, 0), (4.0, 0), (5.5, 2**-24), (12.0, 2**-24)])
def test_the_temperature_is_rounded_as_in_llama_cpp(factor, lost, tmp_path):
    """It divides by ggml's factor and multiplies by its own, in float32; the logits show the last bit."""
    spec = TinySpec(scaling_kind="yarn", scaling_factor=factor)
    assert rope_of(spec, tmp_path).attn_factor == 1 - lost


def test_yarn_raises_the_temperature(tmp_path):
    """cos^2 + sin^2 is the square of 1 + 0.1 ln(factor) (arXiv 2309.00071, equation 15), in every dimension."""
    table = RopeTable(rope_of(SPECS["yarn"], tmp_path))(POSITIONS).astype(np.float64)
    np.testing.assert_allclose(table[:64] ** 2 + table[64:] ** 2, (1 + 0.1 * np.log(4)) ** 2, rtol=1e-5)


def test_a_difference_of_positions_is_all_that_counts(tmp_path):
    """q at p and k at p - 7 give the same product for every p."""
    table = RopeTable(rope_of(SPECS["none"], tmp_path))
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 32)) + 1j * rng.standard_normal((2, 32))

    def product(p):
        (cos_q, cos_k), (sin_q, sin_k) = table(np.array([p, p - 7])).reshape(2, 32, 2).transpose(0, 2, 1)
        return ((q * (cos_q + 1j * sin_q)) * np.conj(k * (cos_k + 1j * sin_k))).real.sum()

    products = [product(p) for p in (7, 100, 4000, 30_000)]
    assert np.ptp(products) < 2e-2
    assert abs(product(8000) - products[0]) < 1e-2
