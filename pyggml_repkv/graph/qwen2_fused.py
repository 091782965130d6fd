"""The same model in the extension's fused nodes, for weights that lie as in the file: five nodes a layer for one token,
seven for a chunk. Shapes as in qwen2.py; P panels of PANEL tokens.
"""

from __future__ import annotations

from pyggml_repkv.ffi.context import Tensor
from pyggml_repkv.graph.qwen2 import NameTensor
from pyggml_repkv.memory.policy import StepAttention
from pyggml_repkv.model.weights import LayerWeights, Weights
from pyggml_repkv.ops.kernels import PANEL
from pyggml_repkv.ops.makers import Ops


class FusedQwen2Graph:
    """Builds the nodes of one step."""

    def __init__(self, ops: Ops, weights: Weights, attention: StepAttention, cb: NameTensor) -> None:
        self.g, self.ops, self.weights, self.attention, self.cb = ops.g, ops, weights, attention, cb

    def build_one(self, token: Tensor) -> Tensor:
        """token I32 [1] -> logits [V]."""
        g, ops, cb = self.g, self.ops, self.cb
        inpL = g.get_rows(self.weights.token_embd, token)  # [1, E]
        cb(inpL, "embd", -1)
        for il, layer in enumerate(self.weights.layers):
            qkv = ops.norm_linear(inpL, layer.attn_norm, *_qkv(layer))  # [(H + 2 K) * d]
            cb(qkv, "qkv", il)
            partials = self.attention.attend(qkv, il)  # [n_threads, H, 2 + d]
            cb(partials, "kqv_partial", il)
            ffn_inp = ops.attn_out(partials, layer.attn_output, inpL)  # [E]
            cb(ffn_inp, "ffn_inp", il)
            inpL = self._ffn_one(ffn_inp, layer, il)
        return self._logits_one(inpL)

    def build_chunk(self, tokens: Tensor, *, last_only: bool = True, output: bool = True) -> Tensor | None:
        """tokens I32 [T] -> logits of the last [V], or of all, packed [P, V, PANEL].

        Without `output` the last layer only stores its keys and values.
        """
        g, ops, cb = self.g, self.ops, self.cb
        last_token = tokens.contents.ne[0] - 1
        inpL = ops.pack(g.get_rows(self.weights.token_embd, tokens))  # [P, E, PANEL]
        cb(inpL, "embd", -1)
        for il, layer in enumerate(self.weights.layers):
            is_last = layer is self.weights.layers[-1]
            cur = ops.norm_packed(inpL, layer.attn_norm)
            cb(cur, "attn_norm", il)
            qkv = ops.matmul(cur, *_qkv(layer))  # [P, (H + 2 K) * d, PANEL]
            cb(qkv, "qkv", il)
            if is_last and not output:
                self.attention.store(qkv, il)
                return None
            cur = self.attention.attend(qkv, il)  # [P, H * d, PANEL]
            cb(cur, "kqv_out", il)
            if is_last and last_only:
                cur, inpL = self._lane(cur, last_token), self._lane(inpL, last_token)  # [H * d], [E]
                ffn_inp = ops.linear_add(cur, layer.attn_output, inpL)  # [E]
                cb(ffn_inp, "ffn_inp", il)
                return self._logits_one(self._ffn_one(ffn_inp, layer, il))
            ffn_inp = ops.matmul_add(cur, layer.attn_output, inpL)  # [P, E, PANEL]
            cb(ffn_inp, "ffn_inp", il)
            cur = ops.norm_packed(ffn_inp, layer.ffn_norm)
            cb(cur, "ffn_norm", il)
            cur = ops.matmul_gate_up(cur, layer.ffn_gate, layer.ffn_up)  # [P, F, PANEL]
            cb(cur, "ffn_swiglu", il)
            inpL = ops.matmul_add(cur, layer.ffn_down, ffn_inp)  # [P, E, PANEL]
            cb(inpL, "l_out", il)
        cur = ops.norm_packed(inpL, self.weights.output_norm)
        cb(cur, "result_norm", -1)
        cur = ops.matmul(cur, [self.weights.output])  # [P, V, PANEL]
        cb(cur, "result_output", -1)
        return g.output(cur)

    def _ffn_one(self, ffn_inp: Tensor, layer: LayerWeights, il: int) -> Tensor:
        hidden = self.ops.gate_up(ffn_inp, layer.ffn_norm, layer.ffn_gate, layer.ffn_up)  # [F]
        self.cb(hidden, "ffn_swiglu", il)
        out = self.ops.linear_add(hidden, layer.ffn_down, ffn_inp)  # [E]
        self.cb(out, "l_out", il)
        return out

    def _logits_one(self, x: Tensor) -> Tensor:
        logits = self.ops.norm_linear(x, self.weights.output_norm, [self.weights.output])  # [V]
        self.cb(logits, "result_output", -1)
        return self.g.output(logits)

    def _lane(self, packed: Tensor, token: int) -> Tensor:
        """One token's features out of a packed tensor: [P, n, PANEL] -> [n]."""
        n, n_bytes = packed.contents.ne[1], 4
        offset = (token // PANEL * n * PANEL + token % PANEL) * n_bytes
        return self.g.contiguous(self.g.view(packed, (n, 1), (PANEL * n_bytes,), offset))


def _qkv(layer: LayerWeights) -> tuple[list[Tensor], list[Tensor]]:
    return [layer.attn_q, layer.attn_k, layer.attn_v], [
        layer.attn_q_bias,
        layer.attn_k_bias,
        layer.attn_v_bias,
    ]
