"""What is taken from stored keys and comes back where they are read, against float64, at any position."""

from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT
from hypothesis import given, settings
from hypothesis import strategies as st

from pyggml_repkv.memory.centres import KeyCentres
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.model.config import RopeScaling
from pyggml_repkv.model.rope import RopeTable, rope_params
from tests.unit.native.op_bench import Bench, config, rotated

Q8_KEYS = MemoryConfig(type_k="q8_0")
YARN = RopeScaling("yarn", 0.25, 512, 1.0, 1.0)


def centres_of(bench, bias, n_positions):
    rope = RopeTable(rope_params(bench.config), np.float64)
    return KeyCentres(bench.config, Q8_KEYS, rope, [bias], n_positions), rope


@given(
    head_dim=st.sampled_from([16, 24, 32, 64, 80, 128]), partly=st.booleans(), n_head_kv=st.integers(1, 3),
    first=st.one_of(st.integers(0, 200), st.integers(4000, 4200), st.integers(0, 10**6)), n=st.integers(1, 150),
    yarn=st.booleans(), n_threads=st.integers(1, 4), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=80)
def test_a_bias_is_taken_rotated(head_dim, partly, n_head_kv, first, n, yarn, n_threads, seed):
    """At every position up to the last; both ways."""
    rng = np.random.default_rng(seed)
    rope_dim = head_dim // 2 if partly else head_dim
    sizes = config(n_head=n_head_kv, n_head_kv=n_head_kv, head_dim=head_dim, rope_dim=rope_dim)
    bench = Bench(replace(sizes, rope_scaling=YARN) if yarn else sizes, n_threads)
    bias = (100 * rng.standard_normal(n_head_kv * head_dim)).astype(np.float32)
    centres, rope = centres_of(bench, bias, first + n)
    keys = rng.standard_normal((n, n_head_kv * head_dim)).astype(np.float32)
    rows = bench.tensor(np.arange(first, first + n), QT.I64)
    got = bench.compute(bench.ops.centred(centres.of(0)).less_bias(bench.tensor(keys), rows))
    table = rope(np.arange(first, first + n)).astype(np.float64)
    cos, sin = table[: rope_dim // 2].T[:, None], table[rope_dim // 2 :].T[:, None]
    taken = rotated(
        np.broadcast_to(bias.astype(np.float64).reshape(n_head_kv, head_dim), (n, n_head_kv, head_dim)), cos, sin
    )
    limit = 1e-6 * np.abs(taken).max()
    assert np.abs(got.reshape(taken.shape) - (keys.reshape(taken.shape) - taken)).max() < limit
    back = centres.added(0, got.reshape(taken.shape), np.arange(first, first + n), rotated=True)
    assert np.abs(back - keys.reshape(taken.shape)).max() < limit


@pytest.mark.parametrize("n", [1, 64, 300])
def test_what_was_taken_comes_back(n):
    bench = Bench(config(n_head=2, n_head_kv=2, head_dim=32), 2)
    rng = np.random.default_rng(n)
    bias = (100 * rng.standard_normal(64)).astype(np.float32)
    centres, _ = centres_of(bench, bias, n)
    stored = rng.standard_normal((n, 64)).astype(np.float32)
    got = bench.compute(bench.ops.centred(centres.of(0)).with_bias(bench.tensor(stored)))
    want = centres.added(0, stored.reshape(n, 2, 32), np.arange(n), rotated=True)
    assert got.dtype == np.float16
    assert np.abs(got.reshape(want.shape) - want).max() < 1e-3 * np.abs(want).max()


def test_nothing_is_taken_from_keys_that_are_not_quantised():
    bench, bias = Bench(config(), 1), np.ones(64, np.float32)
    rope = RopeTable(rope_params(bench.config), np.float64)
    for memory in (MemoryConfig(), MemoryConfig(type_k="bf16", type_v="q8_0")):
        centres = KeyCentres(bench.config, memory, rope, [bias], 100)
        assert not centres.of(0)
        keys = np.ones((3, 2, 32), np.float32)
        assert centres.added(0, keys, np.arange(3), rotated=True) is keys
