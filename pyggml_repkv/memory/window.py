"""`--kv window`: the first tokens and the recent ones, the rest forgotten (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.ffi.context import Tensor
from pyggml_repkv.ffi.library import g
from pyggml_repkv.memory.bounded import BoundedMemory
from pyggml_repkv.memory.policy import NO_DISK, PolicyInputs
from pyggml_repkv.ops.makers import Ops


class WindowMemory(BoundedMemory):
    """Positions are those in the cache, as in the paper: sinks are seen from just before the window."""

    name = "window"

    def __init__(self, inputs: PolicyInputs) -> None:
        super().__init__(inputs, n_stored=inputs.memory.n_sink, n_tensors=2)
        self.far = inputs.memory.positions != "exact"
        self.places_tensor = self.arenas.new(g.GGML_TYPE_I32, (1, 2), "block_places")
        self._no_block = self.arenas.new(g.GGML_TYPE_I32, (1, 1), "no_block")

    def select(self, ops: Ops, q: Tensor, q_far: Tensor, regions: Tensor, layer: int) -> Tensor:
        return self._no_block

    def select_one(self, ops: Ops, qkv: Tensor, rope: Tensor, regions: Tensor, layer: int) -> Tensor:
        return self._no_block

    def seal(self, tokens: NDArray[np.int32], n_past: int, start: int) -> tuple[int, int]:
        return start, 0

    def bytes_at(self, n_tokens: int) -> dict[str, int]:
        n_local = min(self.n_local_rows, n_tokens)
        return {"window": self.row_bytes * (n_local + min(self.memory.n_sink, n_tokens))}

    def stats(self, n_past: int) -> dict[str, object]:
        return {
            "policy": self.name,
            "blocks": 0,
            "selected": 0,
            "resident_bytes": sum(self.bytes_at(n_past).values()),
            "ram_bytes": 0,
            "far_tokens": min(self.memory.n_sink, self.local_start(n_past)),
            **NO_DISK,
        }
