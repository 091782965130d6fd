"""How text is cut into words before byte-pair merging, by the name the GGUF gives.

The names and what they match are llama.cpp's (src/llama-vocab.cpp and src/unicode.cpp).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split

from pyggml_repkv.errors import ModelFileError


# Possessive wherever giving characters back could not help: Oniguruma gives up, by a panic, on a match that
# backtracks ten million times, which one long run of blanks is enough for.
def _words(digits: str) -> str:
    return (
        r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"  # not (?i:...), which would also match the long s
        r"|[^\r\n\p{L}\p{N}]?+\p{L}++"
        rf"|{digits}"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|(?:[^\S\r\n]*+[\r\n]++)++"
        r"|\s+(?!\S)"
        r"|\s"
    )


_QWEN2 = _words(r"\p{N}")


def _gpt2_words(digits: str) -> str:
    return rf"'(?:[stmd]|re|ve|ll)| ?\p{{L}}++{digits}| ?[^\s\p{{L}}\p{{N}}]++|\s+(?!\S)|\s"


_DIGIT_BY_DIGIT = (r"\p{N}", _gpt2_words(""))

# Names of one pre-tokenizer. With it a word that is a token stays one, whatever the merges say, and a text starts with
# BOS unless the file says otherwise.
LLAMA3 = frozenset(
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano")
)
# Others that cut as these do, and have no more to them.
_AS_QWEN2 = ("deepseek-r1-qwen", "megrez", "kormo", "f2llmv2", "stablelm2", "hunyuan", "solar-open", "grok-2")
_AS_SMOLLM = ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2")

# Each pattern cuts what the one before left; what it does not match stays whole.
PATTERNS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("qwen2", *_AS_QWEN2), (_QWEN2,)),
    **dict.fromkeys(("smollm", *_AS_SMOLLM), _DIGIT_BY_DIGIT),
    # Of a model that nothing is known about.
    "default": (r"[\p{P}$+<=>^~|]++", _gpt2_words(r"| ?\p{N}++"), r"\p{N}++", "[0-9][0-9][0-9]"),
    **dict.fromkeys(sorted(LLAMA3), (_words(r"\p{N}{1,3}"),)),
}

# Names whose models were trained on NFC text: their own tokenizers normalize, and a GGUF file has no key for it.
NFC = frozenset(("qwen2", "deepseek-r1-qwen"))

# No word goes on past these places and no lookahead sees across them, with any of the patterns above; nor does NFC
# join what stands on their two sides.
_WORD_ENDS = re.compile(
    r"(?<=\S) |(?<=\S\n)(?=\S)"
    # No word holds a letter or digit before anything else: ASCII, kana, ideographs and Hangul before punctuation.
    r"|(?<=[0-9A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3])"
    r"(?=[\x00-/:-@\[-`{-\x7f\u3001\u3002\uff01-\uff0f\uff1a-\uff20])"
    r"|(?<=[!-/:-~])(?=[0-9])"  # nor a digit after anything else
)


def pre_name(metadata: Mapping[str, Any]) -> str:
    """The name in `tokenizer.ggml.pre`; where that is missing, empty or "default", the one that a model of this
    architecture and vocabulary was trained with, or "default" if that is unknown.
    """
    name = metadata.get("tokenizer.ggml.pre", "")
    if not isinstance(name, str) or name not in ("", "default"):
        return str(name)
    arch, tokens = metadata.get("general.architecture"), metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return "default"
    n_tokens = len(tokens)
    if arch == "llama" and ("<|begin_of_text|>" in tokens or 128_000 <= n_tokens < 129_000):
        return "llama-bpe"
    # Padding apart, all vocabularies of Qwen 2, 2.5 and 3 have 151,6xx tokens. Models of other families have
    # <|im_start|> too.
    if 151_000 <= n_tokens < 153_000 or (arch in ("qwen2", "qwen3") and "<|im_start|>" in tokens):
        return "qwen2"
    return "default"


def check_known(name: str) -> None:
    """Raises ModelFileError for the name of a pre-tokenizer that is unknown here."""
    if name not in PATTERNS:
        known = ", ".join(sorted(PATTERNS))
        raise ModelFileError(f"tokenizer.ggml.pre is {name!r:.80}; the pre-tokenizers known here are {known}")


def pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer called `name` in `tokenizer.ggml.pre`. Raises ModelFileError for an unknown one."""
    check_known(name)
    splits = [Split(Regex(pattern), "isolated") for pattern in PATTERNS[name]]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


def chunks(text: str, size: int) -> Iterator[str]:
    """Parts of `text` that pre-tokenize separately to what the whole does.

    Each is `size` characters or a little more; longer where nothing but a cut inside a word would do.
    """
    start = 0
    while len(text) - start > size:
        end = _WORD_ENDS.search(text, start + size)
        if end is None:
            break
        yield text[start : end.start()]
        start = end.start()
    yield text[start:]
