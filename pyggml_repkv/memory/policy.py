"""The one seam between a model's graph and what its attention remembers.

A policy owns the stored keys and values. The graph asks it, layer by layer, what the new tokens attend to; so a new
policy needs no change to a model, and a new model none to a policy.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, Protocol

from pyggml_repkv.errors import InputError
from pyggml_repkv.ffi.context import GraphContext, Tensor
from pyggml_repkv.model.config import ModelConfig

Form = Literal["ggml", "one", "packed"]

CACHE_TYPES = ("f16", "bf16", "f32", "q8_0")


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """What a session may remember, and how.

    n_ctx: tokens, 0 = as trained; n_batch: tokens per prefill step; type_k, type_v: storage of keys and values;
    flash_attn: never store the scores (fused decode needs it).
    """

    kv: str = "full"
    n_ctx: int = 0
    n_batch: int = 512
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: bool = True

    def __post_init__(self) -> None:
        if self.n_ctx < 0:
            raise InputError(f"-c is {self.n_ctx}; it must be 0 (the trained context) or a number of tokens")
        if self.n_batch < 1:
            raise InputError(f"-b is {self.n_batch}; it must be at least 1")
        for flag, value in (("-ctk", self.type_k), ("-ctv", self.type_v)):
            if value not in CACHE_TYPES:
                raise InputError(f"{flag} is {value!r}; it must be one of {', '.join(CACHE_TYPES)}")


@dataclass(frozen=True, slots=True)
class StepShape:
    """What makes two steps share one static graph: the number of tokens, what the layers are built of (ggml's nodes,
    the fused ones for one token, or the packed ones for a chunk), and whatever the policy sized the graph by.
    """

    n_tokens: int
    form: Form
    memory: Hashable


class StepAttention(Protocol):
    """A policy's part of one static graph."""

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


class Policy(Protocol):
    """What a session asks of its memory."""

    name: str
    n_ctx: int

    @property
    def can_fuse(self) -> bool:
        """Whether `build` knows the forms `one` and `packed`."""

    def step_shape(self, n_past: int, n_tokens: int, form: Form) -> StepShape: ...

    def build(self, context: GraphContext, shape: StepShape) -> StepAttention: ...

    def stats(self, n_past: int) -> dict[str, object]:
        """The `kv` object of `run --json`."""

    def close(self) -> None: ...


def context_length(memory: MemoryConfig, config: ModelConfig) -> int:
    return memory.n_ctx or config.n_ctx_train
