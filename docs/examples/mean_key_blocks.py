"""A KV memory of one's own: blocks found by the mean of all their keys instead of by representative tokens.

    python -m pyggml_repkv run --kv docs/examples/mean_key_blocks.py -f book.txt -p 'Who did it?'
    python -m pyggml_repkv eval passkey --lengths 8192 --kv docs/examples/mean_key_blocks.py

Window, blocks, positions, selection and attention are RepKV's; only what the index holds differs. `representatives`
(which tokens stand for a block) and `select`, `select_one` (the graph nodes that choose blocks) may be overridden too;
a memory that shares nothing with RepKV implements `Policy` (pyggml_repkv/memory/policy.py) instead.
"""

from dataclasses import replace

import numpy as np

from pyggml_repkv.memory.policy import Policy, PolicyInputs
from pyggml_repkv.memory.repkv import RepKVMemory


class MeanKeyBlocks(RepKVMemory):
    """One vector a block and key head: the index is a quarter of the default one."""

    name = "mean-key"

    def __init__(self, inputs: PolicyInputs) -> None:
        super().__init__(replace(inputs, memory=replace(inputs.memory, n_repr=1)))

    def block_keys(self, layer: int, begin: int, end: int, chosen: np.ndarray) -> np.ndarray:
        """Float32 [K, 1, d]."""
        return self.stored_keys(layer, np.arange(begin, end)).mean(0)[:, None]


def make_policy(inputs: PolicyInputs) -> Policy:
    """What `--kv FILE.py` looks for."""
    return MeanKeyBlocks(inputs)
