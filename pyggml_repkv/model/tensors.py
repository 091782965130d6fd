"""Which tensors a Qwen2 model must hold, their shapes, and the types that ggml's CPU backend can multiply."""

from dataclasses import dataclass

from gguf.constants import GGMLQuantizationType

from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.gguf_file import GGUFFile, file_error, printable

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
VECTOR_TYPES = frozenset({QT.F32})

# A tensor under these names would take part in the computation, so an unknown one may not be passed over.
_MEANINGFUL = ("blk.", "token_embd", "output", "rope_")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What one tensor must be: `shape` in numpy order, one of `types`."""

    shape: tuple[int, ...]
    types: frozenset[QT]


def expected_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """The tensors of the model, by name, in the order of the computation."""
    specs = {"token_embd.weight": _matrix(config.n_vocab, config.n_embd)}
    for layer in range(config.n_layer):
        specs.update({f"blk.{layer}.{name}": spec for name, spec in _block_tensors(config).items()})
    specs["output_norm.weight"] = _vector(config.n_embd)
    if not config.tied_output:
        specs["output.weight"] = _matrix(config.n_vocab, config.n_embd)
    return specs


def check_tensors(file: GGUFFile, config: ModelConfig) -> tuple[str, ...]:
    """Check presence, shape and type of every tensor; return the names of tensors the model has no use for.

    Raises ModelFileError. That rows are whole blocks and lie in the file is checked when the file is opened.
    """
    specs = expected_tensors(config)
    for name, spec in specs.items():
        info = file.tensors.get(name)
        if info is None:
            hint = "a vocabulary-only file cannot be run" if not file.tensors else "the file is incomplete"
            raise file_error(file.path, f"lacks the tensor {name}", f"{hint}: give a complete model")
        if info.shape != spec.shape:
            shapes = f"has the shape {list(info.shape)}, its metadata call for {list(spec.shape)}"
            raise file_error(file.path, f"tensor {name} {shapes}")
        if info.type not in spec.types:
            types = ", ".join(t.name for t in sorted(spec.types))
            raise file_error(file.path, f"tensor {name} is {info.type.name}", f"convert it to one of {types}")
    extra = tuple(name for name in file.tensors if name not in specs)
    for name in extra:
        if name.startswith(_MEANINGFUL):
            raise file_error(
                file.path,
                f"tensor {printable(name)} is no part of a {config.arch} model of {config.n_layer} layers",
                "convert the model again with a current converter",
            )
    return extra


def _block_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    return {
        "attn_norm.weight": _vector(config.n_embd),
        "attn_q.weight": _matrix(config.n_embd_q, config.n_embd),
        "attn_q.bias": _vector(config.n_embd_q),
        "attn_k.weight": _matrix(config.n_embd_kv, config.n_embd),
        "attn_k.bias": _vector(config.n_embd_kv),
        "attn_v.weight": _matrix(config.n_embd_kv, config.n_embd),
        "attn_v.bias": _vector(config.n_embd_kv),
        "attn_output.weight": _matrix(config.n_embd, config.n_embd_q),
        "ffn_norm.weight": _vector(config.n_embd),
        "ffn_gate.weight": _matrix(config.n_ff, config.n_embd),
        "ffn_up.weight": _matrix(config.n_ff, config.n_embd),
        "ffn_down.weight": _matrix(config.n_embd, config.n_ff),
    }


def _matrix(n_rows: int, n_columns: int) -> TensorSpec:
    return TensorSpec((n_rows, n_columns), MATRIX_TYPES)


def _vector(n: int) -> TensorSpec:
    return TensorSpec((n,), VECTOR_TYPES)
