"""The ranks of ends in a text, and what the keys on both sides add."""

import numpy as np
import pytest

from pyggml_repkv.memory.cut.boundaries import (
    CLAUSE_END,
    DROP_WEIGHT,
    INSIDE_WORD,
    LINE_END,
    LOOKAHEAD,
    N_CACHED_KEYS,
    PARAGRAPH_END,
    SENTENCE_END,
    WORD_END,
    BoundaryScores,
)


def rank(*texts):
    """Rank of the boundary before the last of these tokens."""
    scores = BoundaryScores(lambda token: b"" if token < 0 else _encoded(texts[token]), None)
    return scores.score(range(len(texts)), range(len(texts) - 1, len(texts)))[0]


def _encoded(text):
    return text if isinstance(text, bytes) else text.encode()


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["end", ".", "\n\n", "New"], PARAGRAPH_END),
        (["end", ".\n\n", "New"], PARAGRAPH_END),
        (["end", "\r\n\r\n", "New"], PARAGRAPH_END),
        (["\n", "\n", "New"], PARAGRAPH_END),
        ([".\n", " \n", "New"], PARAGRAPH_END),
        (["\n\n  ", "indented"], PARAGRAPH_END),
        (["end", "\n", "New"], LINE_END),
        (["\n", "x\n", "New"], LINE_END),
        (["\n", "\n\nNew", "er"], INSIDE_WORD),
        (["end", ".", " New"], SENTENCE_END),
        (["end", "?!", "\n"], SENTENCE_END),
        (["end", ". ", "New"], SENTENCE_END),
        (["end", "…", " New"], SENTENCE_END),
        (["end", '."', " New"], SENTENCE_END),
        (["end", ".", '")', " New"], SENTENCE_END),
        (["end", ".", "”", "\n"], SENTENCE_END),
        (["end", ".", ""], SENTENCE_END),
        (["终", "。", "新"], SENTENCE_END),
        (["终", "。」", "新"], SENTENCE_END),
        (["终", "。", "New"], SENTENCE_END),
        (["终", b"\xe3\x80", b"\x82", "新"], SENTENCE_END),
        (["终", ".", "新"], SENTENCE_END),
        (["end", ",", " new"], CLAUSE_END),
        (["end", ';"', " new"], CLAUSE_END),
        (["终", "，", "新"], CLAUSE_END),
        (["one", " two"], WORD_END),
        (["one", "\n"], WORD_END),
        (["one", " ", "two"], WORD_END),
        (["end", ".", " ", "New"], WORD_END),
        (["said", ".", ' "', "New"], INSIDE_WORD),
        (["3", ".", "14"], INSIDE_WORD),
        (["1", ",", "000"], INSIDE_WORD),
        (["12", ":", "30"], INSIDE_WORD),
        (["a", ".", "b"], INSIDE_WORD),
        (["end", ".", '"'], INSIDE_WORD),
        (["end", ".", "”"], INSIDE_WORD),
        (["end", ".", ".."], INSIDE_WORD),
        (["终", "。", "」"], INSIDE_WORD),
        (["un", "likely"], INSIDE_WORD),
        (["终", "新"], INSIDE_WORD),
    ],
)
def test_what_ends_at_a_boundary(texts, expected):
    assert rank(*texts) == expected


def test_the_ends_are_in_order():
    order = [INSIDE_WORD, WORD_END, CLAUSE_END, SENTENCE_END, LINE_END, PARAGRAPH_END]
    assert order == sorted(set(order))


def drops(keys, at=None):
    """Scores of tokens 0, 1, ... with these keys and no text ends."""
    keys = np.array(keys, dtype=np.float64)
    return BoundaryScores(lambda token: b"x", lambda token: keys[token]).score(range(len(keys)), at or range(len(keys)))


def test_the_drop_is_one_minus_the_cosine_of_the_means():
    keys = np.random.default_rng(1).normal(size=(60, 5))
    got = drops(keys)
    for i in range(1, 60):
        before, after = keys[max(0, i - 16) : i].mean(axis=0), keys[i : i + 16].mean(axis=0)
        cosine = before @ after / (np.linalg.norm(before) * np.linalg.norm(after))
        assert got[i] == pytest.approx(DROP_WEIGHT * (1 - cosine), abs=1e-12)


def test_a_change_of_subject_is_the_highest_of_its_rank():
    got = drops([[1, 0]] * 30 + [[0, 1]] * 30)
    assert got.argmax() == 30
    assert got[30] == DROP_WEIGHT
    assert got[5] == 0


def test_the_drop_decides_only_among_ends_of_one_rank():
    opposite = drops([[1.0]] * 20 + [[-1.0]] * 20)
    assert opposite.max() == 2 * DROP_WEIGHT < 1


@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_takes_no_drop_out_of_its_range(sign):
    for key in np.random.default_rng(3).normal(size=(50, 7)):
        got = drops([key] * 20 + [sign * key] * 20)
        assert got.min() >= 0
        assert got.max() <= 2 * DROP_WEIGHT


def test_nothing_before_or_a_zero_key_is_no_drop():
    assert drops([[1, 2]])[0] == 0
    assert drops([[0, 0]] * 20 + [[1, 2]] * 20)[20] == 0


def test_the_same_tokens_give_the_same_bits_in_any_call():
    rng = np.random.default_rng(2)
    keys = rng.normal(size=(300, 37)).astype(np.float32)
    tokens = rng.integers(0, 300, 200).tolist()
    scores = BoundaryScores(lambda token: b" x."[token % 3 :], lambda token: keys[token])
    whole = scores.score(tokens, range(200))
    for i in range(LOOKAHEAD, 200 - LOOKAHEAD):
        near = tokens[i - LOOKAHEAD : i + LOOKAHEAD]
        assert scores.score(near, range(LOOKAHEAD, LOOKAHEAD + 1))[0] == whole[i]
        assert np.array_equal(scores.score(tokens, range(i, min(i + 7, 200))), whole[i : i + 7])


def test_a_key_is_asked_for_once_and_copied():
    asked, buffer = [], np.zeros(2)

    def key(token):
        asked.append(token)
        buffer[:] = (token + 1, 1)
        return buffer

    scores = BoundaryScores(lambda token: b"x", key)
    first = scores.score([0, 9] * 20, range(40))
    assert asked == [0, 9]
    assert np.array_equal(scores.score([0, 9] * 20, range(40)), first)
    assert asked == [0, 9]
    assert first[1] > 0


def test_the_keys_that_are_kept_are_bounded():
    scores = BoundaryScores(lambda token: b"x", lambda token: np.ones(1))
    scores.score(range(N_CACHED_KEYS + 100), range(N_CACHED_KEYS + 100))
    assert scores._key.cache_info().currsize == N_CACHED_KEYS


def test_scores_of_no_boundary():
    scores = BoundaryScores(lambda token: b"x", lambda token: np.ones(1))
    assert scores.score([], range(0)).shape == (0,)
    assert scores.score([1, 2], range(2, 2)).shape == (0,)


@pytest.mark.parametrize("at", [range(-1, 2), range(4), range(0, 3, 2), range(2, 1)])
def test_boundaries_outside_the_tokens_are_an_error(at):
    with pytest.raises(ValueError, match="of 3 tokens"):
        BoundaryScores(lambda token: b"x", None).score([1, 2, 3], at)
