"""`--kv repkv`: older tokens in blocks, found again by an index, the most relevant attended at each layer and step.

A block that is selected is attended where it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import InputError, StoreError
from pyggml_repkv.ffi.context import Tensor
from pyggml_repkv.memory.bounded.local import LocalWindow
from pyggml_repkv.memory.bounded.memory import BoundedMemory, check_settings, context_of
from pyggml_repkv.memory.bounded.rotation import Rotation
from pyggml_repkv.memory.checkpoints import State
from pyggml_repkv.memory.cut.blocks import Blocks, make_blocks, parse_block
from pyggml_repkv.memory.index.base import Index, IndexParts, Queries, Selection
from pyggml_repkv.memory.index.kept import Kept
from pyggml_repkv.memory.index.representatives import Representatives
from pyggml_repkv.memory.policy import NO_DISK, DiskNeed, PolicyInputs, StepCost
from pyggml_repkv.memory.repkv.checkpoints import RepKVCheckpoints, block_shape
from pyggml_repkv.memory.store.arenas import Arenas, as_rows
from pyggml_repkv.memory.store.block_file import BlockFile, BlockHeader
from pyggml_repkv.memory.store.disk import DiskStore, block_folder
from pyggml_repkv.memory.store.ram import RamStore, floats
from pyggml_repkv.ops.kernels import LANES
from pyggml_repkv.ops.makers import Ops


class RepKVMemory(BoundedMemory):
    """To try another index, subclass and set `make_index` (docs/examples/mean_key_blocks.py)."""

    name: ClassVar[str] = "repkv"
    evicts: ClassVar[bool] = True
    ignores: ClassVar[frozenset[str]] = frozenset(("kv_dir", "kv_disk_max", "prefetch"))
    make_index: ClassVar[Callable[[IndexParts], Index]] = Representatives
    store: RamStore | DiskStore

    def __init__(self, inputs: PolicyInputs) -> None:
        memory, config, scheme = inputs.memory, inputs.config, parse_block(inputs.memory.block)
        check_settings(inputs, self.name)
        n_ctx = context_of(inputs)
        # How many blocks a full context may have, in whole groups.
        max_blocks = -(-n_ctx // (scheme.min_size * LANES)) * LANES
        arenas = inputs.arenas or Arenas(10 * config.n_layer + 4)
        rotation = Rotation(config, memory, inputs.rope, inputs.long)
        self.n_dense = 0 if rotation.long else min(memory.n_dense, config.n_ctx_train)
        self.n_top_max = max(memory.top_blocks, memory.chunk_blocks, self.n_dense // scheme.min_size)
        self.blocks: Blocks = make_blocks(scheme, memory.n_sink, inputs.boundaries)
        # First token of each unit, and where the last one ends.
        self.unit_bounds = [memory.n_sink]
        self.kept = Kept(arenas, config, memory, self.n_top_max)
        local = LocalWindow(arenas, config, memory)
        parts = IndexParts(
            arenas, config, memory, local, self.kept, lambda layer, at: self.stored_keys(layer, at), n_ctx, max_blocks,
            self.n_top_max, lambda: self.blocks.n_blocks, lambda: self.blocks.sealed_end, self.unit_bounds,
        )  # fmt: skip
        self.index = type(self).make_index(parts)
        self.writes = frozenset(("k_local", "v_local", "k_store", "v_store")) | self.index.writes
        super().__init__(inputs, arenas, rotation, local, self._make_store(inputs, arenas, n_ctx, max_blocks))

    def _make_store(self, inputs: PolicyInputs, arenas: Arenas, n_ctx: int, max_blocks: int) -> RamStore | DiskStore:
        memory, config, file = inputs.memory, inputs.config, inputs.block_file
        if file is None and not memory.on_disk:
            if memory.kv_disk_max or memory.type_evicted:
                raise InputError("--kv-disk-max and --cache-type-evicted need --kv-ram or --kv-dir")
            return RamStore(
                arenas, config, memory, n_rows=n_ctx, max_units=max_blocks * self.index.max_units,
                sealed_end=lambda: self.blocks.sealed_end,
            )  # fmt: skip
        if file is None:
            file = BlockFile(block_folder(memory), None)
        try:
            return DiskStore(
                arenas, config, memory, file, self.blocks, shape=block_shape(config, memory, self.index),
                max_blocks=max_blocks, n_selected=self.n_top_max,
                n_extra=self.index.n_packed if inputs.kept else 0, kept=self.kept.tensors,
            )  # fmt: skip
        except BaseException:
            file.close()
            raise

    @property
    def disk(self) -> DiskStore | None:
        """The store, where blocks are on disk."""
        return self.store if isinstance(self.store, DiskStore) else None

    @property
    def n_units(self) -> int:
        return len(self.unit_bounds) - 1

    def n_select(self, n_past: int, n_tokens: int) -> int:
        if n_past + n_tokens <= self.n_dense:
            return self.n_top_max
        return self.memory.top_blocks if n_tokens == 1 else self.memory.chunk_blocks

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
            ends = self.index.unit_ends(begin, end)
            self.unit_bounds += ends
            self.index.seal(block, begin, end)
            extra = self.index.pack(block) if self._inputs.kept else b""
            self.store.seal(block, begin, end, ends, rotated=not self.rotation.far, extra=extra)
        if self.disk is not None:
            self.index.forget(self.blocks.sealed_end)
        self.index.remember(n_past, len(tokens))
        return self.blocks.sealed_end, self.n_units

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
        if self._n_blocks_at(n_past) > self.n_select(n_past, 1):
            self.kept.assume()
            self.regions.kept = 0

    def checkpoint(self) -> RepKVCheckpoints:
        return RepKVCheckpoints(self)

    def restore(self, state: State, headers: Sequence[tuple[int, BlockHeader]], tokens: Sequence[int]) -> None:
        """See Checkpoints.restore."""
        disk = self.disk
        assert disk is not None
        position = self.memory.n_sink
        for block, (offset, header) in enumerate(headers):
            if (header.block, header.first_position) != (block, position):
                raise StoreError(f"{disk.file.path}: block {block} is not where it should be")
            disk.layout.check(header)
            self.unit_bounds += [position + end for end in header.unit_ends]
            position += header.n_tokens
            self.index.unpack(block, header.extra)
            disk.io.add(header, offset)
        if position != state.sealed_end:
            raise StoreError(f"{disk.file.path}: its blocks end at token {position}, not at {state.sealed_end}")
        ends = np.cumsum([h.n_tokens for _, h in headers], dtype=np.int64) + self.memory.n_sink
        self.blocks.restore([self.memory.n_sink, *ends.tolist()], tokens)
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
        # Sinks have none, also where some are still to come.
        n_scored = max(0, state.n_past - state.sealed_end)
        if state.scores.size != self.config.n_layer * self.config.n_head_kv * n_scored:
            raise StoreError("the scores are damaged")
        self.index.put_scores(state.sealed_end, state.scores)
        n_select = self.n_select(state.n_past, 1)
        self.kept.restore(
            state.kept, n_blocks=self.n_units, n_select=n_select, n_most=self.memory.top_blocks
        )  # fmt: skip
        if state.warm.shape[1] % disk.layout.n_lanes:
            raise StoreError("which blocks lay in RAM is damaged")
        for layer, lanes in enumerate(state.warm.reshape(self.config.n_layer, disk.layout.n_lanes, -1).tolist()):
            disk.io.prefetch(layer, *([u for u in units if 0 <= u < self.n_units] for units in lanes))

    def copy_from(self, other: Self) -> None:
        super().copy_from(other)
        self.blocks.copy_from(other.blocks)
        self.unit_bounds[:] = other.unit_bounds
        self.index.copy_from(other.index)
        self.kept.copy_from(other.kept)

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
        size = parse_block(m.block).max_size
        n_far = max(0, n_past - m.n_local - m.n_sink)
        n_blocks = n_far // size
        n_selected = min(n_blocks, self.n_select(n_past, n_tokens))
        n_attended = min(n_past, m.n_sink + m.n_local) + own + n_selected * size + n_far - n_blocks * size
        n_indexed = n_blocks * self.index.n_entries
        return StepCost(n_attended, min(m.n_scoring, n_past + own), n_blocks, n_indexed)

    def bytes_at(self, n_tokens: int) -> dict[str, int]:
        n_stored, row_bytes = min(n_tokens, self.n_ctx), self.local.row_bytes
        n_blocks, n_open = self._n_blocks_at(n_stored), n_stored
        blocks: dict[str, int] = {}
        if self.disk is not None:
            n_open = min(self.memory.n_sink + self.disk.n_open, n_stored)
            blocks = self.disk.ram_bytes_at(n_blocks * self.index.max_units)
        return {
            "window": row_bytes * min(self.local.n_rows, n_stored),
            "tokens": row_bytes * n_open,
            **blocks,
            **self.index.bytes_at(n_blocks, n_open),
        }

    def disk_need(self, n_tokens: int) -> DiskNeed | None:
        return None if self.disk is None else self.disk.need(n_tokens - self.memory.n_local - self.memory.n_sink)

    def _n_blocks_at(self, n_tokens: int) -> int:
        n_far = n_tokens - self.memory.n_local - self.memory.n_sink
        return max(0, n_far // parse_block(self.memory.block).min_size)

    def stats(self, n_past: int) -> dict[str, object]:
        parts = self.bytes_at(n_past)
        return {
            "policy": self.name,
            "blocks": self.blocks.n_blocks,
            "selected": min(self.n_select(max(0, n_past - 1), 1), self.n_units),
            "resident_bytes": parts["window"],
            "ram_bytes": parts["tokens"] + parts.get("blocks", 0),
            "index_bytes": self.blocks.n_blocks * self.index.block_bytes,
            "score_bytes": parts["scores"],
            "far_tokens": self.local.start(n_past),
            "far_positions": self.rotation.far,
            **(NO_DISK if self.disk is None else self.disk.stats()),
        }

    def close(self) -> None:
        self.index.close()
        self.kept.close()
        super().close()
