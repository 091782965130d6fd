"""Model weights as ggml tensors: over the memory map where they lie, or repacked where that multiplies faster."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from pyggml_repkv.ffi.context import Tensor, TensorContext
from pyggml_repkv.ffi.handles import Buffer, aligned_zeros
from pyggml_repkv.ffi.library import g
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.gguf_file import GGUFFile

_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Matrices are [n_out, n_in]. `attn_qkv` and `ffn_gate_up` are the row-wise joins, None where kept apart."""

    attn_norm: Tensor
    attn_q: Tensor
    attn_k: Tensor
    attn_v: Tensor
    attn_q_bias: Tensor
    attn_k_bias: Tensor
    attn_v_bias: Tensor
    attn_output: Tensor
    ffn_norm: Tensor
    ffn_gate: Tensor
    ffn_up: Tensor
    ffn_down: Tensor
    attn_qkv: Tensor | None = None
    attn_qkv_bias: Tensor | None = None
    ffn_gate_up: Tensor | None = None


_PARTS = {
    "attn_norm": "attn_norm.weight",
    "attn_q": "attn_q.weight",
    "attn_k": "attn_k.weight",
    "attn_v": "attn_v.weight",
    "attn_q_bias": "attn_q.bias",
    "attn_k_bias": "attn_k.bias",
    "attn_v_bias": "attn_v.bias",
    "attn_output": "attn_output.weight",
    "ffn_norm": "ffn_norm.weight",
    "ffn_gate": "ffn_gate.weight",
    "ffn_up": "ffn_up.weight",
    "ffn_down": "ffn_down.weight",
}

_JOINS = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "attn_qkv_bias": ("attn_q_bias", "attn_k_bias", "attn_v_bias"),
    "ffn_gate_up": ("ffn_gate", "ffn_up"),
}


class Weights:
    """All tensors of a checked file (see `check_tensors`), kept alive together with the memory map.

    `repacked` says whether any matrix was copied into a layout of ggml's; such a matrix can only be multiplied by
    ggml's own node, so the fused decode ops are not used then. `joins` says whether matrices may be joined.
    """

    def __init__(self, file: GGUFFile, config: ModelConfig, *, repack: bool, join: bool) -> None:
        self._file, self._config = file, config
        self._context = TensorContext((len(_PARTS) + len(_JOINS)) * config.n_layer + 16)
        self._map = Buffer.over(file.data)
        self._buffers: list[Buffer] = []
        self._repacker = Repacker() if repack else None
        self.joins = join
        self.repacked = False
        self.repacked_bytes = 0
        # Of the file, what is never read again since it was repacked.
        self.replaced_bytes = 0

        self.token_embd = self._mapped("token_embd.weight")
        self.output_norm = self._mapped("output_norm.weight")
        output_name = "token_embd.weight" if config.tied_output else "output.weight"
        self.output = self._matrix([output_name], "output.weight")
        self.layers = [self._layer(i, join) for i in range(config.n_layer)]
        if self.repacked:
            file.release_pages()

    def floats(self, name: str, row: int | None = None) -> np.ndarray:
        """A tensor of the file, or one row of it, as float32."""
        info = self._file.tensors[name]
        data = self._file.tensor_bytes(name).reshape(*info.shape[:-1], -1)
        return dequantize(data if row is None else data[row], GGMLQuantizationType(info.type))

    def _layer(self, layer: int, join: bool) -> LayerWeights:
        names = {part: f"blk.{layer}.{suffix}" for part, suffix in _PARTS.items()}
        joined: dict[str, Tensor] = {}
        if join:
            for whole, parts in _JOINS.items():
                if whole == "attn_qkv_bias" and "attn_qkv" not in joined:
                    continue
                tensor = self._join(f"blk.{layer}.{whole}", [names[part] for part in parts])
                if tensor is not None:
                    joined[whole] = tensor
        covered = {part for whole in joined for part in _JOINS[whole]}
        single: dict[str, Tensor] = {}
        for part, name in names.items():
            single[part] = self._mapped(name) if part in covered else self._matrix([name], name)
        return LayerWeights(**single, **joined)

    def _join(self, name: str, parts: list[str]) -> Tensor | None:
        """One tensor of the parts' rows, where that pays: matrices that are repacked anyway, and their biases."""
        infos = [self._file.tensors[part] for part in parts]
        if len({info.type for info in infos}) != 1:
            return None
        if len(infos[0].shape) == 2:
            if self._repacker is None or self._repacker.buffer_type(infos[0].type, self._shape(parts)) is None:
                return None
            return self._matrix(parts, name)
        bias = np.concatenate([self._file.tensor_bytes(part) for part in parts])
        return self._copied(name, infos[0].type, self._shape(parts), bias)

    def _shape(self, parts: Iterable[str]) -> tuple[int, ...]:
        shapes = [self._file.tensors[part].shape for part in parts]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def _matrix(self, parts: list[str], name: str) -> Tensor:
        """A matrix that is only multiplied, from the rows of `parts`: repacked if this CPU has a layout for it."""
        type_, shape = self._file.tensors[parts[0]].type, self._shape(parts)
        buffer_type = self._repacker.buffer_type(type_, shape) if self._repacker and len(shape) == 2 else None
        if buffer_type is None:
            return self._mapped(parts[0])
        data = [self._file.tensor_bytes(part) for part in parts]
        rows = data[0] if len(data) == 1 else np.concatenate(data)
        tensor = self._context.new(type_, shape, name)
        buffer = Buffer.allocate(buffer_type, g.ggml_backend_buft_get_alloc_size(buffer_type, tensor))
        self._buffers.append(buffer)
        buffer.place(tensor, 0)
        g.ggml_backend_tensor_set(tensor, rows.ctypes.data_as(ctypes.c_void_p), 0, rows.nbytes)
        self.repacked = True
        self.repacked_bytes += buffer.size
        if parts[0] != "token_embd.weight":  # whose rows are still taken from the file
            self.replaced_bytes += rows.nbytes
        return tensor

    def _mapped(self, name: str) -> Tensor:
        info = self._file.tensors[name]
        if info.offset % _ALIGNMENT:
            return self._copied(name, info.type, info.shape, self._file.tensor_bytes(name))
        tensor = self._context.new(info.type, info.shape, name)
        self._map.place(tensor, info.offset)
        return tensor

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
        for buffer in (*self._buffers, self._map):
            buffer.close()


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
