"""Qwen2 as a ggml graph: llama.cpp's nodes in llama.cpp's order, with its names.

Comments give shapes: T tokens, E embedding, H query heads, K key/value heads, d head size, F feed-forward size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyggml_repkv.ffi.context import GraphContext, Rope, Tensor
from pyggml_repkv.memory.policy import StepAttention
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.weights import LayerWeights, Weights

NameTensor = Callable[[Any, str, int], None]


class Qwen2Graph:
    """Builds the nodes of one step. `cb(tensor, name, layer)` names them; layer is -1 outside the layers."""

    def __init__(
        self,
        context: GraphContext,
        config: ModelConfig,
        weights: Weights,
        rope: Rope,
        attention: StepAttention,
        cb: NameTensor,
    ) -> None:
        self.g, self.config, self.weights, self.rope = context, config, weights, rope
        self.attention, self.cb = attention, cb

    def build(
        self, tokens: Tensor, positions: Tensor, *, output_rows: Tensor | None = None, output: bool = True
    ) -> Tensor | None:
        """tokens, positions I32 [T] -> logits F32 [n_outputs, V] of the rows in `output_rows` (I32; None = all).

        Without `output` nobody reads the logits, so the last layer only stores its keys and values.
        """
        g, cb = self.g, self.cb
        inpL = g.get_rows(self.weights.token_embd, tokens)  # [T, E]
        cb(inpL, "embd", -1)
        for il, layer in enumerate(self.weights.layers):
            is_last = il == self.config.n_layer - 1
            inpSA = inpL
            cur = self.norm(inpL, layer.attn_norm, "attn_norm", il)  # [T, E]
            q, k, v = self.qkv(cur, layer, positions, il)  # [T, H, d], [T, K, d], [T, K, d]
            if is_last and not output:
                self.attention.store((q, k, v), il)
                return None
            cur = self.attention.attend((q, k, v), il)  # [T, H * d]
            cb(cur, "kqv_out", il)
            cur = g.linear(layer.attn_output, cur)  # [T, E]
            cb(cur, "attn_out", il)
            if is_last and output_rows is not None:
                cur = g.get_rows(cur, output_rows)  # [n_outputs, E]
                inpSA = g.get_rows(inpSA, output_rows)
            ffn_inp = g.add(cur, inpSA)  # [T, E]
            cb(ffn_inp, "ffn_inp", il)
            cur = self.norm(ffn_inp, layer.ffn_norm, "ffn_norm", il)  # [T, E]
            cur = self.ffn(cur, layer, il)  # [T, E]
            inpL = g.add(cur, ffn_inp)  # [T, E]
            cb(inpL, "l_out", il)

        cur = self.norm(inpL, self.weights.output_norm, "result_norm", -1)  # [n_outputs, E]
        cur = g.linear(self.weights.output, cur)  # [n_outputs, V]
        cb(cur, "result_output", -1)
        return g.output(cur)

    def norm(self, x: Tensor, weight: Tensor, name: str, il: int) -> Tensor:
        cur = self.g.rms_norm(x, self.config.norm_eps)
        self.cb(cur, "norm", il)
        cur = self.g.mul(cur, weight)
        self.cb(cur, name, il)
        return cur

    def qkv(self, cur: Tensor, layer: LayerWeights, positions: Tensor, il: int) -> tuple[Tensor, Tensor, Tensor]:
        """cur [T, E] -> q [T, H, d] and k [T, K, d] rotated, v [T, K, d]."""
        g, cb, c = self.g, self.cb, self.config
        heads = (("Qcur", c.n_head), ("Kcur", c.n_head_kv), ("Vcur", c.n_head_kv))
        if layer.attn_qkv is not None:
            joined = g.linear(layer.attn_qkv, cur)  # [T, (H + 2 K) * d]
            cb(joined, "wqkv", il)
            joined = g.add(joined, layer.attn_qkv_bias)
            cb(joined, "bqkv", il)
            parts = _split_heads(g, joined, [n for _, n in heads], c.head_dim)
        else:
            matrices = (layer.attn_q, layer.attn_k, layer.attn_v)
            biases = (layer.attn_q_bias, layer.attn_k_bias, layer.attn_v_bias)
            parts = []
            for (name, n), matrix, bias in zip(heads, matrices, biases, strict=True):
                x = g.linear(matrix, cur)  # [T, n * d]
                cb(x, name, il)
                x = g.add(x, bias)
                cb(x, name, il)
                parts.append(g.reshape(x, (x.contents.ne[1], n, c.head_dim)))
        q, k, v = parts
        q, k = g.rope_neox(q, positions, self.rope), g.rope_neox(k, positions, self.rope)
        for x, (name, _) in zip((q, k, v), heads, strict=True):
            cb(x, name, il)
        if not self.weights.joins:
            # The order in which llama.cpp's graph has them.
            for x in (q, v, k):
                g.expand(x)
        return q, k, v

    def ffn(self, cur: Tensor, layer: LayerWeights, il: int) -> Tensor:
        """silu(gate) * up, then down: [T, E] -> [T, E]."""
        g, cb = self.g, self.cb
        if layer.ffn_gate_up is not None:
            cur = g.linear(layer.ffn_gate_up, cur)  # [T, 2 F]
            cb(cur, "ffn_gate_up", il)
            cur = g.swiglu_halves(cur)  # [T, F]
        else:
            up = g.linear(layer.ffn_up, cur)  # [T, F]
            cb(up, "ffn_up", il)
            gate = g.linear(layer.ffn_gate, cur)  # [T, F]
            cb(gate, "ffn_gate", il)
            cur = g.swiglu(gate, up)  # [T, F]
        cb(cur, "ffn_swiglu", il)
        cur = g.linear(layer.ffn_down, cur)  # [T, E]
        cb(cur, "ffn_out", il)
        return cur


def _split_heads(g: GraphContext, joined: Tensor, n_heads: list[int], head_dim: int) -> list[Tensor]:
    """[T, sum of n_heads * d] -> views [T, n, d], side by side in each row."""
    n_tokens, row_bytes = joined.contents.ne[1], joined.contents.nb[1]
    head_bytes = 4 * head_dim
    views, first = [], 0
    for n in n_heads:
        views.append(g.view(joined, (n_tokens, n, head_dim), (row_bytes, head_bytes), first * head_bytes))
        first += n
    return views
