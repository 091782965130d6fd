"""What the native ops of all graphs of a model share, and the sizes that their layouts have.

Packed tensors are [n_panels, n_features, PANEL]: PANEL tokens side by side, padded to whole panels.
"""

from __future__ import annotations

from typing import Any

from pyggml_repkv.ffi.context import Tensor
from pyggml_repkv.ffi.handles import Backend, aligned_zeros
from pyggml_repkv.ffi.library import native, native_ffi
from pyggml_repkv.model.config import ModelConfig

PANEL: int = native.PANEL
"""Tokens side by side in a packed tensor."""

LANES: int = native.LANES
"""Blocks side by side in the index (native/select_ops.h)."""

MAX_SELECTED: int = native.MAX_SELECTED
"""Most units of a selection, if units are chosen and not all taken (native/select_ops.h)."""

SCAN_ROWS: int = native.SCAN_ROWS
"""Query rows that share each load of codes (native/scan_ops.h)."""

CODE_LANES: int = native.CODE_LANES
"""Tokens of a tile of codes (native/codes.h)."""

MAX_CODE_DIM: int = native.MAX_CODE_DIM
"""Largest head whose keys have codes."""


def n_panels(n_tokens: int) -> int:
    return -(-n_tokens // PANEL)


def packed_like(x: Tensor, n_features: int) -> tuple[int, int, int]:
    """The shape of a packed tensor with the tokens of another."""
    return x.contents.ne[2], n_features, PANEL


class Kernels:
    """Sizes of the model, and scratch for the threads of the backend that computes the graphs: one at a time."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        self.config, self.backend, self.n_threads = config, backend, backend.n_threads
        c = config
        size = native.repkv_scratch_size(c.n_embd, c.n_ff, c.n_head, c.n_head_kv, c.head_dim)
        self._scratch_stride = -(-size // 64) * 64
        self._scratch = aligned_zeros(self._scratch_stride * self.n_threads)

    def params(self, **values: Any) -> Any:
        """A struct repkv_op_params for one node, with these fields besides the common ones. It points to what this
        object owns: the graph must keep it alive.
        """
        c = self.config
        params = native_ffi.new("struct repkv_op_params *")
        params.eps, params.scale = c.norm_eps, c.head_dim**-0.5
        params.n_head, params.n_head_kv = c.n_head, c.n_head_kv
        params.head_dim, params.rope_dim = c.head_dim, c.rope_dim
        params.n_threads = self.n_threads
        params.scratch = native_ffi.cast("char *", self._scratch.ctypes.data)
        params.scratch_stride = self._scratch_stride
        params.compute = self.backend.compute_state
        for name, value in values.items():
            setattr(params, name, value)
        return params
