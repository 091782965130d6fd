"""Model weights as ggml tensors: over the memory map where they lie, or repacked where that multiplies faster."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from pyggml_repkv.ffi.context import Tensor, TensorContext
from pyggml_repkv.ffi.handles import Buffer, aligned_zeros
from pyggml_repkv.ffi.library import g
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.gguf_file import GGUFFile
from pyggml_repkv.model.rows import QKV, Rows, layer_rows

_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Matrices are [n_out, n_in]. What the file lacks is None, as are the row-wise joins `attn_qkv` and `ffn_gate_up`
    where the parts are kept apart.

    qkv_biases: no tensors, or one for each of q, k and v, zeros where only others have one.
    """

    attn_norm: Tensor
    attn_q: Tensor
    attn_k: Tensor
    attn_v: Tensor
    attn_output: Tensor
    ffn_norm: Tensor
    ffn_gate: Tensor
    ffn_up: Tensor
    ffn_down: Tensor
    attn_q_bias: Tensor | None = None
    attn_k_bias: Tensor | None = None
    attn_v_bias: Tensor | None = None
    qkv_biases: tuple[Tensor, ...] = ()
    attn_q_norm: Tensor | None = None
    attn_k_norm: Tensor | None = None
    attn_output_bias: Tensor | None = None
    ffn_gate_bias: Tensor | None = None
    ffn_up_bias: Tensor | None = None
    ffn_down_bias: Tensor | None = None
    attn_qkv: Tensor | None = None
    attn_qkv_bias: Tensor | None = None
    ffn_gate_up: Tensor | None = None
    ffn_gate_up_bias: Tensor | None = None


_JOINS = {"attn_qkv": QKV, "ffn_gate_up": ("ffn_gate", "ffn_up")}


class Weights:
    """All tensors of a checked file (see `check_tensors`), kept alive together with the memory map.

    `key_biases`: float32 [K * d] of each layer, in the order of the file, None where no key is a product plus a bias.
    `repacked` says whether any matrix was copied into a layout of ggml's; such a matrix can only be multiplied by
    ggml's own node, so the fused decode ops are not used then. `joins` says whether matrices are joined that the file
    has apart.
    """

    def __init__(self, file: GGUFFile, config: ModelConfig, *, repack: bool, join: bool) -> None:
        self._file, self._config = file, config
        self._context = TensorContext(len(fields(LayerWeights)) * config.n_layer + 16)
        self._maps = [Buffer.over(part) for part in file.parts]
        self._buffers: list[Buffer] = []
        self._repacker = Repacker() if repack else None
        self.joins = join
        self.repacked = False
        self.repacked_bytes = 0
        # Of the file, what is never read again since it was repacked.
        self.replaced_bytes = 0

        self.token_embd = self._mapped(self._of_vocabulary("token_embd.weight"))
        self.output_norm = self._mapped(Rows.of(file, "output_norm.weight"))
        output_name = "token_embd.weight" if config.tied_output else "output.weight"
        self.output = self._matrix([self._of_vocabulary(output_name)], "output.weight")
        bias, freqs = "output.bias", "rope_freqs.weight"
        self.output_bias = self._mapped(self._of_vocabulary(bias)) if bias in file.tensors else None
        self.rope_freqs = self._mapped(Rows.of(file, freqs)) if freqs in file.tensors else None
        self.key_biases: list[np.ndarray | None] = []
        self.layers = [self._layer(i) for i in range(config.n_layer)]
        if self._buffers:  # what was copied is hardly read from the file again
            file.release_pages()

    def _of_vocabulary(self, name: str) -> Rows:
        """Without the rows of no token: their logits are not computed, so that none of them is ever drawn."""
        return replace(Rows.of(self._file, name), n=self._config.n_vocab)

    def _layer(self, layer: int) -> LayerWeights:
        rows = layer_rows(self._file, self._config, layer)
        has_key_bias = "attn_k_bias" in rows and "attn_k_norm" not in rows
        self.key_biases.append(self._bias(rows, "attn_k") if has_key_bias else None)
        made: dict[str, Any] = {}
        for whole, parts in _JOINS.items():
            of_whole = [rows[whole]] if whole in rows else [rows[part] for part in parts]
            if whole in rows or (self.joins and self._gains_by_joining(of_whole)):
                made[whole] = self._matrix(of_whole, f"blk.{layer}.{whole}.weight")
                made |= {part: self._mapped(rows[part]) for part in parts}
                if _any_bias(rows, parts):
                    bias = np.concatenate([self._bias(rows, part) for part in parts])
                    made[f"{whole}_bias"] = self._vector(f"blk.{layer}.{whole}.bias", bias)
        made |= {part: self._matrix([rows[part]], rows[part].name) for part in rows if part not in made}
        if _any_bias(rows, QKV):
            made["qkv_biases"] = tuple(
                made[f"{part}_bias"]
                if f"{part}_bias" in made
                else self._vector(f"blk.{layer}.{part}.bias", self._bias(rows, part))
                for part in QKV
            )
        return LayerWeights(**made)

    def _gains_by_joining(self, parts: Sequence[Rows]) -> bool:
        """Whether the parts are matrices of one type that are repacked anyway."""
        if self._repacker is None or len({part.info.type for part in parts}) != 1:
            return False
        return self._repacker.buffer_type(parts[0].info.type, _joined_shape(parts)) is not None

    def _bias(self, rows: dict[str, Rows], part: str) -> np.ndarray:
        """float32 [n_out] of a matrix: zeros where the file has none."""
        bias = rows.get(f"{part}_bias")
        return np.zeros(rows[part].n, np.float32) if bias is None else bias.floats_in(self._file)

    def _matrix(self, parts: Sequence[Rows], name: str) -> Tensor:
        """What is only multiplied, or a vector: repacked if this CPU has a layout for it, else the only part."""
        type_, shape = parts[0].info.type, _joined_shape(parts)
        buffer_type = self._repacker.buffer_type(type_, shape) if self._repacker and len(shape) == 2 else None
        if buffer_type is None:
            (part,) = parts
            return self._mapped(part)
        data = [part.bytes_in(self._file) for part in parts]
        rows = data[0] if len(data) == 1 else np.concatenate(data)
        tensor = self._context.new(type_, shape, name)
        buffer = Buffer.allocate(buffer_type, g.ggml_backend_buft_get_alloc_size(buffer_type, tensor))
        self._buffers.append(buffer)
        buffer.place(tensor, 0)
        g.ggml_backend_tensor_set(tensor, rows.ctypes.data_as(ctypes.c_void_p), 0, rows.nbytes)
        self.repacked = True
        self.repacked_bytes += buffer.size
        if parts[0].name != "token_embd.weight":  # whose rows are still taken from the file
            self.replaced_bytes += rows.nbytes
        return tensor

    def _mapped(self, rows: Rows) -> Tensor:
        if len(rows.shape) == 1 and rows.info.type != GGMLQuantizationType.F32:
            return self._vector(rows.name, rows.floats_in(self._file))
        if rows.offset % _ALIGNMENT:
            return self._copied(rows.name, rows.info.type, rows.shape, rows.bytes_in(self._file))
        tensor = self._context.new(rows.info.type, rows.shape, rows.name)
        self._maps[rows.info.part].place(tensor, rows.offset)
        return tensor

    def _vector(self, name: str, values: np.ndarray) -> Tensor:
        return self._copied(name, g.GGML_TYPE_F32, values.shape, values.view(np.uint8))

    def _copied(self, name: str, type_: int, shape: tuple[int, ...], data: np.ndarray) -> Tensor:
        memory = aligned_zeros(-(-data.nbytes // 64) * 64)
        memory[: data.nbytes] = data
        buffer = Buffer.over(memory)
        self._buffers.append(buffer)
        tensor = self._context.new(type_, shape, name)
        buffer.place(tensor, 0)
        return tensor

    def close(self) -> None:
        self._context.close()
        for buffer in (*self._buffers, *self._maps):
            buffer.close()


def _any_bias(rows: dict[str, Rows], parts: Sequence[str]) -> bool:
    return any(f"{part}_bias" in rows for part in parts)


def _joined_shape(parts: Sequence[Rows]) -> tuple[int, ...]:
    return (sum(part.n for part in parts), *parts[0].shape[1:])


class Repacker:
    """Asks ggml's CPU backend which layouts it has for a matrix on this CPU."""

    def __init__(self) -> None:
        self._device = g.ggml_backend_reg_dev_get(g.ggml_backend_cpu_reg(), 0)
        self._buffer_types = _extra_buffer_types(self._device)
        self._known: dict[tuple[int, tuple[int, ...]], int | None] = {}

    def buffer_type(self, type_: int, shape: tuple[int, ...]) -> int | None:
        """The buffer type that repacks [n_out, n_in] matrices of this type, or None."""
        key = (int(type_), shape)
        if key not in self._known:
            self._known[key] = next((b for b in self._buffer_types if self._supports(b, *key)), None)
        return self._known[key]

    def _supports(self, buffer_type: int, type_: int, shape: tuple[int, ...]) -> bool:
        context = TensorContext(8)
        weight = context.new(type_, shape)
        x = context.new(g.GGML_TYPE_F32, (512, shape[1]))
        node = g.ggml_mul_mat(context.pointer, weight, x)
        # Pages of the trial buffer are never touched, so its size costs nothing.
        buffer = Buffer.allocate(buffer_type, g.ggml_backend_buft_get_alloc_size(buffer_type, weight))
        try:
            buffer.place(weight, 0)
            return bool(weight.contents.extra) and g.ggml_backend_dev_supports_op(self._device, node)
        finally:
            context.close()
            buffer.close()


def _extra_buffer_types(device: Any) -> list[int]:
    """Of ggml's layouts all but AMX tiles: GCC drops the stores of the table that sets them up, so that the first
    multiplication ends the process with SIGILL (github.com/ggml-org/llama.cpp/pull/26954).
    """
    registry = g.ggml_backend_cpu_reg()
    address = g.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return []
    function = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
    types: list[int] = []
    found = function(device)
    while found and found[len(types)]:
        types.append(found[len(types)])
    return [t for t in types if g.ggml_backend_buft_name(t) != b"AMX"]
