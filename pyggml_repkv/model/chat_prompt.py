"""A conversation as token ids: markers that the template writes are control tokens, what messages say is text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from pyggml_repkv.errors import InputError
from pyggml_repkv.model.chat_template import ChatTemplate, plain_messages
from pyggml_repkv.model.text import unmask, valid_text
from pyggml_repkv.model.tokenizer import Tokenizer

MAX_DEPTH = 100
MAX_SPELLING = 256  # characters of a control token that are looked for at an end of a text

# Masks are lone surrogates: characters that no valid text has.
_FIRST_MASK = 0xDC00


class ChatPrompt(NamedTuple):
    """What the template makes of messages, and its token ids."""

    text: str
    tokens: list[int]


def chat_prompt(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], /, **options: Any
) -> ChatPrompt:
    """The prompt of a conversation; options: those of `ChatTemplate.render`.

    A control token that a message or an option spells out, alone or together with its neighbours, is text and not
    that token. (A user-defined token, as <tool_call> is in Qwen2.5, is part of the language: it is always itself.)
    Raises as `ChatTemplate.render` does, and InputError where a template treats such a spelling as its own.
    """
    contents = {name: _mapped(value, valid_text) for name, value in options.items()}
    contents["messages"] = _mapped(plain_messages(messages), valid_text)
    # All renderings show the same time.
    now = datetime.now()
    text = template.render(**contents, strftime_now=now.strftime)

    def masked_with(
        texts: Sequence[str], *, edges: bool = False, kept: Sequence[str] = ()
    ) -> tuple[str, _Masker, bool]:
        """The prompt, what was masked, and whether the template did with masked messages what it did with others."""
        masker = _Masker(texts, text, edges=edges, kept=kept)
        try:
            masked = template.render(**_mapped(contents, masker.mask), strftime_now=now.strftime)
        except InputError:  # it cannot encode masks
            return "", masker, False
        return masked, masker, unmask(masked, masker.masks) == text

    masked, masker, same = masked_with(tokenizer.control_texts, edges=True)
    if not same:
        masked, masker, same = masked_with(tokenizer.control_texts)
    if not same:
        # It looks for a spelling in messages, as for the </think> after which it takes an answer to begin.
        sought = [spelled for spelled in masker.found if not masked_with([spelled])[2]]
        n_written = {spelled: masked.count(spelled) for spelled in sought}
        others = [spelled for spelled in tokenizer.control_texts if spelled not in sought]
        masked, masker, same = masked_with(others, edges=True, kept=sought)
        if not same:
            masked, masker, same = masked_with(others)
        left = [spelled for spelled in sought if masked.count(spelled) > n_written[spelled]]
        if left or not same:
            what = repr(left[0]) if left else "special tokens"
            raise InputError(
                f"a message spells out {what:.80}, which the chat template takes for its own: leave it out"
            )
    tokens = tokenizer.encode(masked, parse_special=True, masks=masker.masks)
    if tokenizer.add_bos and tokens[:2] == [tokenizer.bos_id] * 2:
        tokens = tokens[1:]  # The template writes a start token too.
    return ChatPrompt(text, tokens)


class _Masker:
    """Masks a character of whatever in a text could be, or become, one of `texts`."""

    def __init__(self, texts: Sequence[str], whole: str, *, edges: bool, kept: Sequence[str]) -> None:
        """whole: all that messages hold, as the template renders it. edges: wherever `texts` may begin or end, except
        in those `kept`, so that a template that changes what messages say (by `lower`, `replace`) makes none either.
        """
        self._kept = re.compile("(" + "|".join(map(re.escape, kept)) + ")") if kept else None
        self._edges = {char for text in texts for char in (text[0], text[-1]) if not char.isalnum()} if edges else set()
        self.found: dict[str, None] = {}  # of `texts`, those spelled out
        self.masks: dict[str, str] = {}  # what each mask stands for
        self._mask_of: dict[str, str] = {}
        self._next_mask = _FIRST_MASK
        self._whole = whole
        self._texts = texts

    def mask(self, value: str) -> str:
        for text in self._texts:
            if text in value:
                self.found[text] = None
                value = value.replace(text, text[:-1] + self._mask(text[-1]))
        # A template may trim it, and what comes before or after may complete a spelling.
        body = value.strip()
        if any(_overlaps(body, text) for text in self._texts):
            last = len(value.rstrip()) - 1
            value = value[:last] + self._mask(value[last]) + value[last + 1 :]
        if any(_overlaps(text, body) for text in self._texts):
            first = len(value) - len(value.lstrip())
            value = value[:first] + self._mask(value[first]) + value[first + 1 :]
        parts = [value] if self._kept is None else self._kept.split(value)
        parts[::2] = map(self._mask_edges, parts[::2])
        return "".join(parts)

    def _mask_edges(self, value: str) -> str:
        for char in self._edges.intersection(value):
            value = value.replace(char, self._mask(char))
        return value

    def _mask(self, char: str) -> str:
        if char in self.masks:
            return char
        if char not in self._mask_of:
            # JSON and Python's own notation may write it so.
            while (escaped := f"\\u{self._next_mask:04x}") in self._whole:
                self._next_mask += 1
            self._mask_of[char] = chr(self._next_mask)
            self.masks |= {self._mask_of[char]: char, escaped: char}
            self._next_mask += 1
        return self._mask_of[char]


def _overlaps(left: str, right: str) -> bool:
    """Whether `left` ends as `right` begins."""
    if not left or not right or left[-1] not in right or right[0] not in left:
        return False
    return any(left.endswith(right[:n]) for n in range(1, min(len(left), len(right), MAX_SPELLING) + 1))


def _mapped(value: Any, change: Callable[[str], str], depth: int = 0) -> Any:
    """`value` with every string in it changed, also keys. Raises InputError for what JSON has not."""
    if depth > MAX_DEPTH:
        raise InputError(f"messages: they hold lists or dicts nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(item, change, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, change, depth + 1) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    raise InputError(
        f"messages and their options hold a {type(value).__name__}; texts, numbers, lists and dicts may be there"
    )
