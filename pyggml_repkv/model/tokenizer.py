"""Text to token ids and back, with the vocabulary, merges and special tokens of a GGUF file.

Special tokens and the end-of-generation set follow llama.cpp (src/llama-vocab.cpp).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import TokenType
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC

from pyggml_repkv.errors import InputError, ModelFileError
from pyggml_repkv.model import pretokenizers
from pyggml_repkv.model.pretokenizers import LLAMA3, chunks, pre_tokenizer
from pyggml_repkv.model.stream import StreamDecoder
from pyggml_repkv.model.text import apart, unmask, valid_text

# Characters. One call costs 170 bytes for each of them, and cannot be interrupted.
CHUNK = 16384
# A word of more characters is encoded in a thread, which Ctrl-C need not wait for: some milliseconds.
LONG_CHUNK = 4 * CHUNK

# Tokens that end generation, and are control tokens, whatever their type says.
EOG_TEXTS = frozenset(
    (
        *("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_text|>"),
        *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>", "<turn|>", "<end_of_turn>"),
        *("</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "[e~[", "<end_of_utterance>"),
        "<｜end▁of▁sentence｜>",
    )
)


class _FimRole(NamedTuple):
    """A fill-in-the-middle token: `texts` stand in for missing metadata, and make it a control token."""

    roles: tuple[str, ...]  # in names of metadata keys
    texts: tuple[str, ...]
    ends: bool  # generation ends there


_PREFIXES = ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>")
_SUFFIXES = ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>")
_MIDDLES = ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>")
_FIM_ROLES = (
    _FimRole(("fim_pre", "prefix"), (*_PREFIXES, "<|code_prefix|>", "<|prefix|>"), ends=False),
    _FimRole(("fim_suf", "suffix"), (*_SUFFIXES, "<|code_suffix|>", "<|suffix|>"), ends=False),
    _FimRole(("fim_mid", "middle"), (*_MIDDLES, "<|code_middle|>", "<|middle|>"), ends=False),
    _FimRole(("fim_pad",), ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"), ends=True),
    _FimRole(("fim_rep",), ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"), ends=True),
    _FimRole(("fim_sep",), ("<|file_sep|>",), ends=True),
)

_NFC = NFC()

_CONTROL = (TokenType.CONTROL, TokenType.UNKNOWN)
_SPELLED_OUT = (*_CONTROL, TokenType.USER_DEFINED)  # their text is their bytes


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class Tokenizer:
    """Byte-level BPE over the vocabulary of a GGUF file.

    n_vocab: number of tokens, padding included. bos_id, eos_id: None where the file names none.
    eog_ids: tokens that end generation. add_bos: whether a text starts with bos_id. normalizes: whether text is brought
    to NFC first, as the model's own tokenizer does (llama.cpp does not).
    """

    def __init__(
        self,
        tokens: Sequence[str],
        merges: Sequence[str],
        pre: str,
        *,
        kinds: Mapping[int, int] | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
        eog_ids: frozenset[int] = frozenset(),
        add_bos: bool = False,
    ) -> None:
        """`kinds` holds the type (gguf's TokenType) of every token that is not a normal one.

        Raises ModelFileError for a vocabulary or merges that contradict themselves.
        """
        self.n_vocab = len(tokens)
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.eog_ids = eog_ids
        self.add_bos = add_bos and bos_id is not None
        self.normalizes = pre in pretokenizers.NFC
        self._tokens = tokens
        self._kinds = dict(kinds or {})
        words = pre_tokenizer(pre)
        self._bpe, self._dropped = _byte_pair_encoder(tokens, merges, ignore_merges=pre in LLAMA3)
        self._bpe.pre_tokenizer = words
        # Longest first, by bytes: the order in which llama.cpp looks for them.
        by_length = sorted(self._kinds, key=lambda i: len(tokens[i].encode()), reverse=True)
        self._specials = [i for i in by_length if self._kinds[i] in _SPELLED_OUT]
        self.control_texts = tuple(tokens[i] for i in by_length if self._kinds[i] in _CONTROL and tokens[i])
        self._user_defined = [i for i in by_length if self._kinds[i] == TokenType.USER_DEFINED]

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer that the `tokenizer.ggml.*` keys describe. Raises ModelFileError."""
        model = metadata.get("tokenizer.ggml.model")
        if model != "gpt2":
            raise ModelFileError(f"tokenizer.ggml.model is {model!r:.80}; only 'gpt2' is supported")
        tokens = _strings(metadata, "tokenizer.ggml.tokens")
        if "" in tokens:
            tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        kinds = _token_kinds(metadata, len(tokens))
        eog_ids = _mark_special_tokens(metadata, tokens, kinds)
        return cls(
            tokens,
            _strings(metadata, "tokenizer.ggml.merges"),
            str(metadata.get("tokenizer.ggml.pre", "missing")),
            kinds=kinds,
            bos_id=_token_id(metadata, "bos", len(tokens)),
            eos_id=_token_id(metadata, "eos", len(tokens)),
            eog_ids=eog_ids,
            add_bos=adds_bos(metadata),
        )

    def encode(
        self,
        text: str,
        *,
        add_special: bool = True,
        parse_special: bool = False,
        masks: Mapping[str, str] = MappingProxyType({}),
    ) -> list[int]:
        """Token ids of `text`. Lone surrogates count as U+FFFD; bytes that no token covers are dropped.

        add_special: begin with bos_id if add_bos. parse_special: control tokens spelled out in the text
        become those tokens; user-defined tokens always do. masks: characters that stand for others, by which a control
        token is not found. Raises InputError if `text` is no string.
        """
        if not isinstance(text, str):
            raise InputError(f"text must be a string, got {text!r:.80}")
        ids = [self.bos_id] if add_special and self.add_bos and self.bos_id is not None else []
        for part in self._split_specials(text if masks else valid_text(text), parse_special, masks):
            if isinstance(part, int):
                ids.append(part)
                continue
            for chunk in chunks(part, CHUNK):
                ids += self._encode_words(chunk) if len(chunk) <= LONG_CHUNK else apart(self._encode_words, chunk)
        if self._dropped is not None and self._dropped in ids:
            return [i for i in ids if i != self._dropped]
        return ids

    def decode(self, ids: Iterable[int], *, special: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary nothing.

        special: control tokens are spelled out rather than left out.
        """
        return b"".join(self._piece(i, special) for i in ids).decode("utf-8", "replace")

    def stream(self, *, special: bool = True) -> StreamDecoder:
        """A decoder of one text, token by token, that agrees with `decode`."""
        return StreamDecoder(lambda i: self._piece(i, special))

    def token_bytes(self, token: int) -> bytes:
        """Bytes of one token; none for an unused one. Raises InputError for an id outside the vocabulary."""
        if not 0 <= token < self.n_vocab:
            raise InputError(f"token id {token} is not in the vocabulary; ids go from 0 to {self.n_vocab - 1}")
        kind = self._kinds.get(token, TokenType.NORMAL)
        text = self._tokens[token]
        if kind == TokenType.NORMAL:
            try:
                return bytes(map(_BYTE_OF.__getitem__, text))
            except KeyError:  # not byte-level text
                return text.encode()
        if kind == TokenType.BYTE:
            return _byte_token(text)
        return text.encode() if kind in _SPELLED_OUT else b""

    def is_special(self, token: int) -> bool:
        """Whether `token` is a control token: part of the protocol, not of the text."""
        return self._kinds.get(token) in _CONTROL

    def _piece(self, token: int, special: bool) -> bytes:
        if not 0 <= token < self.n_vocab or (not special and self.is_special(token)):
            return b""
        return self.token_bytes(token)

    def _encode_words(self, text: str) -> list[int]:
        if self.normalizes and not text.isascii():
            text = _NFC.normalize_str(text)
        return self._bpe.encode(text, add_special_tokens=False).ids

    def _split_specials(self, text: str, parse_special: bool, masks: Mapping[str, str]) -> list[str | int]:
        """`text`, unmasked, cut at every special token, the longest first."""
        parts: list[str | int] = [text] if text else []
        if parse_special:
            parts = self._cut(parts, text, self._specials)
        if masks:
            text = unmask(text, masks)
            parts = [part if isinstance(part, int) else valid_text(unmask(part, masks)) for part in parts]
        return self._cut(parts, text, self._user_defined)

    def _cut(self, parts: list[str | int], text: str, specials: Iterable[int]) -> list[str | int]:
        """`parts` of `text` cut at every occurrence of one of `specials`, earlier ones in the list first."""
        for special in specials:
            spelled = self._tokens[special]
            if spelled in text:
                parts = [cut for part in parts for cut in _cut(part, spelled, special)]
        return parts


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether a text starts with the BOS token."""
    return bool(metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.pre") in LLAMA3))


def _cut(part: str | int, spelled: str, special: int) -> list[str | int]:
    if isinstance(part, int):
        return [part]
    cuts: list[str | int] = []
    for piece in part.split(spelled):
        cuts += [special, piece] if piece else [special]
    return cuts[1:]


def _byte_token(text: str) -> bytes:
    """The byte that a token like <0x0A> stands for."""
    try:
        return bytes([int(text.removeprefix("<0x").removesuffix(">"), 16)])
    except ValueError:
        return text.encode()


def _byte_pair_encoder(
    tokens: Sequence[str], merges: Sequence[str], *, ignore_merges: bool
) -> tuple[HFTokenizer, int | None]:
    """The encoder, and the id that it gives to bytes without a token (None if every byte has one).

    ignore_merges: a word that is a token is that token, though no merges lead to it.
    """
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(i for i, token in enumerate(tokens) if vocab[token] != i)
        raise ModelFileError(
            f"tokenizer.ggml.tokens has {tokens[twice]!r:.80} as {twice} and as {vocab[tokens[twice]]}; "
            "every token must be there once"
        )
    pairs: list[tuple[str, str]] = []
    for merge in dict.fromkeys(merges):  # of a merge listed twice the first one counts
        left, _, right = merge.partition(" ")
        # Checked here because the encoder panics where a merge makes no token.
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ModelFileError(
                f"tokenizer.ggml.merges has {merge!r:.80}; a merge is two tokens with a space between that make a third"
            )
        pairs.append((left, right))
    try:
        if _BYTE_OF.keys() <= vocab.keys():
            return HFTokenizer(BPE(vocab, pairs, ignore_merges=ignore_merges)), None
        # A stand-in for missing bytes keeps their neighbours from merging as if nothing were between.
        stand_in = " "
        while stand_in in vocab:
            stand_in += " "
        vocab[stand_in] = len(tokens)
        return HFTokenizer(BPE(vocab, pairs, unk_token=stand_in, ignore_merges=ignore_merges)), len(tokens)
    except TypeError:
        raise ModelFileError("tokenizer.ggml.tokens has text that is not UTF-8; convert the file again") from None


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or {*map(type, values)} != {str}:
        raise ModelFileError(f"{key} is missing, empty or no array of strings; a model file needs it")
    return values


def _token_kinds(metadata: Mapping[str, Any], n_tokens: int) -> dict[int, int]:
    """The types of the tokens that are not normal ones."""
    key = "tokenizer.ggml.token_type"
    if key not in metadata:
        return {}
    types = np.asarray(metadata[key])
    if types.dtype.kind not in "iu" or types.ndim != 1 or len(types) < n_tokens:
        raise ModelFileError(f"{key} is not an array of {n_tokens} integers, one for each token")
    return {int(i): int(types[i]) for i in np.flatnonzero(types[:n_tokens] != TokenType.NORMAL)}


def _token_id(metadata: Mapping[str, Any], role: str, n_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    token = metadata.get(key)
    if token is not None and (not isinstance(token, int) or not 0 <= token < n_tokens):
        raise ModelFileError(f"{key} is {token!r:.80}; it must be a token id, from 0 to {n_tokens - 1}")
    return token


def _mark_special_tokens(metadata: Mapping[str, Any], tokens: Sequence[str], kinds: dict[int, int]) -> frozenset[int]:
    """The end-of-generation ids; tokens known by their text to be control tokens are marked so in `kinds`."""
    n_tokens = len(tokens)
    known = EOG_TEXTS.union(*(role.texts for role in _FIM_ROLES))
    found = {token: i for i, token in enumerate(tokens) if token in known}
    control = {found[text] for text in EOG_TEXTS if text in found}

    def named(*roles: str) -> list[int]:
        return [i for role in roles if (i := _token_id(metadata, role, n_tokens)) is not None]

    eog = control.union(named("eos", "eot", "eom"))
    for roles, texts, ends in _FIM_ROLES:
        by_name = named(*roles)
        by_text = [] if by_name else [found[text] for text in texts if text in found][:1]
        control.update(by_text)
        if ends:
            eog.update(by_name or by_text)
    kinds.update(dict.fromkeys(control, int(TokenType.CONTROL)))
    return frozenset(eog)
