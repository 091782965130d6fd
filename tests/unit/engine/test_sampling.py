import math
from dataclasses import replace

import numpy as np
import pytest

from pyggml_repkv.engine.sampling import MAX_SEED, Sampler, SamplingConfig
from pyggml_repkv.errors import ComputeError, InputError

OFF = SamplingConfig(temp=1, top_k=0, top_p=1, min_p=0, seed=1)


def logits_of(*probs):
    return np.log(np.array(probs, dtype=np.float32))


def survivors(config, logits):
    return Sampler(config).distribution(logits)[0].tolist()


def test_the_defaults_are_those_of_llama_cpp():
    config = SamplingConfig()
    assert (config.top_k, config.top_p, config.min_p, config.temp) == (40, 0.95, 0.05, 0.8)
    assert (config.repeat_penalty, config.repeat_last_n) == (1.0, 64)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temp", -0.1),
        ("temp", math.nan),
        ("temp", math.inf),
        ("top_k", -1),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.01),
        ("repeat_penalty", 0),
        ("repeat_penalty", math.inf),
        ("repeat_last_n", -2),
        ("seed", -2),
        ("seed", MAX_SEED + 1),
    ],
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(InputError, match=f"^{field} must be "):
        replace(SamplingConfig(), **{field: value})


@pytest.mark.parametrize("position", [0, 1, 7, 33, 99])
@pytest.mark.parametrize("temp", [0, 0.8])
def test_nan_anywhere_is_an_error(position, temp):
    logits = np.linspace(0, 5, 100, dtype=np.float32)
    logits[50] = np.inf
    logits[position] = np.nan
    with pytest.raises(ComputeError, match=f"NaN at token {position}"):
        Sampler(replace(OFF, temp=temp)).sample(logits)


@pytest.mark.parametrize("temp", [0, 0.8])
def test_no_possible_token_is_an_error(temp):
    with pytest.raises(ComputeError, match="every logit is -inf"):
        Sampler(replace(OFF, temp=temp)).sample(np.full(5, -np.inf, dtype=np.float32))
    with pytest.raises(ComputeError, match="every logit is -inf"):
        Sampler(replace(OFF, temp=temp), banned=[0, 1]).sample(np.zeros(2, dtype=np.float32))


def test_top_k_keeps_the_lowest_ids_among_equals():
    assert survivors(replace(OFF, top_k=3), np.array([1, 2, 1, 3, 1, 1], dtype=np.float32)) == [0, 1, 3]


def test_top_p_keeps_the_token_that_crosses_the_share():
    logits = logits_of(0.1, 0.5, 0.15, 0.25)
    assert survivors(replace(OFF, top_p=0.0), logits) == [1]
    assert survivors(replace(OFF, top_p=0.6), logits) == [1, 3]
    assert survivors(replace(OFF, top_p=0.8), logits) == [1, 2, 3]


def test_min_p_is_relative_to_the_best():
    logits = logits_of(0.1, 0.5, 0.15, 0.25)
    assert survivors(replace(OFF, min_p=0.28), logits) == [1, 2, 3]
    assert survivors(replace(OFF, min_p=1.0), logits) == [1]


def test_truncation_comes_before_temperature():
    logits = logits_of(0.1, 0.5, 0.15, 0.25)
    assert survivors(replace(OFF, top_p=0.6, temp=50), logits) == [1, 3]


def test_the_penalty_also_moves_the_greedy_choice():
    logits = np.array([2.0, 1.5, -1.0], dtype=np.float32)
    config = SamplingConfig(temp=0, repeat_penalty=2.0)
    assert Sampler(config).sample(logits, [0]) == 1
    assert Sampler(replace(config, repeat_last_n=1)).sample(logits, [0, 2]) == 0
    assert Sampler(replace(config, repeat_last_n=0)).sample(logits, [0]) == 0


def test_draws_follow_the_probabilities():
    sampler = Sampler(OFF)
    logits = logits_of(0.5, 0.3, 0.2)
    counts = np.bincount([sampler.sample(logits) for _ in range(4000)], minlength=3)
    np.testing.assert_allclose(counts / 4000, [0.5, 0.3, 0.2], atol=0.04)


def test_the_ends_of_the_draw_never_reach_an_impossible_token():
    class Ends:
        def __init__(self, value):
            self.value = value

        def random(self):
            return self.value

    logits = np.array([-np.inf, 0.0, 1.0, -np.inf], dtype=np.float32)
    for value, expected in ((0.0, 1), (1.0, 2)):
        sampler = Sampler(OFF)
        sampler._rng = Ends(value)
        assert sampler.sample(logits) == expected


def test_an_open_seed_is_drawn_and_can_be_given_again():
    sampler = Sampler(replace(OFF, seed=-1))
    again = Sampler(replace(OFF, seed=sampler.seed))
    logits = np.zeros(1000, dtype=np.float32)
    assert [sampler.sample(logits) for _ in range(5)] == [again.sample(logits) for _ in range(5)]
    assert len({Sampler(replace(OFF, seed=-1)).seed for _ in range(5)}) > 1


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"seed": 1},
        {"seed": 1, "rng": {}},
        {"seed": "x", "rng": {}},
        {"seed": 1, "rng": {"bit_generator": "MT19937"}},
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(state):
    sampler = Sampler(OFF)
    before = sampler.state()
    with pytest.raises(InputError, match="not a saved sampler state"):
        sampler.restore(state)
    assert sampler.state() == before


def test_extreme_temperatures_stay_finite():
    logits = np.array([-3e38, 0.0, 3e38, 3e38], dtype=np.float32)
    for temp in (5e-324, 1e-30, 1e300):
        _, probs = Sampler(replace(OFF, temp=temp)).distribution(logits)
        assert np.isfinite(probs).all()
        assert probs.sum() == pytest.approx(1)
