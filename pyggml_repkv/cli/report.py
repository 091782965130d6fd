"""What `run` reports: timings in llama.cpp's layout, a line about the memory, and the JSON object."""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

from pyggml_repkv.engine.generate import GenerationResult


def timings(result: GenerationResult, load_ms: float) -> str:
    """Returns the timings in llama.cpp's layout, and what ended the text.

    A "run" is a step of one token; the total excludes loading.
    """
    n_tokens = result.n_prompt + result.n_decoded
    return (
        f"perf:        load time = {load_ms:10.2f} ms\n"
        f"perf: prompt eval time = {_per_token(result.prompt_ms, result.n_prompt, 'tokens')}\n"
        f"perf:        eval time = {_per_token(result.predicted_ms, result.n_decoded, 'runs  ')}\n"
        f"perf:       total time = {result.total_ms:10.2f} ms / {n_tokens:5d} tokens\n"
        f"perf:    finish reason = {result.finish_reason or 'interrupted'}\n"
    )


def memory(kv: dict[str, Any]) -> str:
    """Returns one line: what the memory held at the end, and what it cost."""
    from pyggml_repkv.engine.budget import size

    parts = [f"{size(kv.get('ram_bytes') or kv.get('resident_bytes', 0))} of keys and values"]
    if kv.get("blocks"):
        parts += [
            f"{kv['blocks']} blocks, of which the next token attends {kv.get('selected', 0)} tokens",
            f"index {size(kv.get('index_bytes', 0))}",
        ]
    prefetch = kv.get("prefetch", {})
    if kv.get("disk_bytes") and prefetch.get("required"):
        there = 100 * prefetch["hits"] / prefetch["required"]
        parts += [
            f"{size(kv['disk_bytes'])} on disk",
            f"{there:.1f} % of what was selected was in RAM when needed",
            f"{prefetch.get('wait_ms', 0) / 1e3:.1f} s spent waiting for the others",
        ]
    return f"perf:           memory = {', '.join(parts)}, peak RSS {size(peak_rss_bytes())}\n"


def _per_token(ms: float, n: int, noun: str) -> str:
    each = ms / n if n else 0.0
    rate = 1e3 * n / ms if ms else 0.0
    return f"{ms:10.2f} ms / {n:5d} {noun} ({each:8.2f} ms per token, {rate:8.2f} tokens per second)"


def as_json(result: GenerationResult, load_ms: float, kv: dict[str, Any], seed: int) -> str:
    """Returns one JSON object on one line."""
    return json.dumps(
        {
            "text": result.text,
            "tokens": result.tokens,
            "prompt_tokens": result.n_prompt,
            "predicted_tokens": len(result.tokens),
            "load_ms": round(load_ms, 3),
            "prompt_ms": round(result.prompt_ms, 3),
            "predicted_ms": round(result.predicted_ms, 3),
            "prompt_per_second": round(result.prompt_per_second, 3),
            "predicted_per_second": round(result.predicted_per_second, 3),
            "peak_rss_bytes": peak_rss_bytes(),
            "kv": kv,
            "finish_reason": result.finish_reason,
            "seed": seed,
        },
        ensure_ascii=False,
        allow_nan=False,
    )


def peak_rss_bytes() -> int:
    """Returns the largest resident set that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
