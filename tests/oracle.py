"""Qwen2, Qwen3 and Llama in plain numpy, float64, all tokens at once. The engine must equal them."""

import math

import numpy as np

from tests.tiny_models import TinySpec

Array = np.ndarray


def oracle_logits(spec: TinySpec, weights: dict[str, Array], tokens: list[int]) -> Array:
    """Logits [T, V] of every token, with the weights as write_tiny_model returns them."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    positions = np.arange(len(tokens))
    x = w["token_embd.weight"][tokens]  # [T, E]
    for i in range(spec.n_layer):
        block = layer_weights(w, i)
        heads = attention(spec, block, rms_norm(x, block["attn_norm.weight"], spec.norm_eps), positions)
        x = x + linear(block, "attn_output", heads)
        x = x + feed_forward(block, rms_norm(x, block["ffn_norm.weight"], spec.norm_eps))
    return output_logits(spec, w, x)


def layer_weights(w: dict[str, Array], layer: int) -> dict[str, Array]:
    """Returns a layer's weights by name without the layer, with the divisors of RoPE's frequencies if there are any."""
    prefix = f"blk.{layer}."
    block = {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}
    return block | {name: w[name] for name in ("rope_freqs.weight",) if name in w}


def output_logits(spec: TinySpec, w: dict[str, Array], x: Array) -> Array:
    x = rms_norm(x, w["output_norm.weight"], spec.norm_eps)
    return x @ w["token_embd.weight" if spec.tied else "output.weight"].T + w.get("output.bias", 0.0)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def linear(block: dict[str, Array], name: str, x: Array) -> Array:
    return x @ block[f"{name}.weight"].T + block.get(f"{name}.bias", 0.0)


def feed_forward(block: dict[str, Array], x: Array) -> Array:
    gate = linear(block, "ffn_gate", x)
    return linear(block, "ffn_down", gate / (1 + np.exp(-gate)) * linear(block, "ffn_up", x))


def project(spec: TinySpec, block: dict[str, Array], x: Array) -> tuple[Array, Array, Array]:
    """x [T, E] -> q [H, T, d], k and v [K, T, d], before RoPE."""
    names = ("attn_qkv",) if "attn_qkv.weight" in block else ("attn_q", "attn_k", "attn_v")
    joined = np.concatenate([linear(block, name, x) for name in names], -1)
    heads = joined.reshape(len(x), -1, spec.head_dim).transpose(1, 0, 2)
    q, k, v = np.split(heads, [spec.n_head, spec.n_head + spec.n_head_kv])
    if "attn_q_norm.weight" in block:
        q = rms_norm(q, block["attn_q_norm.weight"], spec.norm_eps)
        k = rms_norm(k, block["attn_k_norm.weight"], spec.norm_eps)
    return q, k, v


def attention(spec: TinySpec, block: dict[str, Array], x: Array, positions: Array) -> Array:
    """Causal grouped-query attention [T, H * d]: query head h reads key/value head h // (H / K)."""
    n_tokens = len(x)
    q, k, v = project(spec, block, x)
    factors = block.get("rope_freqs.weight")
    q, k = rotate(spec, q, positions, factors), rotate(spec, k, positions, factors)
    group = spec.n_head // spec.n_head_kv
    visible = positions[None, :] <= positions[:, None]
    out = np.empty((n_tokens, spec.n_head, spec.head_dim))
    for h in range(spec.n_head):
        scores = q[h] @ k[h // group].T / math.sqrt(spec.head_dim)
        scores = np.where(visible, scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, h] = (p / p.sum(-1, keepdims=True)) @ v[h // group]
    return out.reshape(n_tokens, -1)


def rotate(spec: TinySpec, x: Array, positions: Array, factors: Array | None = None) -> Array:
    """RoPE on the first n = rope_dim values: i with i + n/2, in Llama 2i with 2i + 1; linear scaling and YaRN (arXiv
    2309.00071). factors: what each frequency is divided by.
    """
    n = spec.rope_dim or spec.head_dim
    frequency = spec.rope_base ** (-2.0 * np.arange(n // 2) / n)
    if factors is not None:
        frequency = frequency / factors
    magnitude = 1.0
    if spec.scaling_kind == "linear":
        frequency = frequency / spec.scaling_factor
    elif spec.scaling_kind == "yarn":
        frequency, magnitude = yarn(spec, frequency, n)
    angle = positions[:, None] * frequency
    cos, sin = np.cos(angle) * magnitude, np.sin(angle) * magnitude
    first = np.arange(0, n, 2) if spec.arch == "llama" else np.arange(n // 2)
    second = first + (1 if spec.arch == "llama" else n // 2)
    a, b = x[..., first], x[..., second]
    rotated = x.copy()
    rotated[..., first], rotated[..., second] = a * cos - b * sin, a * sin + b * cos
    return rotated


def yarn(spec: TinySpec, frequency: Array, n: int) -> tuple[Array, float]:
    """Interpolates slow dimensions, keeps fast ones, and blends those between 1 and 32 turns."""
    original = spec.scaling_orig_ctx or spec.n_ctx

    def dimension(turns: float) -> float:
        return n * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(spec.rope_base))

    low = max(0.0, math.floor(dimension(32.0)))
    high = min(n - 1.0, math.ceil(dimension(1.0)))
    ramp = np.clip((np.arange(n // 2) - low) / max(0.001, high - low), 0, 1)
    blended = frequency / spec.scaling_factor * ramp + frequency * (1 - ramp)
    return blended, 1 + 0.1 * math.log(spec.scaling_factor)
