"""Representative-token memory in plain numpy, float64: every step as the description of the method says.

It serves `window` too, which is the same without blocks: only first and recent tokens are attended.
"""

from dataclasses import dataclass, field

import numpy as np

from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.cut.blocks import parse_block
from tests.oracle import Array, feed_forward, layer_weights, linear, output_logits, project, rms_norm, rotate
from tests.tiny_models import TinySpec


@dataclass
class Layer:
    raw: list[Array] = field(default_factory=list)  # before RoPE, [K, d] per token
    keys: list[Array] = field(default_factory=list)  # the same with YaRN's factor
    rotated: list[Array] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)
    scores: list[Array] = field(default_factory=list)  # [K] per token
    representatives: list[list[list[int]]] = field(default_factory=list)  # per block, per key head
    kept: list[list[int]] = field(default_factory=list)  # the last token's selection, per key head or once


class RepKVOracle:
    """bounds: of the blocks, for schemes that depend on the text; n_ctx_train: beyond it `auto` becomes far."""

    def __init__(
        self, spec: TinySpec, weights: dict[str, Array], memory: MemoryConfig, bounds: list[int] | None = None
    ) -> None:
        self.window = memory.kv == "window"
        self.spec, self.memory, self.far = spec, memory, memory.positions in ("far", "ordered")
        if self.window:
            self.far = memory.positions != "exact"
        self.n_dense = min(memory.n_dense, spec.n_ctx_train)
        if memory.positions == "auto" and memory.n_ctx > spec.n_ctx_train:
            self.far, self.n_dense = True, 0
        self.w = {name: value.astype(np.float64) for name, value in weights.items()}
        self.layers = [Layer() for _ in range(spec.n_layer)]
        if bounds is None:
            bounds = [*range(memory.n_sink, 1024, int(memory.block.split(":")[1]))]
        self.bounds = bounds
        # A block is cut when all its possible ends have left the window.
        self.max_size = parse_block(memory.block).max_size
        self.blocks: list[range] = []
        self.n_past = 0
        self.selected: list[list[list[int]]] = []

    def step(self, tokens: list[int]) -> Array:
        """Logits [T, V] of one chunk."""
        first, m = self.n_past, self.memory
        start = max(0, first - m.n_local)
        self.far |= m.positions == "auto" and first + len(tokens) > self.spec.n_ctx_train
        while not self.window and self.bounds[len(self.blocks)] + self.max_size <= start:
            self.blocks.append(range(*self.bounds[len(self.blocks) : len(self.blocks) + 2]))
            for layer in self.layers:
                layer.representatives.append([self.best(layer, kv) for kv in range(self.spec.n_head_kv)])
        self.selected = []
        x = self.w["token_embd.weight"][tokens]
        for i, layer in enumerate(self.layers):
            block = layer_weights(self.w, i)
            h = rms_norm(x, block["attn_norm.weight"], self.spec.norm_eps)
            x = x + linear(block, "attn_output", self.attend(layer, block, h, start))
            x = x + feed_forward(block, rms_norm(x, block["ffn_norm.weight"], self.spec.norm_eps))
        self.n_past += len(tokens)
        return output_logits(self.spec, self.w, x)

    def best(self, layer: Layer, kv: int) -> list[int]:
        tokens = sorted(self.blocks[-1], key=lambda t: (-layer.scores[t][kv], t))
        return sorted(tokens[: self.memory.n_repr])

    def attend(self, layer: Layer, block: dict[str, Array], x: Array, start: int) -> Array:
        spec, m, first, n = self.spec, self.memory, self.n_past, len(x)
        group, positions = spec.n_head // spec.n_head_kv, np.arange(first, first + n)
        q, k, v = project(spec, block, x)

        def turned(heads: Array, at: Array) -> Array:
            return rotate(spec, heads, at, block.get("rope_freqs.weight"))

        q_near, k_near = turned(q, positions), turned(k, positions)
        q_far = turned(q, np.full(n, m.n_local)) if self.far else q_near
        for t in range(n):
            # A key at position 0 is not the key itself with YaRN, which puts a factor on both sides of a product.
            layer.raw.append(k[:, t])
            layer.keys.append(turned(k[:, t : t + 1], np.zeros(1, int))[:, 0])
            layer.rotated.append(k_near[:, t])
            layer.values.append(v[:, t])
            layer.scores.append(np.zeros(spec.n_head_kv))
        for j in range(n):
            for kv in range(spec.n_head_kv):
                self.score(layer, q_near[kv * group : (kv + 1) * group, j], first + j, start, kv)

        n_top = m.top_blocks if n == 1 else m.chunk_blocks
        if first + n <= self.n_dense:
            n_top = len(self.blocks)
        far_keys = layer.keys if self.far else layer.rotated
        chosen = self.select(layer, far_keys, q_far.mean(1), n_top, layer.kept if n == 1 else [])
        kept, layer.kept = layer.kept, chosen if n == 1 and 0 < n_top < len(self.blocks) else []
        if m.late and n == 1 and kept and layer.kept:
            chosen = kept
        self.selected.append(chosen)
        sealed_end = start if self.window else self.bounds[len(self.blocks)]
        out = np.empty((n, spec.n_head, spec.head_dim))
        for h in range(spec.n_head):
            kv = h // group
            blocks = [t for b in chosen[kv if m.per_head else 0] for t in self.blocks[b]]
            far = [*range(min(m.n_sink, start)), *blocks, *range(sealed_end, start)]
            older = [far_keys[t][kv] for t in far]
            if m.positions == "ordered" and far:
                compact = np.arange(start - len(far), start)
                older = turned(np.array([layer.raw[t][kv] for t in far])[None], compact)[0]
            for j in range(n):
                local = range(start, first + j + 1)
                q = (q_near if m.positions == "ordered" else q_far)[h, j]
                s = [q @ key for key in older] + [q_near[h, j] @ layer.rotated[t][kv] for t in local]
                p = np.exp(np.array(s) / np.sqrt(spec.head_dim) - max(s) / np.sqrt(spec.head_dim))
                out[j, h] = p / p.sum() @ np.array([layer.values[t][kv] for t in [*far, *local]])
        return out.reshape(n, -1)

    def score(self, layer: Layer, q: Array, position: int, start: int, kv: int) -> None:
        """Adds to the scores of the keys before a token, for its queries [G, d]."""
        m = self.memory
        if m.score == "dot":
            for t in range(max(0, position - m.n_scoring), position):
                layer.scores[t][kv] += q.sum(0) @ layer.rotated[t][kv] / m.n_scoring
            return
        window = range(max(start, position - m.n_scoring), position + 1)
        s = q @ np.array([layer.rotated[t][kv] for t in window]).T / np.sqrt(self.spec.head_dim)
        p = np.exp(s - s.max(1, keepdims=True))
        for t, share in zip(window, (p / p.sum(1, keepdims=True)).sum(0), strict=True):
            layer.scores[t][kv] += share

    def select(self, layer: Layer, keys: list[Array], q: Array, n_top: int, kept: list[list[int]]) -> list[list[int]]:
        """Returns the blocks with the highest sum of relevance over heads, per key head or once for all. Blocks in
        `kept` have an advantage.
        """
        n_blocks, n_head_kv = len(self.blocks), self.spec.n_head_kv
        if n_blocks <= n_top:
            return [list(range(n_blocks))] * n_head_kv
        group = self.spec.n_head // n_head_kv
        x = np.empty((n_blocks, self.spec.n_head))
        for b in range(n_blocks):
            for h in range(self.spec.n_head):
                s = np.array([q[h] @ keys[t][h // group] for t in layer.representatives[b][h // group]])
                s /= np.sqrt(self.spec.head_dim)
                x[b, h] = {"lse": np.log(np.exp(s).sum()), "mean": s.mean(), "max": s.max()}[self.memory.relevance]
        if self.memory.relevance == "lse":
            p = np.exp(x - x.max(0))
            x = p / p.sum(0)
        rows = x.reshape(n_blocks, n_head_kv, group).sum(2) if self.memory.per_head else x.sum(1)[:, None]
        n_heads = self.spec.n_head // rows.shape[1]
        for row, before in zip(rows.T, kept, strict=False):
            if self.memory.relevance == "lse":
                row[before] *= np.exp(self.memory.sticky)
            else:
                row[before] += self.memory.sticky * n_heads
        return [sorted(np.argsort(-row, kind="stable")[:n_top].tolist()) for row in rows.T]
