"""Where a bounded memory keeps tokens that left the window, and sinks: one pair of arenas a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.ffi.context import Tensor
from pyggml_repkv.ffi.handles import Backend
from pyggml_repkv.memory.store.block_file import BlockFile

if TYPE_CHECKING:
    from pyggml_repkv.memory.bounded.rotation import Rotation
    from pyggml_repkv.memory.hook import StepHook


class Store(Protocol):
    """k[layer], v[layer]: [n_rows, K * d]. A sink lies at row = position, an open token (one that no block holds) at
    row = position - base, a unit of a block where `places` says.
    """

    k: list[Tensor]
    v: list[Tensor]

    @property
    def base(self) -> int: ...

    def places(self, layer: int) -> Tensor:
        """I32 [1 or n_lanes, n_units, 3], of each unit: its first row, how many tokens it has, the first's position."""

    def make_room(self, n_past: int, n_tokens: int) -> None:
        """Called before a step, so that its tokens have rows."""

    def new_hook(self, backend: Backend) -> StepHook | None:
        """For one plan, which the backend computes; None where blocks are always there."""

    def keys(self, layer: int, positions: NDArray[np.integer]) -> NDArray[np.float32]:
        """Float32 [n, K, d]: before RoPE with far positions, else rotated. Raises StoreError for unreadable ones."""

    def turn_back(self, rotation: Rotation, n_past: int) -> None:
        """Takes the rotation out of all keys, at once or when they are read."""

    def share_file(self) -> BlockFile | None:
        """The file that blocks are in, for one more store; None where there is none."""

    def new_file(self) -> BlockFile | None:
        """An empty file without a name, for a store that begins; None where there is none."""

    def copy_from(self, other: Any) -> None:
        """Takes over what another store of the same kind holds beside its arenas."""

    def close(self) -> None:
        """Before the arenas."""
