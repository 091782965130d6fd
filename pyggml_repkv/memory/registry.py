"""`--kv NAME` -> a policy. A new policy is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from pyggml_repkv.errors import InputError
from pyggml_repkv.graph.plan import GraphModel
from pyggml_repkv.memory.full import FullMemory
from pyggml_repkv.memory.policy import MemoryConfig, Policy
from pyggml_repkv.memory.repkv import RepKVMemory
from pyggml_repkv.model.config import ModelConfig

POLICIES: dict[str, Callable[[ModelConfig, MemoryConfig, GraphModel], Policy]] = {
    "full": lambda config, memory, graph: FullMemory(config, memory, graph.fused_ops),
    "repkv": lambda config, memory, graph: RepKVMemory(graph, memory),
}


def make_policy(config: ModelConfig, memory: MemoryConfig, graph: GraphModel) -> Policy:
    if memory.kv not in POLICIES:
        raise InputError(f"--kv is {memory.kv!r}; it must be one of {', '.join(sorted(POLICIES))}")
    return POLICIES[memory.kv](config, memory, graph)
