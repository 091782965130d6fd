"""What comparisons with llama.cpp's stored answers share."""

from pathlib import Path

import numpy as np

from pyggml_repkv.ffi.library import describe

# The golden runs used CPUs with AVX-512 and without half-precision arithmetic. On other CPUs ggml's kernels round
# differently, in llama.cpp too: the numbers are near, and a greedy text may differ after some tokens.
HAS_FP16 = any("avx512_fp16" in line.split() for line in Path("/proc/cpuinfo").read_text().splitlines())
SAME_KERNELS = "avx512" in describe()["cpu"].split() and not HAS_FP16


def log_probs(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def nll(logits: np.ndarray, tokens: list[int]) -> float:
    """Mean over all tokens of the prompt but the first."""
    # Row by row: in float64, a long prompt times a large vocabulary is gigabytes.
    rows = zip(logits[:-1], tokens[1:], strict=True)
    return float(-np.mean([log_probs(row)[token] for row, token in rows]))
