"""Types in which keys and values are kept."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from pyggml_repkv.errors import InputError
from pyggml_repkv.ffi.library import g
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.model.config import ModelConfig

GGML_CACHE_TYPES = {
    "f16": g.GGML_TYPE_F16,
    "bf16": g.GGML_TYPE_BF16,
    "f32": g.GGML_TYPE_F32,
    "q8_0": g.GGML_TYPE_Q8_0,
}


def to_float32(rows: NDArray[np.uint8], type_name: str) -> NDArray[np.float32]:
    """Rows of an arena, uint8 [n, bytes of a row] -> float32 [n, values of a row]."""
    if type_name == "f16":
        return rows.view(np.float16).astype(np.float32)
    return np.ascontiguousarray(dequantize(rows, GGMLQuantizationType[type_name.upper()]), np.float32)


def check_cache_types(config: ModelConfig, memory: MemoryConfig) -> None:
    for flag, name in (("-ctk", memory.type_k), ("-ctv", memory.type_v)):
        block = g.ggml_blck_size(GGML_CACHE_TYPES[name])
        if config.head_dim % block:
            raise InputError(f"{flag} {name} needs a head size that {block} divides; this model's is {config.head_dim}")
    if memory.type_evicted and config.n_embd_kv % g.ggml_blck_size(GGML_CACHE_TYPES[memory.type_evicted]):
        raise InputError(f"--cache-type-evicted {memory.type_evicted} does not fit rows of {config.n_embd_kv} values")
    if not memory.flash_attn and memory.type_v == "q8_0":
        raise InputError("-ctv q8_0 needs flash attention; leave out -fa off, or use f16, bf16 or f32")
