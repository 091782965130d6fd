"""Local inference for Qwen2-family GGUF models whose context is not bounded by memory."""

__version__ = "0.1.0"
