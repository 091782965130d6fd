"""What a session that is kept in a directory needs of a memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.memory.store.block_file import BlockFile, BlockHeader

BlockRow = tuple[int, int, int, int]
"""(block, first position, n_tokens, offset in the file)."""


@dataclass(frozen=True, slots=True)
class State:
    """After n_past tokens. scores: float32 [n_layer, n_past - sealed_end, K]; far_at: n_past when older tokens began to
    be seen from one distance, 0 from the start, -1 not yet; warm: int32 [n_layer, (1 or K) * n], units worth reading
    first, -1 after the last; kept: int32 [n_layer, 1 or K, 1 + n], what the last token selected if the next one holds
    on to it, else empty.
    """

    n_past: int
    sealed_end: int
    n_blocks: int
    far_at: int
    scores: NDArray[np.float32]
    warm: NDArray[np.int32]
    kept: NDArray[np.int32]


class Checkpoints(Protocol):
    """Of one memory, between two steps. n_sink, n_batch: of its settings; n_layer: of its model; entry_bytes: of a
    token's rows, of all layers.
    """

    n_sink: int
    n_batch: int
    n_layer: int
    entry_bytes: int

    @property
    def header_bytes(self) -> int:
        """Of a block on disk."""

    @property
    def far_at(self) -> int:
        """See State."""

    @property
    def long(self) -> bool:
        """Whether older tokens are far from the start because of the sequence's length."""

    @property
    def n_blocks(self) -> int: ...

    def n_ring(self, n_step: int) -> int:
        """Open tokens that a file must hold; n_step: most tokens between two saves."""

    def check(self) -> None:
        """Raises ComputeError for a memory that was stopped halfway."""

    def check_copy(self) -> None:
        """Also raises InputError where a copy would not be the same."""

    def flush(self) -> None:
        """Waits until every block is written. Raises StoreError."""

    def take(self, n_past: int) -> State:
        """A copy of the state."""

    def open_positions(self, first: int, n_past: int) -> NDArray[np.int64]:
        """Those of [first, n_past) that no block holds: sinks and what follows the last block."""

    def blocks_from(self, first: int) -> list[BlockRow]:
        """Blocks from a number on, of a memory whose blocks are in the session's file."""

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Rows of open tokens: uint8 [n, entry_bytes]."""

    def put_rows(self, first: int, rows: NDArray[np.uint8]) -> None:
        """Puts the rows of the open tokens from `first` on back."""

    def restore(self, state: State, headers: Sequence[tuple[int, BlockHeader]], tokens: Sequence[int]) -> None:
        """Goes on where a state was taken, in a memory that is still empty; the rows follow by `put_rows`.

        headers: offset and header of each block; tokens: those from state.sealed_end on. Raises StoreError where they
        do not fit.
        """

    def copy_blocks(self, file: BlockFile) -> list[BlockRow]:
        """Writes every block into another file, of a session that has none yet. Raises StoreError."""
