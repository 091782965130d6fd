"""The same model for one token in five nodes a layer (see native/decode_ops.h), where every matrix is as in the file."""

from __future__ import annotations

from pyggml_repkv.ffi.context import GraphContext, Tensor
from pyggml_repkv.graph.decode_ops import DecodeOps
from pyggml_repkv.graph.qwen2 import NameTensor
from pyggml_repkv.memory.policy import StepAttention
from pyggml_repkv.model.weights import Weights


def build_fused_decode(
    g: GraphContext, weights: Weights, ops: DecodeOps, attention: StepAttention, token: Tensor, cb: NameTensor
) -> Tensor:
    """token I32 [1] -> logits F32 [V]. `ops.rope` must be set."""
    inpL = g.get_rows(weights.token_embd, token)  # [1, E]
    cb(inpL, "embd", -1)
    for il, layer in enumerate(weights.layers):
        matrices = (layer.attn_q, layer.attn_k, layer.attn_v)
        biases = (layer.attn_q_bias, layer.attn_k_bias, layer.attn_v_bias)
        qkv = ops.norm_linear(g, inpL, layer.attn_norm, matrices, biases)  # [(H + 2 K) * d]
        cb(qkv, "qkv", il)
        partials = attention.attend_one(qkv, il)  # [n_threads, H, 2 + d]
        cb(partials, "kqv_partial", il)
        ffn_inp = ops.attn_out(g, partials, layer.attn_output, inpL)  # [E]
        cb(ffn_inp, "ffn_inp", il)
        hidden = ops.gate_up(g, ffn_inp, layer.ffn_norm, layer.ffn_gate, layer.ffn_up)  # [F]
        cb(hidden, "ffn_swiglu", il)
        inpL = ops.linear_add(g, hidden, layer.ffn_down, ffn_inp)  # [E]
        cb(inpL, "l_out", il)
    logits = ops.norm_linear(g, inpL, weights.output_norm, [weights.output])  # [V]
    cb(logits, "result_output", -1)
    return g.output(logits)
