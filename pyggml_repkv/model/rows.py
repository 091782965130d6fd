"""Rows of a file's tensors: what a model takes as one weight, also where the file has several of them joined."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.gguf_file import GGUFFile, TensorInfo

QKV = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows [first, first + n) of a tensor, and the name they go by; a vector has as many rows as values."""

    name: str
    info: TensorInfo
    first: int
    n: int

    @classmethod
    def of(cls, file: GGUFFile, name: str) -> Rows:
        info = file.tensors[name]
        return cls(name, info, 0, info.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n, *self.info.shape[1:])

    @property
    def offset(self) -> int:
        """From the start of the part of the file that it lies in, in bytes."""
        return self.info.offset + self.first * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return self.info.n_bytes // self.info.shape[0]

    def bytes_in(self, file: GGUFFile) -> np.ndarray:
        """The mapped bytes: uint8 [n_bytes], read-only."""
        first = self.first * self._row_bytes
        return file.tensor_bytes(self.info.name)[first : first + self.n * self._row_bytes]

    def floats_in(self, file: GGUFFile) -> np.ndarray:
        """float32, in the shape of the rows."""
        data = self.bytes_in(file).reshape(*self.shape[:-1], -1)
        return dequantize(data, GGMLQuantizationType(self.info.type))


def layer_rows(file: GGUFFile, config: ModelConfig, layer: int) -> dict[str, Rows]:
    """All that a checked file has of a layer, by the fields of `LayerWeights`: where q, k and v are joined, both the
    whole and its parts.
    """
    prefix = f"blk.{layer}."
    found: dict[str, Rows] = {}
    for name in file.tensors:
        if name.startswith(prefix):
            found[_field(name.removeprefix(prefix))] = Rows.of(file, name)
    sizes = (config.n_embd_q, config.n_embd_kv, config.n_embd_kv)
    for suffix in ("weight", "bias"):
        whole = found.get(_field(f"attn_qkv.{suffix}"))
        if whole is None:
            continue
        for part, n, end in zip(QKV, sizes, accumulate(sizes), strict=True):
            name = f"{part}.{suffix}"
            found[_field(name)] = replace(whole, name=prefix + name, first=end - n, n=n)
    return found


def _field(suffix: str) -> str:
    return suffix.removesuffix(".weight").replace(".bias", "_bias")
