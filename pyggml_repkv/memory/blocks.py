"""How tokens that leave the local window are cut into blocks: plain ints."""

from __future__ import annotations

import re

from pyggml_repkv.errors import InputError

MIN_BLOCK, MAX_BLOCK = 16, 4096


class FixedBlocks:
    """Blocks of `size` tokens one after another, from the end of the sinks on.

    `bounds[b]` is the first token of block b, `bounds[b + 1]` the first one after it. What does not fill a block yet is
    the remainder.
    """

    def __init__(self, n_sink: int, size: int) -> None:
        self.size = size
        self.bounds = [n_sink]

    @property
    def n_blocks(self) -> int:
        return len(self.bounds) - 1

    @property
    def sealed_end(self) -> int:
        """First token that no block holds."""
        return self.bounds[-1]

    def seal(self, end: int) -> list[tuple[int, int]]:
        """Makes blocks of the tokens before `end` -> the new ones' [first, end); the same whatever the steps were."""
        new = []
        while self.sealed_end + self.size <= end:
            new.append((self.sealed_end, self.sealed_end + self.size))
            self.bounds.append(self.sealed_end + self.size)
        return new


def parse_block(text: str) -> int:
    """`fixed:128` -> 128. Raises InputError."""
    match = re.fullmatch(r"fixed:(\d{1,9})", text)
    if match is None or not MIN_BLOCK <= int(match[1]) <= MAX_BLOCK:
        raise InputError(f"--block is {text!r}; it must be fixed:N with N from {MIN_BLOCK} to {MAX_BLOCK}")
    return int(match[1])
