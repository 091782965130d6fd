"""Blocks are the same whatever the steps were, and every token is in exactly one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyggml_repkv.errors import InputError
from pyggml_repkv.memory.blocks import FixedBlocks, parse_block


@given(n_sink=st.integers(0, 100), size=st.integers(16, 300), steps=st.lists(st.integers(0, 400), max_size=30))
def test_blocks_do_not_depend_on_the_steps(n_sink, size, steps):
    stepwise, at_once = FixedBlocks(n_sink, size), FixedBlocks(n_sink, size)
    sealed, end = [], 0
    for step in steps:
        end += step
        sealed += stepwise.seal(end)
        assert stepwise.sealed_end <= max(end, n_sink)
        assert end - stepwise.sealed_end < size
    assert sealed == at_once.seal(end)
    assert [token for first, last in sealed for token in range(first, last)] == list(range(n_sink, stepwise.sealed_end))
    assert stepwise.n_blocks == len(sealed)


def test_the_scheme_is_parsed():
    assert parse_block("fixed:128") == 128


@pytest.mark.parametrize(
    "text", ["", "128", "fixed:", "fixed:15", "fixed:4097", "fixed:-1", "fixed:1e3", "semantic:1-2"]
)
def test_another_scheme_is_an_error(text):
    with pytest.raises(InputError, match=r"--block is .* it must be fixed:N with N from 16 to 4096"):
        parse_block(text)
