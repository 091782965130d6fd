"""What finds evicted tokens again: the seam between a memory and its index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.ffi.context import Tensor
from pyggml_repkv.memory.bounded.local import LocalWindow
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.cut.blocks import Blocks, Scheme
from pyggml_repkv.memory.index.kept import Kept
from pyggml_repkv.memory.store.arenas import Arenas
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.ops.makers import Ops


@dataclass(frozen=True, slots=True)
class Queries:
    """A layer's queries. Of a chunk: `near` and `far`, packed and scaled, as the window and as older tokens meet them.
    Of one token: both are qkv [(H + 2 K) * d] before RoPE, and `rope` [2, rope_dim] holds the tables for either.
    """

    near: Tensor
    far: Tensor
    rope: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """units: I32 [n_rows, 1 + n], how many units are attended and which, for whom must make them resident; runs: I32
    [n_rows, 1 + 3 n], how many runs of rows are attended, then (first row, number of rows, first position) of each.
    One row for all key heads, or one a key head, for each group of queries; group: queries of a chunk in a group, 0 for
    all of them.
    """

    units: Tensor
    runs: Tensor
    group: int = 0


@dataclass(frozen=True, slots=True)
class IndexParts:
    """What an index is made from. keys(layer, positions) -> float32 [n, K, d]: stored keys, before RoPE with far
    positions, else rotated; scheme: how tokens are cut; units: I32, bounds of the units in blocks, of which n_top at
    most are selected in a step and max_units (a multiple of LANES) in a full context; n_room: units that the graph
    which is built has room for, at least those so far; blocks: those so far.
    """

    arenas: Arenas
    config: ModelConfig
    memory: MemoryConfig
    local: LocalWindow
    kept: Kept
    keys: Callable[[int, NDArray[np.integer]], NDArray[np.float32]]
    n_ctx: int
    scheme: Scheme
    units: Tensor
    max_units: int
    n_top: int
    n_room: Callable[[], int]
    blocks: Blocks


class Index(Protocol):
    """Entries are made when a block leaves the window (`seal`), and searched in every layer and step (`nodes`)."""

    def __init__(self, parts: IndexParts) -> None: ...

    @staticmethod
    def unit_of(memory: MemoryConfig) -> str | None:
        """The scheme of what it selects, None for whole blocks."""

    @staticmethod
    def n_groups(memory: MemoryConfig, n_tokens: int) -> int:
        """Groups of queries of a chunk that select for themselves."""
        ...

    @staticmethod
    def selects_per_head(memory: MemoryConfig) -> bool:
        """Whether every key head selects for itself."""
        ...

    writes: ClassVar[frozenset[str]]
    """Memories that the nodes of each layer must change, by name without the layer."""

    n_entries: int
    """Entries of a block that a query is compared with."""

    block_bytes: int
    """RAM of a block's entries, of all layers."""

    n_packed: int
    """Bytes that `pack` takes."""

    def n_queries(self, n_tokens: int) -> int:
        """Queries of a step that are compared with entries."""
        ...

    def nodes(self, ops: Ops, q: Queries, regions: Tensor, places: Tensor, layer: int) -> Selection:
        """What a layer's queries ask for. places: where its blocks lie (Store.places)."""

    def seal(self, block: int, begin: int, end: int) -> None:
        """Makes the entries of the tokens [begin, end), which are stored and in no block yet."""

    def renew(self, block: int, begin: int, end: int) -> None:
        """Makes a block's entries again, from keys that have lost their rotation."""

    def pack(self, block: int, begin: int, end: int) -> bytes:
        """A block's entries, to be kept with it."""

    def unpack(self, block: int, begin: int, end: int, data: bytes) -> None:
        """Puts them back. Raises StoreError where they do not fit."""

    def take_state(self, first: int, end: int) -> NDArray[np.float32]:
        """What entries of later blocks depend on, besides their keys, where the tokens [first, end) are in no block
        yet: float32 [n_layer, ...].
        """

    def put_state(self, first: int, end: int, values: NDArray[np.float32]) -> None:
        """Puts it back; values: of the same numbers, in any shape. Raises StoreError for another number of them."""

    def settle(self) -> None:
        """Called when a step begins: what the last one would have taken back is settled."""

    def remember(self, n_past: int, n_tokens: int) -> None:
        """Called before a step computes: what `undo` must put back."""

    def undo(self) -> None:
        """Takes back what a step did that failed."""

    def forget(self, end: int) -> None:
        """Nothing of the tokens before `end` is asked for any more but their entries."""

    def bytes_at(self, n_blocks: int, n_open: int) -> dict[str, int]:
        """RAM for n_blocks blocks and n_open tokens whose scores are held."""

    def copy_from(self, other: Any) -> None:
        """Takes over what another index of the same kind holds beside its arenas."""

    def close(self) -> None: ...
