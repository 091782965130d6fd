"""Which blocks are cut, which tokens are kept for that, and which schemes `--block` accepts."""

import numpy as np
import pytest

from pyggml_repkv.errors import InputError
from pyggml_repkv.memory.cut.blocks import BlockScheme, FixedBlocks, SemanticBlocks, parse_block
from pyggml_repkv.memory.cut.boundaries import LOOKAHEAD


class TokenScores:
    """The score of a boundary is the token before it."""

    def score(self, tokens, at):
        return np.array([tokens[i - 1] for i in at], dtype=np.float64)


def semantic(n_sink=0, min_size=16, max_size=32):
    return SemanticBlocks(n_sink, min_size, max_size, TokenScores())


def ends_at(*positions, n=200):
    """Tokens whose score is 1 at the boundaries at `positions`, else 0."""
    return [int(i + 1 in positions) for i in range(n)]


def test_fixed_blocks_follow_the_sinks():
    blocks = FixedBlocks(4, 16)
    blocks.append([1, 2, 3], 0)
    assert blocks.seal(35) == [(4, 20)]
    assert blocks.seal(36) == [(20, 36)]
    assert (blocks.bounds, blocks.n_blocks, blocks.sealed_end) == ([4, 20, 36], 2, 36)


def test_a_semantic_block_ends_at_the_highest_score():
    blocks = semantic()
    blocks.append(ends_at(20, 50, 66), 0)
    assert blocks.seal(100) == [(0, 20), (20, 50), (50, 66), (66, 82)]
    assert (blocks.bounds, blocks.n_blocks, blocks.sealed_end) == ([0, 20, 50, 66, 82], 4, 82)


@pytest.mark.parametrize("size", [16, 32])
def test_the_smallest_and_the_largest_block_are_candidates(size):
    blocks = semantic()
    blocks.append(ends_at(15, size, 33), 0)
    assert blocks.seal(32) == [(0, size)]


def test_of_equal_scores_the_earliest_ends_the_block():
    blocks = semantic()
    blocks.append(ends_at(19, 23, 31), 0)
    assert blocks.seal(32) == [(0, 19)]


def test_the_first_semantic_block_starts_after_the_sinks():
    blocks = semantic(n_sink=10)
    for first in range(0, 80, 4):
        blocks.append(ends_at(20, 30)[first : first + 4], first)
    assert blocks.seal(64) == [(10, 30), (30, 46)]


def test_a_block_waits_for_its_last_candidate():
    blocks = semantic()
    blocks.append(ends_at(16), 0)
    assert blocks.seal(31) == []
    assert blocks.seal(32) == [(0, 16)]


def test_a_block_waits_for_the_tokens_it_looks_ahead_to():
    blocks = semantic()
    blocks.append(ends_at(16)[: 32 + LOOKAHEAD - 1], 0)
    assert blocks.seal(200) == []
    blocks.append([0], 32 + LOOKAHEAD - 1)
    assert blocks.seal(200) == [(0, 16)]


def test_tokens_of_a_failed_step_are_forgotten():
    blocks = semantic()
    blocks.append(ends_at()[:10], 0)
    blocks.append(ends_at(24)[10:], 10)
    blocks.append(ends_at(18)[10:40], 10)
    assert blocks.seal(200) == []
    blocks.append(ends_at()[40:], 40)
    assert blocks.seal(32) == [(0, 18)]


def test_tokens_of_a_failed_step_among_the_sinks_are_forgotten():
    blocks = semantic(n_sink=8)
    blocks.append(ends_at(30), 0)
    blocks.append(ends_at(35)[4:], 4)
    assert blocks.seal(40) == [(8, 35)]


def test_tokens_are_told_without_a_gap_and_not_after_the_decision():
    blocks = semantic()
    with pytest.raises(ValueError, match="tokens from 1 on; expected from 0 to 0"):
        blocks.append([5], 1)
    blocks.append(ends_at(), 0)
    blocks.seal(32)
    with pytest.raises(ValueError, match="tokens from 47 on; expected from 48 to 200"):
        blocks.append([5], 47)
    blocks.append([5], 48)


def test_the_tokens_of_finished_blocks_are_dropped():
    blocks = semantic()
    for first in range(0, 100_000, 100):
        blocks.append([0] * 100, first)
        blocks.seal(first + 100 - 32)
        assert len(blocks._tokens) < 32 + 32 + 100


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("fixed:128", BlockScheme("fixed", 128, 128)),
        ("fixed:16", BlockScheme("fixed", 16, 16)),
        ("semantic:128-256", BlockScheme("semantic", 128, 256)),
        ("semantic:16-4096", BlockScheme("semantic", 16, 4096)),
        ("semantic:64-64", BlockScheme("semantic", 64, 64)),
    ],
)
def test_the_scheme_is_parsed(text, scheme):
    assert parse_block(text) == scheme


@pytest.mark.parametrize(
    "text",
    [
        *("", "128", "fixed:", "fixed:15", "fixed:4097", "fixed:-1", "fixed:1e3", "fixed:64-128", "fixed:١٢٨"),
        *("semantic:", "semantic:128", "semantic:15-64", "semantic:64-4097", "semantic:128-64", "semantic:64-128 "),
    ],
)
def test_another_scheme_is_an_error(text):
    expected = r"--block is .*; it must be fixed:N or semantic:N-M with N and M from 16 to 4096, N <= M"
    with pytest.raises(InputError, match=expected):
        parse_block(text)
