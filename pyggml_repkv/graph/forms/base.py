"""What the decoder asks of a form, and what the two forms of the extension's ops share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from pyggml_repkv.ffi.context import GraphContext, Tensor
from pyggml_repkv.model.weights import LayerWeights, Weights
from pyggml_repkv.ops.makers import Ops

NameTensor = Callable[[Any, str, int], None]


class DecoderForm(Protocol):
    """Parts of a layer, with their residuals. Shapes as in decoder.py."""

    attended: str
    """The name of what attention makes."""

    @property
    def of_last(self) -> DecoderForm:
        """The form in which the last token goes on alone."""

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens I32 [T] -> [T, E]."""

    def qkv(self, x: Tensor, layer: LayerWeights, il: int) -> Any:
        """x [T, E] -> queries, keys and values as this form's attention takes them (StepAttention.attend)."""

    def attn_out(self, cur: Tensor, x: Tensor, layer: LayerWeights, il: int, *, last_only: bool) -> Tensor:
        """What attention made, and the layer's input [T, E] -> their sum [T, E] after projection, or its last row."""

    def ffn(self, x: Tensor, layer: LayerWeights, il: int) -> Tensor:
        """x [T, E] -> x + feed-forward of norm(x) [T, E]."""

    def logits(self, x: Tensor) -> Tensor:
        """x [T, E] -> [T, V]."""


class FusedForm(ABC):
    """q, k and v are one tensor [T, (H + 2 K) * d] before RoPE, each head by halves."""

    def __init__(self, ops: Ops, weights: Weights, cb: NameTensor) -> None:
        self.ops, self.g, self.weights, self.cb = ops, ops.g, weights, cb

    @abstractmethod
    def _qk_norm(self, qkv: Tensor, layer: LayerWeights) -> Tensor: ...

    def _heads(self, qkv: Tensor, layer: LayerWeights, il: int) -> Tensor:
        """The product of q, k and v -> the heads as attention takes them."""
        self.cb(qkv, "qkv", il)
        family = self.ops.config.family
        if not family.qk_norm and family.rope == "halves":
            return qkv
        qkv = self._qk_norm(qkv, layer)  # [T, (H + 2 K) * d]
        self.cb(qkv, "qk_norm", il)
        return qkv


def qkv_weights(layer: LayerWeights) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    return [layer.attn_q, layer.attn_k, layer.attn_v], layer.qkv_biases


def biases(bias: Tensor | None) -> list[Tensor]:
    """Of one matrix, as the ops take them."""
    return [] if bias is None else [bias]


def plus(g: GraphContext, x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else g.add(x, bias)
