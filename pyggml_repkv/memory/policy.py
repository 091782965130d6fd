"""The one seam between a model's graph and what its attention remembers: protocols only.

A policy owns the stored keys and values. The graph asks it, layer by layer, what the new tokens attend to; so a new
policy needs no change to a model, and a new model none to a policy. What a policy can do it declares: nobody asks for
its name.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.ffi.context import Tensor
from pyggml_repkv.memory.centres import KeyCentres
from pyggml_repkv.memory.checkpoints import Checkpoints
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.cut.boundaries import BoundaryScores
from pyggml_repkv.memory.store.arenas import Arenas
from pyggml_repkv.memory.store.block_file import BlockFile
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.rope import RopeTable
from pyggml_repkv.ops.makers import Ops

Form = Literal["ggml", "one", "packed"]


@dataclass(frozen=True, slots=True)
class PolicyInputs:
    """What a policy is made from.

    rope: float64 angles; key_biases: of each layer, float32 [K * d] by halves, None where there is none; boundaries:
    where a text may be cut, for policies that cut it; kept: whether the session is kept in a directory; block_file:
    where a kept session's blocks are, or those that a fork shares; long: whether the sequence is to be taken for one
    beyond the trained context from its start (None: as n_ctx says); arenas: memory that is filled already, for a fork.
    """

    config: ModelConfig
    memory: MemoryConfig
    rope: RopeTable
    boundaries: Callable[[], BoundaryScores]
    key_biases: Sequence[NDArray[np.float32] | None] = ()
    kept: bool = False
    block_file: BlockFile | None = None
    long: bool | None = None
    arenas: Arenas | None = None


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
class StepCost:
    """What a step does in each layer. n_attended: keys that a token attends, on average; n_scored: keys that a token
    scores; n_indexed: entries of the index that a query is compared with, which take index_bytes; n_queries: so many
    are compared with them.
    """

    n_attended: int
    n_scored: int = 0
    n_indexed: int = 0
    index_bytes: int = 0
    n_queries: int = 1


@dataclass(frozen=True, slots=True)
class StepShape:
    """What makes two steps share one static graph: the number of tokens, what the layers are built of (ggml's nodes,
    the fused ones for one token, or the packed ones for a chunk), and whatever the policy sized the graph by.
    """

    n_tokens: int
    form: Form
    memory: Hashable


@dataclass(frozen=True, slots=True)
class HookPoint:
    """A node after which the blocks of a layer are asked for. late: whether what it keeps is attended by the next
    token; n_known: how many layers from this one on attend what the last token kept, so that they are asked for
    together (0: only this one, and what the node selects).
    """

    node: Tensor
    layer: int
    late: bool = False
    n_known: int = 0


class EvalHook(Protocol):
    """What runs between nodes of a step's graph: a C eval callback for ggml's scheduler, and what it gets."""

    callback: int
    userdata: int

    @property
    def points(self) -> Sequence[HookPoint]:
        """Where it runs, in the order of the graph."""

    def begin(self) -> None:
        """Called before a compute."""

    def check(self) -> None:
        """Called after a compute that was stopped: raises what the callback met, if that was the cause."""

    def check_complete(self) -> None:
        """Called after a compute that went through: raises ComputeError if the callback did not run everywhere."""


class StepAttention(Protocol):
    """A policy's part of one static graph, for the form that it was built for.

    qkv is what the form's projections give: in form `ggml` the tuple of q [T, H, d], k and v [T, H_kv, d] after RoPE;
    in form `one` a tensor [(H + 2 H_kv) * d] and in form `packed` one [n_panels, (H + 2 H_kv) * d, PANEL], before RoPE.
    """

    @property
    def hook(self) -> EvalHook | None:
        """What must run between the graph's nodes; None: they are computed at once."""

    def attend(self, qkv: Any, layer: int) -> Tensor:
        """Stores keys and values, then attends -> in form `ggml` [T, H * d], in form `one` partial sums for the
        `attn_out` op, in form `packed` heads [n_panels, H * d, PANEL].
        """

    def store(self, qkv: Any, layer: int) -> None:
        """Stores keys and values, for a layer whose output nobody reads."""

    def fill(self, n_past: int) -> None:
        """Writes this part's inputs for a step whose first token has position n_past. Call before every compute."""


class Policy(Protocol):
    """What a session asks of its memory. The first members say what it can do, before one is made."""

    name: ClassVar[str]

    forms: ClassVar[frozenset[Form]]
    """Of what its graphs can be built."""

    bounded: ClassVar[bool]
    """Whether a token attends a bounded number of keys, so that a context may be longer than the trained one."""

    rewinds: ClassVar[bool]
    """Whether tokens after any position can be forgotten: what lies beyond n_past is overwritten before it is read."""

    evicts: ClassVar[bool]
    """Whether it writes blocks to a file (`--kv-ram`, `--session`)."""

    ignores: ClassVar[frozenset[str]]
    """Fields of MemoryConfig on which its results do not depend."""

    precise_rope: ClassVar[bool]
    """Whether the fused forms rotate by float64 angles: only where no key is ever rotated by ggml."""

    n_ctx: int

    writes: frozenset[str]
    """Memories that each layer of a step must change, by name without the layer (`graph verify`)."""

    def split(self, n_tokens: int, n_batch: int) -> list[int]:
        """The sizes of the steps in which a prompt is read."""

    def begin_step(self, tokens: NDArray[np.int32], n_past: int) -> None:
        """Called before a step that reads tokens, the first at position n_past. What it raises ends the step."""

    def step_shape(self, n_past: int, n_tokens: int, preferred: Form) -> StepShape:
        """`preferred` is the fastest form the model has for this step; the policy may know fewer."""

    def undo_step(self, n_past: int) -> None:
        """Called when a step after n_past tokens failed, begun or not: takes back what must not count twice."""

    def build(self, ops: Ops, shape: StepShape) -> StepAttention:
        """Its part of the graph that `ops` makes nodes of."""

    def cost(self, n_past: int, n_tokens: int) -> StepCost:
        """Of a step that reads n_tokens after n_past."""

    def bytes_at(self, n_tokens: int) -> dict[str, int]:
        """What n_tokens tokens will take of RAM, part by part."""

    def disk_need(self, n_tokens: int) -> DiskNeed | None:
        """What n_tokens tokens will take of the disk; None: the memory uses none."""

    def stats(self, n_past: int) -> dict[str, object]:
        """The `kv` object of `run --json`."""

    def rewind(self, n_past: int) -> None:
        """Called before tokens from position n_past on are forgotten; only if it `rewinds`."""

    def checkpoint(self) -> Checkpoints | None:
        """What a session that is kept in a directory needs; None: this memory cannot be kept."""

    def fork(self, n_past: int) -> Policy:
        """Another memory that has read the same n_past tokens: it shares what neither will change, and copies the rest.

        Called between two steps. Raises InputError where this memory cannot.
        """

    def fresh(self) -> Policy:
        """An empty memory with the same settings, as far from its start, kept nowhere."""

    def close(self) -> None:
        """Gives everything back; more than once does no harm."""


@runtime_checkable
class Repeatable(Protocol):
    """A memory that benchmarks can fill without computing."""

    def repeat(self, n: int, n_past: int) -> None:
        """The keys and values of the first n tokens, over and over, up to position n_past; which rotations the keys
        have is the memory's affair.
        """


@runtime_checkable
class Centring(Protocol):
    """A memory that may store keys less their bias (centres.py)."""

    @property
    def centres(self) -> KeyCentres: ...


@runtime_checkable
class Selective(Protocol):
    """A memory whose graphs depend on what was selected before."""

    def assume_selected(self, n_past: int) -> None:
        """For a graph that is never computed: as if the token before had selected, if there was a choice by then."""


@runtime_checkable
class OnDisk(Protocol):
    """A memory that may keep blocks on disk; disk: its store (store/disk.py), None where they are in RAM."""

    @property
    def disk(self) -> Any: ...


def even_split(n_tokens: int, n_batch: int) -> list[int]:
    """Steps of n_batch tokens and one of what is left."""
    whole, rest = divmod(n_tokens, n_batch)
    return [n_batch] * whole + [rest] * bool(rest)
