"""What a session may remember, and how: plain values, cheap to import."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pyggml_repkv.arguments import check_fields
from pyggml_repkv.errors import InputError
from pyggml_repkv.model.limits import MAX_CONTEXT

# Tokens a bounded memory may hold where nobody says how many.
UNBOUNDED_CONTEXT = 2**20

POSITIONS = ("auto", "exact", "far", "ordered")
SCORES = ("dot", "attention")
RELEVANCES = ("lse", "mean", "max")
CACHE_TYPES = ("f16", "bf16", "f32", "q8_0")
EVICTED_TYPES = ("f16", "q8_0")
PREFETCH = ("on", "off")


# What bounded memories are set by, apart from what every memory has.
MEMORY_FIELDS = (
    "n_sink", "n_local", "n_dense", "block", "index", "unit", "budget", "chunk_budget", "group", "stride", "n_question",
    "score", "n_score", "relevance", "per_head", "sticky", "late", "positions", "kv_dir", "kv_ram", "kv_disk_max",
    "type_evicted", "prefetch",
)  # fmt: skip

# Those that an index depends on, by the word before its number.
INDEX_FIELDS = {
    "tokens": ("unit", "group", "stride"),
    "representatives": ("score", "n_score", "relevance", "per_head"),
}

# Those that say where evicted blocks go, and how they get back.
DISK_FIELDS = ("kv_dir", "kv_ram", "kv_disk_max", "type_evicted", "prefetch")

# What the results of a session depend on, by the names that a user knows.
_IDENTITY = {
    "--kv": "kv",
    "-b": "n_batch",
    "-ctk": "type_k",
    "-ctv": "type_v",
    "--n-sink": "n_sink",
    "--n-local": "n_local",
    "--n-dense": "n_dense",
    "--block": "block",
    "--index": "index",
    "--unit": "unit",
    "--budget": "budget",
    "--chunk-budget": "chunk_budget",
    "--group": "group",
    "--stride": "stride",
    "--n-question": "n_question",
    "--score": "score",
    "--n-score": "n_score",
    "--relevance": "relevance",
    "--per-head": "per_head",
    "--sticky": "sticky",
    "--late": "late",
    "--positions": "positions",
}
_AS_IN_RAM = "as in RAM"

# Measured on the demo model: docs/repkv.md.
PRESETS: dict[str, dict[str, int | str]] = {
    "fast": {"n_dense": 0, "budget": 1024, "chunk_budget": 512},
    "balanced": {},
    "accurate": {"budget": 4096, "chunk_budget": 4096},
}


def context_length(memory: MemoryConfig, n_ctx_train: int, *, bounded: bool) -> int:
    """Tokens that a context may hold. bounded: whether the memory's is not limited by what the model was trained on."""
    return memory.n_ctx or (UNBOUNDED_CONTEXT if bounded else n_ctx_train)


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """What a session may remember, and how.

    n_ctx: tokens, 0 = as trained, or about a million for `window` and `repkv`; n_batch: tokens per prefill step;
    type_k, type_v: storage of keys and values; flash_attn: never store the attention scores (the fused forms need it).

    For `window` and `repkv`: n_sink first tokens and n_local recent ones are always attended. For `repkv`: block: how
    older tokens are cut; n_dense: up to this length, or the trained context if that is less, every block is attended;
    beyond it budget tokens of them in a one-token step and chunk_budget in a chunk, of each layer; index: how they are
    found, by the codes of all tokens (tokens:BITS) or by representatives of each block (representatives:N); unit: with
    codes, the pieces of a block that are selected; group: how many queries of a chunk share a selection, 0 for all of
    it; stride: every so manyth of them is asked; n_question: so many last tokens of a prompt are read one by one, each
    with a selection of its own; score: what makes a token a representative, the dot products with the n_score queries
    after it (0: 256, or n_local if that is less) or the attention it gets from them; relevance: how
    blocks are compared; per_head: every key head selects its own blocks; sticky: by how many nats what the last token
    selected ranks higher for the next one; late: a token attends what the one before it selected; positions: exact,
    far, ordered, or auto (exact until the sequence outgrows the trained context; far from the start, and nothing dense,
    if n_ctx says that it will).

    Where evicted blocks go (`repkv`): kv_dir: a directory for a file of them, "" for the default if kv_ram is given;
    kv_ram: bytes of RAM for them, 0 for no limit (with neither they stay in RAM); kv_disk_max: bytes on disk, 0 for no
    limit; type_evicted: their type on disk, "" as in RAM; prefetch: off reads no block before a layer asks for it, on
    reads what is certain to be asked for, which `late` makes known a token earlier; kv_debug: for tests, poisons slots
    that hold nothing and checks that attended ones are left alone.
    """

    kv: str = "full"
    n_ctx: int = 0
    n_batch: int = 512
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: bool = True
    n_sink: int = 64
    n_local: int = 1024
    n_dense: int = 4096
    block: str = "fixed:128"
    index: str = "tokens:4"
    unit: str = "16"
    budget: int = 2048
    chunk_budget: int = 2048
    group: int = 0
    stride: int = 4
    n_question: int = 16
    score: str = "attention"
    n_score: int = 0
    relevance: str = "lse"
    per_head: bool = False
    sticky: float = 0.0
    late: bool = False
    positions: str = "auto"
    kv_dir: str = ""
    kv_ram: int = 0
    kv_disk_max: int = 0
    type_evicted: str = ""
    prefetch: str = "on"
    kv_debug: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.n_ctx <= MAX_CONTEXT:
            raise InputError(
                f"-c is {self.n_ctx}; it must be 0 (the trained context) or a number of tokens, at most {MAX_CONTEXT}"
            )
        for flag, value in (("-ctk", self.type_k), ("-ctv", self.type_v)):
            if value not in CACHE_TYPES:
                raise InputError(f"{flag} is {value!r}; it must be one of {', '.join(CACHE_TYPES)}")
        limits = (
            ("-b", self.n_batch, 1, 2**20),
            ("--n-sink", self.n_sink, 0, 2**20),
            ("--n-local", self.n_local, 32, 2**20),
            ("--n-dense", self.n_dense, 0, 2**20),
            ("--budget", self.budget, 0, 2**20),
            ("--chunk-budget", self.chunk_budget, 0, 2**20),
            ("--group", self.group, 0, 2**14),
            ("--stride", self.stride, 1, 2**14),
            ("--n-question", self.n_question, 0, 2**14),
            ("--n-score", self.n_score, 0, self.n_local),
            ("--sticky", self.sticky, 0, 50),
            ("--kv-ram", self.kv_ram, 0, 2**50),
            ("--kv-disk-max", self.kv_disk_max, 0, 2**60),
        )
        for flag, number, low, high in limits:
            if not low <= number <= high:
                raise InputError(f"{flag} is {number}; it must be between {low} and {high}")
        if not re.fullmatch(r"tokens:[124]|representatives:([1-9]|[1-5][0-9]|6[0-4])", self.index):
            raise InputError(
                f"--index is {self.index!r}; it must be tokens:4, :2 or :1, or representatives:N, N from 1 to 64"
            )
        if self.group % 32:
            raise InputError(f"--group is {self.group}; it must be a multiple of 32, or 0 for whole chunks")
        choices = (
            ("--positions", self.positions, POSITIONS),
            ("--score", self.score, SCORES),
            ("--relevance", self.relevance, RELEVANCES),
            ("--cache-type-evicted", self.type_evicted, ("", *EVICTED_TYPES)),
            ("--prefetch", self.prefetch, PREFETCH),
        )
        for flag, choice, known in choices:
            if choice not in known:
                raise InputError(f"{flag} is {choice!r}; it must be one of {', '.join(filter(None, known))}")

    @property
    def index_kind(self) -> tuple[str, int]:
        """`tokens` and the bits of a code, or `representatives` and how many of a block and key head."""
        kind, _, number = self.index.partition(":")
        return kind, int(number)

    @property
    def on_disk(self) -> bool:
        """Whether evicted blocks are written to a file."""
        return bool(self.kv_dir or self.kv_ram)

    @property
    def keeps(self) -> bool:
        """Whether a token's selection matters to the next one's."""
        return self.late or self.sticky > 0

    def identity(self, *, long: bool) -> dict[str, object]:
        """What a saved session depends on, by names that a user knows. long: far from the start because n_ctx says so.

        `far from the start` is not compared: a session stays what it was begun as.
        """
        values = {flag: getattr(self, field) for flag, field in _IDENTITY.items()}
        return {
            **values,
            "--n-score": self.n_scoring,
            "--cache-type-evicted": self.type_evicted or _AS_IN_RAM,
            "far from the start": long,
        }

    @classmethod
    def from_identity(cls, settings: Any) -> MemoryConfig:
        """The reverse, for any length. Raises InputError for what `identity` cannot have returned."""
        if not isinstance(settings, dict):
            raise InputError("they are no names and values")
        evicted = settings.get("--cache-type-evicted", _AS_IN_RAM)
        values: dict[str, Any] = {"type_evicted": "" if evicted == _AS_IN_RAM else evicted}
        for flag, field in _IDENTITY.items():
            values[field] = settings.get(flag, "repkv" if flag == "--kv" else None)
            kind = type(getattr(cls(), field))
            # JSON has one kind of number.
            fits = type(values[field]) in ((int, float) if kind is float else (kind,))
            if not fits:
                raise InputError(f"{flag} is {values[field]!r}")
        return cls(**values)

    @property
    def n_scoring(self) -> int:
        """How many later queries score a token."""
        return self.n_score or min(256, self.n_local)
