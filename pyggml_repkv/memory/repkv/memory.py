"""`--kv repkv`: older tokens in blocks, found again by an index, the most relevant attended at each layer and step.

A block that is selected is attended where it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import InputError, StoreError
from pyggml_repkv.ffi.context import Tensor
from pyggml_repkv.ffi.library import g
from pyggml_repkv.memory.bounded.local import LocalWindow
from pyggml_repkv.memory.bounded.memory import BoundedMemory, check_settings, context_of
from pyggml_repkv.memory.bounded.rotation import Rotation
from pyggml_repkv.memory.checkpoints import State
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.cut.blocks import Blocks, Scheme, make_blocks, parse_scheme
from pyggml_repkv.memory.index.base import Index, IndexParts, Queries, Selection
from pyggml_repkv.memory.index.kept import Kept
from pyggml_repkv.memory.index.representatives import Representatives
from pyggml_repkv.memory.index.tokens import TokenCodes
from pyggml_repkv.memory.policy import (
    NO_DISK,
    DiskNeed,
    Form,
    PolicyInputs,
    StepAttention,
    StepCost,
    StepShape,
    even_split,
)  # fmt: skip
from pyggml_repkv.memory.repkv.checkpoints import RepKVCheckpoints
from pyggml_repkv.memory.store.arenas import Arenas, Rows, as_array, as_rows
from pyggml_repkv.memory.store.block_file import BlockFile, BlockHeader
from pyggml_repkv.memory.store.disk import DiskStore, block_folder
from pyggml_repkv.memory.store.layout import BlockShape
from pyggml_repkv.memory.store.ram import RamStore, floats
from pyggml_repkv.ops.kernels import LANES, MAX_SELECTED
from pyggml_repkv.ops.makers import Ops

# Units that the smallest graph has room for.
FIRST_ROOM = 1024


class RepKVMemory(BoundedMemory):
    """To try another index, subclass and set `make_index` (docs/examples/mean_key_blocks.py)."""

    name: ClassVar[str] = "repkv"
    evicts: ClassVar[bool] = True
    ignores: ClassVar[frozenset[str]] = frozenset(("kv_dir", "kv_disk_max", "prefetch"))
    make_index: ClassVar[type[Index] | None] = None
    """None: as the settings say."""
    store: RamStore | DiskStore

    def __init__(self, inputs: PolicyInputs) -> None:
        memory, config = inputs.memory, inputs.config
        make_index = type(self).make_index or index_of(memory)
        self.scheme = scheme = parse_scheme(memory.block, make_index.unit_of(memory))
        check_settings(inputs, self.name)
        n_ctx = context_of(inputs)
        # How many units a full context may have, in whole vectors.
        max_units = -(-n_ctx // (scheme.smallest_unit * LANES)) * LANES
        arenas = inputs.arenas or Arenas(10 * config.n_layer + 4)
        rotation = Rotation(config, memory, inputs.rope, inputs.long)
        self.n_dense = 0 if rotation.long else min(memory.n_dense, config.n_ctx_train)
        self.n_top_max = max(memory.budget, memory.chunk_budget, self.n_dense) // scheme.smallest_unit
        most = MAX_SELECTED * scheme.smallest_unit
        # A budget for the whole context leaves no choice.
        if any(most < budget < n_ctx for budget in (memory.budget, memory.chunk_budget)):
            raise InputError(
                f"--budget and --chunk-budget may be at most {most} tokens with units of {scheme.smallest_unit}; "
                "or give larger units (--unit, --block)"
            )
        # So that every token that has a choice selects something: what it kept says whether it had one.
        if memory.keeps and 0 < memory.budget < scheme.largest_unit:
            raise InputError(
                f"--budget is {memory.budget}; with --sticky or --late it must be 0 or at least {scheme.largest_unit}, "
                "the tokens of the largest unit"
            )
        # Of a key head in a step, for all groups of a chunk.
        n_groups = make_index.n_groups(memory, memory.n_batch)
        self.most_selected = max(memory.budget, n_groups * memory.chunk_budget, self.n_dense) // scheme.smallest_unit
        self.blocks: Blocks = make_blocks(scheme, memory.n_sink, inputs.boundaries)
        self.n_rows = config.n_head_kv if make_index.selects_per_head(memory) else 1
        self.kept = Kept(arenas, config, memory, self.n_rows, self.n_top_max)
        self.shape = BlockShape(scheme.largest_block, scheme.largest_unit, scheme.most_units, self.n_rows)
        local = LocalWindow(arenas, config, memory)
        bounds = arenas.new(g.GGML_TYPE_I32, (max_units + 1,), "unit_bounds", rows=lambda _: Rows(0, max_units + 1))
        self._unit_bounds = as_array(bounds, np.int32)
        self._unit_bounds[0], self._n_noted = memory.n_sink, 0
        self._max_units, self._n_room = max_units, max_units
        parts = IndexParts(
            arenas, config, memory, local, self.kept, lambda layer, at: self.stored_keys(layer, at), n_ctx, scheme,
            bounds, max_units, self.n_top_max, lambda: self._n_room, self.blocks,
        )  # fmt: skip
        self.index: Index = make_index(parts)
        self.writes = frozenset(("k_local", "v_local", "k_store", "v_store")) | self.index.writes
        super().__init__(inputs, arenas, rotation, local, self._make_store(inputs, arenas, n_ctx, max_units))

    def _make_store(self, inputs: PolicyInputs, arenas: Arenas, n_ctx: int, max_units: int) -> RamStore | DiskStore:
        memory, config, file = inputs.memory, inputs.config, inputs.block_file
        if file is None and not memory.on_disk:
            if memory.kv_disk_max or memory.type_evicted:
                raise InputError("--kv-disk-max and --cache-type-evicted need --kv-ram or --kv-dir")
            return RamStore(
                arenas, config, memory, n_rows=n_ctx, max_units=max_units, sealed_end=lambda: self.blocks.sealed_end
            )  # fmt: skip
        if file is None:
            file = BlockFile(block_folder(memory), None)
        try:
            return DiskStore(
                arenas, config, memory, file, self.blocks, shape=self.shape,
                max_blocks=-(-n_ctx // self.scheme.block.min_size), n_selected=self.most_selected,
                n_extra=self.index.n_packed if inputs.kept else 0, kept=self.kept.tensors,
            )  # fmt: skip
        except BaseException:
            file.close()
            raise

    @property
    def disk(self) -> DiskStore | None:
        """The store, where blocks are on disk."""
        return self.store if isinstance(self.store, DiskStore) else None

    def budget(self, n_past: int, n_tokens: int) -> int:
        if n_past + n_tokens <= self.n_dense:
            return n_past
        return self.memory.budget if n_tokens == 1 else self.memory.chunk_budget

    def split(self, n_tokens: int, n_batch: int) -> list[int]:
        # Each with a selection of its own: a chunk's selection hides what a short question at its end asks.
        n_single = min(self.memory.n_question, n_tokens)
        return even_split(n_tokens - n_single, n_batch) + [1] * n_single

    def step_shape(self, n_past: int, n_tokens: int, preferred: Form) -> StepShape:
        shape = super().step_shape(n_past, n_tokens, preferred)
        # Rooms double, so that a graph for few units is small and few graphs are built.
        n_room = min(max(FIRST_ROOM, 1 << (self.regions.n_units - 1).bit_length()), self._max_units)
        return replace(shape, memory=(shape.memory, n_room))

    def build(self, ops: Ops, shape: StepShape) -> StepAttention:
        assert isinstance(shape.memory, tuple)
        memory, self._n_room = shape.memory
        return super().build(ops, replace(shape, memory=memory))

    def select(self, ops: Ops, q: Queries, regions: Tensor, layer: int) -> Selection:
        return self.index.nodes(ops, q, regions, self.store.places(layer), layer)

    def begin_step(self, tokens: NDArray[np.int32], n_past: int) -> None:
        # What the last step would have taken back is settled now, however far this one comes.
        self.index.settle()
        self.kept.settle()
        super().begin_step(tokens, n_past)
        self.regions.kept = self.kept.begin_step(one=len(tokens) == 1)

    def evict(self, tokens: NDArray[np.int32], n_past: int, start: int) -> tuple[int, int]:
        self.blocks.append(tokens.tolist(), n_past)
        first_new = self.blocks.n_blocks
        for block, (begin, end) in enumerate(self.blocks.seal(start), first_new):
            self.index.seal(block, begin, end)
            extra = self.index.pack(block, begin, end) if self._inputs.kept else b""
            ends = self.blocks.unit_ends(begin, end)
            self.store.seal(block, begin, end, ends, rotated=not self.rotation.far, extra=extra)
        self._note_units()
        if self.disk is not None:
            self.index.forget(self.blocks.sealed_end)
        self.index.remember(n_past, len(tokens))
        return self.blocks.sealed_end, self.blocks.n_units

    def _note_units(self) -> None:
        """Tells the graph of the units that are in blocks now."""
        n = self.blocks.n_units
        first = min(self._n_noted, n)
        self._unit_bounds[first : n + 1] = self.blocks.unit_bounds[first : n + 1]
        self._n_noted = n

    def undo_step(self, n_past: int) -> None:
        # One that was stopped before it rearranged anything has nothing to take back, least of all the step before.
        if self.regions.first == n_past:
            self.index.undo()
            self.kept.undo()

    def went_far(self) -> None:
        for block, (begin, end) in enumerate(pairwise(self.blocks.bounds)):
            self.index.renew(block, begin, end)

    @property
    def knows_selection(self) -> bool:
        return self.disk is not None and self.disk.reads_ahead and self.kept.chose(self.regions.kept)

    def assume_selected(self, n_past: int) -> None:
        """For a graph that is never computed: as if the token before had selected, if there was a choice by then."""
        if self._n_far(n_past) > self.budget(n_past, 1):
            self.kept.assume()
            self.regions.kept = 0

    def checkpoint(self) -> RepKVCheckpoints:
        return RepKVCheckpoints(self)

    def restore(self, state: State, headers: Sequence[tuple[int, BlockHeader]], tokens: Sequence[int]) -> None:
        """See Checkpoints.restore."""
        disk = self.disk
        assert disk is not None
        position = self.memory.n_sink
        unit_bounds = [position]
        for block, (offset, header) in enumerate(headers):
            if (header.block, header.first_position) != (block, position):
                raise StoreError(f"{disk.file.path}: block {block} is not where it should be")
            disk.layout.check(header)
            self.index.unpack(block, position, position + header.n_tokens, header.extra)
            unit_bounds += [position + unit_end for unit_end in header.unit_ends]
            position += header.n_tokens
            disk.io.add(header, offset)
        if position != state.sealed_end:
            raise StoreError(f"{disk.file.path}: its blocks end at token {position}, not at {state.sealed_end}")
        ends = np.cumsum([h.n_tokens for _, h in headers], dtype=np.int64) + self.memory.n_sink
        bounds = [self.memory.n_sink, *ends.tolist()]
        self.blocks.restore(bounds, unit_bounds, tokens)
        self._note_units()
        rotation = self.rotation
        rotation.far, rotation.far_at = state.far_at >= 0, state.far_at
        disk.resume(position)
        if state.far_at > 0:
            disk.turn_back_blocks(rotation.inverse(0, state.far_at))
            # What they carry of the index is from before their keys were turned back.
            for block, (begin, end) in enumerate(pairwise(self.blocks.bounds)):
                if headers[block][1].rotated:
                    self.index.renew(block, begin, end)
        self.local.base = self.local.start(state.n_past)
        self.index.forget(state.sealed_end)
        self.index.put_state(state.sealed_end, state.n_past, state.scores)
        scheme, n_units, budget = self.scheme, self.blocks.n_units, self.budget(state.n_past, 1)
        self.kept.restore(
            state.kept, unit_bounds, budget=budget, n_most=self.memory.budget // scheme.smallest_unit,
            even=scheme.smallest_unit == scheme.largest_unit,
        )  # fmt: skip
        if state.warm.shape[1] % disk.layout.n_lanes:
            raise StoreError("which blocks lay in RAM is damaged")
        for layer, lanes in enumerate(state.warm.reshape(self.config.n_layer, disk.layout.n_lanes, -1).tolist()):
            disk.io.prefetch(layer, *([u for u in units if 0 <= u < n_units] for units in lanes))

    def copy_from(self, other: Self) -> None:
        super().copy_from(other)
        self.blocks.copy_from(other.blocks)
        self._note_units()
        self.index.copy_from(other.index)
        self.kept.copy_from(other.kept)

    def new_blocks(self, scheme: Scheme) -> Blocks:
        """Blocks of the same text by another scheme, none yet."""
        return make_blocks(scheme, self.memory.n_sink, self._inputs.boundaries)

    def stored_keys(self, layer: int, positions: NDArray[np.integer]) -> NDArray[np.float32]:
        """Float32 [n, K, d]: before RoPE with far positions, else rotated. Raises StoreError for unreadable ones."""
        keys = self.store.keys(layer, positions)
        return self.centres.added(layer, keys, positions, rotated=not self.rotation.far)

    def local_keys(self, layer: int, first: int, end: int) -> NDArray[np.float32]:
        """Rotated keys of the window's positions [first, end), float32 [n, K, d]."""
        rows = as_rows(self.local.k[layer])[first - self.local.base : end - self.local.base]
        keys = floats(rows, self.config, self.memory)
        return self.centres.added(layer, keys, np.arange(first, end), rotated=True)

    def cost(self, n_past: int, n_tokens: int) -> StepCost:
        m, own = self.memory, (n_tokens + 1) // 2
        size = self.scheme.block.max_size
        n_far = self._n_far(n_past)
        n_blocks = n_far // size
        n_selected = min(n_blocks * size, self.budget(n_past, n_tokens))
        n_attended = min(n_past, m.n_sink + m.n_local) + own + n_selected + n_far - n_blocks * size
        n_indexed, index_bytes = n_blocks * self.index.n_entries, n_blocks * self.index.block_bytes
        n_scored = min(m.n_scoring, n_past + own) if "score_l" in self.index.writes else 0
        n_queries = self.index.n_queries(n_tokens)
        return StepCost(n_attended, n_scored, n_indexed, index_bytes // self.config.n_layer, n_queries)

    def bytes_at(self, n_tokens: int) -> dict[str, int]:
        n_stored, row_bytes = min(n_tokens, self.n_ctx), self.local.row_bytes
        n_blocks, n_open = self._n_blocks_at(n_stored), n_stored
        blocks: dict[str, int] = {}
        if self.disk is not None:
            n_open = min(self.memory.n_sink + self.disk.n_open, n_stored)
            blocks = self.disk.ram_bytes_at(n_blocks * self.scheme.most_units)
        return {
            "window": row_bytes * min(self.local.n_rows, n_stored),
            "tokens": row_bytes * n_open,
            **blocks,
            **self.index.bytes_at(n_blocks, n_open),
        }

    def disk_need(self, n_tokens: int) -> DiskNeed | None:
        return None if self.disk is None else self.disk.need(n_tokens - self.memory.n_local - self.memory.n_sink)

    def _n_far(self, n_tokens: int) -> int:
        return max(0, n_tokens - self.memory.n_local - self.memory.n_sink)

    def _n_blocks_at(self, n_tokens: int) -> int:
        return self._n_far(n_tokens) // self.scheme.block.min_size

    def stats(self, n_past: int) -> dict[str, object]:
        parts = self.bytes_at(n_past)
        return {
            "policy": self.name,
            "blocks": self.blocks.n_blocks,
            "selected": min(self.budget(max(0, n_past - 1), 1), self.blocks.sealed_end - self.memory.n_sink),
            "resident_bytes": parts["window"],
            "ram_bytes": parts["tokens"] + parts.get("blocks", 0),
            "index_bytes": self.blocks.n_blocks * self.index.block_bytes,
            "score_bytes": parts.get("scores", 0),
            "far_tokens": self.local.start(n_past),
            "far_positions": self.rotation.far,
            **(NO_DISK if self.disk is None else self.disk.stats()),
        }

    def close(self) -> None:
        self.index.close()
        self.kept.close()
        super().close()


def index_of(memory: MemoryConfig) -> type[Index]:
    """The index that the settings ask for."""
    return TokenCodes if memory.index_kind[0] == "tokens" else Representatives
