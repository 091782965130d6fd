"""The fused one-token ops of the C extension as graph nodes (see native/decode_ops.h)."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from pyggml_repkv.ffi.context import GraphContext, Tensor
from pyggml_repkv.ffi.handles import aligned_zeros
from pyggml_repkv.ffi.library import native, native_ffi
from pyggml_repkv.model.config import ModelConfig

# cffi structs hold no references: the scratch lives as long as any params that point to it.
_SCRATCH_OF: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class DecodeOps:
    """Makes nodes that share one scratch area; graphs that use it must not be computed at the same time."""

    def __init__(self, config: ModelConfig, n_threads: int) -> None:
        self.config, self.n_threads = config, n_threads
        size = native.repkv_scratch_size(config.n_embd, config.n_ff, config.n_head, config.head_dim)
        self._scratch_stride = -(-size // 64) * 64
        self._scratch = aligned_zeros(self._scratch_stride * n_threads)
        self.rope: Tensor = None  # F32 [2, rope_dim / 2], set by the graph that is being built

    def norm_linear(
        self, g: GraphContext, x: Tensor, norm: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()
    ) -> Tensor:
        """rms_norm(x) @ each weight + bias, one after another -> [sum of rows]."""
        n_rows = sum(w.contents.ne[1] for w in weights)
        params = self._params(n_matrices=len(weights), n_biases=len(biases))
        return g.custom((n_rows,), [x, norm, *weights, *biases], _address(native.REPKV_NORM_LINEAR), params)

    def attend(self, g: GraphContext, qkv: Tensor, k_arena: Tensor, v_arena: Tensor, cells: Tensor) -> Tensor:
        """-> partial softmax sums [n_threads, H, 2 + d]; writes the new key and value into the arenas."""
        shape = (self.n_threads, self.config.n_head, 2 + self.config.head_dim)
        sources = [qkv, k_arena, v_arena, self.rope, cells]
        return g.custom(shape, sources, _address(native.REPKV_ATTEND), self._params())

    def attn_out(self, g: GraphContext, partials: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        shape = (self.config.n_embd,)
        return g.custom(shape, [partials, weight, residual], _address(native.REPKV_ATTN_OUT), self._params())

    def gate_up(self, g: GraphContext, x: Tensor, norm: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        return g.custom((self.config.n_ff,), [x, norm, gate, up], _address(native.REPKV_GATE_UP), self._params())

    def linear_add(self, g: GraphContext, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        shape = (self.config.n_embd,)
        return g.custom(shape, [x, weight, residual], _address(native.REPKV_LINEAR_ADD), self._params())

    def _params(self, *, n_matrices: int = 0, n_biases: int = 0) -> Any:
        c = self.config
        params = native_ffi.new("struct repkv_op_params *")
        params.eps, params.scale = c.norm_eps, c.head_dim**-0.5
        params.n_matrices, params.n_biases = n_matrices, n_biases
        params.n_head, params.n_head_kv, params.head_dim, params.rope_dim = c.n_head, c.n_head_kv, c.head_dim, c.rope_dim
        params.n_threads = self.n_threads
        params.scratch = native_ffi.cast("char *", self._scratch.ctypes.data)
        params.scratch_stride = self._scratch_stride
        _SCRATCH_OF[params] = self._scratch
        return params


def _address(op: int) -> int:
    return int(native_ffi.cast("uintptr_t", native.repkv_op_address(op)))

