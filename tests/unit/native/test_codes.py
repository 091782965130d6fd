"""Codes of keys: their layout, what they lose, and what they leave alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyggml_repkv.ops.kernels import CODE_LANES
from tests.unit.native.coded import Codes, random_turn

bit_widths = st.sampled_from([1, 2, 4])
head_dims = st.sampled_from([4, 20, 32, 48, 64, 72, 128])

# Where the outermost level may lie, in shares of the largest value.
REACHES = {1: (1.0,), 2: (0.85, 0.7, 0.55, 0.45), 4: (1.0, 0.9, 0.8, 0.7)}


def unpacked(codes: Codes) -> tuple[np.ndarray, np.ndarray]:
    """Codes [n_tokens, K, d] and steps [n_tokens, K], from the bytes as codes.h describes them."""
    n_head_kv, d = codes.shape
    bits, per_word = codes.bits, 32 // codes.bits
    n_words = -(-d // per_word)
    n_bytes = n_words * CODE_LANES * 4
    heads = codes.rows[:, : n_head_kv * (n_bytes + 2 * CODE_LANES)].reshape(len(codes.rows), n_head_kv, -1)
    words = np.ascontiguousarray(heads[..., :n_bytes]).reshape(len(codes.rows), n_head_kv, n_words, CODE_LANES, 4)
    fields = np.stack([words >> (bits * k) & (2**bits - 1) for k in range(8 // bits)], -2)
    values = fields.transpose(0, 3, 1, 2, 4, 5).reshape(-1, n_head_kv, n_words * per_word)[..., :d]
    steps = np.ascontiguousarray(heads[..., n_bytes:]).view(np.float16)
    return values, steps.transpose(0, 2, 1).reshape(-1, n_head_kv).astype(np.float32)


@given(
    d=head_dims, bits=bit_widths, n_head_kv=st.integers(1, 3), first=st.integers(0, 40), n=st.integers(1, 40),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_keys_are_the_nearest_levels_and_nothing_else_changes(d, bits, n_head_kv, first, n, seed):
    rng = np.random.default_rng(seed)
    codes = Codes(first + n + 20, n_head_kv, d, bits, random_turn(rng, d))
    codes.centre[...] = rng.normal(size=codes.shape)
    keys = (rng.normal(size=(n, n_head_kv, d)) * rng.uniform(0.1, 10, (n, n_head_kv, 1))).astype(np.float32)
    values_before, steps_before = unpacked(codes)
    codes.encode(first, keys)
    values, steps = unpacked(codes)
    others = np.ones(len(values), bool)
    others[first : first + n] = False
    assert (values[others] == values_before[others]).all()
    assert np.isnan(steps[others]).all()
    assert np.isnan(steps_before).all()
    levels = values[first : first + n] - (2**bits - 1) / 2
    decoded = codes.decode(first, n)
    assert np.allclose(decoded, levels * steps[first : first + n, :, None], rtol=1e-6)
    turned = (keys.astype(np.float64) - codes.centre) @ codes.turn
    # Products with the key itself are right: the step is F16.
    assert np.allclose((decoded * turned).sum(-1), (turned**2).sum(-1), rtol=2e-3)
    # Each level is the nearest one of some scale, but for values between two.
    middle, most = (2**bits - 1) / 2, np.abs(turned).max(-1, keepdims=True)
    fits = np.zeros(turned.shape[:2], bool)
    for reach in REACHES[bits]:
        exact = turned * middle / (most * reach) + middle
        nearest = np.clip(np.rint(exact), 0, 2**bits - 1) - middle
        fits |= ((nearest == levels) | (np.abs(exact % 1 - 0.5) < 1e-3)).all(-1)
    assert fits.all()


@pytest.mark.parametrize(("bits", "limit"), [(4, 0.11), (2, 0.4), (1, 0.8)])
def test_products_with_gaussian_keys(bits, limit):
    """The error of q . k, relative to |q| |k| / sqrt(d), which products of random vectors have."""
    rng = np.random.default_rng(0)
    codes = Codes(2000, 1, 64, bits, random_turn(rng, 64))
    keys, queries = rng.normal(size=(2000, 1, 64)), rng.normal(size=(50, 64))
    codes.encode(0, keys)
    got, want = (codes.decode(0, 2000) @ codes.turn.T)[:, 0] @ queries.T, keys[:, 0] @ queries.T
    assert 0.3 * limit < np.sqrt(((got - want) ** 2).mean() / (want**2).mean()) < limit
    assert abs((got * want).sum() / (want**2).sum() - 1) < 0.02


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_writing_in_pieces_is_writing_at_once(bits):
    rng = np.random.default_rng(1)
    keys = rng.normal(size=(50, 2, 64))
    whole, pieces = Codes(50, 2, 64, bits), Codes(50, 2, 64, bits)
    whole.encode(0, keys)
    for begin, end in [(0, 3), (3, 16), (30, 50), (16, 30)]:
        pieces.encode(begin, keys[begin:end])
    assert np.array_equal(whole.rows, pieces.rows)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_keys_at_the_edge_of_numbers(bits):
    keys = np.ones((7, 1, 32), np.float32)
    keys[0] = 0.0
    keys[1, 0, 3] = np.nan
    keys[2, 0, 3] = np.inf
    keys[3] = -1e15
    keys[4] = 1e30
    keys[5] = 1e-30
    codes = Codes(7, 1, 32, bits)
    codes.encode(0, keys)
    decoded = codes.decode(0, 7)[:, 0]
    assert (decoded[0] == 0).all()
    assert np.isnan(decoded[1:3]).all()
    # As far as a step of F16 goes.
    assert np.allclose(decoded[3], -65504.0 * (2**bits - 1) / 2)
    assert np.isnan(decoded[4]).all()
    assert (decoded[5] == 0).all()
    assert np.allclose(decoded[6], 1.0, rtol=2e-3)
