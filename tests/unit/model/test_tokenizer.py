import threading
from typing import Any

import numpy as np
import pytest
from gguf import TokenType
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from pyggml_repkv.errors import InputError
from pyggml_repkv.model import tokenizer as tokenizer_module
from pyggml_repkv.model.pretokenizers import PATTERNS, chunks, pre_tokenizer
from pyggml_repkv.model.tokenizer import Tokenizer
from tests.tiny_models import byte_alphabet, tiny_tokenizer

TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
MERGES, PRE = "tokenizer.ggml.merges", "tokenizer.ggml.pre"
BOS, EOS, ADD_BOS = (f"tokenizer.ggml.{key}" for key in ("bos_token_id", "eos_token_id", "add_bos_token"))
SPACE = "Ġ"


def vocabulary(**changes: Any) -> dict[str, Any]:
    """Returns metadata with all bytes, the merges of "the" and two unused tokens. changes: by the key's last part."""
    metadata = {key: value for key, (value, _) in tiny_tokenizer(274).items()}
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def with_tokens(*added: tuple[str, TokenType], **changes: Any) -> dict[str, Any]:
    """Returns `vocabulary` with more tokens at its end."""
    metadata = vocabulary(**changes)
    metadata[TOKENS] = metadata[TOKENS] + [text for text, _ in added]
    metadata[TYPES] = np.array([*metadata[TYPES], *(kind for _, kind in added)], np.int32)
    return metadata


def pieces(tokenizer: Tokenizer, text: str, **options: bool) -> list[bytes]:
    return [tokenizer.token_bytes(i) for i in tokenizer.encode(text, **options)]


def test_text_that_is_not_byte_level_is_decoded_as_it_stands() -> None:
    tokenizer = Tokenizer.from_metadata(with_tokens(("日本 x", TokenType.NORMAL)))
    assert tokenizer.decode([274]) == "日本 x"


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "pixtral"])
def test_with_llama_3s_names_whole_words_need_no_merges_and_a_text_has_bos(pre: str) -> None:
    tokens = [*byte_alphabet(), "ab", "abc", f"{SPACE}abc", "<s>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2", PRE: pre, TOKENS: tokens, MERGES: ["a b"], BOS: len(tokens) - 1,
    }  # fmt: skip
    tokenizer = Tokenizer.from_metadata(metadata)
    assert pieces(tokenizer, "abc abc abca") == [b"<s>", b"abc", b" abc", b" ", b"ab", b"c", b"a"]
    without = Tokenizer.from_metadata({**metadata, "tokenizer.ggml.add_bos_token": False})
    assert pieces(without, "abc") == [b"abc"]
    assert pieces(Tokenizer.from_metadata({**metadata, PRE: "qwen2"}), "abc") == [b"ab", b"c"]


def test_llama_3_takes_digits_by_threes() -> None:
    text = "x1234 56½a\n\n 7"
    found = pre_tokenizer("llama-bpe").pre_tokenize_str(text)
    assert [text[a:b] for _, (a, b) in found] == ["x", "123", "4", " ", "56½", "a", "\n\n", " ", "7"]


def test_merges_and_words() -> None:
    tokenizer = Tokenizer.from_metadata(vocabulary())
    assert pieces(tokenizer, "the and them") == [*(b"th", b"e", b" and", b" "), *(b"th", b"e", b"m")]
    assert tokenizer.encode("") == []
    assert tokenizer.n_vocab == 274


def test_of_a_merge_listed_twice_the_first_counts() -> None:
    tokens = [*byte_alphabet(), "ab", "bc"]
    tokenizer = Tokenizer(tokens, ["a b", "b c", "a b"], "qwen2")
    assert pieces(tokenizer, "abc") == [b"ab", b"c"]


def test_bos_only_where_the_file_and_the_caller_ask_for_it() -> None:
    plain = Tokenizer.from_metadata(vocabulary())
    assert not plain.add_bos
    assert plain.bos_id not in plain.encode("a")
    asked = Tokenizer.from_metadata(vocabulary(add_bos_token=True))
    assert asked.encode("a")[0] == asked.bos_id == vocabulary()[BOS]
    assert asked.encode("") == [asked.bos_id]
    assert asked.encode("a", add_special=False) == plain.encode("a")
    metadata = vocabulary(add_bos_token=True)
    del metadata[BOS]
    nameless = Tokenizer.from_metadata(metadata)
    assert (nameless.add_bos, nameless.bos_id) == (False, None)
    assert nameless.encode("a") == plain.encode("a")


def test_control_tokens_are_text_unless_parsed() -> None:
    tokenizer = Tokenizer.from_metadata(vocabulary())
    text = "<|im_start|>the<|im_end|><|im_end|>"
    parsed = tokenizer.encode(text, parse_special=True)
    assert [tokenizer.token_bytes(i) for i in parsed] == [
        *(b"<|im_start|>", b"th", b"e"),
        *(b"<|im_end|>", b"<|im_end|>"),
    ]
    assert [tokenizer.is_special(i) for i in parsed] == [True, False, False, True, True]
    plain = tokenizer.encode(text)
    assert not any(tokenizer.is_special(i) for i in plain)
    assert tokenizer.decode(plain) == tokenizer.decode(parsed) == text
    assert tokenizer.decode(parsed, special=False) == "the"


def test_user_defined_tokens_are_always_matched_and_shown() -> None:
    tokenizer = Tokenizer.from_metadata(with_tokens(("<think>", TokenType.USER_DEFINED)))
    for parse_special in (False, True):
        ids = tokenizer.encode("a<think>b", parse_special=parse_special)
        assert ids[1] == 274
        assert tokenizer.decode(ids, special=False) == "a<think>b"
    assert not tokenizer.is_special(274)


def test_the_longest_special_token_is_looked_for_first_everywhere() -> None:
    added = [("ab", TokenType.USER_DEFINED), ("bcd", TokenType.USER_DEFINED), ("éx", TokenType.USER_DEFINED)]
    tokenizer = Tokenizer.from_metadata(with_tokens(*added))
    assert pieces(tokenizer, "abcd") == [b"a", b"bcd"]
    assert pieces(tokenizer, "abéxab") == [b"ab", "éx".encode(), b"ab"]


def test_unknown_tokens_are_matched_like_control_tokens() -> None:
    tokenizer = Tokenizer.from_metadata(with_tokens(("<unk>", TokenType.UNKNOWN)))
    assert tokenizer.encode("<unk>", parse_special=True) == [274]
    assert 274 not in tokenizer.encode("<unk>")
    assert tokenizer.is_special(274)


def test_token_bytes_by_type() -> None:
    added = [
        ("<0x0A>", TokenType.BYTE),
        ("<0xZZ>", TokenType.BYTE),
        ("two words", TokenType.NORMAL),
        (SPACE + "é", TokenType.USER_DEFINED),
        ("[gone]", TokenType.UNUSED),
        ("", TokenType.NORMAL),
    ]
    tokenizer = Tokenizer.from_metadata(with_tokens(*added))
    got = [tokenizer.token_bytes(i) for i in range(274, 280)]
    assert got == [b"\n", b"<0xZZ>", b"two words", (SPACE + "é").encode(), b"", b"[EMPTY_279]"]
    assert b"".join(tokenizer.token_bytes(i) for i in range(256)) == bytes(range(256))


@pytest.mark.parametrize("token", [-1, 274, 1 << 40])
def test_ids_outside_the_vocabulary(token: int) -> None:
    tokenizer = Tokenizer.from_metadata(vocabulary())
    with pytest.raises(InputError, match="from 0 to 273"):
        tokenizer.token_bytes(token)
    assert tokenizer.decode([ord("a") - 0x21, token]) == tokenizer.decode([ord("a") - 0x21])
    assert not tokenizer.is_special(token)
    stream = tokenizer.stream()
    assert stream.push(token) + stream.flush() == ""


def test_decode_takes_numpy_ids_and_replaces_bad_bytes() -> None:
    tokenizer = Tokenizer.from_metadata(vocabulary())
    assert tokenizer.decode(np.array([0xE4, 0xBD, 0xA0, 0xFF, 0x41])) == "你\ufffdA"


def test_stream_can_leave_control_tokens_out() -> None:
    tokenizer = Tokenizer.from_metadata(vocabulary())
    ids = tokenizer.encode("<|im_start|>é<|im_end|>", parse_special=True)
    shown, hidden = tokenizer.stream(), tokenizer.stream(special=False)
    assert "".join(map(shown.push, ids)) + shown.flush() == "<|im_start|>é<|im_end|>"
    assert "".join(map(hidden.push, ids)) + hidden.flush() == "é"


def test_surrogates_are_joined_or_replaced() -> None:
    tokenizer = Tokenizer.from_metadata(vocabulary())
    assert tokenizer.decode(tokenizer.encode("a\ud83d\ude00b")) == "a😀b"
    assert tokenizer.decode(tokenizer.encode("a\ud83db\udce9")) == "a\ufffdb\ufffd"


def test_text_without_a_token_is_dropped_and_keeps_its_neighbours_apart() -> None:
    tokens = [c for c in byte_alphabet() if c not in ("x", SPACE)]
    tokenizer = Tokenizer([*tokens, "ab"], ["a b"], "smollm")
    assert pieces(tokenizer, "ab axb a b") == [b"ab", b"a", b"b", b"a", b"b"]
    assert max(tokenizer.encode("ab xyz")) < tokenizer.n_vocab
    taken = Tokenizer([*tokens, "ab", " ", "  "], ["a b"], "smollm")
    assert pieces(taken, "axb") == [b"a", b"b"]


@pytest.mark.parametrize(
    ("text", "qwen2", "smollm"),
    [
        ("I'dx'Sa'lLb", ["I", "'d", "x", "'S", "a", "'lL", "b"], ["I", "'d", "x", "'", "Sa", "'", "lLb"]),
        (
            "we'll they've I'm",
            ["we", "'ll", " they", "'ve", " I", "'m"],
            ["we", "'ll", " they", "'ve", " I", "'m"],
        ),
        (
            "it's don't you're",
            ["it", "'s", " don", "'t", " you", "'re"],
            ["it", "'s", " don", "'t", " you", "'re"],
        ),
        ("'ſa", ["'ſa"], ["'", "ſa"]),
        ("$a_b", ["$a", "_b"], ["$", "a", "_", "b"]),
        ("x12 34", ["x", "1", "2", " ", "3", "4"], ["x", "1", "2", " ", "3", "4"]),
        ("a  12½", ["a", " ", " ", "1", "2", "½"], ["a", "  ", "1", "2", "½"]),
        ("a\n\n  b", ["a", "\n\n", " ", " b"], ["a", "\n\n ", " b"]),
        ("x!\n\ny ?", ["x", "!\n\n", "y", " ?"], ["x", "!", "\n", "\n", "y", " ?"]),
        (" \r\n \tx", [" \r\n", " ", "\tx"], [" \r\n ", "\t", "x"]),
        ("a  ", ["a", "  "], ["a", "  "]),
        ("a\u3000\xa0b", ["a", "\u3000", "\xa0b"], ["a", "\u3000", "\xa0", "b"]),
        ("你好，世界", ["你好", "，世界"], ["你好", "，", "世界"]),
    ],
)
def test_words(text: str, qwen2: list[str], smollm: list[str]) -> None:
    for pre, expected in (("qwen2", qwen2), ("deepseek-r1-qwen", qwen2), ("smollm", smollm)):
        found = pre_tokenizer(pre).pre_tokenize_str(text)
        assert [text[start:end] for _, (start, end) in found] == expected


def test_long_text_is_encoded_in_chunks_to_the_same_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_metadata(vocabulary())
    text = "the  and\n\nthem, 'tis 12 \n of\nit.\r\n" * 20
    whole = tokenizer.encode(text)
    monkeypatch.setattr(tokenizer_module, "CHUNK", 5)
    assert len(list(chunks(text, 5))) > 60
    assert tokenizer.encode(text) == whole


def test_text_is_composed_where_the_models_own_tokenizer_does_so() -> None:
    text = "cafe\u0301 \u1112\u1161\u11ab"
    for pre, composes in (("qwen2", True), ("deepseek-r1-qwen", True), ("smollm", False), ("llama-bpe", False)):
        tokenizer = Tokenizer.from_metadata(vocabulary(pre=pre))
        assert tokenizer.normalizes == composes
        assert tokenizer.decode(tokenizer.encode(text)) == ("café 한" if composes else text)
        tokenizer.normalizes = False
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_found_before_text_is_composed() -> None:
    metadata = with_tokens(("e\u0301", TokenType.CONTROL), pre="qwen2")
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("e\u0301\u0301", parse_special=True)[0] == len(metadata[TOKENS]) - 1
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "é"


def test_a_word_that_is_too_long_to_wait_for_is_encoded_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_metadata(vocabulary())
    encoded_in = []
    plain = tokenizer._encode_words
    monkeypatch.setattr(
        tokenizer, "_encode_words", lambda text: encoded_in.append(threading.current_thread()) or plain(text)
    )
    assert len(tokenizer.encode("the" * tokenizer_module.CHUNK * 4)) == 2 * 4 * tokenizer_module.CHUNK
    assert encoded_in[0] is not threading.current_thread()
    monkeypatch.setattr(tokenizer, "_encode_words", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tokenizer.encode("the" * tokenizer_module.CHUNK * 4)


def test_minified_json_is_cut() -> None:
    text = '[{"id":12,"name":"abc","v":[1.5,2,null]},{"id":3}]' * 50
    assert max(map(len, chunks(text, 40))) < 50


def test_text_without_blanks_is_cut() -> None:
    for text in ("你好，世界。" * 50, "これはペンです。" * 50, "안녕하세요！" * 50):
        assert max(map(len, chunks(text, 40))) < 50


def test_a_text_that_is_no_string_is_an_error() -> None:
    for text in (None, 5, b"bytes"):
        with pytest.raises(InputError, match="text must be a string"):
            Tokenizer.from_metadata(vocabulary()).encode(text)  # type: ignore[arg-type]


def test_text_without_a_place_to_cut_stays_whole() -> None:
    assert list(chunks("a" * 100, 10)) == ["a" * 100]
    assert list(chunks("", 10)) == [""]
    assert list(chunks("ab cd\nef", 1)) == ["ab", " cd", "\n", "ef"]
    assert list(chunks("é!cd\n!é", 1)) == ["é!cd", "\n", "!é"]


@pytest.mark.slow
def test_a_run_of_ten_million_blanks_does_not_exhaust_the_regex() -> None:
    (pattern,) = PATTERNS["qwen2"]
    assert len(Split(Regex(pattern), "isolated").pre_tokenize_str(" " * 10_000_001)) == 1


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (5, "ids must be token ids, got 5"),
        (None, "ids must be token ids, got None"),
        ("x", "token must be an integer, got 'x'"),
        ([1.0], "token must be an integer, got 1.0"),
        ([True], "token must be an integer, got True"),
        ([[1]], r"token must be an integer, got \[1\]"),
    ],
)
def test_what_is_no_token_is_named(ids: Any, message: str) -> None:
    tokenizer = Tokenizer.from_metadata(vocabulary())
    with pytest.raises(InputError, match=f"^{message}$"):
        tokenizer.decode(ids)
    if isinstance(ids, list):
        with pytest.raises(InputError, match=f"^{message}$"):
            tokenizer.token_bytes(ids[0])
        with pytest.raises(InputError, match=f"^{message}$"):
            tokenizer.stream().push(ids[0])
    assert tokenizer.decode(np.array([0, 1])) == tokenizer.decode(iter([0, 1]))
