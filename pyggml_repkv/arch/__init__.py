"""The families of models that are known, by `general.architecture`."""

from pyggml_repkv.arch.base import Arch
from pyggml_repkv.arch.llama import LLAMA
from pyggml_repkv.arch.qwen2 import QWEN2
from pyggml_repkv.arch.qwen3 import QWEN3

__all__ = ["ARCHS", "Arch"]

ARCHS: dict[str, Arch] = {arch.name: arch for arch in (QWEN2, QWEN3, LLAMA)}
