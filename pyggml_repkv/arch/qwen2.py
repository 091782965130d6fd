"""Qwen2 and Qwen2.5 (arXiv 2407.10671): biases on q, k and v."""

from pyggml_repkv.arch.base import QKV_BIASES, Arch

QWEN2 = Arch("qwen2", optional=QKV_BIASES | {"output.bias"})
