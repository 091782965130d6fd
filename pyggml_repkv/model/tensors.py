"""Which tensors a model must hold, their shapes, and the types that ggml's CPU backend can multiply."""

from collections.abc import Container
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGMLQuantizationType

from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.gguf_file import GGUFFile, file_error, printable
from pyggml_repkv.model.rows import Rows
from pyggml_repkv.model.unread import warn_of_unused_tensors

QT = GGMLQuantizationType

# The types with a dot product in ggml's table of CPU type traits; Q8_1, Q8_K and the integers have none.
MATRIX_TYPES = frozenset(
    {
        *(QT.F32, QT.F16, QT.BF16),
        *(QT.Q1_0, QT.Q4_0, QT.Q4_1, QT.Q5_0, QT.Q5_1, QT.Q8_0),
        *(QT.Q2_K, QT.Q3_K, QT.Q4_K, QT.Q5_K, QT.Q6_K),
        *(QT.IQ1_S, QT.IQ1_M, QT.IQ2_XXS, QT.IQ2_XS, QT.IQ2_S, QT.IQ3_XXS, QT.IQ3_S, QT.IQ4_NL, QT.IQ4_XS),
        *(QT.TQ1_0, QT.TQ2_0, QT.MXFP4, QT.NVFP4),
    }
)
# Of these, all but F32 are converted at load: ggml adds and multiplies vectors in F32 only.
VECTOR_TYPES = frozenset({QT.F32, QT.F16, QT.BF16})

# A tensor under these names would take part in the computation (a norm of queries, a bias, another layer), so an
# unknown one may not be passed over; llama.cpp refuses any tensor that it does not use.
_MEANINGFUL = ("blk.", "token_embd", "position_embd", "token_types", "output", "rope_")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What one tensor must be: `shape` in numpy order, one of `types`. padded: it may have more rows, for no token."""

    shape: tuple[int, ...]
    types: frozenset[QT]
    padded: bool = False

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor may have this shape."""
        rows = shape[0] >= self.shape[0] if self.padded else shape[0] == self.shape[0]
        return rows and shape[1:] == self.shape[1:]


def expected_tensors(config: ModelConfig, present: Container[str]) -> dict[str, TensorSpec]:
    """The tensors of the model, by name, in the order of the computation: all that its family must have, and of those
    that may be missing the ones in `present`, the names that the file has.
    """
    optional = config.family.optional
    of_vocabulary = TensorSpec((config.n_vocab, config.n_embd), MATRIX_TYPES, padded=True)
    specs = {"token_embd.weight": of_vocabulary}
    if "rope_freqs.weight" in optional and "rope_freqs.weight" in present:
        specs["rope_freqs.weight"] = _vector(config.rope_dim // 2)
    for layer in range(config.n_layer):
        joined = frozenset(kind for kind in ("weight", "bias") if f"blk.{layer}.attn_qkv.{kind}" in present)
        for suffix, spec in _block_tensors(config, joined).items():
            name = f"blk.{layer}.{suffix}"
            if name in present if suffix in optional else suffix.endswith(".weight"):
                specs[name] = spec
    specs["output_norm.weight"] = _vector(config.n_embd)
    if not config.tied_output:
        specs["output.weight"] = of_vocabulary
    if "output.bias" in optional and "output.bias" in present:
        specs["output.bias"] = TensorSpec((config.n_vocab,), VECTOR_TYPES, padded=True)
    return specs


def check_tensors(file: GGUFFile, config: ModelConfig) -> tuple[str, ...]:
    """Check presence, shape and type of every tensor, and the divisors of RoPE's frequencies; return the names of
    tensors the model has no use for, of which it warns.

    Raises ModelFileError. That rows are whole blocks and lie in the file is checked when the file is opened.
    """
    specs = expected_tensors(config, file.tensors)
    for name, spec in specs.items():
        info = file.tensors.get(name)
        if info is None:
            hint = "a vocabulary-only file cannot be run" if not file.tensors else "the file is incomplete"
            raise file_error(file.path, f"lacks the tensor {name}", f"{hint}: give a complete model")
        if not spec.fits(info.shape):
            shapes = f"has the shape {list(info.shape)}, its metadata call for {list(spec.shape)}"
            raise file_error(file.path, f"tensor {name} {shapes}")
        if info.type not in spec.types:
            types = ", ".join(t.name for t in sorted(spec.types))
            raise file_error(file.path, f"tensor {name} is {info.type.name}", f"convert it to one of {types}")
    if "rope_freqs.weight" in specs:
        factors = Rows.of(file, "rope_freqs.weight").floats_in(file)
        if not (np.isfinite(factors) & (factors > 0)).all():
            raise file_error(file.path, "tensor rope_freqs.weight has values that no frequency can be divided by")
    extra = tuple(name for name in file.tensors if name not in specs)
    for name in extra:
        if name.startswith(_MEANINGFUL):
            raise file_error(
                file.path,
                f"tensor {printable(name)} is no part of a {config.arch} model of {config.n_layer} layers",
                "convert the model again with a current converter",
            )
    warn_of_unused_tensors(file, extra)
    return extra


def _block_tensors(config: ModelConfig, joined: Container[str]) -> dict[str, TensorSpec]:
    """Of one layer, with every bias that any family may have. joined: "weight" where q, k and v are one matrix, "bias"
    where their biases are one vector; a file may have either without the other.
    """
    c = config
    parts = {"attn_q": c.n_embd_q, "attn_k": c.n_embd_kv, "attn_v": c.n_embd_kv}
    whole = {"attn_qkv": c.n_embd_q + 2 * c.n_embd_kv}
    specs = {"attn_norm.weight": _vector(c.n_embd)}
    for name, n_rows in (whole if "weight" in joined else parts).items():
        specs[f"{name}.weight"] = _matrix(n_rows, c.n_embd)
    for name, n_rows in (whole if "bias" in joined else parts).items():
        specs[f"{name}.bias"] = _vector(n_rows)
    if c.family.qk_norm:
        specs |= {"attn_q_norm.weight": _vector(c.head_dim), "attn_k_norm.weight": _vector(c.head_dim)}
    specs |= {
        "attn_output.weight": _matrix(c.n_embd, c.n_embd_q),
        "attn_output.bias": _vector(c.n_embd),
        "ffn_norm.weight": _vector(c.n_embd),
    }
    for name, n_rows, n_columns in (
        ("ffn_gate", c.n_ff, c.n_embd),
        ("ffn_up", c.n_ff, c.n_embd),
        ("ffn_down", c.n_embd, c.n_ff),
    ):
        specs |= {f"{name}.weight": _matrix(n_rows, n_columns), f"{name}.bias": _vector(n_rows)}
    return specs


def _matrix(n_rows: int, n_columns: int) -> TensorSpec:
    return TensorSpec((n_rows, n_columns), MATRIX_TYPES)


def _vector(n: int) -> TensorSpec:
    return TensorSpec((n,), VECTOR_TYPES)
