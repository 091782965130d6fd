"""Representative-token memory in plain numpy, float64: every step as the description of the method says.

It serves `window` too, which is the same without blocks: only first and recent tokens are attended.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.cut.blocks import parse_scheme
from pyggml_repkv.memory.repkv.memory import index_of
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


# A value of a query that lies between two steps of 8 bits may be rounded otherwise, which changes weights by so much.
CLOSE = 0.03

Engine = Callable[[int], tuple[Array, list[list[int]], Array]]
"""Layer -> keys that the engine's codes stand for, [n, K, d] from the sinks' end on, what it selected, and the matrix
[d, d] that queries are multiplied by before they are rounded.
"""


class RepKVOracle:
    """bounds, unit_bounds: of blocks and units, for schemes that depend on the text; engine: with an index of codes.

    Codes are made by rounding, so the oracle takes the engine's. And a rounding may decide between two units of nearly
    equal weight, so it takes the engine's selection, if that is one of the best.
    """

    def __init__(
        self, spec: TinySpec, weights: dict[str, Array], memory: MemoryConfig, bounds: list[int] | None = None,
        unit_bounds: list[int] | None = None, engine: Engine | None = None,
    ) -> None:  # fmt: skip
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
        self.bounds, self.engine = bounds, engine
        scheme = parse_scheme(memory.block, index_of(memory).unit_of(memory))
        self.coded = scheme.unit is not None
        if unit_bounds is None:
            unit_bounds = [*range(memory.n_sink, 1024, scheme.smallest_unit)] if self.coded else bounds
        self.unit_bounds = unit_bounds
        # A block is cut when all its possible ends have left the window.
        self.max_size = scheme.block.max_size
        self.per_head = self.coded or memory.per_head
        self.n_repr = memory.index_kind[1]
        self.blocks: list[range] = []
        self.n_past = 0
        self.selected: list[list[list[int]]] = []

    def sealed(self, end: int, start: int) -> bool:
        """Whether a block that ends at `end` is cut when the window starts at `start`."""
        return end <= start if self.coded else self.bounds[len(self.blocks)] + self.max_size <= start

    @property
    def units(self) -> list[range]:
        end = self.bounds[len(self.blocks)]
        return [range(*pair) for pair in pairwise(self.unit_bounds) if pair[1] <= end]

    def step(self, tokens: list[int]) -> Array:
        """Logits [T, V] of one chunk."""
        first, m = self.n_past, self.memory
        start = max(0, first - m.n_local)
        self.far |= m.positions == "auto" and first + len(tokens) > self.spec.n_ctx_train
        while not self.window and self.sealed(self.bounds[len(self.blocks) + 1], start):
            self.blocks.append(range(*self.bounds[len(self.blocks) : len(self.blocks) + 2]))
            for layer in [] if self.coded else self.layers:
                layer.representatives.append([self.best(layer, kv) for kv in range(self.spec.n_head_kv)])
        self.selected = []
        x = self.w["token_embd.weight"][tokens]
        for i, layer in enumerate(self.layers):
            block = layer_weights(self.w, i)
            h = rms_norm(x, block["attn_norm.weight"], self.spec.norm_eps)
            x = x + linear(block, "attn_output", self.attend(layer, i, block, h, start))
            x = x + feed_forward(block, rms_norm(x, block["ffn_norm.weight"], self.spec.norm_eps))
        self.n_past += len(tokens)
        return output_logits(self.spec, self.w, x)

    def best(self, layer: Layer, kv: int) -> list[int]:
        tokens = sorted(self.blocks[-1], key=lambda t: (-layer.scores[t][kv], t))
        return sorted(tokens[: self.n_repr])

    def attend(self, layer: Layer, number: int, block: dict[str, Array], x: Array, start: int) -> Array:
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
        for j in range(n if not self.coded else 0):
            for kv in range(spec.n_head_kv):
                self.score(layer, q_near[kv * group : (kv + 1) * group, j], first + j, start, kv)

        units = self.units
        n_far = self.bounds[len(self.blocks)] - m.n_sink
        budget = n_far if first + n <= self.n_dense else m.budget if n == 1 else m.chunk_budget
        far_keys = layer.keys if self.far else layer.rotated
        n_group = m.group if 0 < m.group < -(-n // 32) * 32 else n
        if self.window or n_far <= budget:
            chosen = [list(range(len(units)))] * (-(-n // n_group) * spec.n_head_kv)
        elif self.coded:
            kept = layer.kept if n == 1 else []
            # Codes are of keys before RoPE, without YaRN's factor, which is left to the query.
            factor = turned(np.ones((1, 1, spec.head_dim)), np.zeros(1, int)) if self.far else 1.0
            asked = q_far * factor
            weights = [self.unit_weights(number, asked[:, g : g + n_group]) for g in range(0, n, n_group)]
            chosen = self.judged(number, np.concatenate(weights), budget, kept)
        else:
            chosen = self.select(layer, far_keys, q_far.mean(1), budget, layer.kept if n == 1 else [])
        kept, layer.kept = layer.kept, chosen if n == 1 and 0 < budget < n_far else []
        if m.late and n == 1 and any(kept) and any(layer.kept):
            chosen = kept
        self.selected.append(chosen)
        sealed_end = start if self.window else self.bounds[len(self.blocks)]
        out = np.empty((n, spec.n_head, spec.head_dim))
        for h in range(spec.n_head):
            kv = h // group
            for j in range(n):
                row = j // n_group * spec.n_head_kv + kv if self.per_head else 0
                far = [t for u in chosen[row] for t in units[u]]
                far = [*range(min(m.n_sink, start)), *far, *range(sealed_end, start)]
                older = [far_keys[t][kv] for t in far]
                if m.positions == "ordered" and far:
                    compact = np.arange(start - len(far), start)
                    older = turned(np.array([layer.raw[t][kv] for t in far])[None], compact)[0]
                local = range(start, first + j + 1)
                q = (q_near if m.positions == "ordered" else q_far)[h, j]
                s = [q @ key for key in older] + [q_near[h, j] @ layer.rotated[t][kv] for t in local]
                p = np.exp(np.array(s) / np.sqrt(spec.head_dim) - max(s) / np.sqrt(spec.head_dim))
                out[j, h] = p / p.sum() @ np.array([layer.values[t][kv] for t in [*far, *local]])
        return out.reshape(n, -1)

    def unit_weights(self, number: int, q: Array) -> Array:
        """Probability of each unit for queries [H, n, d], summed over queries and heads of a key head: [K, n_units]."""
        assert self.engine is not None
        keys, _, turn = self.engine(number)
        keys, turn, spec = keys.astype(np.float64), turn.astype(np.float64), self.spec
        starts = np.array([unit.start for unit in self.units]) - self.memory.n_sink
        asked = q[:, ::-1][:, :: self.memory.stride].reshape(spec.n_head_kv, -1, spec.head_dim)
        if spec.arch == "llama":
            # The engine's heads have the even values first.
            asked = np.concatenate((asked[..., ::2], asked[..., 1::2]), -1)
        turned = asked @ turn
        step = np.abs(turned).max(-1, keepdims=True) / 127
        asked = np.rint(turned / step) * step @ turn.T
        weights = np.empty((spec.n_head_kv, len(starts)))
        for kv in range(spec.n_head_kv):
            s = asked[kv] @ keys[: self.units[-1].stop - self.memory.n_sink, kv].T / np.sqrt(spec.head_dim)
            p = np.exp(s - s.max(1, keepdims=True))
            weights[kv] = np.add.reduceat(p / p.sum(1, keepdims=True), starts, axis=1).sum(0)
        return weights

    def judged(self, number: int, weights: Array, budget: int, kept: list[list[int]]) -> list[list[int]]:
        """The engine's selection, if it fits the budget and nothing left out that fits is clearly better."""
        assert self.engine is not None
        units, (_, chosen, _) = self.units, self.engine(number)
        for row, before in zip(weights, kept, strict=False):
            row[before] *= np.exp(self.memory.sticky)
        for row, selected in zip(weights, chosen, strict=True):
            assert selected == sorted(set(selected))
            sizes = np.array([len(unit) for unit in units])
            left = budget - sizes[selected].sum()
            assert left >= 0
            density, out = row / sizes, np.setdiff1d(np.arange(len(units)), selected)
            least = density[selected].min() if len(selected) else np.inf
            assert left < sizes.max() or not len(out), "there was room for more"
            if sizes.min() == sizes.max() and selected:
                assert density[out].max() <= least * (1 + CLOSE), "a better unit was left out"
        return chosen

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

    def select(self, layer: Layer, keys: list[Array], q: Array, budget: int, kept: list[list[int]]) -> list[list[int]]:
        """Returns the blocks with the highest sum of relevance over heads that fit a budget of tokens, per key head or
        once for all. Blocks in `kept` have an advantage.
        """
        n_blocks, n_head_kv = len(self.blocks), self.spec.n_head_kv
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
        n_top = max(self.memory.budget, self.memory.chunk_budget, self.n_dense)
        n_top //= parse_scheme(self.memory.block, None).smallest_unit
        return [fitting(np.argsort(-row, kind="stable")[:n_top], self.blocks, budget) for row in rows.T]


def fitting(best: Array, blocks: list[range], budget: int) -> list[int]:
    """Those of blocks, best first, that still fit a budget of tokens, in order of position."""
    chosen = []
    for b in best.tolist():
        if len(blocks[b]) <= budget:
            chosen.append(b)
            budget -= len(blocks[b])
    return sorted(chosen)
