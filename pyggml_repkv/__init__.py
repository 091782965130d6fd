"""Local inference for Qwen and Llama GGUF models whose context is not bounded by memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyggml_repkv.engine.generate import GenerationConfig as GenerationConfig
    from pyggml_repkv.engine.model import Model as Model
    from pyggml_repkv.engine.sampling import SamplingConfig as SamplingConfig
    from pyggml_repkv.engine.session import Session as Session
    from pyggml_repkv.memory.config import MemoryConfig as MemoryConfig
    from pyggml_repkv.model.rope_options import RopeOptions as RopeOptions

__version__ = "0.1.0"

# Loaded when they are first asked for: ggml takes a while, and `--help` does not need it.
_PUBLIC = {
    "GenerationConfig": "engine.generate",
    "MemoryConfig": "memory.config",
    "Model": "engine.model",
    "RopeOptions": "model.rope_options",
    "SamplingConfig": "engine.sampling",
    "Session": "engine.session",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
