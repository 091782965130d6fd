"""`--kv repkv`: older tokens in blocks, found again by representative tokens, the most relevant attended at each step.

Two arenas per layer. `local` holds the rotated keys of the window and what the steps since it was last moved added.
`store` holds every token; with far positions its keys are as before RoPE, and the queries that meet them are rotated
by one distance, n_local, so no stored key is ever rotated again however long the sequence grows. A block that is
selected is attended where it lies.
"""

from __future__ import annotations

import numpy as np

from pyggml_repkv.errors import InputError
from pyggml_repkv.ffi.context import GraphContext, Tensor, TensorContext
from pyggml_repkv.ffi.handles import Buffer, lazy_zeros
from pyggml_repkv.ffi.library import g, native, native_ffi
from pyggml_repkv.graph.plan import GraphModel
from pyggml_repkv.memory.blocks import FixedBlocks, parse_block
from pyggml_repkv.memory.cache_types import GGML_CACHE_TYPES, check_cache_types
from pyggml_repkv.memory.policy import Form, MemoryConfig, StepAttention, StepShape, even_split
from pyggml_repkv.memory.repkv_attention import RepKVChunk, RepKVOne
from pyggml_repkv.model.config import ModelConfig

DEFAULT_CONTEXT = 2**20

# The end of a prompt is read token by token, each with a selection of its own: the mean query of a chunk hides what a
# short question at its end asks.
N_SINGLE = 16


class RepKVMemory:
    """`local_base` is the position of local row 0; positions before `local_start` are far."""

    name = "repkv"
    precise_rope = True

    def __init__(self, graph: GraphModel, memory: MemoryConfig) -> None:
        config = graph.config
        self.config, self.memory, self.graph = config, memory, graph
        self.n_ctx = memory.n_ctx or DEFAULT_CONTEXT
        self.far = _far_positions(config, memory, self.n_ctx)
        if graph.exact:
            raise InputError("--exact-graph is llama.cpp's graph, which has no --kv repkv: leave one of them out")
        if graph.weights.repacked:
            raise InputError("--kv repkv needs the weights as in the file: load the model with --no-repack")
        check_cache_types(config, memory)
        self.blocks = FixedBlocks(memory.n_sink, parse_block(memory.block))
        n_blocks = max(1, self.n_ctx // self.blocks.size)
        types = GGML_CACHE_TYPES[memory.type_k], GGML_CACHE_TYPES[memory.type_v]
        width = config.n_embd_kv
        self.n_local_rows = memory.n_local + 2 * max(memory.n_batch, N_SINGLE)
        self._context = TensorContext(6 * config.n_layer + 16)
        self._buffers: list[Buffer] = []
        layers = range(config.n_layer)
        self.k_local = [self._arena(types[0], (self.n_local_rows, width), f"k_local-{i}") for i in layers]
        self.v_local = [self._arena(types[1], (self.n_local_rows, width), f"v_local-{i}") for i in layers]
        self.k_store = [self._arena(types[0], (self.n_ctx, width), f"k_store-{i}") for i in layers]
        self.v_store = [self._arena(types[1], (self.n_ctx, width), f"v_store-{i}") for i in layers]
        self.index = [self._arena(types[0], (n_blocks, width * memory.n_repr), f"index-{i}") for i in layers]
        self.score_tensors = [
            self._arena(g.GGML_TYPE_F32, (self.n_ctx, config.n_head_kv), f"score-{i}") for i in layers
        ]
        self.scores = [_numpy(t, np.float32).reshape(self.n_ctx, config.n_head_kv) for t in self.score_tensors]
        self.bounds_tensor = self._arena(g.GGML_TYPE_I32, (n_blocks + 1,), "block_bounds")
        self._bounds = _numpy(self.bounds_tensor, np.int32)
        self._bounds[0] = memory.n_sink
        self.local_base = 0
        self._undo: tuple[int, list[np.ndarray]] | None = None

    def split(self, n_tokens: int, n_batch: int) -> list[int]:
        n_single = min(N_SINGLE, n_tokens)
        return even_split(n_tokens - n_single, n_batch) + [1] * n_single

    def step_shape(self, n_past: int, n_tokens: int, preferred: Form) -> StepShape:
        return StepShape(n_tokens, "one" if n_tokens == 1 else "packed", None)

    def build(self, context: GraphContext, shape: StepShape) -> StepAttention:
        return RepKVOne(self, context) if shape.form == "one" else RepKVChunk(self, context, shape.n_tokens)

    def local_start(self, n_past: int) -> int:
        return max(0, n_past - self.memory.n_local)

    def begin_step(self, n_past: int, n_tokens: int) -> np.ndarray:
        """Seals what has left the window, makes room in `local` -> regions int32 [8] (native/memory_ops.h)."""
        start = self.local_start(n_past)
        for begin, end in self.blocks.seal(start):
            self._seal(begin, end)
        self._make_room(n_past, n_tokens, start)
        self._remember_scores(n_past, n_tokens)
        sink_end = min(self.memory.n_sink, start)
        remainder = min(self.blocks.sealed_end, start)
        n_blocks = self.blocks.n_blocks
        return np.array(
            [n_past, n_tokens, sink_end, remainder, start, self.local_base, n_blocks, self.far], dtype=np.int32
        )

    def undo_step(self) -> None:
        if self._undo is not None:
            first, saved = self._undo
            for scores, values in zip(self.scores, saved, strict=True):
                scores[first : first + len(values)] = values
            self._undo = None

    def get_scores(self, layer: int, position: int) -> np.ndarray:
        """Representative score of a token in a layer, float32 [H_kv]."""
        return self.scores[layer][position].copy()

    def set_scores(self, layer: int, position: int, values: np.ndarray) -> None:
        """Changes it; what was already chosen for a sealed block stays."""
        self.scores[layer][position] = values

    def stats(self, n_past: int) -> dict[str, object]:
        row = sum(t.contents.nb[1] for t in (self.k_store[0], self.v_store[0])) * self.config.n_layer
        start = self.local_start(n_past)
        return {
            "policy": self.name,
            "blocks": self.blocks.n_blocks,
            "selected": min(self.memory.top_blocks, self.blocks.n_blocks),
            "resident_bytes": row * min(self.n_local_rows, n_past),
            "ram_bytes": row * n_past,
            "index_bytes": self.blocks.n_blocks * self.index[0].contents.nb[1] * self.config.n_layer,
            "far_tokens": start,
            "disk_bytes": 0,
            "disk_written_bytes": 0,
            "prefetch": {"issued": 0, "used": 0, "late": 0, "missed": 0, "wait_ms": 0.0},
        }

    def close(self) -> None:
        self.scores = []
        self._context.close()
        for buffer in self._buffers:
            buffer.close()

    def _arena(self, type_: int, shape: tuple[int, ...], name: str) -> Tensor:
        tensor = self._context.new(type_, shape, name)
        buffer = Buffer.over(lazy_zeros(g.ggml_nbytes(tensor)))
        buffer.place(tensor, 0)
        self._buffers.append(buffer)
        return tensor

    def _seal(self, begin: int, end: int) -> None:
        block = (begin - self.memory.n_sink) // self.blocks.size
        self._bounds[block + 1] = end
        for layer in range(self.config.n_layer):
            index, store = self.index[layer].contents, self.k_store[layer].contents
            native.repkv_repr_topk(
                native_ffi.cast("char *", index.data + block * index.nb[1]),
                native_ffi.cast("char *", store.data),
                store.nb[1],
                native_ffi.cast("float *", self.scores[layer].ctypes.data),
                begin,
                end,
                self.config.n_head_kv,
                self.memory.n_repr,
            )

    def _make_room(self, n_past: int, n_tokens: int, start: int) -> None:
        if n_past + n_tokens - self.local_base <= self.n_local_rows:
            return
        shift, n_kept = start - self.local_base, n_past - start
        for tensor in (*self.k_local, *self.v_local):
            rows = _numpy(tensor, np.uint8).reshape(self.n_local_rows, -1)
            rows[:n_kept] = rows[shift : shift + n_kept].copy()
        self.local_base = start

    def _remember_scores(self, n_past: int, n_tokens: int) -> None:
        first = max(0, n_past - self.memory.n_score)
        self._undo = first, [scores[first : n_past + n_tokens].copy() for scores in self.scores]


def _far_positions(config: ModelConfig, memory: MemoryConfig, n_ctx: int) -> bool:
    if memory.positions == "auto":
        return n_ctx > config.n_ctx_train
    return memory.positions == "far"


def _numpy(tensor: Tensor, dtype: type[np.generic]) -> np.ndarray:
    """All bytes of an arena as a flat array."""
    t = tensor.contents
    memory = native_ffi.buffer(native_ffi.cast("char *", t.data), g.ggml_nbytes(tensor))
    return np.frombuffer(memory, dtype)
