"""The sampling chain against a naive one in plain Python, and the stop-string splitter against str.find."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pyggml_repkv.engine import sampling
from pyggml_repkv.engine.generate import StopStrings
from pyggml_repkv.engine.sampling import Sampler, SamplingConfig

# Steps of 1/4 make ties common, and every value exact in float32.
finite_logits = st.lists(st.integers(-80, 80).map(lambda n: n / 4), min_size=1, max_size=60)
logits_with_inf = st.lists(
    st.one_of(st.integers(-80, 80).map(lambda n: n / 4), st.sampled_from([-math.inf, math.inf])),
    min_size=1,
    max_size=60,
).filter(lambda values: max(values) > -math.inf)
seeds = st.integers(0, 2**32 - 1)
shares = st.floats(0, 1)


def as_logits(values):
    return np.array(values, dtype=np.float32)


def naive_chain(values, config):
    """{id: probability}, by sorting everything."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    order = order[: config.top_k or None]
    peak = values[order[0]]
    if config.top_p < 1:
        weights = [math.exp(values[i] - peak) for i in order]
        target, mass, n = config.top_p * math.fsum(weights), 0.0, 0
        for weight in weights:
            mass += weight
            n += 1
            # Two sums that differ in their last bit may fall on either side of so near a target.
            assume(mass == target or abs(mass - target) > 1e-12 * mass)
            if mass >= target:
                break
        order = order[:n]
    if config.min_p > 0:
        order = [i for i in order if values[i] - peak >= math.log(config.min_p)]
    weights = {i: math.exp((values[i] - peak) / config.temp) for i in order}
    return {i: weight / math.fsum(weights.values()) for i, weight in weights.items()}


@given(
    guess=st.sampled_from([1, 3, sampling.NUCLEUS_GUESS]),
    values=finite_logits,
    config=st.builds(
        SamplingConfig,
        temp=st.floats(0.05, 5),
        top_k=st.integers(0, 70),
        top_p=shares,
        min_p=shares,
        seed=seeds,
    ),
)
def test_the_chain_equals_a_naive_one(values, config, guess):
    expected = naive_chain(values, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "NUCLEUS_GUESS", guess)
        ids, probs = Sampler(config).distribution(as_logits(values))
    assert ids.tolist() == sorted(expected)
    assert math.isclose(probs.sum(), 1, rel_tol=1e-12)
    np.testing.assert_allclose(probs, [expected[i] for i in ids.tolist()], rtol=1e-9)


@given(
    values=logits_with_inf,
    temp=st.floats(0, 1e6),
    top_k=st.integers(0, 70),
    top_p=shares,
    min_p=shares,
    seed=seeds,
)
def test_infinite_logits_are_certain_or_impossible(values, temp, top_k, top_p, min_p, seed):
    sampler = Sampler(SamplingConfig(temp=temp, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed))
    _, probs = sampler.distribution(as_logits(values))
    assert np.isfinite(probs).all()
    assert math.isclose(probs.sum(), 1, rel_tol=1e-12)
    drawn = values[sampler.sample(as_logits(values))]
    assert drawn == math.inf if math.inf in values else drawn > -math.inf


@given(values=logits_with_inf, seed=seeds)
def test_greedy_is_the_first_of_the_highest(values, seed):
    expected = values.index(max(values))
    assert Sampler(SamplingConfig(temp=0, seed=seed)).sample(as_logits(values)) == expected
    assert Sampler(SamplingConfig(top_k=1, seed=seed)).sample(as_logits([*values, -math.inf])) in {
        i for i, value in enumerate(values) if value == max(values)
    }


@given(
    values=finite_logits,
    penalty=st.floats(0.1, 10),
    last_n=st.integers(-1, 20),
    recent=st.lists(st.integers(0, 59), max_size=30),
)
def test_the_penalty_touches_each_recent_token_once(values, penalty, last_n, recent):
    recent = [token % len(values) for token in recent]
    expected = list(values)
    for token in set(recent if last_n < 0 else recent[max(0, len(recent) - last_n) :]):
        expected[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    config = SamplingConfig(temp=1, top_k=0, top_p=1, min_p=0, repeat_penalty=penalty, repeat_last_n=last_n)
    logits = as_logits(values)
    _, probs = Sampler(config).distribution(logits, recent)
    assert logits.tolist() == values
    _, plain = Sampler(SamplingConfig(temp=1, top_k=0, top_p=1, min_p=0)).distribution(as_logits(expected))
    np.testing.assert_allclose(probs, plain, rtol=1e-5)


@given(
    values=finite_logits,
    seed=seeds,
    n_before=st.integers(0, 20),
    banned=st.sets(st.integers(0, 59), max_size=3),
)
def test_a_seed_fixes_the_draws_and_a_state_continues_them(values, seed, n_before, banned):
    banned = {token for token in banned if token < len(values)}
    assume(len(banned) < len(values))
    config = SamplingConfig(temp=2.0, top_p=1, min_p=0, seed=seed)
    sampler, twin = Sampler(config, banned), Sampler(config, banned)
    logits = as_logits(values)
    draws = [sampler.sample(logits) for _ in range(n_before)]
    assert draws == [twin.sample(logits) for _ in range(n_before)]
    assert not banned & set(draws)
    resumed = Sampler(SamplingConfig(temp=2.0, top_p=1, min_p=0, seed=seed ^ 1), banned)
    resumed.restore(json.loads(json.dumps(sampler.state())))
    assert resumed.seed == seed
    assert [sampler.sample(logits) for _ in range(20)] == [resumed.sample(logits) for _ in range(20)]


def naive_split(text, stops):
    """Returns the text before the stop string that is complete first; of two that end together, before the longer."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return (text[: min(ends)[1]], True) if ends else (text, False)


letters = st.text("ab", max_size=30)


@given(
    text=letters,
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=10),
)
def test_the_splitter_equals_find_however_the_text_is_cut(text, stops, cuts):
    expected, found = naive_split(text, stops)
    splitter, shown = StopStrings(stops), ""
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in itertools.pairwise(bounds):
        shown += splitter.push(text[start:end])
        assert expected.startswith(shown)
        # Text that is held back may still begin a stop string; all other text is out.
        held = text[len(shown) : end]
        assert splitter.found or held == "" or any(stop.startswith(held) for stop in stops)
        if splitter.found:
            break
    assert (shown + splitter.flush(), splitter.found) == (expected, found)


@given(text=letters, stop=st.text("ab", min_size=1, max_size=5))
def test_one_stop_string_cuts_where_find_finds_it(text, stop):
    splitter = StopStrings([stop])
    shown = "".join("" if splitter.found else splitter.push(letter) for letter in text) + splitter.flush()
    assert shown == (text[: text.find(stop)] if stop in text else text)
