import threading
from typing import Any

import numpy as np
import pytest
from gguf import TokenType
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from pyggml_repkv.errors import InputError, ModelFileError
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


def test_text_that_is_not_byte_level_is_decoded_as_it_stands() -> None:
    tokenizer = Tokenizer.from_metadata(with_tokens(("日本 x", TokenType.NORMAL)))
    assert tokenizer.decode([274]) == "日本 x"


def test_merges_may_be_pairs() -> None:
    pairs = [merge.split(" ") for merge in vocabulary()[MERGES]]
    text = "the tin and the on"
    want = Tokenizer.from_metadata(vocabulary()).encode(text)
    assert Tokenizer.from_metadata(vocabulary(merges=pairs)).encode(text) == want
    spaced = with_tokens(("a b", TokenType.NORMAL), ("a bc", TokenType.NORMAL), merges=[["a b", "c"]])
    assert Tokenizer.from_metadata(spaced).n_vocab == 276


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


def test_ends_that_a_file_wants_added_are_not(caplog: pytest.LogCaptureFixture) -> None:
    keys = {key: value for key, (value, _) in tiny_tokenizer(300).items()} | {"tokenizer.ggml.add_eos_token": True}
    tokenizer = Tokenizer.from_metadata(keys)
    assert tokenizer.eos_id not in tokenizer.encode("a")
    assert caplog.messages == ["tokenizer.ggml.add_eos_token is not honoured: a prompt is to be continued"]
