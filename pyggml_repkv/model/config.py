"""The frozen description of a model, built once from its file's metadata, every value checked."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyggml_repkv.arch import ARCHS, Arch
from pyggml_repkv.errors import ModelFileError
from pyggml_repkv.model.gguf_file import GGUFFile, file_error, printable
from pyggml_repkv.model.limits import MAX_CONTEXT, MAX_SCALING
from pyggml_repkv.model.unread import warn_of_unread_keys

log = logging.getLogger(__name__)

# Far above any published model, far below what would overflow ggml's 32-bit counts.
MAX_LAYERS = 512
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024
MAX_WIDTH = 2**20
MAX_VOCAB = 2**24
MAX_EXPERTS = 2**16

_CONVERT = "convert the model again with a current converter"
_OTHER_MODEL = f"give a text-generating model of one of the families {', '.join(ARCHS)}"

_SCALING_KEYS = ("type", "factor", "original_context_length", "attn_factor", "finetuned")
# llama.cpp reads these for other families only. With these values they say what is computed anyway.
_UNREAD_KEYS = {
    "yarn_ext_factor": 1.0,
    "yarn_attn_factor": 1.0,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_log_multiplier": 0.0,
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How RoPE is stretched; the numbers are the arguments of ggml_rope_ext, with llama.cpp's defaults.

    `factor` divides the frequencies; `ext_factor` blends in the unscaled ones (YaRN, arXiv 2309.00071) for
    dimensions that turn between `beta_fast` and `beta_slow` times in `orig_context` tokens; `attn_factor`
    scales q and k. As in llama.cpp, a file of this family cannot change the betas or the ext factor.
    """

    kind: str  # "none", "linear" or "yarn"
    factor: float
    orig_context: int
    ext_factor: float
    attn_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    @property
    def freq_scale(self) -> float:
        """What ggml_rope_ext multiplies positions with."""
        return 1.0 / self.factor

    @property
    def reach(self) -> int:
        """Tokens that YaRN stretches the original context to."""
        return min(MAX_CONTEXT, round(self.factor * self.orig_context))

    def __str__(self) -> str:
        if self.kind == "none":
            return "not scaled"
        return f"{self.kind} scaling by {self.factor:.9g} from {self.orig_context:,} tokens"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and constants of a model: `n_embd` values of hidden state, `n_head` heads of `head_dim` each.

    arch: a key of `ARCHS`. n_vocab: of tokens; matrices may have more rows, which belong to none and are left out.
    """

    arch: str
    name: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    rope_base: float
    rope_dim: int
    rope_scaling: RopeScaling
    norm_eps: float
    n_ctx_train: int
    tied_output: bool

    @property
    def family(self) -> Arch:
        return ARCHS[self.arch]

    @property
    def n_gqa(self) -> int:
        """Query heads per key/value head."""
        return self.n_head // self.n_head_kv

    @property
    def n_embd_q(self) -> int:
        """Width of all query heads together."""
        return self.n_head * self.head_dim

    @property
    def n_embd_kv(self) -> int:
        """Width of all key (or value) heads together."""
        return self.n_head_kv * self.head_dim

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> "ModelConfig":
        """Read and check the metadata of `file`, and warn of what nobody reads; raises ModelFileError that names the
        key.
        """
        arch = _known_arch(file)
        keys = _Keys(file, arch.name)
        _check_kind(keys)
        n_embd = keys.integer("embedding_length", 1, MAX_WIDTH)
        n_head = keys.integer("attention.head_count", 1, MAX_HEADS)
        n_head_kv = keys.integer("attention.head_count_kv", 1, MAX_HEADS, default=n_head)
        if n_head % n_head_kv:
            raise keys.error(f"{n_head} query heads cannot share {n_head_kv} key/value heads evenly")
        head_dim = _head_dim(keys, n_embd, n_head)
        rope_dim = keys.integer("rope.dimension_count", 2, head_dim, default=head_dim)
        if rope_dim % 2:
            raise keys.error(f"{keys.full('rope.dimension_count')} is {rope_dim}, it must be even")
        if arch.rope == "pairs" and rope_dim != head_dim:
            raise keys.error(f"{keys.full('rope.dimension_count')} is {rope_dim}, it must be the {head_dim} of a head")
        n_ctx_train = keys.integer("context_length", 1, MAX_CONTEXT)
        scaling = _rope_scaling(keys, n_ctx_train)
        if scaling.kind == "yarn" and scaling.orig_context == n_ctx_train:
            # Converters that copy max_position_embeddings leave out what YaRN adds.
            n_ctx_train = scaling.reach
        config = cls(
            arch=arch.name,
            name=printable(file.metadata.get("general.name", file.path.stem)),
            n_layer=keys.integer("block_count", 1, MAX_LAYERS),
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=n_head_kv,
            head_dim=head_dim,
            n_ff=keys.integer("feed_forward_length", 1, MAX_WIDTH),
            n_vocab=_n_vocab(keys),
            # YaRN takes the logarithm of the base.
            rope_base=keys.real("rope.freq_base", 1.0, 1e12, default=10000.0),
            rope_dim=rope_dim,
            rope_scaling=scaling,
            norm_eps=keys.real("attention.layer_norm_rms_epsilon", 0.0, 1.0),
            n_ctx_train=n_ctx_train,
            tied_output="output.weight" not in file.tensors,
        )
        warn_of_unread_keys(file, arch.name, keys.asked)
        return config


class _Keys:
    """Typed, range-checked access to the metadata of one file."""

    def __init__(self, file: GGUFFile, prefix: str) -> None:
        self.file, self._prefix = file, prefix
        self.asked: set[str] = set()

    def error(self, what: str, remedy: str = _CONVERT) -> ModelFileError:
        return file_error(self.file.path, what, remedy)

    def full(self, key: str) -> str:
        self.asked.add(f"{self._prefix}.{key}")
        return f"{self._prefix}.{key}"

    def has(self, key: str) -> bool:
        return self.full(key) in self.file.metadata

    def _value(self, key: str, default: Any) -> Any:
        value = self.file.metadata.get(self.full(key), default)
        if value is None:
            raise self.error(f"lacks the key {self.full(key)}")
        if isinstance(value, list | np.ndarray):
            # Some families vary these by layer; those of `ARCHS` do not, and neither does the graph.
            raise self.error(f"{self.full(key)} is an array, one value for all layers is needed", _OTHER_MODEL)
        return value

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self._value(key, default)
        if type(value) is not int:
            raise self.error(f"{self.full(key)} is {printable(repr(value))}, an integer is needed")
        if not low <= value <= high:
            raise self.error(f"{self.full(key)} is {value}, it must lie in {low}..{high}")
        return value

    def real(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A float in (low, high]."""
        value = self._value(key, default)
        if type(value) is not float:
            raise self.error(f"{self.full(key)} is {printable(repr(value))}, a float is needed")
        if not low < value <= high:  # nor is NaN
            raise self.error(f"{self.full(key)} is {value:g}, it must be above {low:g} and at most {high:g}")
        return value

    def text(self, key: str, default: str) -> str:
        value = self._value(key, default)
        if type(value) is not str:
            raise self.error(f"{self.full(key)} is {printable(repr(value))}, a string is needed")
        return value


def _known_arch(file: GGUFFile) -> Arch:
    name = file.metadata.get("general.architecture")
    if name is None:
        raise file_error(file.path, "lacks the key general.architecture", _CONVERT)
    arch = ARCHS.get(name) if isinstance(name, str) else None
    if arch is None:
        raise file_error(file.path, f"its architecture is {printable(repr(name))}", _OTHER_MODEL)
    return arch


def _check_kind(keys: _Keys) -> None:
    kind = keys.file.metadata.get("general.type", "model")
    if not isinstance(kind, str) or kind != "model":
        raise keys.error(f"its general.type is {printable(repr(kind))}, not a model", "give the model itself")
    if keys.file.metadata.get(keys.full("attention.causal"), True) is not True:
        raise keys.error("its attention is not causal: it makes embeddings, not text", _OTHER_MODEL)
    n_experts = keys.integer("expert_count", 0, MAX_EXPERTS, default=0)
    if n_experts:
        raise keys.error(f"it is a mixture of {n_experts} experts", "give a dense model")


def _head_dim(keys: _Keys, n_embd: int, n_head: int) -> int:
    default = n_embd // n_head
    if not keys.has("attention.key_length") and n_embd % n_head:
        raise keys.error(f"an embedding of {n_embd} cannot be split over {n_head} heads")
    head_dim = keys.integer("attention.key_length", 2, MAX_HEAD_DIM, default=default)
    value_dim = keys.integer("attention.value_length", 2, MAX_HEAD_DIM, default=default)
    if head_dim != value_dim:
        raise keys.error(f"keys have {head_dim} values per head and values {value_dim}, they must be equal")
    return head_dim


def _rope_scaling(keys: _Keys, n_ctx_train: int) -> RopeScaling:
    # llama.cpp reads a file without a type as linear with a factor of 1, and a factor of 0 as none given.
    kind = keys.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        what = f"{keys.full('rope.scaling.type')} is {printable(repr(kind))}"
        raise keys.error(what, "none, linear and yarn are supported")
    old_key = not keys.has("rope.scaling.factor")
    factor = keys.real("rope.scale_linear" if old_key else "rope.scaling.factor", -1.0, MAX_SCALING, default=1.0)
    factor = 1.0 if factor == 0.0 or kind == "none" else factor
    lowest = 1.0 if kind == "yarn" else 1.0 / MAX_SCALING
    if factor < lowest:
        raise keys.error(f"the RoPE scaling factor is {factor:g}, {kind} scaling needs at least {lowest:g}")
    if kind == "linear" and factor == 1.0:
        kind = "none"
    orig_context = keys.integer("rope.scaling.original_context_length", 0, MAX_CONTEXT, default=n_ctx_train)
    _warn_of_unread(keys)
    return RopeScaling(
        kind=kind,
        factor=factor,
        orig_context=orig_context or n_ctx_train,
        ext_factor=1.0 if kind == "yarn" else 0.0,
        attn_factor=keys.real("rope.scaling.attn_factor", 0.0, MAX_SCALING, default=1.0),
    )


def _warn_of_unread(keys: _Keys) -> None:
    prefix = keys.full("rope.scaling.")
    unread = []
    for key, value in keys.file.metadata.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name in _SCALING_KEYS:
            continue
        if isinstance(value, list | np.ndarray):
            unread.append(f"{key} (an array)")
        elif value != _UNREAD_KEYS.get(name):
            unread.append(f"{key} = {value!r}")
    if unread:
        path, what = printable(keys.file.path, 400), printable(", ".join(unread), 400)
        log.warning("%s: ignored, as llama.cpp ignores it for this family: %s", path, what)


def _n_vocab(keys: _Keys) -> int:
    tokens = keys.file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise keys.error("lacks the list of tokens tokenizer.ggml.tokens")
    if len(tokens) > MAX_VOCAB:
        raise keys.error(f"its vocabulary has {len(tokens)} tokens, at most {MAX_VOCAB} are possible")
    embeddings = keys.file.tensors.get("token_embd.weight")
    if embeddings is not None and embeddings.shape[0] < len(tokens):
        raise keys.error(f"token_embd.weight has {embeddings.shape[0]} rows for {len(tokens)} tokens")
    return len(tokens)
