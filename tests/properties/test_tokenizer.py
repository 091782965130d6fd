"""Properties of any text and any ids, with a vocabulary that has every byte."""

import re
import unicodedata
from collections.abc import Iterator
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyggml_repkv.model import tokenizer as tokenizer_module
from pyggml_repkv.model.pretokenizers import chunks, pre_tokenizer
from pyggml_repkv.model.stream import StreamDecoder
from pyggml_repkv.model.tokenizer import Tokenizer
from tests.tiny_models import tiny_tokenizer

N_VOCAB = 290
CHECKED = settings(max_examples=200, deadline=None, derandomize=True)

# Characters that the patterns tell apart, more often than in a random text.
SNIPPETS = (
    *(" ", "  ", "\t", "\n", "\r\n", "\r", "\x0b", "\x1c", "\x85", "\xa0", "\u2003", "\u2028", "\u3000"),
    *("'s", "'S", "'t", "'Re", "'ll", "'LL", "'ve", "'d", "'m", "'ſ", "'", "''", "’s"),
    *("a", "The", " the", "and", "é", "ß", "ſ", "İ", "你", "ば", "한", "й", "म", "ा", "\u0301", "ª"),
    *(
        "0",
        "12",
        "½",
        "²",
        "Ⅷ",
        "٣",
        "१",
        "!",
        "...",
        " ?",
        "\n!",
        "!\n",
        "$",
        "€",
        "😀",
        "👩\u200d👧",
        "\u200b",
    ),
    *("，", "。", "ア", "か", "か\u3099", "글"),
    *("{", '":', ",", "x1", "1.5", "<\u0338", "e\u0301", "\u1112\u1161\u11ab", "\u2126", "\u0958", "\u0323"),
    *("<|im_start|>", "<|im_end|>", "<|im_", "|>", "<|endoftext|>", "\ufffd", "\x00"),
)
# Starts and middles of characters, and bytes that are neither.
FRAGMENTS = (
    *(b"\xc3", b"\xe4\xbd", b"\xe0", b"\xe0\xa0", b"\xed", b"\xed\x9f", b"\xf0\x9f\x98", b"\x80", b"\xa0"),
    *(
        b"\xe0\x80",
        b"\xed\xa0",
        b"\xed\xbf",
        b"\xf0\x80",
        b"\xf4\x8f",
        b"\xf4\x90",
        b"\xc0",
        b"\xc1",
        b"\xf5",
    ),
)
# One name for each pattern.
PRE_TOKENIZERS = ("default", "llama-bpe", "qwen2", "smollm")
CHARACTERS = st.characters(exclude_categories=("Cs",))
TEXTS = st.one_of(
    st.text(CHARACTERS),
    st.lists(st.one_of(st.sampled_from(SNIPPETS), st.text(CHARACTERS, max_size=2)), max_size=20).map("".join),
)
ANY_TEXTS = st.text(st.characters())
IDS = st.lists(st.one_of(st.integers(0, N_VOCAB - 1), st.integers(-2, N_VOCAB + 50), st.integers(128, 255)))


@cache
def tokenizer(pre: str, *, normalizes: bool = False) -> Tokenizer:
    keys = {key: value for key, (value, _) in tiny_tokenizer(N_VOCAB).items()}
    tokenizer = Tokenizer.from_metadata(keys | {"tokenizer.ggml.pre": pre})
    tokenizer.normalizes = normalizes
    return tokenizer


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@pytest.mark.parametrize("parse_special", [False, True])
@CHECKED
@given(text=TEXTS)
def test_decoding_gives_the_text_back(pre: str, parse_special: bool, text: str) -> None:
    ids = tokenizer(pre).encode(text, parse_special=parse_special)
    assert tokenizer(pre).decode(ids) == text
    if not parse_special:
        assert tokenizer(pre).decode(ids, special=False) == text


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@CHECKED
@given(text=ANY_TEXTS, parse_special=st.booleans())
def test_any_text_can_be_encoded(pre: str, text: str, parse_special: bool) -> None:
    ids = tokenizer(pre).encode(text, parse_special=parse_special)
    assert all(0 <= i < N_VOCAB for i in ids)
    assert len(tokenizer(pre).decode(ids)) <= len(text)


@CHECKED
@given(text=TEXTS, size=st.integers(1, 6))
def test_normalizing_is_that_of_the_whole_text(text: str, size: int) -> None:
    text = "".join(c for c in text if unicodedata.category(c) != "Cn")  # not every library knows the newest ones
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "CHUNK", size)
        patch.setattr(tokenizer_module, "LONG_CHUNK", 3 * size)
        found = tokenizer("qwen2", normalizes=True).encode(text)
    assert found == tokenizer("qwen2").encode(unicodedata.normalize("NFC", text))


@CHECKED
@given(ids=IDS, special=st.booleans())
def test_streamed_text_is_the_decoded_text(ids: list[int], special: bool) -> None:
    stream = tokenizer("qwen2").stream(special=special)
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer("qwen2").decode(ids, special=special)


@CHECKED
@given(tokens=st.lists(st.one_of(st.binary(max_size=4), TEXTS.map(str.encode), st.sampled_from(FRAGMENTS))))
def test_a_stream_holds_back_what_may_yet_become_a_character_and_no_more(tokens: list[bytes]) -> None:
    stream = StreamDecoder(tokens.__getitem__)
    shown, read = "", b""
    for i, token in enumerate(tokens):
        shown += stream.push(i)
        read += token
        held = next(n for n in range(4) if read[: len(read) - n].decode("utf-8", "replace") == shown)
        assert held == 0 or may_become_a_character(read[-held:])
    assert shown + stream.flush() == read.decode("utf-8", "replace")


def may_become_a_character(start: bytes) -> bool:
    return any(is_utf8(start + bytes([byte]) + b"\x80" * n_more) for byte in range(0x80, 0xC0) for n_more in range(3))


def is_utf8(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@CHECKED
@given(text=TEXTS, size=st.integers(1, 6))
def test_chunks_pre_tokenize_to_what_the_whole_does(pre: str, text: str, size: int) -> None:
    parts = list(chunks(text, size))
    assert "".join(parts) == text
    assert [word for part in parts for word in words(pre, part)] == words(pre, text)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@CHECKED
@given(text=TEXTS)
def test_words_are_those_of_the_plain_patterns(pre: str, text: str) -> None:
    text = "".join(c for c in text if unicodedata.category(c) != "Cn")
    assert words(pre, text) == plain_words(pre, text)


def words(pre: str, text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in pre_tokenizer(pre).pre_tokenize_str(text)]


# llama.cpp's patterns, for text whose characters past ASCII are replaced by an ASCII character of their kind.
QWEN2 = (
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\nA-Za-z0-9]?[A-Za-z]+"
    r"|[0-9]| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
PUNCTUATION = r"[!-/:-@\[-_{-~]+"  # of ASCII all but the backtick, which is a symbol


def plain_words(pre: str, text: str) -> list[str]:
    kinds = "".join(map(kind, text))
    digits = "".join(
        c if c.isascii() else "*" for c in text
    )  # past ASCII, what the last of default's patterns passes over
    qwen2 = QWEN2.replace("|[0-9]|", "|[0-9]{1,3}|") if pre == "llama-bpe" else QWEN2
    steps = {
        "smollm": [(kinds, "[0-9]"), (kinds, GPT2)],
        "default": [(kinds, PUNCTUATION), (kinds, GPT2), (kinds, "[0-9]+"), (digits, "[0-9]{3}")],
    }
    spans = [(0, len(text))] if text else []
    for chars, pattern in steps.get(pre, [(kinds, qwen2)]):
        spans = [cut for span in spans for cut in cuts(chars, pattern, *span)]
    return [text[start:end] for start, end in spans]


def cuts(chars: str, pattern: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yields the matches and what lies between them, in chars[start:end]."""
    at = start
    for match in re.finditer(pattern, chars[start:end], re.ASCII):
        first, last = start + match.start(), start + match.end()
        if at < first:
            yield at, first
        yield first, last
        at = last
    if at < end:
        yield at, end


def kind(char: str) -> str:
    """Returns an ASCII character of the same kind as `char` that no contraction has."""
    if char.isascii():
        return char
    if char.isspace():
        return "\x0b"
    return {"L": "z", "N": "0", "P": "*"}.get(unicodedata.category(char)[0], "`")
