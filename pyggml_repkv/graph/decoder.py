"""The decoder that all families share: embed, layers, logits; once, over a form of its activations.

Shapes in comments, here and in forms/: T tokens, E embedding, H query heads, K key/value heads, d head size, F
feed-forward size, V vocabulary. For [T, n] the form `one` has [n] and `packed` [P, n, PANEL], P panels of PANEL tokens.
"""

from __future__ import annotations

from typing import Literal

from pyggml_repkv.ffi.context import GraphContext, Tensor
from pyggml_repkv.graph.forms.base import DecoderForm, NameTensor
from pyggml_repkv.memory.policy import StepAttention
from pyggml_repkv.model.weights import Weights

Outputs = Literal["last", "all", "none", "hidden"]


class Decoder:
    """Builds the nodes of one step. `cb(tensor, name, layer)` names them; layer is -1 outside the layers."""

    def __init__(
        self, g: GraphContext, weights: Weights, form: DecoderForm, attention: StepAttention, cb: NameTensor
    ) -> None:
        self.g, self.weights, self.form, self.attention, self.cb = g, weights, form, attention, cb

    def build(self, tokens: Tensor, outputs: Outputs) -> Tensor | None:
        """tokens I32 [T] -> logits F32 of the `last` token, or of `all`; with `hidden` what head.py makes them of.

        With `none` nobody reads the last layer's output, so it only stores its keys and values.
        """
        form, attention, cb = self.form, self.attention, self.cb
        inpL = form.embed(tokens)  # [T, E]
        cb(inpL, "embd", -1)
        for il, layer in enumerate(self.weights.layers):
            is_last = layer is self.weights.layers[-1]
            qkv = form.qkv(inpL, layer, il)  # q [T, H, d], k [T, K, d], v [T, K, d]
            if is_last and outputs == "none":
                attention.store(qkv, il)
                return None
            cur = attention.attend(qkv, il)  # [T, H * d]
            cb(cur, form.attended, il)
            last_only = is_last and outputs == "last"
            ffn_inp = form.attn_out(cur, inpL, layer, il, last_only=last_only)  # [T, E], or the last row
            cb(ffn_inp, "ffn_inp", il)
            if last_only:
                form = form.of_last
            inpL = form.ffn(ffn_inp, layer, il)  # [T, E]
            cb(inpL, "l_out", il)
        if outputs == "hidden":
            return self.g.output(inpL)  # [T, E]
        cur = form.logits(inpL)  # [T, V]
        cb(cur, "result_output", -1)
        return self.g.output(cur)
