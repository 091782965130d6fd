"""One token in the extension's ops, five nodes a layer; x [T, n] is [n] here."""

from __future__ import annotations

from pyggml_repkv.ffi.context import Tensor
from pyggml_repkv.graph.forms.base import FusedForm, biases, plus, qkv_weights
from pyggml_repkv.model.weights import LayerWeights


class OneForm(FusedForm):
    attended = "kqv_partial"

    @property
    def of_last(self) -> OneForm:
        return self

    def embed(self, tokens: Tensor) -> Tensor:
        return self.g.get_rows(self.weights.token_embd, tokens)  # [1, E]

    def qkv(self, x: Tensor, layer: LayerWeights, il: int) -> Tensor:
        qkv = self.ops.norm_linear(x, layer.attn_norm, *qkv_weights(layer))  # [(H + 2 K) * d]
        return self._heads(qkv, layer, il)

    def attn_out(self, cur: Tensor, x: Tensor, layer: LayerWeights, il: int, *, last_only: bool) -> Tensor:
        """cur: partial sums [n_threads, H, 2 + d]."""
        return plus(self.g, self.ops.attn_out(cur, layer.attn_output, x), layer.attn_output_bias)  # [E]

    def ffn(self, x: Tensor, layer: LayerWeights, il: int) -> Tensor:
        if layer.ffn_gate_bias is None and layer.ffn_up_bias is None:
            hidden = self.ops.gate_up(x, layer.ffn_norm, layer.ffn_gate, layer.ffn_up)  # [F]
        else:
            gate = self.ops.norm_linear(x, layer.ffn_norm, [layer.ffn_gate], biases(layer.ffn_gate_bias))  # [F]
            up = self.ops.norm_linear(x, layer.ffn_norm, [layer.ffn_up], biases(layer.ffn_up_bias))  # [F]
            hidden = self.g.swiglu(gate, up)  # [F]
        self.cb(hidden, "ffn_swiglu", il)
        return self.residual(hidden, layer.ffn_down, layer.ffn_down_bias, x)  # [E]

    def logits(self, x: Tensor) -> Tensor:
        w = self.weights
        return self.ops.norm_linear(x, w.output_norm, [w.output], biases(w.output_bias))  # [V]

    def residual(self, cur: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """cur [n] through a matrix, plus x [E]."""
        return plus(self.g, self.ops.linear_add(cur, weight, x), bias)

    def _qk_norm(self, qkv: Tensor, layer: LayerWeights) -> Tensor:
        return self.ops.qk_norm(qkv, layer.attn_q_norm, layer.attn_k_norm)
