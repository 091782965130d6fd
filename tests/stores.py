"""A block store over plain numpy memory, and blocks with known contents."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pyggml_repkv.ffi.handles import aligned_zeros
from pyggml_repkv.memory.store.block_file import BlockFile
from pyggml_repkv.memory.store.block_store import BlockStore, RecordLayout
from tests.unit.native.op_bench import config

N_LAYER, MAX_TOKENS, MAX_BLOCKS, FIRST_ROW = 2, 24, 64, 5


@dataclass
class StoreBench:
    """A store whose layers have arenas [FIRST_ROW + n_slots * MAX_TOKENS, row]. blocks[b][layer]: a block's (k, v)."""

    folder: Path
    n_slots: int = 4
    n_threads: int = 2
    types: tuple[str, str] = ("f16", "f16")
    file_types: tuple[str, str] | None = None
    name: str | None = None
    debug: bool = True
    blocks: list[list[list[np.ndarray]]] = field(default_factory=list)

    def __post_init__(self):
        self.config = config(n_head_kv=2, head_dim=32, n_embd=128)
        object.__setattr__(self.config, "n_layer", N_LAYER)
        self.layout = RecordLayout(self.config, MAX_TOKENS, self.types, self.file_types or self.types, 0)
        n_rows = FIRST_ROW + self.n_slots * MAX_TOKENS
        self.arenas = [
            [aligned_zeros(n_rows * n).reshape(n_rows, n) for n in self.layout.row_bytes] for _ in range(N_LAYER)
        ]
        self.places = [np.zeros((MAX_BLOCKS, 3), np.int32) for _ in range(N_LAYER)]
        self.file = BlockFile(self.folder, self.name)
        self.store = BlockStore(
            self.file, self.layout, n_slots=self.n_slots, max_blocks=MAX_BLOCKS, n_threads=self.n_threads,
            first_row=FIRST_ROW, k_rows=[a[0].ctypes.data for a in self.arenas],
            v_rows=[a[1].ctypes.data for a in self.arenas], places=[p.ctypes.data for p in self.places],
            debug=self.debug, memory=(self.arenas, self.places),
        )  # fmt: skip
        self.position = 0

    def put(self, n_tokens, rng):
        """Puts a block of random rows (F16 numbers, so that every type can take them)."""
        block = [
            [rng.standard_normal((n_tokens, n // 2)).astype(np.float16).view(np.uint8) for n in self.layout.row_bytes]
            for _ in range(N_LAYER)
        ]
        self.store.put(
            self.position, n_tokens, rotated=False,
            k_rows=[layer[0].ctypes.data for layer in block], v_rows=[layer[1].ctypes.data for layer in block],
        )  # fmt: skip
        self.position += n_tokens
        self.blocks.append(block)

    def attended(self, layer, block):
        """Returns the key rows and value rows that attention finds at the block's place in the table."""
        row, n_tokens, position = self.places[layer][block]
        assert position == sum(len(b[0][0]) for b in self.blocks[:block])
        return [arena[row : row + n_tokens] for arena in self.arenas[layer]]

    def close(self):
        self.store.close()
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
