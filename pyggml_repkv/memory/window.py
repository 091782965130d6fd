"""`--kv window`: the first tokens and the recent ones, the rest forgotten (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.ffi.context import Tensor
from pyggml_repkv.ffi.library import g
from pyggml_repkv.memory.bounded.local import LocalWindow
from pyggml_repkv.memory.bounded.memory import BoundedMemory, check_settings
from pyggml_repkv.memory.bounded.rotation import Rotation
from pyggml_repkv.memory.config import MEMORY_FIELDS
from pyggml_repkv.memory.index.base import Queries, Selection
from pyggml_repkv.memory.policy import NO_DISK, PolicyInputs, StepCost
from pyggml_repkv.memory.store.arenas import Arenas
from pyggml_repkv.memory.store.ram import RamStore
from pyggml_repkv.ops.makers import Ops


class WindowMemory(BoundedMemory):
    """Positions are those in the cache, as in the paper: sinks are seen from just before the window."""

    name: ClassVar[str] = "window"
    ignores: ClassVar[frozenset[str]] = frozenset(MEMORY_FIELDS) - {"n_sink", "n_local", "positions"}
    writes = frozenset(("k_local", "v_local", "k_store", "v_store"))

    def __init__(self, inputs: PolicyInputs) -> None:
        config, memory = inputs.config, inputs.memory
        check_settings(inputs, self.name)
        arenas = inputs.arenas or Arenas(4 * config.n_layer + 4)
        rotation = Rotation(config, memory, inputs.rope, inputs.long, far=memory.positions != "exact")
        store = RamStore(arenas, config, memory, n_rows=memory.n_sink, max_units=1, sealed_end=lambda: 0)
        super().__init__(inputs, arenas, rotation, LocalWindow(arenas, config, memory), store)
        self._nothing = arenas.new(g.GGML_TYPE_I32, (1, 1), "no_runs")

    def select(self, ops: Ops, q: Queries, regions: Tensor, layer: int) -> Selection:
        return Selection(self._nothing, self._nothing)

    def evict(self, tokens: NDArray[np.int32], n_past: int, start: int) -> tuple[int, int]:
        return start, 0

    def cost(self, n_past: int, n_tokens: int) -> StepCost:
        return StepCost(min(n_past, self.memory.n_sink + self.memory.n_local) + (n_tokens + 1) // 2)

    def bytes_at(self, n_tokens: int) -> dict[str, int]:
        n_rows = min(self.local.n_rows, n_tokens) + min(self.memory.n_sink, n_tokens)
        return {"window": self.local.row_bytes * n_rows}

    def stats(self, n_past: int) -> dict[str, object]:
        return {
            "policy": self.name,
            "blocks": 0,
            "selected": 0,
            "resident_bytes": sum(self.bytes_at(n_past).values()),
            "ram_bytes": 0,
            "far_tokens": min(self.memory.n_sink, self.local.start(n_past)),
            **NO_DISK,
        }
