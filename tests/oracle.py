"""Qwen2 in plain numpy, float64, one token at a time in the reader's head: what the engine must equal."""

import math

import numpy as np

from tests.tiny_models import TinySpec

Array = np.ndarray


def qwen2_logits(spec: TinySpec, weights: dict[str, Array], tokens: list[int]) -> Array:
    """Logits [T, V] of every token, with the weights as write_tiny_model returns them."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    positions = np.arange(len(tokens))
    x = w["token_embd.weight"][tokens]  # [T, E]
    for i in range(spec.n_layer):
        block = {name.removeprefix(f"blk.{i}."): v for name, v in w.items() if name.startswith(f"blk.{i}.")}
        x = x + attention(spec, block, rms_norm(x, block["attn_norm.weight"], spec.norm_eps), positions)
        x = x + feed_forward(block, rms_norm(x, block["ffn_norm.weight"], spec.norm_eps))
    x = rms_norm(x, w["output_norm.weight"], spec.norm_eps)
    return x @ w["token_embd.weight" if spec.tied else "output.weight"].T


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def feed_forward(block: dict[str, Array], x: Array) -> Array:
    gate = x @ block["ffn_gate.weight"].T
    return (gate / (1 + np.exp(-gate)) * (x @ block["ffn_up.weight"].T)) @ block["ffn_down.weight"].T


def attention(spec: TinySpec, block: dict[str, Array], x: Array, positions: Array) -> Array:
    """Causal grouped-query attention: query head h reads key/value head h // (H / K)."""
    n_tokens = len(x)

    def heads(name: str, n: int) -> Array:  # [n, T, d]
        y = x @ block[f"attn_{name}.weight"].T + block[f"attn_{name}.bias"]
        return y.reshape(n_tokens, n, spec.head_dim).transpose(1, 0, 2)

    q = rotate(spec, heads("q", spec.n_head), positions)
    k = rotate(spec, heads("k", spec.n_head_kv), positions)
    v = heads("v", spec.n_head_kv)
    group = spec.n_head // spec.n_head_kv
    visible = positions[None, :] <= positions[:, None]
    out = np.empty((n_tokens, spec.n_head, spec.head_dim))
    for h in range(spec.n_head):
        scores = q[h] @ k[h // group].T / math.sqrt(spec.head_dim)
        scores = np.where(visible, scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, h] = (p / p.sum(-1, keepdims=True)) @ v[h // group]
    return out.reshape(n_tokens, -1) @ block["attn_output.weight"].T


def rotate(spec: TinySpec, x: Array, positions: Array) -> Array:
    """RoPE on pairs (i, i + n/2) of the first n = rope_dim values; linear scaling and YaRN (arXiv 2309.00071)."""
    n = spec.rope_dim or spec.head_dim
    frequency = spec.rope_base ** (-2.0 * np.arange(n // 2) / n)
    magnitude = 1.0
    if spec.scaling_kind == "linear":
        frequency = frequency / spec.scaling_factor
    elif spec.scaling_kind == "yarn":
        frequency, magnitude = yarn(spec, frequency, n)
    angle = positions[:, None] * frequency
    cos, sin = np.cos(angle) * magnitude, np.sin(angle) * magnitude
    a, b = x[..., : n // 2], x[..., n // 2 : n]
    return np.concatenate((a * cos - b * sin, a * sin + b * cos, x[..., n:]), -1)


def yarn(spec: TinySpec, frequency: Array, n: int) -> tuple[Array, float]:
    """Slow dimensions are interpolated, fast ones kept, those between 1 and 32 turns blended."""
    original = spec.scaling_orig_ctx or spec.n_ctx

    def dimension(turns: float) -> float:
        return n * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(spec.rope_base))

    low = max(0.0, math.floor(dimension(32.0)))
    high = min(n - 1.0, math.ceil(dimension(1.0)))
    ramp = np.clip((np.arange(n // 2) - low) / max(0.001, high - low), 0, 1)
    blended = frequency / spec.scaling_factor * ramp + frequency * (1 - ramp)
    return blended, 1 + 0.1 * math.log(spec.scaling_factor)
