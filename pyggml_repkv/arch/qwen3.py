"""Qwen3, dense (arXiv 2505.09388): no biases, a norm of each query and key head, heads as wide as the file says."""

from pyggml_repkv.arch.base import Arch

QWEN3 = Arch("qwen3", qk_norm=True)
