"""What a session may remember, and how: plain values, cheap to import."""

from __future__ import annotations

from dataclasses import dataclass

from pyggml_repkv.errors import InputError

POSITIONS = ("auto", "exact", "far")
CACHE_TYPES = ("f16", "bf16", "f32", "q8_0")


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """What a session may remember, and how.

    n_ctx: tokens, 0 = as trained; n_batch: tokens per prefill step; type_k, type_v: storage of keys and values;
    flash_attn: never store the attention scores (the fused forms need it).

    For `repkv`: n_sink first tokens and n_local recent ones are always attended; block: how older tokens are cut;
    top_blocks: how many blocks a layer attends in a step; n_repr: representative tokens of a block and key head;
    n_score: how many later queries score a token; positions: exact, far, or auto (far as soon as the context may
    outgrow the trained one).
    """

    kv: str = "full"
    n_ctx: int = 0
    n_batch: int = 512
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: bool = True
    n_sink: int = 64
    n_local: int = 1024
    block: str = "fixed:128"
    top_blocks: int = 16
    n_repr: int = 4
    n_score: int = 256
    positions: str = "auto"

    def __post_init__(self) -> None:
        if self.n_ctx < 0:
            raise InputError(f"-c is {self.n_ctx}; it must be 0 (the trained context) or a number of tokens")
        if self.n_batch < 1:
            raise InputError(f"-b is {self.n_batch}; it must be at least 1")
        for flag, value in (("-ctk", self.type_k), ("-ctv", self.type_v)):
            if value not in CACHE_TYPES:
                raise InputError(f"{flag} is {value!r}; it must be one of {', '.join(CACHE_TYPES)}")
        limits = (
            ("--n-sink", self.n_sink, 0, 2**20),
            ("--n-local", self.n_local, 32, 2**20),
            ("--top-blocks", self.top_blocks, 0, 4096),
            ("--n-repr", self.n_repr, 1, 64),
            ("--n-score", self.n_score, 1, self.n_local),
        )
        for flag, number, low, high in limits:
            if not low <= number <= high:
                raise InputError(f"{flag} is {number}; it must be between {low} and {high}")
        if self.positions not in POSITIONS:
            raise InputError(f"--positions is {self.positions!r}; it must be one of {', '.join(POSITIONS)}")
