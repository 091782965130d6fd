"""Representative-token memory in plain numpy, float64: every step as the method's description says, nothing clever."""

from dataclasses import dataclass, field

import numpy as np

from pyggml_repkv.memory.config import MemoryConfig
from tests.oracle import Array, feed_forward, rms_norm, rotate
from tests.tiny_models import TinySpec


@dataclass
class Layer:
    keys: list[Array] = field(default_factory=list)  # before RoPE, [K, d] per token
    rotated: list[Array] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)
    scores: list[Array] = field(default_factory=list)  # [K] per token
    representatives: list[list[list[int]]] = field(default_factory=list)  # per block, per key head


class RepKVOracle:
    def __init__(self, spec: TinySpec, weights: dict[str, Array], memory: MemoryConfig, far: bool) -> None:
        self.spec, self.memory, self.far = spec, memory, far
        self.w = {name: value.astype(np.float64) for name, value in weights.items()}
        self.layers = [Layer() for _ in range(spec.n_layer)]
        self.size = int(memory.block.split(":")[1])
        self.blocks: list[range] = []
        self.n_past = 0
        self.selected: list[list[int]] = []

    def step(self, tokens: list[int]) -> Array:
        """Logits [T, V] of one chunk."""
        first, m = self.n_past, self.memory
        start = max(0, first - m.n_local)
        while (begin := m.n_sink + len(self.blocks) * self.size) + self.size <= start:
            self.blocks.append(range(begin, begin + self.size))
            for layer in self.layers:
                layer.representatives.append([self.best(layer, kv) for kv in range(self.spec.n_head_kv)])
        self.selected = []
        x = self.w["token_embd.weight"][tokens]
        for i, layer in enumerate(self.layers):
            block = {n.removeprefix(f"blk.{i}."): v for n, v in self.w.items() if n.startswith(f"blk.{i}.")}
            h = rms_norm(x, block["attn_norm.weight"], self.spec.norm_eps)
            x = x + self.attend(layer, block, h, start) @ block["attn_output.weight"].T
            x = x + feed_forward(block, rms_norm(x, block["ffn_norm.weight"], self.spec.norm_eps))
        self.n_past += len(tokens)
        x = rms_norm(x, self.w["output_norm.weight"], self.spec.norm_eps)
        return x @ self.w["token_embd.weight" if self.spec.tied else "output.weight"].T

    def best(self, layer: Layer, kv: int) -> list[int]:
        tokens = sorted(self.blocks[-1], key=lambda t: (-layer.scores[t][kv], t))
        return sorted(tokens[: self.memory.n_repr])

    def attend(self, layer: Layer, block: dict[str, Array], x: Array, start: int) -> Array:
        spec, m, first, n = self.spec, self.memory, self.n_past, len(x)
        group, positions = spec.n_head // spec.n_head_kv, np.arange(first, first + n)

        def heads(name: str, count: int) -> Array:  # [count, T, d]
            y = x @ block[f"attn_{name}.weight"].T + block[f"attn_{name}.bias"]
            return y.reshape(n, count, spec.head_dim).transpose(1, 0, 2)

        q, k, v = heads("q", spec.n_head), heads("k", spec.n_head_kv), heads("v", spec.n_head_kv)
        q_near, k_near = rotate(spec, q, positions), rotate(spec, k, positions)
        q_far = rotate(spec, q, np.full(n, m.n_local)) if self.far else q_near
        for t in range(n):
            layer.keys.append(k[:, t])
            layer.rotated.append(k_near[:, t])
            layer.values.append(v[:, t])
            layer.scores.append(np.zeros(spec.n_head_kv))
        for j in range(n):
            for t in range(max(0, first + j - m.n_score), first + j):
                for kv in range(spec.n_head_kv):
                    q_sum = q_near[kv * group : (kv + 1) * group, j].sum(0)
                    layer.scores[t][kv] += q_sum @ layer.rotated[t][kv] / m.n_score

        far_keys = layer.keys if self.far else layer.rotated
        chosen = self.select(layer, far_keys, q_far.mean(1))
        self.selected.append(chosen)
        sealed_end = m.n_sink + len(self.blocks) * self.size
        far = [*range(min(m.n_sink, start)), *(t for b in chosen for t in self.blocks[b]), *range(sealed_end, start)]
        out = np.empty((n, spec.n_head, spec.head_dim))
        for h in range(spec.n_head):
            kv = h // group
            for j in range(n):
                local = range(start, first + j + 1)
                s = [q_far[h, j] @ far_keys[t][kv] for t in far] + [q_near[h, j] @ layer.rotated[t][kv] for t in local]
                p = np.exp(np.array(s) / np.sqrt(spec.head_dim) - max(s) / np.sqrt(spec.head_dim))
                out[j, h] = p / p.sum() @ np.array([layer.values[t][kv] for t in [*far, *local]])
        return out.reshape(n, -1)

    def select(self, layer: Layer, keys: list[Array], q: Array) -> list[int]:
        """The blocks with the highest sum over heads of softmax over blocks of logsumexp over representatives."""
        if len(self.blocks) <= self.memory.top_blocks:
            return list(range(len(self.blocks)))
        group = self.spec.n_head // self.spec.n_head_kv
        x = np.empty((len(self.blocks), self.spec.n_head))
        for b in range(len(self.blocks)):
            for h in range(self.spec.n_head):
                s = [q[h] @ keys[t][h // group] for t in layer.representatives[b][h // group]]
                x[b, h] = np.log(np.exp(np.array(s) / np.sqrt(self.spec.head_dim)).sum())
        p = np.exp(x - x.max(0))
        weights = (p / p.sum(0)).sum(1)
        return sorted(np.argsort(-weights, kind="stable")[: self.memory.top_blocks].tolist())
