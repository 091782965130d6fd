"""ggml's own nodes, on rows [T, n]: llama.cpp's, in its order and under its names."""

from __future__ import annotations

from pyggml_repkv.ffi.context import GraphContext, Rope, Tensor
from pyggml_repkv.graph.forms.base import NameTensor, plus
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.weights import LayerWeights, Weights


class GgmlForm:
    """positions I32 [T]; last_row I32 [1]: which row is the last, None where it is the only one or all are asked for.

    by_halves: whether queries and keys that the family has by pairs are put by halves, the order of the fused forms: so
    that in a memory that both write all keys lie alike.
    """

    attended = "kqv_out"

    def __init__(
        self, g: GraphContext, config: ModelConfig, weights: Weights, rope: Rope, positions: Tensor | None,
        cb: NameTensor, *, last_row: Tensor | None, by_halves: bool,
    ) -> None:  # fmt: skip
        self.g, self.config, self.weights, self.rope, self.cb = g, config, weights, rope, cb
        self._positions, self._last_row = positions, last_row
        self._pairs = config.family.rope == "pairs" and not by_halves
        self._reorders = config.family.rope == "pairs" and by_halves

    @property
    def of_last(self) -> GgmlForm:
        return self

    def embed(self, tokens: Tensor) -> Tensor:
        return self.g.get_rows(self.weights.token_embd, tokens)  # [T, E]

    def qkv(self, x: Tensor, layer: LayerWeights, il: int) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, E] -> q [T, H, d] and k [T, K, d] rotated, v [T, K, d]."""
        cur = self._norm(x, layer.attn_norm, "attn_norm", il)  # [T, E]
        q, k, v = self._heads(cur, layer, il)  # [T, H, d], [T, K, d], [T, K, d]
        q = self._rotated(q, layer.attn_q_norm, "Qcur", il)
        k = self._rotated(k, layer.attn_k_norm, "Kcur", il)
        for name, heads in (("Qcur", q), ("Kcur", k), ("Vcur", v)):
            self.cb(heads, name, il)
        if not self.weights.joins:
            # The order in which llama.cpp's graph has them.
            for heads in (q, v, k):
                self.g.expand(heads)
        return q, k, v

    def attn_out(self, cur: Tensor, x: Tensor, layer: LayerWeights, il: int, *, last_only: bool) -> Tensor:
        g = self.g
        cur = plus(g, g.linear(layer.attn_output, cur), layer.attn_output_bias)  # [T, E]
        self.cb(cur, "attn_out", il)
        if last_only and self._last_row is not None:
            cur, x = g.get_rows(cur, self._last_row), g.get_rows(x, self._last_row)  # [1, E]
        return g.add(cur, x)

    def ffn(self, x: Tensor, layer: LayerWeights, il: int) -> Tensor:
        g, cb = self.g, self.cb
        cur = self._norm(x, layer.ffn_norm, "ffn_norm", il)  # [T, E]
        if layer.ffn_gate_up is not None:
            cur = self._linear("ffn_gate_up", layer.ffn_gate_up, layer.ffn_gate_up_bias, cur, il)  # [T, 2 F]
            cur = g.swiglu_halves(cur)  # [T, F]
        else:
            up = self._linear("ffn_up", layer.ffn_up, layer.ffn_up_bias, cur, il)  # [T, F]
            gate = self._linear("ffn_gate", layer.ffn_gate, layer.ffn_gate_bias, cur, il)  # [T, F]
            cur = g.swiglu(gate, up)  # [T, F]
        cb(cur, "ffn_swiglu", il)
        cur = g.linear(layer.ffn_down, cur)  # [T, E]
        if layer.ffn_down_bias is not None:
            cb(cur, "ffn_down", il)
            cur = g.add(cur, layer.ffn_down_bias)
        cb(cur, "ffn_out", il)
        return g.add(cur, x)

    def logits(self, x: Tensor) -> Tensor:
        cur = self._norm(x, self.weights.output_norm, "result_norm", -1)  # [T, E]
        return plus(self.g, self.g.linear(self.weights.output, cur), self.weights.output_bias)  # [T, V]

    def _heads(self, cur: Tensor, layer: LayerWeights, il: int) -> list[Tensor]:
        """cur [T, E] -> [T, H, d], [T, K, d], [T, K, d]."""
        g, c = self.g, self.config
        sizes = (c.n_head, c.n_head_kv, c.n_head_kv)
        if layer.attn_qkv is not None:
            joined = self._linear("wqkv", layer.attn_qkv, layer.attn_qkv_bias, cur, il)  # [T, (H + 2 K) * d]
            return _split_heads(g, joined, sizes, c.head_dim)
        parts = (
            ("Qcur", layer.attn_q, layer.attn_q_bias),
            ("Kcur", layer.attn_k, layer.attn_k_bias),
            ("Vcur", layer.attn_v, layer.attn_v_bias),
        )
        heads = []
        for n, (name, matrix, bias) in zip(sizes, parts, strict=True):
            x = g.linear(matrix, cur)  # [T, n * d]
            self.cb(x, name, il)
            if bias is not None:
                x = g.add(x, bias)
                self.cb(x, name, il)
            heads.append(g.reshape(x, (x.contents.ne[1], n, c.head_dim)))
        return heads

    def _rotated(self, heads: Tensor, norm: Tensor | None, name: str, il: int) -> Tensor:
        """[T, n, d] -> the same, normed where there is a norm, and rotated."""
        if norm is not None:
            heads = self._norm(heads, norm, f"{name}_normed", il)
        if self._reorders:
            heads = _halves_of_pairs(self.g, heads)
        return self.g.rope(heads, self._positions, self.rope, self.weights.rope_freqs, pairs=self._pairs)

    def _norm(self, x: Tensor, weight: Tensor, name: str, il: int) -> Tensor:
        cur = self.g.rms_norm(x, self.config.norm_eps)
        self.cb(cur, "norm", il)
        cur = self.g.mul(cur, weight)
        self.cb(cur, name, il)
        return cur

    def _linear(self, name: str, matrix: Tensor, bias: Tensor | None, x: Tensor, il: int) -> Tensor:
        cur = self.g.linear(matrix, x)
        self.cb(cur, name, il)
        if bias is not None:
            cur = self.g.add(cur, bias)
            self.cb(cur, f"{name}_b", il)
        return cur


def _split_heads(g: GraphContext, joined: Tensor, sizes: tuple[int, ...], head_dim: int) -> list[Tensor]:
    """[T, sum of sizes * d] -> views [T, n, d], side by side in each row."""
    n_tokens, row_bytes = joined.contents.ne[1], joined.contents.nb[1]
    head_bytes = 4 * head_dim
    views, first = [], 0
    for n in sizes:
        views.append(g.view(joined, (n_tokens, n, head_dim), (row_bytes, head_bytes), first * head_bytes))
        first += n
    return views


def _halves_of_pairs(g: GraphContext, heads: Tensor) -> Tensor:
    """[T, n, d] -> a copy with the even values of each head first, then the odd ones."""
    head_dim, n, n_tokens = heads.contents.ne[:3]
    pairs = g.reshape(g.contiguous(heads), (n_tokens * n, head_dim // 2, 2))
    halves = g.contiguous(g.transpose(pairs))  # [T * n, 2, d / 2]
    return g.reshape(halves, (n_tokens, n, head_dim))
