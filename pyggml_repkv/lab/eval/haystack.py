"""A haystack of so many tokens: a filler, or other pairs of a JSON object, with needles at their depths."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence

from pyggml_repkv.errors import InputError

Encode = Callable[[str], list[int]]

# (depth, text): depth 0 is the beginning of the haystack, 1 its end.
Needle = tuple[float, str]

FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

# A needle moves back by less than so many tokens to the end of a sentence.
NEAR = 100

# With so many repetitions of the filler, a needle goes between two of them.
MANY = 20


def fill_text(
    encode: Encode, head: str, needles: Iterable[Needle], n_tokens: int, filler: Sequence[int],
    ends: Container[int] = (),
) -> list[int]:  # fmt: skip
    """Returns exactly n_tokens token ids: the head, then the filler, repeated as often as necessary, with the needles.

    ends: tokens that end a sentence. A needle goes after the nearest of them before its depth, if one is less than NEAR
    tokens away. Raises InputError if head and needles do not fit.
    """
    haystack = encode(head) if head else []
    encoded = [(depth, encode(text)) for depth, text in _by_depth(needles)]
    n_filler = _room(n_tokens, haystack, encoded)
    filler, n_once = (list(filler) * (n_filler // len(filler) + 1))[:n_filler], len(filler)
    begin = 0
    for depth, needle in encoded:
        at = int(n_filler * depth)
        # Between two sentences where the filler repeats a few.
        at -= at % n_once if MANY * n_once < n_filler else 0
        at = next((i for i in range(at, max(begin, at - NEAR), -1) if filler[i - 1] in ends), at)
        haystack += [*filler[begin:at], *needle]
        begin = at
    return [*haystack, *filler[begin:]]


def fill_json(
    encode: Encode, head: str, needles: Iterable[Needle], n_tokens: int, others: Iterable[str]
) -> list[int]:  # fmt: skip
    """Returns at most n_tokens token ids: the head, then the needles among as many whole other pairs as fit.

    Raises InputError if head and needles do not fit.
    """
    haystack = encode(head)
    encoded = [(depth, encode(text)) for depth, text in _by_depth(needles)]
    room = _room(n_tokens, haystack, encoded)
    parts: list[list[int]] = []
    for other in others:
        part = encode(other)
        if len(part) > room:
            break
        parts.append(part)
        room -= len(part)
    begin = 0
    for depth, needle in encoded:
        at = int(len(parts) * depth)
        haystack += [*(token for part in parts[begin:at] for token in part), *needle]
        begin = at
    return [*haystack, *(token for part in parts[begin:] for token in part)]


def _by_depth(needles: Iterable[Needle]) -> list[Needle]:
    return sorted(needles, key=lambda needle: needle[0])


def _room(n_tokens: int, head: Sequence[int], needles: Iterable[tuple[float, Sequence[int]]]) -> int:
    n_used = len(head) + sum(len(needle) for _, needle in needles)
    if n_used > n_tokens:
        raise InputError(
            f"--lengths is too short: what is hidden has {n_used} tokens, and {max(n_tokens, 0)} are left before the "
            "question; give more, or fewer --depths"
        )
    return n_tokens - n_used
