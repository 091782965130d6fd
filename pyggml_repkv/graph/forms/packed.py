"""A chunk in the extension's ops, seven nodes a layer; x [T, n] is [P, n, PANEL] here."""

from __future__ import annotations

from pyggml_repkv.ffi.context import Tensor
from pyggml_repkv.graph.forms.base import FusedForm, NameTensor, biases, plus, qkv_weights
from pyggml_repkv.graph.forms.one import OneForm
from pyggml_repkv.model.weights import LayerWeights, Weights
from pyggml_repkv.ops.kernels import PANEL
from pyggml_repkv.ops.makers import Ops


class PackedForm(FusedForm):
    attended = "kqv_out"

    def __init__(self, ops: Ops, weights: Weights, cb: NameTensor, n_tokens: int) -> None:
        super().__init__(ops, weights, cb)
        self.of_last = OneForm(ops, weights, cb)
        self._last_token = n_tokens - 1

    def embed(self, tokens: Tensor) -> Tensor:
        return self.ops.pack(self.g.get_rows(self.weights.token_embd, tokens))  # [P, E, PANEL]

    def qkv(self, x: Tensor, layer: LayerWeights, il: int) -> Tensor:
        cur = self._norm(x, layer.attn_norm, "attn_norm", il)  # [P, E, PANEL]
        qkv = self.ops.matmul(cur, *qkv_weights(layer))  # [P, (H + 2 K) * d, PANEL]
        return self._heads(qkv, layer, il)

    def attn_out(self, cur: Tensor, x: Tensor, layer: LayerWeights, il: int, *, last_only: bool) -> Tensor:
        if last_only:
            cur, x = self._lane(cur), self._lane(x)  # [H * d], [E]
            return self.of_last.residual(cur, layer.attn_output, layer.attn_output_bias, x)  # [E]
        return self._residual(cur, layer.attn_output, layer.attn_output_bias, x)  # [P, E, PANEL]

    def ffn(self, x: Tensor, layer: LayerWeights, il: int) -> Tensor:
        cur = self._norm(x, layer.ffn_norm, "ffn_norm", il)  # [P, E, PANEL]
        if layer.ffn_gate_bias is None and layer.ffn_up_bias is None:
            hidden = self.ops.matmul_gate_up(cur, layer.ffn_gate, layer.ffn_up)  # [P, F, PANEL]
        else:
            gate = self.ops.matmul(cur, [layer.ffn_gate], biases(layer.ffn_gate_bias))  # [P, F, PANEL]
            up = self.ops.matmul(cur, [layer.ffn_up], biases(layer.ffn_up_bias))  # [P, F, PANEL]
            hidden = self.g.swiglu(gate, up)  # [P, F, PANEL]
        self.cb(hidden, "ffn_swiglu", il)
        return self._residual(hidden, layer.ffn_down, layer.ffn_down_bias, x)  # [P, E, PANEL]

    def logits(self, x: Tensor) -> Tensor:
        cur = self._norm(x, self.weights.output_norm, "result_norm", -1)  # [P, E, PANEL]
        return self.ops.matmul(cur, [self.weights.output], biases(self.weights.output_bias))  # [P, V, PANEL]

    def _norm(self, x: Tensor, weight: Tensor, name: str, il: int) -> Tensor:
        cur = self.ops.norm_packed(x, weight)
        self.cb(cur, name, il)
        return cur

    def _residual(self, cur: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        if bias is not None:
            bias = self.g.reshape(bias, (bias.contents.ne[0], 1))  # one value for all lanes
        return plus(self.g, self.ops.matmul_add(cur, weight, x), bias)

    def _lane(self, packed: Tensor) -> Tensor:
        """The last token's features: [P, n, PANEL] -> [n]."""
        n, n_bytes = packed.contents.ne[1], 4
        offset = (self._last_token // PANEL * n * PANEL + self._last_token % PANEL) * n_bytes
        return self.g.contiguous(self.g.view(packed, (n, 1), (PANEL * n_bytes,), offset))

    def _qk_norm(self, qkv: Tensor, layer: LayerWeights) -> Tensor:
        return self.ops.qk_norm_packed(qkv, layer.attn_q_norm, layer.attn_k_norm)
