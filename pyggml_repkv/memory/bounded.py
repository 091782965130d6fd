"""What bounded memories share: two arenas per layer, the regions of a step, and where older tokens are seen.

`local` holds the rotated keys of the window and what the steps since it was last moved added. `store` holds tokens by
position; with far positions its keys are as before RoPE, and the queries that meet them are rotated by one distance,
n_local, so no stored key is ever rotated again however long the sequence grows.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import ComputeError, InputError
from pyggml_repkv.ffi.context import Tensor
from pyggml_repkv.ffi.library import g, native, native_ffi
from pyggml_repkv.memory.arenas import Arenas, as_rows
from pyggml_repkv.memory.blocks import parse_block
from pyggml_repkv.memory.bounded_attention import BoundedChunk, BoundedOne, BoundedStep
from pyggml_repkv.memory.cache_types import GGML_CACHE_TYPES, check_cache_types
from pyggml_repkv.memory.config import UNBOUNDED_CONTEXT
from pyggml_repkv.memory.disk_tier import DiskTier
from pyggml_repkv.memory.policy import DiskNeed, Form, PolicyInputs, StepAttention, StepShape, even_split
from pyggml_repkv.memory.regions import Regions
from pyggml_repkv.memory.repkv_checkpoints import Checkpoints
from pyggml_repkv.ops.makers import Ops

# The end of a prompt is read token by token, each with a selection of its own: the mean query of a chunk hides what a
# short question at its end asks.
N_SINGLE = 16

log = logging.getLogger(__name__)


class BoundedMemory(ABC):
    """`local_base` is the position of local row 0. A policy says what is selected between sinks and window."""

    name: str
    rewinds = False
    precise_rope = True

    places_tensor: Tensor
    """I32 [n_blocks, 2]: first row of a block in the store, and its tokens; where that is the same in all layers."""

    def __init__(self, inputs: PolicyInputs, *, n_stored: int | None, n_tensors: int) -> None:
        """n_stored: how many of the first tokens the store holds, None for all; n_tensors: arenas of the subclass."""
        graph, memory, config = inputs.graph, inputs.memory, inputs.graph.config
        self.config, self.memory, self.graph = config, memory, graph
        if graph.exact:
            raise InputError(f"--exact-graph is llama.cpp's graph, which has no --kv {self.name}: leave one out")
        if graph.weights.repacked:
            raise InputError(f"--kv {self.name} needs the weights as in the file: load the model with --no-repack")
        if not memory.flash_attn:
            raise InputError(f"-fa off stores attention scores, which --kv {self.name} never does: leave one out")
        check_cache_types(config, memory)
        self.n_ctx = memory.n_ctx or UNBOUNDED_CONTEXT
        # Pass keys were found less often where the first part of a text was read in one way and the rest in the other.
        long_from_the_start = memory.positions == "auto" and memory.n_ctx > config.n_ctx_train
        if inputs.long is not None:
            long_from_the_start = inputs.long
        self.long = long_from_the_start
        self.far = memory.positions == "far" or long_from_the_start
        # n_past when they began to be far: 0 from the start, -1 not yet.
        self.far_at = 0 if self.far else -1
        self.n_local_rows = memory.n_local + 2 * max(memory.n_batch, N_SINGLE)
        n_stored = self.n_ctx if n_stored is None else min(n_stored, self.n_ctx)
        n_long = 0 if long_from_the_start else min(memory.n_dense, config.n_ctx_train)
        n_dense_blocks = n_long // parse_block(memory.block).min_size
        self.n_dense = n_long
        self.n_top_max = max(memory.top_blocks, memory.chunk_blocks, n_dense_blocks)
        self.disk = self.make_disk(inputs)
        if self.disk is not None:
            n_stored = self.disk.n_rows
        type_k, type_v = GGML_CACHE_TYPES[memory.type_k], GGML_CACHE_TYPES[memory.type_v]
        width = config.n_embd_kv
        self.row_bytes: int = config.n_layer * (g.ggml_row_size(type_k, width) + g.ggml_row_size(type_v, width))
        self.arenas = Arenas(5 * config.n_layer + n_tensors)
        local, store, layers = (self.n_local_rows, width), (max(1, n_stored), width), range(config.n_layer)
        self.k_local = [self.arenas.new(type_k, local, f"k_local-{i}") for i in layers]
        self.v_local = [self.arenas.new(type_v, local, f"v_local-{i}") for i in layers]
        self.k_store = [self.arenas.new(type_k, store, f"k_store-{i}") for i in layers]
        self.v_store = [self.arenas.new(type_v, store, f"v_store-{i}") for i in layers]
        if self.disk is not None:
            self.disk.open(self.arenas, self.k_store, self.v_store)
        self._torn = False
        self.kept_tensors: list[Tensor] = []
        self.local_base = 0
        self.regions = Regions()
        # Set before the first step: queries and selections stay readable after each (`last_step`).
        self.observed = False
        self.last_step: BoundedStep | None = None

    def make_disk(self, inputs: PolicyInputs) -> DiskTier | None:
        """What keeps evicted blocks on disk, made before the arenas are."""
        return None

    @property
    def knows_selection(self) -> bool:
        """Whether the step that was begun, of one token, attends what the last one selected (`kept_tensors`)."""
        return False

    @property
    def store_base(self) -> int:
        """Position less row of the tokens in the store that are neither sinks nor in a block."""
        return self.disk.base if self.disk is not None else 0

    def places(self, layer: int) -> Tensor:
        """Where a layer's blocks lie in its store."""
        return self.disk.places[layer] if self.disk is not None else self.places_tensor

    @abstractmethod
    def select(self, ops: Ops, q: Tensor, q_far: Tensor, regions: Tensor, layer: int) -> Tensor:
        """A chunk's queries, packed and scaled -> I32 [1 or K, 1 + n], how many blocks are attended and which."""

    @abstractmethod
    def select_one(self, ops: Ops, qkv: Tensor, rope: Tensor, regions: Tensor, layer: int) -> Tensor:
        """The same for one token: qkv [(H + 2 K) * d] before RoPE, rope [2, rope_dim] near and far."""

    @abstractmethod
    def seal(self, tokens: NDArray[np.int32], n_past: int, start: int) -> tuple[int, int]:
        """Called before each step: what lies before `start` has left the window -> (end of blocks, n_blocks)."""

    def n_select(self, n_past: int, n_tokens: int) -> int:
        """How many blocks a step attends, if there are as many."""
        if n_past + n_tokens <= self.n_dense:
            return self.n_top_max
        return self.memory.top_blocks if n_tokens == 1 else self.memory.chunk_blocks

    def split(self, n_tokens: int, n_batch: int) -> list[int]:
        n_single = min(N_SINGLE, n_tokens)
        return even_split(n_tokens - n_single, n_batch) + [1] * n_single

    def step_shape(self, n_past: int, n_tokens: int, preferred: Form) -> StepShape:
        if n_tokens == 1:
            return StepShape(n_tokens, "one", (self.far, self.knows_selection))
        return StepShape(n_tokens, "packed", (self.far, False))

    def build(self, ops: Ops, shape: StepShape) -> StepAttention:
        if shape.form == "one":
            return BoundedOne(self, ops, known=self.knows_selection)
        return BoundedChunk(self, ops, shape.n_tokens)

    def begin_step(self, tokens: NDArray[np.int32], n_past: int) -> None:
        """Raises ComputeError once an earlier call was stopped halfway, as by Ctrl-C."""
        if self._torn:
            raise ComputeError("the memory was stopped while it was being rearranged: start a new session")
        self._torn = True
        self._rearrange(tokens, n_past)
        self._torn = False

    def _rearrange(self, tokens: NDArray[np.int32], n_past: int) -> None:
        n_tokens = len(tokens)
        if not self.far and self.memory.positions == "auto" and n_past + n_tokens > self.config.n_ctx_train:
            self._go_far(n_past)
        start = self.local_start(n_past)
        remainder, n_blocks = self.seal(tokens, n_past, start)
        self._make_room(n_past, n_tokens, start)
        sink_end = min(self.memory.n_sink, start)
        self.regions = Regions(
            n_past, n_tokens, sink_end, min(remainder, start), start, self.local_base, n_blocks, self.far,
            self.n_select(n_past, n_tokens), self.store_base,
        )  # fmt: skip

    def checkpoint(self) -> Checkpoints | None:
        return None

    @property
    def torn(self) -> bool:
        """Whether it was stopped halfway and is no longer of use."""
        return self._torn

    def undo_step(self) -> None:  # noqa: B027
        """Rows beyond n_past are written again before they are read."""

    def disk_need(self, n_tokens: int) -> DiskNeed | None:
        return None

    def local_start(self, n_past: int) -> int:
        return max(0, n_past - self.memory.n_local)

    @cached_property
    def far_table(self) -> NDArray[np.float32]:
        """[rope_dim]: cosines and sines of the one distance at which everything beyond the window is seen."""
        tables = self.graph.precise_rope_table(np.array([0, self.memory.n_local]))
        # Stored keys lack the factor that YaRN puts on both sides of a rotated product; cos(0) has it.
        return tables[:, 1] * tables[0, 0]

    def near_table(self, position: int) -> NDArray[np.float32]:
        return self.graph.precise_rope_table(np.array([position]))[:, 0]

    def close(self) -> None:
        if self.disk is not None:
            self.disk.close()
        self.arenas.close()

    def _go_far(self, n_past: int) -> None:
        """Takes the rotation out of what is stored."""
        self.far, self.far_at = True, n_past
        if n_past == 0:
            return
        n_ctx = self.config.n_ctx_train
        log.info("past the %d tokens the model was trained on: older tokens are seen from one distance now", n_ctx)
        if self.disk is None:
            parts = [(0, n_past, 0)]
        else:
            # What is on disk is turned back whenever it is read.
            self.disk.unrotate(self.unrotation(0, n_past))
            parts = [(0, min(self.memory.n_sink, n_past), 0), (self.disk.sealed_end, n_past, self.store_base)]
        # Some thousand rows at a time: the table is made in float64.
        for begin, end, base in parts:
            for first in range(begin, end, 4096):
                self._unrotate(first, min(first + 4096, end), base)
        self.went_far()

    def unrotation(self, first: int, end: int) -> NDArray[np.float32]:
        """[n, rope_dim]: cosines and sines that turn stored keys of positions [first, end) back."""
        half = self.config.rope_dim // 2
        if end - first > 4096:
            return np.concatenate([self.unrotation(a, min(a + 4096, end)) for a in range(first, end, 4096)])
        table = np.ascontiguousarray(self.graph.precise_rope_table(np.arange(first, end)).T)  # [n, rope_dim]
        table[:, half:] *= -1
        # cos(0) is YaRN's factor, 1 elsewhere: keys were multiplied by it and rotating back multiplies again.
        table /= self.near_table(0)[0] ** 2
        return table

    def _unrotate(self, first: int, end: int, base: int) -> None:
        """Turns the stored keys of positions [first, end), at rows from first - base on, back."""
        table = self.unrotation(first, end)
        scratch = np.empty(2 * self.config.n_embd_kv, np.float32)
        for tensor in self.k_store:
            rows = as_rows(tensor)[first - base : end - base]
            native.repkv_rotate_rows(
                native_ffi.cast("char *", rows.ctypes.data), int(tensor.contents.type), rows.strides[0], len(rows),
                self.config.n_head_kv, self.config.head_dim, native_ffi.cast("float *", table.ctypes.data),
                self.config.rope_dim, native_ffi.cast("float *", scratch.ctypes.data),
            )  # fmt: skip

    def went_far(self) -> None:  # noqa: B027
        """Called when stored keys have lost their rotation."""

    def _make_room(self, n_past: int, n_tokens: int, start: int) -> None:
        if self.disk is not None:
            self.disk.make_room([as_rows(t) for t in (*self.k_store, *self.v_store)], n_past, n_tokens)
        if n_past + n_tokens - self.local_base <= self.n_local_rows:
            return
        shift, n_kept = start - self.local_base, n_past - start
        for tensor in (*self.k_local, *self.v_local):
            rows = as_rows(tensor)
            rows[:n_kept] = rows[shift : shift + n_kept].copy()
        self.local_base = start
