"""The local window of a bounded memory: recent tokens, which every query attends."""

from __future__ import annotations

from pyggml_repkv.ffi.library import g
from pyggml_repkv.memory.cache_types import GGML_CACHE_TYPES
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.store.arenas import Arenas, Rows, as_rows
from pyggml_repkv.model.config import ModelConfig


class LocalWindow:
    """Row r of k[layer] and v[layer], [n_rows, K * d], is the token at position base + r: rotated keys, and values, of
    the window and of the steps since it was last moved.
    """

    def __init__(self, arenas: Arenas, config: ModelConfig, memory: MemoryConfig) -> None:
        self._n_local = memory.n_local
        self.n_rows = memory.n_local + 2 * memory.n_batch
        self.base = 0
        shape = self.n_rows, config.n_embd_kv
        type_k, type_v = GGML_CACHE_TYPES[memory.type_k], GGML_CACHE_TYPES[memory.type_v]

        def rows(n_past: int) -> Rows:
            return Rows(0, n_past - self.base)

        self.k = [arenas.new(type_k, shape, f"k_local-{i}", rows=rows) for i in range(config.n_layer)]
        self.v = [arenas.new(type_v, shape, f"v_local-{i}", rows=rows) for i in range(config.n_layer)]
        self.row_bytes: int = config.n_layer * sum(g.ggml_row_size(t, config.n_embd_kv) for t in (type_k, type_v))

    def start(self, n_past: int) -> int:
        """First position of the window before a step."""
        return max(0, n_past - self._n_local)

    def make_room(self, n_past: int, n_tokens: int) -> None:
        """Moves the window to the first rows where the step would not fit."""
        if n_past + n_tokens - self.base <= self.n_rows:
            return
        start = self.start(n_past)
        shift, n_kept = start - self.base, n_past - start
        for tensor in (*self.k, *self.v):
            rows = as_rows(tensor)
            rows[:n_kept] = rows[shift : shift + n_kept].copy()
        self.base = start
