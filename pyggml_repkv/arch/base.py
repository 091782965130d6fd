"""What a family of models is, as data. A new family is one file beside this one and one line in `ARCHS`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

QKV_BIASES = frozenset(("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_qkv.bias"))


@dataclass(frozen=True, slots=True)
class Arch:
    """A family of dense decoders: RMS norms, grouped-query attention with RoPE, SwiGLU, and what is said here. The
    matrices of q, k and v may be one, `attn_qkv`.

    name: `general.architecture` of its files, and the prefix of their metadata keys.
    rope: the values of a head that RoPE turns together: i and i + d/2 (`halves`) or 2i and 2i + 1 (`pairs`).
    qk_norm: whether an RMS norm of each query and key head comes before RoPE.
    optional: what a file may have beside the matrices and norms, by the names of tensors without the layer.
    """

    name: str
    rope: Literal["halves", "pairs"] = "halves"
    qk_norm: bool = False
    optional: frozenset[str] = QKV_BIASES
