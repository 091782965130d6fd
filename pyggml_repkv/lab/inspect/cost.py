"""The cost of a node from its shapes: operations (a multiply-add counts as two), and bytes read and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from pyggml_repkv.lab.inspect.graph_reader import RawTensor, info_of
from pyggml_repkv.memory.policy import StepCost
from pyggml_repkv.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Step:
    """What a cost depends on besides shapes."""

    config: ModelConfig
    n_tokens: int
    memory: StepCost


def flops_of(t: RawTensor, sources: Sequence[RawTensor], step: Step) -> int:
    """Returns the operations of a node; 0 if it only moves data, or if they are few beside the multiplications."""
    config, cost = step.config, info_of(t.op).cost
    if cost in ("matrices_one", "matrices"):
        # Only matrices have two dimensions; norms, biases and activations of one token have one.
        n_tokens = 1 if cost == "matrices_one" else step.n_tokens
        return 2 * n_tokens * sum(prod(s.shape) for s in sources if _is_weight(s) and len(s.shape) == 2)
    if cost == "attention":
        return 4 * step.n_tokens * step.memory.n_attended * config.n_embd_q
    if t.op == "flash_attn_ext":
        # With the padded keys, as ggml computes; it skips some of the masked ones.
        return 4 * prod(sources[0].shape) * sources[1].shape[-2]
    if t.op == "mul_mat":
        return 2 * prod(t.shape) * sources[0].shape[-1]
    if cost == "relevance":
        return 2 * step.memory.n_queries * step.memory.n_indexed * config.n_embd_q
    if cost == "score":
        return 2 * step.n_tokens * step.memory.n_scored * config.n_embd_q
    return 0


def _is_weight(t: RawTensor) -> bool:
    return t.name.endswith((".weight", ".bias"))


def bytes_of(t: RawTensor, sources: Sequence[RawTensor], step: Step) -> int:
    """Returns the bytes that a node moves with empty caches: weights and activations whole; of keys, values and index
    the part that the step attends.
    """
    if t.op in ("view", "reshape", "permute", "transpose", ""):
        return 0
    info = info_of(t.op)
    moved = step.n_tokens * _row_bytes(t) if t.op == "set_rows" else t.n_bytes
    if info.cost == "attention":
        # All arenas have rows of the same width.
        moved += step.memory.n_attended * sum(_row_bytes(sources[i]) for i in info.reads[:2])
    for i, source in enumerate(sources):
        if i in info.writes:
            moved += step.n_tokens * _row_bytes(source)
        if i in info.reads:
            if info.cost == "relevance":
                moved += step.memory.index_bytes if i == info.reads[0] else 0
            elif info.cost == "score":
                moved += step.memory.n_scored * _row_bytes(source)
        elif i not in info.writes:
            rows = t.op == "get_rows" and i == 0
            moved += step.n_tokens * _row_bytes(source) if rows else source.n_bytes
    return moved


def _row_bytes(t: RawTensor) -> int:
    return t.n_bytes // t.shape[0] if len(t.shape) > 1 else t.n_bytes
