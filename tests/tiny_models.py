"""Tiny random models of every family, written as complete GGUF files, for tests that compare against a plain oracle.

`write_tiny_model` returns the weights as they were written, dequantised, so an oracle needs no GGUF code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod, sqrt
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize
from hypothesis import strategies as st

QT = GGMLQuantizationType
VT = GGUFValueType

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MERGES = ("t h", "Ġ t", "Ġt h", "Ġth e", "i n", "a n", "an d", "Ġ and", "e r", "o n", "Ġ a", "Ġ i", "o u")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MIN_VOCAB = 256 + len(MERGES) + len(SPECIAL_TOKENS)

# gguf-py dequantises these types but cannot quantise to them, so their blocks are random bytes. For each: the places of
# a block's half-precision scale and minimum, and the mean quant, which gives the minimum that centres the block.
_RANDOM_BLOCKS: dict[QT, tuple[int, int | None, float]] = {
    QT.Q2_K: (80, 82, 1.5),
    QT.Q3_K: (108, None, 0.0),
    QT.Q4_K: (0, 2, 7.5),
    QT.Q5_K: (0, 2, 15.5),
    QT.Q6_K: (208, None, 0.0),
    QT.IQ1_S: (0, None, 0.0),
    QT.IQ2_XXS: (0, None, 0.0),
    QT.IQ2_XS: (0, None, 0.0),
    QT.IQ2_S: (0, None, 0.0),
    QT.IQ3_XXS: (0, None, 0.0),
    QT.IQ3_S: (0, None, 0.0),
    QT.IQ4_NL: (0, None, 0.0),
    QT.IQ4_XS: (0, None, 0.0),
}
EXACT_TYPES = (QT.F32, QT.F16, QT.BF16)
QUANTISED_TYPES = (QT.Q4_0, QT.Q4_1, QT.Q5_0, QT.Q5_1, QT.Q8_0, QT.TQ1_0, QT.TQ2_0, QT.MXFP4)
RANDOM_BLOCK_TYPES = (*_RANDOM_BLOCKS, QT.IQ1_M, QT.NVFP4)
WEIGHT_TYPES = (*EXACT_TYPES, *QUANTISED_TYPES, *RANDOM_BLOCK_TYPES)


QKV_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")
# Tensors that the files of a family may have besides its matrices and norms.
OPTIONAL = {
    "qwen2": (*QKV_BIASES, "output.bias"),
    "qwen3": QKV_BIASES,
    "llama": (*QKV_BIASES, "attn_output.bias", "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias", "rope_freqs.weight"),
}


@dataclass(frozen=True)
class TinySpec:
    """Shape and flavour of a tiny model; `n_embd` and `rope_dim` of 0 mean their usual values.

    optional: of OPTIONAL, what the file has. joined: q, k and v are one matrix, and their biases, if any, one vector.
    """

    arch: str = "qwen2"
    optional: tuple[str, ...] = QKV_BIASES
    joined: bool = False
    n_layer: int = 2
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 16
    n_ff: int = 96
    n_vocab: int = 288
    n_ctx: int = 128
    n_embd: int = 0  # n_head * head_dim
    tied: bool = False
    rope_base: float = 10000.0
    rope_dim: int = 0  # head_dim
    scaling_kind: str = "none"
    scaling_factor: float = 1.0
    scaling_orig_ctx: int = 0  # key left out
    norm_eps: float = 1e-6
    weight_type: GGMLQuantizationType = QT.F32
    # (pattern of tensor names, type) pairs that override weight_type; the first match wins.
    weight_types: tuple[tuple[str, GGMLQuantizationType], ...] = ()
    seed: int = 0

    @property
    def width(self) -> int:
        """Size of the hidden state."""
        return self.n_embd or self.n_head * self.head_dim

    @property
    def n_ctx_train(self) -> int:
        """Where the file names no other context than the original one, YaRN multiplies it."""
        if self.scaling_kind == "yarn" and self.scaling_orig_ctx in (0, self.n_ctx):
            return round(self.scaling_factor * self.n_ctx)
        return self.n_ctx

    def type_of(self, name: str) -> GGMLQuantizationType:
        """Returns the type of the matrix `name` in the file."""
        return next((t for pattern, t in self.weight_types if fnmatchcase(name, pattern)), self.weight_type)


@dataclass(frozen=True)
class Packed:
    """A tensor of the file. data: the F32 array, or the uint8 blocks row by row."""

    data: np.ndarray
    type: GGMLQuantizationType


Metadata = dict[str, tuple[Any, GGUFValueType]]
Tensors = dict[str, Packed]


def write_tiny_model(
    path: str | PathLike[str], spec: TinySpec, edit: Callable[[Metadata, Tensors], None] | None = None
) -> dict[str, np.ndarray]:
    """Writes the model of `spec` to `path`; returns its weights as F32 arrays in numpy order, by tensor name.

    `edit` may change metadata and packed tensors in place before they are written (for bad files).
    """
    metadata = {**tiny_metadata(spec), **tiny_tokenizer(spec.n_vocab)}
    tensors = tiny_tensors(spec)
    if edit is not None:
        edit(metadata, tensors)
    arch = metadata.pop("general.architecture", ("", VT.STRING))[0]
    writer = GGUFWriter(path, arch)
    for key, (value, kind) in metadata.items():
        if kind is VT.ARRAY:
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, kind)
    if "general.alignment" in metadata:
        writer.data_alignment = metadata["general.alignment"][0]
    for name, packed in tensors.items():
        writer.add_tensor(name, packed.data, raw_dtype=None if packed.type is QT.F32 else packed.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {
        name: dequantize(packed.data, packed.type).copy()
        for name, packed in tensors.items()
        if packed.type in WEIGHT_TYPES
    }


def write_split_model(
    stem: Path, spec: TinySpec, *, max_tensors: int = 10, small_first: bool = False
) -> list[Path]:  # fmt: skip
    """Writes the model of `spec` in parts of up to max_tensors tensors, the first one without any if `small_first`, and
    returns their paths: `stem`-00001-of-0000N.gguf and so on.
    """
    metadata = {**tiny_metadata(spec), **tiny_tokenizer(spec.n_vocab)}
    arch = metadata.pop("general.architecture")[0]
    writer = GGUFWriter(f"{stem}.gguf", arch, split_max_tensors=max_tensors, small_first_shard=small_first)
    for key, (value, kind) in metadata.items():
        if kind is VT.ARRAY:
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, kind)
    for name, packed in tiny_tensors(spec).items():
        writer.add_tensor(name, packed.data, raw_dtype=None if packed.type is QT.F32 else packed.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(stem.parent.glob(f"{stem.name}-*-of-*.gguf"))


def tiny_metadata(spec: TinySpec) -> Metadata:
    """Metadata of `spec` without the tokenizer."""
    values = {
        "block_count": (spec.n_layer, VT.UINT32),
        "context_length": (spec.n_ctx, VT.UINT32),
        "embedding_length": (spec.width, VT.UINT32),
        "feed_forward_length": (spec.n_ff, VT.UINT32),
        "attention.head_count": (spec.n_head, VT.UINT32),
        "attention.head_count_kv": (spec.n_head_kv, VT.UINT32),
        "attention.layer_norm_rms_epsilon": (spec.norm_eps, VT.FLOAT32),
        "rope.freq_base": (spec.rope_base, VT.FLOAT32),
    }
    if spec.width != spec.n_head * spec.head_dim:
        values["attention.key_length"] = (spec.head_dim, VT.UINT32)
        values["attention.value_length"] = (spec.head_dim, VT.UINT32)
    if spec.rope_dim:
        values["rope.dimension_count"] = (spec.rope_dim, VT.UINT32)
    if spec.scaling_kind != "none":
        values["rope.scaling.type"] = (spec.scaling_kind, VT.STRING)
        values["rope.scaling.factor"] = (spec.scaling_factor, VT.FLOAT32)
    if spec.scaling_orig_ctx:
        values["rope.scaling.original_context_length"] = (spec.scaling_orig_ctx, VT.UINT32)
    return {
        "general.architecture": (spec.arch, VT.STRING),
        "general.name": ("tiny", VT.STRING),
        "general.quantization_version": (2, VT.UINT32),
        **{f"{spec.arch}.{key}": value for key, value in values.items()},
    }


def byte_alphabet() -> list[str]:
    """The character that GPT-2's byte-level BPE writes for each byte, in byte order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]


def tiny_tokenizer(n_vocab: int) -> Metadata:
    """A byte-level BPE vocabulary of exactly `n_vocab` >= MIN_VOCAB tokens, padded with unused ones."""
    if n_vocab < MIN_VOCAB:
        raise ValueError(f"n_vocab is {n_vocab}, the tiny tokenizer needs {MIN_VOCAB}")
    normal = byte_alphabet() + [merge.replace(" ", "") for merge in MERGES]
    n_unused = n_vocab - MIN_VOCAB
    unused = [f"[PAD{i}]" for i in range(n_unused)]
    types = [TokenType.NORMAL] * len(normal) + [TokenType.CONTROL] * 3 + [TokenType.UNUSED] * n_unused
    end_of_text = len(normal)
    return {
        "tokenizer.ggml.model": ("gpt2", VT.STRING),
        "tokenizer.ggml.pre": ("qwen2", VT.STRING),
        "tokenizer.ggml.tokens": ([*normal, *SPECIAL_TOKENS, *unused], VT.ARRAY),
        "tokenizer.ggml.token_type": ([int(t) for t in types], VT.ARRAY),
        "tokenizer.ggml.merges": (list(MERGES), VT.ARRAY),
        "tokenizer.ggml.bos_token_id": (end_of_text, VT.UINT32),
        "tokenizer.ggml.eos_token_id": (end_of_text + 2, VT.UINT32),
        "tokenizer.ggml.padding_token_id": (end_of_text, VT.UINT32),
        "tokenizer.ggml.add_bos_token": (False, VT.BOOL),
        "tokenizer.chat_template": (CHAT_TEMPLATE, VT.STRING),
    }


def tiny_shapes(spec: TinySpec) -> dict[str, tuple[int, ...]]:
    """Shapes, in numpy order, of all tensors of the model of `spec`."""
    width, n_q, n_kv = spec.width, spec.n_head * spec.head_dim, spec.n_head_kv * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (spec.n_vocab, width),
        "output_norm.weight": (width,),
    }
    if not spec.tied:
        shapes["output.weight"] = (spec.n_vocab, width)
    if "output.bias" in spec.optional:
        shapes["output.bias"] = (spec.n_vocab,)
    if "rope_freqs.weight" in spec.optional:
        shapes["rope_freqs.weight"] = ((spec.rope_dim or spec.head_dim) // 2,)
    matrices = {"attn_q": (n_q, width), "attn_k": (n_kv, width), "attn_v": (n_kv, width)}
    biases = set(spec.optional)
    if spec.joined:
        matrices = {"attn_qkv": (n_q + 2 * n_kv, width)}
        biases |= {"attn_qkv.bias"} if biases & set(QKV_BIASES) else set()
    matrices["attn_output"] = (width, n_q)
    feed_forward = {"ffn_gate": (spec.n_ff, width), "ffn_up": (spec.n_ff, width), "ffn_down": (width, spec.n_ff)}
    for layer in range(spec.n_layer):
        block: dict[str, tuple[int, ...]] = {}
        for norm, of_norm in (("attn_norm.weight", matrices), ("ffn_norm.weight", feed_forward)):
            block[norm] = (width,)
            for name, shape in of_norm.items():
                block[f"{name}.weight"] = shape
                if f"{name}.bias" in biases:
                    block[f"{name}.bias"] = shape[:1]
        if spec.arch == "qwen3":
            block |= {f"attn_{name}_norm.weight": (spec.head_dim,) for name in "qk"}
        shapes.update({f"blk.{layer}.{name}": shape for name, shape in block.items()})
    return shapes


def tiny_tensors(spec: TinySpec) -> Tensors:
    """Random packed tensors of the model of `spec`; matrices keep unit-variance activations at about one."""
    rng = np.random.default_rng(spec.seed)
    tensors: Tensors = {}
    for name, shape in tiny_shapes(spec).items():
        if name.endswith("norm.weight"):
            tensors[name] = Packed((1 + 0.2 * rng.standard_normal(shape)).astype(np.float32), QT.F32)
        elif name == "rope_freqs.weight":
            tensors[name] = Packed(rng.uniform(1, 8, shape).astype(np.float32), QT.F32)
        elif name.endswith(".bias"):
            tensors[name] = Packed((0.3 * rng.standard_normal(shape)).astype(np.float32), QT.F32)
        else:
            fan_in = 1 / sqrt(shape[-1])
            std = {"token_embd.weight": 0.5, "output.weight": 2 * fan_in}.get(name, fan_in)
            tensors[name] = random_matrix(rng, (shape[0], shape[1]), spec.type_of(name), std)
    return tensors


def random_matrix(rng: np.random.Generator, shape: tuple[int, int], kind: GGMLQuantizationType, std: float) -> Packed:
    """A random matrix of `shape` in type `kind` whose entries have a standard deviation of about `std`."""
    block, size = GGML_QUANT_SIZES[kind]
    if shape[1] % block:
        raise ValueError(f"rows of {shape[1]} cannot be {kind.name}: not a multiple of {block}")
    if kind in EXACT_TYPES or kind in QUANTISED_TYPES:
        return Packed(quantize((std * rng.standard_normal(shape)).astype(np.float32), kind), kind)
    if kind not in RANDOM_BLOCK_TYPES:
        raise ValueError(f"gguf-py cannot dequantise {kind.name}")
    blocks = rng.integers(0, 256, (prod(shape) // block, size), dtype=np.uint8)
    _set_scales(blocks, kind, 1.0)
    unit = float(dequantize(blocks, kind).std())
    _set_scales(blocks, kind, std / unit)
    return Packed(blocks.reshape(shape[0], -1), kind)


def _set_scales(blocks: np.ndarray, kind: GGMLQuantizationType, scale: float) -> None:
    """Sets the super-block scale of random `blocks` [n_blocks, bytes of a block], in place."""
    half = np.float16(scale).view(np.uint16)
    if kind is QT.NVFP4:
        # Four unsigned e4m3 bytes, of which the standard 0x38 is 1.0 and each 8 more doubles it.
        blocks[:, :4] = np.clip(round(8 * (np.log2(scale) + 7)), 1, 0x7E)
    elif kind is QT.IQ1_M:
        # The half is spread over the high nibbles of the four 16-bit scale words that end the block.
        words = blocks[:, -8:].view(np.uint16)
        words[:] = (words & 0x0FFF) | (((half >> np.arange(0, 16, 4, dtype=np.uint16)) & 0xF) << 12)
    else:
        at, at_min, mean = _RANDOM_BLOCKS[kind]
        blocks[:, at : at + 2] = np.array([half]).view(np.uint8)
        if at_min is not None:
            blocks[:, at_min : at_min + 2] = np.array([scale * mean], np.float16).view(np.uint8)


def _fitting_types(*row_sizes: int) -> list[GGMLQuantizationType]:
    return [t for t in WEIGHT_TYPES if all(n % GGML_QUANT_SIZES[t][0] == 0 for n in row_sizes)]


@st.composite
def families(draw: st.DrawFn) -> dict[str, Any]:
    """Draws the family of a TinySpec and the optional tensors of its file; mostly those of published files."""
    arch = draw(st.sampled_from(sorted(OPTIONAL)))
    usual = QKV_BIASES if arch == "qwen2" else ()
    optional = st.one_of(st.just(usual), st.sets(st.sampled_from(OPTIONAL[arch])).map(lambda names: (*sorted(names),)))
    return {"arch": arch, "optional": draw(optional), "joined": draw(st.sampled_from([False, False, True]))}


@st.composite
def tiny_specs(draw: st.DrawFn, *, max_layers: int = 3, max_ctx: int = 256) -> TinySpec:
    """Specs of tiny models: any family, grouping of heads, weight type that fits, tying and RoPE scaling."""
    n_head_kv = draw(st.integers(1, 3))
    n_head = n_head_kv * draw(st.integers(1, 4))
    head_dim = draw(st.sampled_from([16, 32, 64]))
    n_ff = draw(st.sampled_from([32, 96, 256]))
    n_ctx = draw(st.sampled_from([64, 128, 256]).filter(lambda n: n <= max_ctx))
    n_embd = draw(st.sampled_from([0, 0, 64, 256]))
    scaling = draw(st.sampled_from([("none", 1.0), ("none", 1.0), ("linear", 2.0), ("yarn", 4.0)]))
    types = _fitting_types(n_embd or n_head * head_dim, n_head * head_dim, n_ff)
    return TinySpec(
        **draw(families()),
        n_layer=draw(st.integers(1, max_layers)),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_ff=n_ff,
        n_vocab=draw(st.integers(MIN_VOCAB, MIN_VOCAB + 40)),
        n_ctx=n_ctx,
        n_embd=n_embd,
        tied=draw(st.booleans()),
        rope_base=draw(st.sampled_from([1e4, 1e5, 1e6])),
        scaling_kind=scaling[0],
        scaling_factor=scaling[1],
        scaling_orig_ctx=draw(st.sampled_from([0, int(n_ctx / scaling[1])])) if scaling[0] == "yarn" else 0,
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        weight_type=draw(st.sampled_from(types)),
        seed=draw(st.integers(0, 2**16)),
    )
