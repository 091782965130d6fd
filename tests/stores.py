"""A block store over plain numpy memory, and blocks with known contents."""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from pyggml_repkv.ffi.handles import aligned_zeros
from pyggml_repkv.memory.store.block_file import BlockFile
from pyggml_repkv.memory.store.block_store import BlockStore
from pyggml_repkv.memory.store.layout import BlockShape, RecordLayout
from tests.unit.native.op_bench import config

N_LAYER, MAX_TOKENS, MAX_BLOCKS, FIRST_ROW = 2, 24, 64, 5
N_HEAD_KV, MAX_UNITS = 2, 6


@dataclass
class StoreBench:
    """A store whose layers have arenas [FIRST_ROW + n_slots * max_unit, row]. blocks[b][layer]: a block's (k, v);
    units[u]: (block, first token, end).
    """

    folder: Path
    n_slots: int = 4
    n_threads: int = 2
    types: tuple[str, str] = ("f16", "f16")
    file_types: tuple[str, str] | None = None
    name: str | None = None
    debug: bool = True
    n_lanes: int = 1
    max_tokens: int = MAX_TOKENS
    max_unit: int = MAX_TOKENS
    units: list[tuple[int, int, int]] = field(default_factory=list)
    blocks: list[list[list[np.ndarray]]] = field(default_factory=list)

    def __post_init__(self):
        self.config = config(n_head_kv=N_HEAD_KV, head_dim=32, n_embd=128)
        object.__setattr__(self.config, "n_layer", N_LAYER)
        shape = BlockShape(self.max_tokens, self.max_unit, MAX_UNITS, self.n_lanes)
        self.layout = RecordLayout(self.config, shape, self.types, self.file_types or self.types, 0)
        n_rows, max_units = FIRST_ROW + self.n_slots * self.max_unit, MAX_BLOCKS * MAX_UNITS
        self.arenas = [
            [aligned_zeros(n_rows * n).reshape(n_rows, n) for n in self.layout.row_bytes] for _ in range(N_LAYER)
        ]
        self.places = [np.zeros((self.n_lanes, max_units, 3), np.int32) for _ in range(N_LAYER)]
        self.file = BlockFile(self.folder, self.name)
        self.store = BlockStore(
            self.file, self.layout, n_slots=self.n_slots, max_blocks=MAX_BLOCKS, max_units=max_units,
            n_threads=self.n_threads, first_row=FIRST_ROW, k_rows=[a[0].ctypes.data for a in self.arenas],
            v_rows=[a[1].ctypes.data for a in self.arenas], places=[p.ctypes.data for p in self.places],
            debug=self.debug, memory=(self.arenas, self.places),
        )  # fmt: skip
        self.position = 0

    def put(self, n_tokens, rng, unit_ends=None):
        """Puts a block of random rows (F16 numbers, so that every type can take them), by default of one unit."""
        ends = unit_ends or [n_tokens]
        block = [
            [rng.standard_normal((n_tokens, n // 2)).astype(np.float16).view(np.uint8) for n in self.layout.row_bytes]
            for _ in range(N_LAYER)
        ]
        self.store.put(
            self.position, ends, rotated=False,
            k_rows=[layer[0].ctypes.data for layer in block], v_rows=[layer[1].ctypes.data for layer in block],
        )  # fmt: skip
        self.position += n_tokens
        self.units += [(len(self.blocks), first, end) for first, end in pairwise((0, *ends))]
        self.blocks.append(block)

    def attended(self, layer, unit, lane=0):
        """Returns the lane's columns of the key rows and value rows that attention finds at a unit's place."""
        row, n_tokens, position = self.places[layer][lane, unit]
        block, first, end = self.units[unit]
        assert position == sum(len(b[0][0]) for b in self.blocks[:block]) + first
        assert n_tokens == end - first
        return [self.columns(arena[row : row + n_tokens], lane) for arena in self.arenas[layer]]

    def stored(self, layer, unit, lane=0):
        """What they should be."""
        block, first, end = self.units[unit]
        return [self.columns(rows[first:end], lane) for rows in self.blocks[block][layer]]

    def columns(self, rows, lane):
        return np.split(rows, self.n_lanes, axis=1)[lane]

    def close(self):
        self.store.close()
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
