"""What a node costs, from shapes alone: operations, where a multiply-add counts as two, and bytes read and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from pyggml_repkv.lab.inspect.graph_reader import RawTensor, info_of
from pyggml_repkv.memory.policy import StepCost
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.ops.kernels import LANES


@dataclass(frozen=True, slots=True)
class Step:
    """What shapes do not say."""

    config: ModelConfig
    n_tokens: int
    memory: StepCost


def flops_of(t: RawTensor, sources: Sequence[RawTensor], step: Step) -> int:
    """0 for what only moves or names data, and for what is small beside the multiplications."""
    c, cost = step.config, info_of(t.op).cost
    if cost in ("matrices_one", "matrices"):
        # Two-dimensional weights; norms, biases and activations of one token have one dimension.
        n_tokens = 1 if cost == "matrices_one" else step.n_tokens
        return 2 * n_tokens * sum(prod(s.shape) for s in sources if _is_weight(s) and len(s.shape) == 2)
    if cost == "attention":
        return 4 * step.n_tokens * step.memory.n_attended * c.n_embd_q
    if t.op == "flash_attn_ext":
        # Of the padded keys, as ggml does; masked ones are skipped in part.
        return 4 * prod(sources[0].shape) * sources[1].shape[-2]
    if t.op == "mul_mat":
        return 2 * prod(t.shape) * sources[0].shape[-1]
    if cost == "relevance":
        return 2 * step.memory.n_indexed * c.n_embd_q
    if cost == "score":
        return 2 * step.n_tokens * step.memory.n_scored * c.n_embd_q
    return 0


def _is_weight(t: RawTensor) -> bool:
    return t.name.endswith((".weight", ".bias"))


def bytes_of(t: RawTensor, sources: Sequence[RawTensor], step: Step) -> int:
    """Of weights and activations all, of keys, values and index what a step attends; caches are taken to be empty."""
    if t.op in ("view", "reshape", "permute", "transpose", ""):
        return 0
    info = info_of(t.op)
    moved = step.n_tokens * _row_bytes(t) if t.op == "set_rows" else t.n_bytes
    if info.cost == "attention":
        # One softmax over rows of one width, in whatever arenas they lie.
        moved += step.memory.n_attended * sum(_row_bytes(sources[i]) for i in info.reads[:2])
    for i, source in enumerate(sources):
        if i in info.writes:
            moved += step.n_tokens * _row_bytes(source)
        if i in info.reads:
            if info.cost == "relevance":
                moved += source.n_bytes * step.memory.n_blocks // max(1, LANES * source.shape[0])
            elif info.cost == "score":
                moved += step.memory.n_scored * _row_bytes(source)
        elif i not in info.writes:
            rows = t.op == "get_rows" and i == 0
            moved += step.n_tokens * _row_bytes(source) if rows else source.n_bytes
    return moved


def _row_bytes(t: RawTensor) -> int:
    return t.n_bytes // t.shape[0] if len(t.shape) > 1 else t.n_bytes
