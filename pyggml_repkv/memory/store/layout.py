"""How evicted blocks lie on disk, and what of them a slot of RAM holds (native/block_file.h)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pyggml_repkv.errors import InputError, StoreError
from pyggml_repkv.ffi.library import g, native, native_ffi
from pyggml_repkv.memory.cache_types import GGML_CACHE_TYPES
from pyggml_repkv.memory.store.block_file import BlockHeader, header_bytes
from pyggml_repkv.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class BlockShape:
    """max_tokens, max_units: of a block; max_unit: most tokens of a unit, which is what is read; n_lanes: parts of a
    layer's key heads that select for themselves, and are read alone: 1, or as many as there are heads.
    """

    max_tokens: int
    max_unit: int
    max_units: int
    n_lanes: int


class RecordLayout:
    """types, file_types: of keys and values in arenas and on disk, names of CACHE_TYPES. Raises InputError where rows
    of such a type cannot be cut into lanes.
    """

    def __init__(
        self, config: ModelConfig, shape: BlockShape, types: tuple[str, str], file_types: tuple[str, str], n_extra: int
    ) -> None:
        width = config.n_embd_kv
        self.n_layer, self.n_lanes, self.n_extra = config.n_layer, shape.n_lanes, n_extra
        self.max_tokens, self.max_unit, self.max_units = shape.max_tokens, shape.max_unit, shape.max_units
        for name in file_types:
            block = g.ggml_blck_size(GGML_CACHE_TYPES[name])
            if width // shape.n_lanes % block:
                raise InputError(
                    f"--cache-type-evicted {name} needs a head size that {block} divides, since each head is read "
                    f"alone; this model's is {config.head_dim}"
                )
        self.types, self.file_types = (tuple(int(GGML_CACHE_TYPES[n]) for n in names) for names in (types, file_types))
        self.row_bytes = tuple(int(g.ggml_row_size(GGML_CACHE_TYPES[name], width)) for name in types)
        self.file_row_bytes = tuple(int(g.ggml_row_size(t, width)) for t in self.file_types)
        self.header_bytes = header_bytes(shape.max_units, config.n_layer * shape.n_lanes, n_extra)
        self.native = native_ffi.new("struct repkv_record_layout *")
        n = self.native
        n.n_layer, n.n_lanes, n.header_bytes = config.n_layer, shape.n_lanes, self.header_bytes
        n.max_tokens, n.max_unit_tokens, n.max_units = shape.max_tokens, shape.max_unit, shape.max_units
        n.n_head_kv, n.head_dim, n.rope_dim = config.n_head_kv, config.head_dim, config.rope_dim
        n.type_k, n.type_v = self.types
        n.file_type_k, n.file_type_v = self.file_types
        (n.k_row_bytes, n.v_row_bytes), (n.file_k_row_bytes, n.file_v_row_bytes) = self.row_bytes, self.file_row_bytes

    def check(self, header: BlockHeader) -> None:
        """Raises StoreError where a block is not laid out like this."""
        found = header.types, header.row_bytes, header.checksums.shape[1:]
        want = self.file_types, self.file_row_bytes, (self.n_layer, self.n_lanes)
        if found != want or not self.takes(header.unit_ends):
            raise StoreError(f"block {header.block} is of another shape")

    def takes(self, unit_ends: Sequence[int]) -> bool:
        """Whether a block may have units that end there, counted in tokens from its first."""
        sizes = [end - begin for begin, end in pairwise((0, *unit_ends))]
        few = 0 < len(sizes) <= self.max_units and unit_ends[-1] <= self.max_tokens
        return few and all(0 < size <= self.max_unit for size in sizes)

    def block_bytes(self, unit_ends: Sequence[int]) -> int:
        """On disk, with the header and all padding, of a block whose units end there, counted from its first token."""
        return int(native.repkv_block_bytes(self.native, list(unit_ends), len(unit_ends)))

    def even_block_bytes(self, n_tokens: int) -> int:
        """On disk, of a block whose units are as long as they may be."""
        return self.block_bytes([*range(self.max_unit, n_tokens, self.max_unit), n_tokens])

    @property
    def slot_bytes(self) -> int:
        """Of RAM, for a slot of each lane in one layer."""
        return self.max_unit * sum(self.row_bytes)
