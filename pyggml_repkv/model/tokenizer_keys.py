"""What a GGUF file says of its tokenizer, each key checked.

Special tokens and the end-of-generation set follow llama.cpp (src/llama-vocab.cpp).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import TokenType

from pyggml_repkv.errors import ModelFileError
from pyggml_repkv.model.gguf_header import printable
from pyggml_repkv.model.pretokenizers import LLAMA3, check_known, pre_name

log = logging.getLogger(__name__)

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

# Of the ids in a file's metadata, those that this program asks for.
_ROLES = ("bos", "eos", "eot", "eom", *(name for role in _FIM_ROLES for name in role.roles))


@dataclass(frozen=True, slots=True)
class TokenizerKeys:
    """The `tokenizer.ggml.*` keys of a file. merges: "left right", or pairs; kinds: types of the tokens that are not
    normal ones; ids: of the special tokens that the file names, by role.
    """

    tokens: list[str]
    merges: list[str | tuple[str, str]]
    pre: str
    kinds: dict[int, int]
    ids: dict[str, int]
    add_bos: bool

    @classmethod
    def read(cls, metadata: Mapping[str, Any]) -> TokenizerKeys:
        """Checks each key, and warns where one is made up for. Whether merges contradict the tokens is left to
        `Tokenizer`, which takes far longer. Raises ModelFileError.
        """
        model = metadata.get("tokenizer.ggml.model")
        if not isinstance(model, str) or model != "gpt2":
            raise ModelFileError(f"tokenizer.ggml.model is {printable(repr(model))}; only 'gpt2' is supported")
        tokens = _strings(metadata, "tokenizer.ggml.tokens")
        if "" in tokens:
            tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        _check_scores(metadata, len(tokens))
        pre, given = pre_name(metadata), metadata.get("tokenizer.ggml.pre")
        check_known(pre)
        keys = cls(
            tokens, _merges(metadata), pre, _token_kinds(metadata, len(tokens)),
            special_ids(metadata, len(tokens)), _adds_bos(metadata),
        )  # fmt: skip
        if given in (None, "", "default"):
            named = "is missing" if given is None else f"is {given!r}"
            guess = f"architecture and vocabulary are those of {pre}, which is used"
            if pre == "default":
                guess = "words are cut by a general rule, perhaps not the one that the model was trained with"
            log.warning("tokenizer.ggml.pre %s: %s", named, guess)
        wrong = [key for role in _ROLES if role not in keys.ids and (key := _id_key(role)) in metadata]
        if wrong:
            named = ", ".join(f"{key} is {printable(repr(metadata[key]), 40)}" for key in wrong)
            log.warning("%s: no token of a vocabulary of %d, treated as none", named, len(tokens))
        if metadata.get("tokenizer.ggml.add_eos_token") is True:
            log.warning("tokenizer.ggml.add_eos_token is not honoured: a prompt is to be continued")
        return keys


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether a text starts with the BOS token. Raises ModelFileError."""
    key = "tokenizer.ggml.add_bos_token"
    adds = metadata.get(key, pre_name(metadata) in LLAMA3)
    if not isinstance(adds, bool | int):
        raise ModelFileError(f"{key} is {printable(repr(adds))}; true or false is needed")
    return bool(adds)


def special_ids(metadata: Mapping[str, Any], n_tokens: int) -> dict[str, int]:
    """The ids that the file names, by role, less what is no id: converters write -1 for a token that there is not."""
    named = {role: metadata.get(_id_key(role)) for role in _ROLES}
    return {role: token for role, token in named.items() if type(token) is int and 0 <= token < n_tokens}


def _id_key(role: str) -> str:
    return f"tokenizer.ggml.{role}_token_id"


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or {*map(type, values)} != {str}:
        raise ModelFileError(f"{key} is missing, empty or no array of strings; a model file needs it")
    return values


def _merges(metadata: Mapping[str, Any]) -> list[str | tuple[str, str]]:
    key = "tokenizer.ggml.merges"
    values = metadata.get(key)
    if not isinstance(values, list) or not values or not isinstance(values[0], list):
        return [*_strings(metadata, key)]
    if any(not isinstance(pair, list) or len(pair) != 2 for pair in values):
        raise ModelFileError(f"{key} is an array of arrays, and not all of them are pairs of tokens")
    return [(left, right) for left, right in values]


def _check_scores(metadata: Mapping[str, Any], n_tokens: int) -> None:
    """Nobody reads them, but a file where they do not fit the tokens is damaged."""
    key = "tokenizer.ggml.scores"
    scores = metadata.get(key)
    if scores is not None and (not isinstance(scores, np.ndarray) or len(scores) < n_tokens):
        raise ModelFileError(f"{key} is not an array of {n_tokens} numbers, one for each token")


def _token_kinds(metadata: Mapping[str, Any], n_tokens: int) -> dict[int, int]:
    """The types of the tokens that are not normal ones."""
    key = "tokenizer.ggml.token_type"
    if key not in metadata:
        return {}
    try:
        types = np.asarray(metadata[key])
    except ValueError:  # arrays of several lengths
        types = np.empty(0)
    if types.dtype.kind not in "iu" or types.ndim != 1 or len(types) < n_tokens:
        raise ModelFileError(f"{key} is not an array of {n_tokens} integers, one for each token")
    return {int(i): int(types[i]) for i in np.flatnonzero(types[:n_tokens] != TokenType.NORMAL)}


def mark_special_tokens(ids: Mapping[str, int], tokens: Sequence[str], kinds: dict[int, int]) -> frozenset[int]:
    """The end-of-generation ids; tokens known by their text to be control tokens are marked so in `kinds`."""
    known = EOG_TEXTS.union(*(role.texts for role in _FIM_ROLES))
    found = {token: i for i, token in enumerate(tokens) if token in known}
    control = {found[text] for text in EOG_TEXTS if text in found}

    def named(*roles: str) -> list[int]:
        return [ids[role] for role in roles if role in ids]

    eog = control.union(named("eos", "eot", "eom"))
    for roles, texts, ends in _FIM_ROLES:
        by_name = named(*roles)
        by_text = [] if by_name else [found[text] for text in texts if text in found][:1]
        control.update(by_text)
        if ends:
            eog.update(by_name or by_text)
    kinds.update(dict.fromkeys(control, int(TokenType.CONTROL)))
    return frozenset(eog)
