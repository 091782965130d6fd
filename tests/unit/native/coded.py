"""Codes of keys (native/codes.h) in memory of their own."""

import numpy as np

from pyggml_repkv.ffi.library import native, native_ffi
from pyggml_repkv.ops.kernels import CODE_LANES


def _floats(x: np.ndarray) -> object:
    return native_ffi.cast("float *", x.ctypes.data)


class Codes:
    """[n_tiles, bytes of a row], all ones (NaN) where nothing was written."""

    def __init__(self, n_tokens: int, n_head_kv: int, d: int, bits: int, turn: np.ndarray | None = None) -> None:
        self.shape, self.bits = (n_head_kv, d), bits
        self.turn = np.ascontiguousarray(np.eye(d) if turn is None else turn, np.float32)
        self.centre = np.zeros(self.shape, np.float32)
        row_bytes = native.repkv_code_row_bytes(n_head_kv, d, bits)
        self.rows = np.full((-(-n_tokens // CODE_LANES), row_bytes), 0xFF, np.uint8)

    def encode(self, first: int, keys: np.ndarray) -> None:
        """keys: [n, K, d]."""
        keys = np.ascontiguousarray(keys, np.float32)
        native.repkv_encode_keys(
            native_ffi.cast("char *", self.rows.ctypes.data), _floats(keys), first, len(keys), *self.shape, self.bits,
            _floats(self.centre), _floats(self.turn),
        )  # fmt: skip

    def decode(self, first: int, n: int) -> np.ndarray:
        """float32 [n, K, d], still turned and without the centre."""
        keys = np.empty((n, *self.shape), np.float32)
        native.repkv_decode_codes(
            native_ffi.cast("char *", self.rows.ctypes.data), _floats(keys), first, n, *self.shape, self.bits
        )
        return keys


def random_turn(rng: np.random.Generator, d: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((d, d)))[0].astype(np.float32)
