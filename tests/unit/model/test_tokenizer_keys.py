"""What a file says of its tokenizer is checked, guessed with a warning, or refused in one line."""

from typing import Any

import numpy as np
import pytest
from gguf import TokenType

from pyggml_repkv.errors import ModelFileError
from pyggml_repkv.model.pretokenizers import pre_tokenizer
from pyggml_repkv.model.tokenizer import Tokenizer
from tests.tiny_models import tiny_tokenizer
from tests.unit.model.test_tokenizer import ADD_BOS, MERGES, PRE, TOKENS, TYPES, pieces, vocabulary, with_tokens


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model is 'llama'"),
        ({"pre": "gpt-4o\n"}, r"tokenizer.ggml.pre is 'gpt-4o\n'"),
        ({"model": np.arange(3)}, "tokenizer.ggml.model is array"),
        ({"pre": np.arange(3)}, "tokenizer.ggml.pre is '[0 1 2]'"),
        ({"pre": 7}, "tokenizer.ggml.pre is '7'"),
        ({"tokens": []}, TOKENS),
        ({"tokens": None}, TOKENS),
        ({"tokens": ["a", 1]}, TOKENS),
        ({"tokens": np.arange(3)}, TOKENS),
        ({"tokens": [*map(str, range(273)), "7"]}, "'7' as 7 and as 273"),
        ({"merges": None}, MERGES),
        ({"merges": ["t h", "nospace"]}, "'nospace'"),
        ({"merges": ["t h", "t Ж"]}, "'t Ж'"),
        ({"merges": ["t h", "t t"]}, "'t t'"),
        ({"merges": ["t h", " th"]}, "' th'"),
        ({"merges": ["t  h"]}, "'t  h'"),
        ({"token_type": [1, 1]}, TYPES),
        ({"token_type": np.ones(274, np.float32)}, TYPES),
        ({"token_type": 7}, TYPES),
        ({"token_type": [[1], [1, 2]]}, TYPES),
        ({"scores": np.ones(273, np.float32)}, "tokenizer.ggml.scores"),
        ({"scores": "x" * 274}, "tokenizer.ggml.scores"),
        ({"merges": [["t", "h"], ["t"]]}, MERGES),
        ({"merges": [["t", "h"], "t h"]}, MERGES),
        ({"merges": [["t", "Ж"]]}, "('t', 'Ж')"),
        ({"add_bos_token": "no"}, ADD_BOS),
    ],
)
def test_contradictions_are_one_line_errors(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        Tokenizer.from_metadata(vocabulary(**changes))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_is_an_error() -> None:
    metadata = vocabulary()
    metadata[TOKENS] = [*metadata[TOKENS][:-1], "\udcff"]
    with pytest.raises(ModelFileError, match="UTF-8"):
        Tokenizer.from_metadata(metadata)


@pytest.mark.parametrize("key", ["tokenizer.ggml.model", TOKENS, MERGES])
def test_a_missing_key_is_named(key: str) -> None:
    metadata = vocabulary()
    del metadata[key]
    with pytest.raises(ModelFileError, match=key.replace(".", r"\.")):
        Tokenizer.from_metadata(metadata)


def test_an_unknown_pre_tokenizer_error_lists_the_known_ones() -> None:
    with pytest.raises(ModelFileError, match=r"deepseek-r1-qwen, .*, qwen2, .*, smollm"):
        Tokenizer.from_metadata(vocabulary(pre="tekken"))


def guess(arch: str, *texts: str, n: int = 0, **changes: Any) -> dict[str, Any]:
    """Returns `vocabulary` of an architecture with more tokens, `texts` and as many as bring it to n."""
    texts = (*texts, *(f"[MORE{i}]" for i in range(n - 274 - len(texts))))
    metadata = with_tokens(*((text, TokenType.CONTROL) for text in texts), **changes)
    return {key: value for key, value in metadata.items() if value is not None} | {"general.architecture": arch}


@pytest.mark.parametrize("pre", [None, "", "default"])
@pytest.mark.parametrize(
    ("arch", "texts", "n", "name"),
    [
        ("qwen2", (), 0, "qwen2"),  # by its <|im_start|>
        ("qwen3", (), 0, "qwen2"),
        ("llama", (), 151_936, "qwen2"),
        ("llama", ("<|begin_of_text|>",), 0, "llama-bpe"),
        ("llama", (), 128_256, "llama-bpe"),
        ("llama", (), 0, "default"),  # <|im_start|> says little there
    ],
)
def test_a_missing_pre_tokenizer_is_guessed_and_named(
    caplog: pytest.LogCaptureFixture, pre: str | None, arch: str, texts: tuple[str, ...], n: int, name: str
) -> None:
    metadata = guess(arch, *texts, n=n, pre=pre, add_bos_token=None)
    guessed = Tokenizer.from_metadata(metadata)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith(f"tokenizer.ggml.pre is {'missing' if pre is None else repr(pre)}: ")
    assert (f"are those of {name}, " in record.message) == (name != "default")
    named = Tokenizer.from_metadata({**metadata, PRE: name})
    text = "12345 it's  \n\n  x IT'S ½٣+=the..."
    assert guessed.encode(text) == named.encode(text)
    assert guessed.add_bos == (name == "llama-bpe")


def test_the_default_cuts_punctuation_then_words_then_digits_by_threes() -> None:
    text = "x12345 67 it's+=  y"
    found = [text[a:b] for _, (a, b) in pre_tokenizer("default").pre_tokenize_str(text)]
    assert found == ["x", "123", "45", " ", "67", " it", "'", "s", "+=", " ", " y"]


@pytest.mark.parametrize(("alias", "name"), [("megrez", "qwen2"), ("starcoder", "smollm"), ("lfm2", "llama-bpe")])
def test_other_names_of_a_pre_tokenizer(alias: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    text = "12345 it's  \n\n  x IT'S"
    one, other = (Tokenizer.from_metadata(vocabulary(pre=pre)) for pre in (alias, name))
    assert one.encode(text) == other.encode(text)
    assert not caplog.records


@pytest.mark.parametrize("bad", [4294967295, 999999, -1, 274, "x", 2.0, True, np.arange(3)])
@pytest.mark.parametrize("role", ["bos", "eos", "eot", "eom", "fim_pre", "fim_pad", "suffix"])
def test_ids_that_are_no_tokens_are_none_with_a_warning(role: str, bad: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer.from_metadata(vocabulary(**{f"{role}_token_id": bad}, add_bos_token=True))
    (record,) = caplog.records
    assert f"tokenizer.ggml.{role}_token_id is " in record.message
    assert "treated as none" in record.message
    assert "\n" not in record.message
    ends = [tokenizer.encode(text, add_special=False, parse_special=True) for text in ("<|im_end|>", "<|endoftext|>")]
    assert {i for (i,) in ends} <= tokenizer.eog_ids
    if role == "bos":
        assert tokenizer.bos_id is None
        assert pieces(tokenizer, "a") == [b"a"]
    if role == "eos":
        assert tokenizer.eos_id is None


@pytest.mark.parametrize("kind", [np.int8, np.uint32, np.int64])
def test_types_of_tokens_may_be_any_integers(kind: type) -> None:
    want = Tokenizer.from_metadata(vocabulary())
    got = Tokenizer.from_metadata(vocabulary(token_type=np.array(vocabulary()[TYPES], kind)))
    text = "<|im_start|>x"
    assert got.encode(text, parse_special=True) == want.encode(text, parse_special=True)


def test_merges_may_be_pairs() -> None:
    pairs = [merge.split(" ") for merge in vocabulary()[MERGES]]
    text = "the tin and the on"
    want = Tokenizer.from_metadata(vocabulary()).encode(text)
    assert Tokenizer.from_metadata(vocabulary(merges=pairs)).encode(text) == want
    spaced = with_tokens(("a b", TokenType.NORMAL), ("a bc", TokenType.NORMAL), merges=[["a b", "c"]])
    assert Tokenizer.from_metadata(spaced).n_vocab == 276


def test_end_of_generation_is_known_by_text_and_by_key() -> None:
    tokens = vocabulary()[TOKENS]
    end_of_text, im_start, im_end = (tokens.index(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    tokenizer = Tokenizer.from_metadata(vocabulary())
    assert tokenizer.eog_ids == {end_of_text, im_end}
    assert tokenizer.eos_id == im_end
    named = Tokenizer.from_metadata(vocabulary(eot_token_id=3, fim_sep_token_id=im_start))
    assert named.eog_ids == {end_of_text, im_end, 3, im_start}


def test_a_normal_token_known_to_end_texts_is_a_control_token() -> None:
    tokenizer = Tokenizer.from_metadata(with_tokens(("</s>", TokenType.NORMAL)))
    assert 274 in tokenizer.eog_ids
    assert tokenizer.is_special(274)
    assert tokenizer.encode("</s>", parse_special=True) == [274]
    assert tokenizer.token_bytes(274) == b"</s>"


def test_fill_in_the_middle_tokens_are_control_tokens_by_their_text() -> None:
    added = [
        ("<|fim_prefix|>", TokenType.USER_DEFINED),
        ("<|fim_pad|>", TokenType.USER_DEFINED),
        ("<|file_sep|>", TokenType.USER_DEFINED),
    ]
    tokenizer = Tokenizer.from_metadata(with_tokens(*added))
    assert {275, 276} <= tokenizer.eog_ids
    assert 274 not in tokenizer.eog_ids
    assert all(tokenizer.is_special(i) for i in (274, 275, 276))
    assert 274 not in tokenizer.encode("<|fim_prefix|>")
    elsewhere = Tokenizer.from_metadata(with_tokens(*added, fim_pre_token_id=1, fim_pad_token_id=2))
    assert not elsewhere.is_special(274)
    assert {2, 276} <= elsewhere.eog_ids
    assert 275 not in elsewhere.eog_ids


def test_ends_that_a_file_wants_added_are_not(caplog: pytest.LogCaptureFixture) -> None:
    keys = {key: value for key, (value, _) in tiny_tokenizer(300).items()} | {"tokenizer.ggml.add_eos_token": True}
    tokenizer = Tokenizer.from_metadata(keys)
    assert tokenizer.eos_id not in tokenizer.encode("a")
    assert caplog.messages == ["tokenizer.ggml.add_eos_token is not honoured: a prompt is to be continued"]
