"""A KV memory of one's own: blocks found by the mean of all their keys.

    python -m pyggml_repkv run --kv docs/examples/mean_key_blocks.py -f book.txt -p 'Who did it?'
    python -m pyggml_repkv eval passkey --lengths 8192 --kv docs/examples/mean_key_blocks.py

Window, blocks, store and attention are RepKV's; only the index differs. An index that shares nothing with
Representatives implements `Index` (pyggml_repkv/memory/index/base.py); a memory that shares nothing with RepKV
implements `Policy` (pyggml_repkv/memory/policy.py).
"""

from dataclasses import replace

import numpy as np

from pyggml_repkv.memory.index.base import IndexParts
from pyggml_repkv.memory.index.representatives import Representatives
from pyggml_repkv.memory.repkv.memory import RepKVMemory


class MeanKeys(Representatives):
    """One vector a block and key head: a quarter of four representatives."""

    def __init__(self, parts: IndexParts) -> None:
        super().__init__(replace(parts, memory=replace(parts.memory, index="representatives:1")))

    def block_keys(self, layer: int, begin: int, end: int, chosen: np.ndarray) -> np.ndarray:
        """Float32 [K, 1, d]."""
        return self.keys(layer, np.arange(begin, end)).mean(0)[:, None]


class MeanKeyBlocks(RepKVMemory):
    name = "mean-key"
    make_index = MeanKeys


make_policy = MeanKeyBlocks
"""What `--kv FILE.py` looks for."""
