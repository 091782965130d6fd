"""What a node costs, from shapes alone: floating-point operations, where a multiply-add counts as two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from pyggml_repkv.ffi.graph_reader import RawTensor
from pyggml_repkv.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Step:
    """What shapes do not say. n_attended: keys that a token attends, on average; n_blocks: in the index; n_scored: keys
    that a token scores.
    """

    config: ModelConfig
    n_tokens: int
    n_attended: int
    n_blocks: int = 0
    n_repr: int = 0
    n_scored: int = 0


_MATRIX_OPS = frozenset(
    f"repkv.{name}"
    for name in ("norm_linear", "attn_out", "gate_up", "linear_add", "matmul", "matmul_add", "matmul_gate_up")
)
_ATTENTION = frozenset(
    f"repkv.{name}" for name in ("attend", "attend_chunk", "attend_memory", "attend_memory_one")
)  # fmt: skip


def flops_of(t: RawTensor, sources: Sequence[RawTensor], step: Step) -> int:
    """0 for what only moves or names data, and for what is small beside the multiplications."""
    c = step.config
    if t.op in _MATRIX_OPS:
        # Two-dimensional weights; norms, biases and activations of one token have one dimension.
        n_tokens = (
            1 if t.op in ("repkv.norm_linear", "repkv.attn_out", "repkv.gate_up", "repkv.linear_add") else step.n_tokens
        )
        return 2 * n_tokens * sum(prod(s.shape) for s in sources if _is_weight(s) and len(s.shape) == 2)
    if t.op in _ATTENTION:
        return 4 * step.n_tokens * step.n_attended * c.n_embd_q
    if t.op == "flash_attn_ext":
        # Of the padded keys, as ggml does; masked ones are skipped in part.
        return 4 * prod(sources[0].shape) * sources[1].shape[-2]
    if t.op == "mul_mat":
        return 2 * prod(t.shape) * sources[0].shape[-1]
    if t.op.startswith("repkv.relevance"):
        return 2 * step.n_blocks * step.n_repr * c.n_embd_q
    if t.op.startswith("repkv.score"):
        return 2 * step.n_tokens * step.n_scored * c.n_embd_q
    return 0


def _is_weight(t: RawTensor) -> bool:
    return t.name.endswith((".weight", ".bias"))
