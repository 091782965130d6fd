"""Units found by low-bit codes of every evicted key (native/codes.h).

A key less the mean key of its head is multiplied by one random orthogonal matrix, which spreads what lies in few values
over all, and each value is kept in `bits` bits with one step for each token and key head. The idea of codes of centred,
rotated vectors is RaBitQ's (arXiv 2405.12497). Keys are coded as they are stored: rotated at exact positions, before
RoPE with far ones.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import InputError, StoreError
from pyggml_repkv.ffi.context import Tensor, set_name
from pyggml_repkv.ffi.library import g, native, native_ffi
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.index.base import IndexParts, Queries, Selection
from pyggml_repkv.memory.store.arenas import Rows, as_array
from pyggml_repkv.ops.kernels import CODE_LANES, MAX_CODE_DIM
from pyggml_repkv.ops.makers import Ops

# Any fixed number: codes of one session must not depend on another.
_SEED = 2405_12497


def code_keys(keys: NDArray[np.float32], bits: int, n_first: int) -> NDArray[np.float32]:
    """The keys that codes of evicted keys stand for, float32 [n, K, d] as these; the first block has n_first."""
    n, n_head_kv, head_dim = keys.shape
    centre, turn = _centre_of(keys[:n_first]), _turn_of(head_dim)
    codes = np.zeros((-(-n // CODE_LANES), _row_bytes(n_head_kv, head_dim, bits)), np.uint8)
    _encode(codes, keys, 0, bits, centre, turn)
    return _decode(codes, 0, n, bits, centre, turn)


def _row_bytes(n_head_kv: int, head_dim: int, bits: int) -> int:
    return int(native.repkv_code_row_bytes(n_head_kv, head_dim, bits))


def _turn_of(head_dim: int) -> NDArray[np.float32]:
    turn, _ = np.linalg.qr(np.random.default_rng(_SEED).standard_normal((head_dim, head_dim)))
    return turn.astype(np.float32)


def _centre_of(keys: NDArray[np.float32]) -> NDArray[np.float32]:
    # A sum in order, whatever numpy's vectors are.
    return np.asarray(np.add.accumulate(keys, axis=0)[-1] / len(keys), np.float32)


def _encode(
    codes: NDArray[np.uint8], keys: NDArray[np.float32], first: int, bits: int, centre: NDArray[np.float32],
    turn: NDArray[np.float32],
) -> None:  # fmt: skip
    """Puts the codes of keys [n, K, d] into tiles [n_tiles, row bytes], as those of the tokens from `first` on."""
    keys, centre = np.ascontiguousarray(keys, np.float32), np.ascontiguousarray(centre)
    native.repkv_encode_keys(
        native_ffi.cast("char *", codes.ctypes.data), _floats(keys), first, len(keys), *keys.shape[1:], bits,
        _floats(centre), _floats(turn),
    )  # fmt: skip


def _decode(
    codes: NDArray[np.uint8], first: int, n: int, bits: int, centre: NDArray[np.float32], turn: NDArray[np.float32]
) -> NDArray[np.float32]:
    keys = np.empty((n, *centre.shape), np.float32)
    native.repkv_decode_codes(
        native_ffi.cast("char *", codes.ctypes.data), _floats(keys), first, n, *centre.shape, bits
    )  # fmt: skip
    return np.asarray(keys @ turn.T + centre, np.float32)


class TokenCodes:
    """codes-l of each layer, and the centres that were taken from the keys: float32 [n_layer, K, d], the mean keys of
    the first block.
    """

    writes: ClassVar[frozenset[str]] = frozenset()

    @staticmethod
    def unit_of(memory: MemoryConfig) -> str:
        return memory.unit

    @staticmethod
    def n_groups(memory: MemoryConfig, n_tokens: int) -> int:
        return -(-n_tokens // memory.group) if memory.group else 1

    @staticmethod
    def selects_per_head(memory: MemoryConfig) -> bool:
        return True

    def __init__(self, parts: IndexParts) -> None:
        config, memory = parts.config, parts.memory
        if config.head_dim > MAX_CODE_DIM:
            raise InputError(f"--index {memory.index} takes heads of at most {MAX_CODE_DIM}, not {config.head_dim}")
        self._parts, self._config, self._memory = parts, config, memory
        self.bits = memory.index_kind[1]
        self._row_bytes = _row_bytes(config.n_head_kv, config.head_dim, self.bits)
        self.n_entries = parts.scheme.block.min_size
        # Tiles run through blocks.
        self.block_bytes = config.n_layer * -(-self._row_bytes * self.n_entries // CODE_LANES)
        n_tiles, n_sink = -(-parts.n_ctx // CODE_LANES), memory.n_sink

        def tiles(n_past: int) -> Rows:
            n_coded = parts.blocks.sealed_end - n_sink
            return Rows(n_coded // CODE_LANES, -(-n_coded // CODE_LANES))

        self._tensors = [
            parts.arenas.new(g.GGML_TYPE_I8, (n_tiles, self._row_bytes), f"codes-{i}", rows=tiles)
            for i in range(config.n_layer)
        ]
        self._arrays = [as_array(t, np.uint8).reshape(n_tiles, self._row_bytes) for t in self._tensors]
        turn = _turn_of(config.head_dim)
        self._turn_tensor = parts.arenas.new(g.GGML_TYPE_F32, turn.shape, "code_turn")
        self.turn = as_array(self._turn_tensor, np.float32).reshape(turn.shape)
        self.turn[...] = turn
        self.centres = np.zeros((config.n_layer, config.n_head_kv, config.head_dim), np.float32)
        # Of a token, as pack has it: codes and step of each key head.
        self._code_bytes = int(native.code_bytes(config.head_dim, self.bits)) // CODE_LANES
        self.n_packed = config.n_layer * parts.scheme.largest_block * config.n_head_kv * (self._code_bytes + 2)

    def n_queries(self, n_tokens: int) -> int:
        return -(-n_tokens // self._memory.stride)

    def nodes(self, ops: Ops, q: Queries, regions: Tensor, places: Tensor, layer: int) -> Selection:
        m, c, parts, kept, group = self._memory, self._config, self._parts, None, 0
        sources, n_padded = (self._tensors[layer], parts.units, self._turn_tensor), parts.n_room()
        if q.rope is None:
            n_tokens = q.far.contents.ne[2] * q.far.contents.ne[0]  # whole panels
            n_groups = self.n_groups(m, n_tokens)
            group = m.group if n_groups > 1 else 0
            relevance = ops.scan_tokens(
                q.far, *sources, regions, bits=self.bits, n_padded=n_padded, n_groups=n_groups, group=group,
                stride=m.stride,
            )  # fmt: skip
            kind, n_rows, n_lines = "mean", n_groups * c.n_head_kv, ops.kernels.n_threads
        else:
            relevance = ops.scan_tokens_one(
                q.far, *sources, q.rope, regions, bits=self.bits, n_padded=n_padded
            )  # fmt: skip
            kind, n_rows, n_lines = "lse", c.n_head_kv, c.n_head // c.n_head_kv
            kept = parts.kept.tensors[layer] if m.keeps else None
        set_name(relevance, "unit_relevance", layer)
        units = ops.block_topk(
            relevance, parts.units, regions, n_top=parts.n_top, kind=kind, n_rows=n_rows, n_lines=n_lines,
            n_padded=n_padded, by_size=True, sticky=m.sticky, kept=kept, late=m.late and kept is not None,
        )  # fmt: skip
        set_name(units, "block_topk", layer)
        runs = ops.locate(units, places)
        set_name(runs, "row_runs", layer)
        return Selection(units, runs, group)

    def seal(self, block: int, begin: int, end: int) -> None:
        self._put(block, begin, end)

    def renew(self, block: int, begin: int, end: int) -> None:
        for tensor in self._tensors:
            self._parts.arenas.thaw(tensor)
        self._put(block, begin, end)

    def _put(self, block: int, begin: int, end: int) -> None:
        positions = np.arange(begin, end)
        for layer, codes in enumerate(self._arrays):
            keys = self._parts.keys(layer, positions)
            if block == 0:
                self.centres[layer] = _centre_of(keys)
            _encode(codes, keys, begin - self._memory.n_sink, self.bits, self.centres[layer], self.turn)

    def decoded(self, layer: int, begin: int, end: int) -> NDArray[np.float32]:
        """The keys that the codes of the tokens [begin, end) stand for, float32 [n, K, d]."""
        first = begin - self._memory.n_sink
        return _decode(self._arrays[layer], first, end - begin, self.bits, self.centres[layer], self.turn)

    def _by_token(self, layer: int, begin: int, end: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Any]:
        """Views of a layer's codes [n_tiles, K, words, CODE_LANES, 4] and steps [n_tiles, K, CODE_LANES, 2], and what
        picks the tokens [begin, end) of either.
        """
        n_head_kv, n_codes = self._config.n_head_kv, self._code_bytes * CODE_LANES
        heads = self._arrays[layer][:, : n_head_kv * (n_codes + 2 * CODE_LANES)].reshape(
            -1, n_head_kv, n_codes + 2 * CODE_LANES
        )
        codes = heads[..., :n_codes].reshape(*heads.shape[:2], -1, CODE_LANES, 4)
        steps = heads[..., n_codes:].reshape(*heads.shape[:2], CODE_LANES, 2)
        tile, lane = np.divmod(np.arange(begin, end) - self._memory.n_sink, CODE_LANES)
        return codes, steps, (tile, slice(None), ..., lane, slice(None))

    def pack(self, block: int, begin: int, end: int) -> bytes:
        """Codes, then steps, of each token and key head, layer by layer."""
        parts = []
        for layer in range(self._config.n_layer):
            codes, steps, at = self._by_token(layer, begin, end)
            parts += [codes[at].tobytes(), steps[at].tobytes()]
        return b"".join(parts).ljust(self.n_packed, b"\0")

    def unpack(self, block: int, begin: int, end: int, data: bytes) -> None:
        if len(data) != self.n_packed:
            raise StoreError(f"block {block} carries an index of another shape")
        bytes_, at_byte = np.frombuffer(data, np.uint8), 0
        for layer in range(self._config.n_layer):
            *views, at = self._by_token(layer, begin, end)
            for view in views:
                shape = view[at].shape
                n = int(np.prod(shape))
                view[at] = bytes_[at_byte : at_byte + n].reshape(shape)
                at_byte += n

    def take_state(self, first: int, end: int) -> NDArray[np.float32]:
        """The centres, and of each layer the matrix's first row, by which a session knows that its codes fit."""
        rows = np.broadcast_to(self.turn[0], (len(self.centres), len(self.turn)))
        return np.concatenate((self.centres.reshape(len(self.centres), -1), rows), 1)

    def put_state(self, first: int, end: int, values: NDArray[np.float32]) -> None:
        n_layer, n_head_kv, head_dim = self.centres.shape
        if values.size != n_layer * (n_head_kv + 1) * head_dim:
            raise StoreError("the centres of the index are damaged")
        state = values.reshape(n_layer, n_head_kv + 1, head_dim)
        if not np.allclose(state[:, -1], self.turn[0], atol=1e-4):
            raise StoreError("the codes of the index were made with another matrix")
        self.centres[...] = state[:, :-1]

    def settle(self) -> None:
        pass

    def remember(self, n_past: int, n_tokens: int) -> None:
        """Steps change no codes."""

    def undo(self) -> None:
        pass

    def forget(self, end: int) -> None:
        pass

    def bytes_at(self, n_blocks: int, n_open: int) -> dict[str, int]:
        return {"index": n_blocks * self.block_bytes}

    def copy_from(self, other: TokenCodes) -> None:
        self.centres[...] = other.centres

    def close(self) -> None:
        self._arrays, self.turn = [], np.empty((0, 0), np.float32)


def _floats(array: NDArray[np.float32]) -> Any:
    return native_ffi.cast("float *", array.ctypes.data)
