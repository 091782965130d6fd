"""The one seam between a model's graph and what its attention remembers.

A policy owns the stored keys and values. The graph asks it, layer by layer, what the new tokens attend to; so a new
policy needs no change to a model, and a new model none to a policy.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.ffi.context import Tensor
from pyggml_repkv.memory.block_file import BlockFile
from pyggml_repkv.memory.boundaries import BoundaryScores
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.ops.makers import Ops

if TYPE_CHECKING:
    from pyggml_repkv.graph.plan import GraphModel
    from pyggml_repkv.memory.repkv_checkpoints import Checkpoints

__all__ = [
    "EvalHook",
    "Form",
    "MemoryConfig",
    "Policy",
    "PolicyInputs",
    "StepAttention",
    "StepShape",
    "UnobservedStep",
    "context_length",
    "even_split",
]

Form = Literal["ggml", "one", "packed"]


@dataclass(frozen=True, slots=True)
class PolicyInputs:
    """What a policy is made from. boundaries: where a text may be cut, for policies that cut it.

    block_file: of a session that is kept, for policies that evict blocks; long: whether the sequence is to be taken for
    one beyond the trained context from its start (None: as n_ctx says).
    """

    graph: GraphModel
    memory: MemoryConfig
    boundaries: Callable[[], BoundaryScores]
    block_file: BlockFile | None = None
    long: bool | None = None


NO_DISK: dict[str, object] = {
    "disk_bytes": 0,
    "disk_written_bytes": 0,
    "prefetch": {"issued": 0, "used": 0, "late": 0, "missed": 0, "wait_ms": 0.0},
}
"""What a memory without a disk says in `stats`."""


@dataclass(frozen=True, slots=True)
class DiskNeed:
    """Bytes: still to be written, free in the folder, in all, and the user's limit for all (0: none)."""

    more: int
    free: int
    total: int
    limit: int
    folder: str


@dataclass(frozen=True, slots=True)
class StepShape:
    """What makes two steps share one static graph: the number of tokens, what the layers are built of (ggml's nodes,
    the fused ones for one token, or the packed ones for a chunk), and whatever the policy sized the graph by.
    """

    n_tokens: int
    form: Form
    memory: Hashable


class EvalHook(Protocol):
    """What runs between nodes of a step's graph: a C eval callback for ggml's scheduler, and what it gets."""

    callback: int
    userdata: int

    def begin(self) -> None:
        """Called before a compute."""

    def check(self) -> None:
        """Called after a compute that was stopped: raises what the callback met, if that was the cause."""

    def check_complete(self) -> None:
        """Called after a compute that went through: raises ComputeError if the callback did not run everywhere."""


class StepAttention(Protocol):
    """A policy's part of one static graph."""

    hook: EvalHook | None
    """What must run between the graph's nodes; None: they are computed at once."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Stores k and v, then attends. q [T, H, d], k and v [T, H_kv, d], after RoPE -> [T, H * d]."""

    def store(self, k: Tensor, v: Tensor, layer: int) -> None:
        """Stores k and v [T, H_kv, d] without attending, for a layer whose output nobody reads."""

    def attend_one(self, qkv: Tensor, layer: int) -> Tensor:
        """Form `one`: qkv [(H + 2 H_kv) * d] before RoPE -> partial sums for the `attn_out` op."""

    def attend_packed(self, qkv: Tensor, layer: int) -> Tensor:
        """Form `packed`: qkv [n_panels, (H + 2 H_kv) * d, PANEL] before RoPE -> heads [n_panels, H * d, PANEL]."""

    def store_packed(self, qkv: Tensor, layer: int) -> None:
        """What `store` is to `attend`."""

    def fill(self, n_past: int) -> None:
        """Writes this part's inputs for a step whose first token has position n_past. Call before every compute."""


class UnobservedStep:
    """A StepAttention that needs nothing between nodes."""

    hook: EvalHook | None = None


class Policy(Protocol):
    """What a session asks of its memory."""

    name: str
    n_ctx: int

    rewinds: bool
    """Whether tokens after any position can be forgotten: what lies beyond n_past is overwritten before it is read."""

    precise_rope: bool
    """Whether the fused forms rotate by float64 angles: only where no key is ever rotated by ggml."""

    def split(self, n_tokens: int, n_batch: int) -> list[int]:
        """The sizes of the steps in which a prompt is read."""

    def begin_step(self, tokens: NDArray[np.int32], n_past: int) -> None:
        """Called before a step that reads tokens, the first at position n_past. What it raises ends the step."""

    def step_shape(self, n_past: int, n_tokens: int, preferred: Form) -> StepShape:
        """`preferred` is the fastest form the model has for this step; the policy may know fewer."""

    def undo_step(self) -> None:
        """Called when a step failed after `begin_step`: takes back what must not count twice."""

    def build(self, ops: Ops, shape: StepShape) -> StepAttention:
        """Its part of the graph that `ops` makes nodes of."""

    def bytes_at(self, n_tokens: int) -> dict[str, int]:
        """What n_tokens tokens will take of RAM, part by part."""

    def disk_need(self, n_tokens: int) -> DiskNeed | None:
        """What n_tokens tokens will take of the disk; None: the memory uses none."""

    def stats(self, n_past: int) -> dict[str, object]:
        """The `kv` object of `run --json`."""

    def checkpoint(self) -> Checkpoints | None:
        """What a session that is kept in a directory needs; None: this memory cannot be kept."""

    def close(self) -> None: ...


@runtime_checkable
class Repeatable(Protocol):
    """A memory that benchmarks can fill without computing."""

    def repeat(self, n: int, n_past: int) -> None:
        """The keys and values of the first n tokens, over and over, up to position n_past."""


def context_length(memory: MemoryConfig, config: ModelConfig) -> int:
    return memory.n_ctx or config.n_ctx_train


def even_split(n_tokens: int, n_batch: int) -> list[int]:
    """Steps of n_batch tokens and one of what is left."""
    whole, rest = divmod(n_tokens, n_batch)
    return [n_batch] * whole + [rest] * bool(rest)
