"""Text to token ids and back, with the vocabulary, merges and special tokens of a GGUF file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from gguf.constants import TokenType
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC

from pyggml_repkv.arguments import check_int, check_type
from pyggml_repkv.errors import InputError, ModelFileError
from pyggml_repkv.model import pretokenizers
from pyggml_repkv.model.pretokenizers import LLAMA3, chunks, pre_tokenizer
from pyggml_repkv.model.stream import StreamDecoder
from pyggml_repkv.model.text import apart, unmask, valid_text
from pyggml_repkv.model.tokenizer_keys import TokenizerKeys, mark_special_tokens

# Characters. One call costs 170 bytes for each of them, and cannot be interrupted.
CHUNK = 16384
# A word of more characters is encoded in a thread, which Ctrl-C need not wait for: some milliseconds.
LONG_CHUNK = 4 * CHUNK

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
        merges: Sequence[str | tuple[str, str]],
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
        """The tokenizer that the `tokenizer.ggml.*` keys describe; warns as TokenizerKeys.read does. Raises
        ModelFileError.
        """
        keys = TokenizerKeys.read(metadata)
        kinds = dict(keys.kinds)
        eog_ids = mark_special_tokens(keys.ids, keys.tokens, kinds)
        return cls(
            keys.tokens,
            keys.merges,
            keys.pre,
            kinds=kinds,
            bos_id=keys.ids.get("bos"),
            eos_id=keys.ids.get("eos"),
            eog_ids=eog_ids,
            add_bos=keys.add_bos,
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

        special: control tokens are spelled out rather than left out. Raises InputError where `ids` holds anything but
        integers.
        """
        check_type("ids", ids, Iterable, "token ids")
        return b"".join(self._piece(i, special) for i in ids).decode("utf-8", "replace")

    def stream(self, *, special: bool = True) -> StreamDecoder:
        """A decoder of one text, token by token, that agrees with `decode`."""
        return StreamDecoder(lambda i: self._piece(i, special))

    def token_bytes(self, token: int) -> bytes:
        """Bytes of one token; none for an unused one. Raises InputError for an id outside the vocabulary."""
        if not 0 <= check_int("token", token) < self.n_vocab:
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
        if not 0 <= check_int("token", token) < self.n_vocab or (not special and self.is_special(token)):
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
    tokens: Sequence[str], merges: Sequence[str | tuple[str, str]], *, ignore_merges: bool
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
        left, _, right = merge.partition(" ") if isinstance(merge, str) else (merge[0], "", merge[1])
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
