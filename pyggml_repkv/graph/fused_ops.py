"""The extension's ops as graph nodes: one-token ops (native/decode_ops.h) and packed ops (native/prefill_ops.h).

Packed tensors are [n_panels, n_features, PANEL]: PANEL tokens side by side, padded to whole panels.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from pyggml_repkv.ffi.context import GraphContext, Tensor
from pyggml_repkv.ffi.handles import aligned_zeros
from pyggml_repkv.ffi.library import native, native_ffi
from pyggml_repkv.model.config import ModelConfig

PANEL: int = native.repkv_panel()

# cffi structs hold no references: the scratch lives as long as any params that point to it.
_SCRATCH_OF: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def n_panels(n_tokens: int) -> int:
    return -(-n_tokens // PANEL)


class FusedOps:
    """Makes nodes that share one scratch area; graphs that use it must not be computed at the same time.

    `rope` is the table input of the graph that is being built: [2, rope_dim / 2] for one token, else packed
    [n_panels, rope_dim, PANEL]; cosines, then sines.
    """

    def __init__(self, config: ModelConfig, n_threads: int) -> None:
        self.config, self.n_threads = config, n_threads
        c = config
        size = native.repkv_scratch_size(c.n_embd, c.n_ff, c.n_head, c.n_head_kv, c.head_dim)
        self._scratch_stride = -(-size // 64) * 64
        self._scratch = aligned_zeros(self._scratch_stride * n_threads)
        self.rope: Tensor = None
        # Whether nodes made now note when they are computed.
        self.traced = False

    def norm_linear(
        self,
        g: GraphContext,
        x: Tensor,
        norm: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor] = (),
    ) -> Tensor:
        """x [n_in] -> rms_norm(x) @ each weight + bias, one after another [sum of rows]."""
        sources = [x, norm, *weights, *biases]
        return self.node(g, native.REPKV_NORM_LINEAR, (_n_rows(weights),), sources, len(weights), len(biases))

    def attend(self, g: GraphContext, qkv: Tensor, k_arena: Tensor, v_arena: Tensor, cells: Tensor) -> Tensor:
        """qkv [(H + 2 K) * d] -> partial softmax sums [n_threads, H, 2 + d]; writes the new key and value."""
        shape = (self.n_threads, self.config.n_head, 2 + self.config.head_dim)
        return self.node(g, native.REPKV_ATTEND, shape, [qkv, k_arena, v_arena, self.rope, cells])

    def attn_out(self, g: GraphContext, partials: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        """Partial sums of `attend` -> weight @ heads + residual [E]."""
        return self.node(g, native.REPKV_ATTN_OUT, (self.config.n_embd,), [partials, weight, residual])

    def gate_up(self, g: GraphContext, x: Tensor, norm: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        """x [E] -> silu(gate @ rms_norm(x)) * (up @ rms_norm(x)) [F]."""
        return self.node(g, native.REPKV_GATE_UP, (self.config.n_ff,), [x, norm, gate, up])

    def linear_add(self, g: GraphContext, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        """x [n_in] -> weight @ x + residual [E]."""
        return self.node(g, native.REPKV_LINEAR_ADD, (self.config.n_embd,), [x, weight, residual])

    def pack(self, g: GraphContext, x: Tensor) -> Tensor:
        """x [T, n] -> packed."""
        n, n_tokens = x.contents.ne[0], x.contents.ne[1]
        return self.node(g, native.REPKV_PACK, (n_panels(n_tokens), n, PANEL), [x])

    def norm_packed(self, g: GraphContext, x: Tensor, norm: Tensor) -> Tensor:
        return self.node(g, native.REPKV_NORM_PACKED, packed_like(x, x.contents.ne[1]), [x, norm])

    def matmul(self, g: GraphContext, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> Tensor:
        """Packed x -> its products with each weight, plus bias, one after another, packed."""
        shape = packed_like(x, _n_rows(weights))
        return self.node(g, native.REPKV_MATMUL, shape, [x, *weights, *biases], len(weights), len(biases))

    def matmul_add(self, g: GraphContext, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        shape = packed_like(x, _n_rows([weight]))
        return self.node(g, native.REPKV_MATMUL_ADD, shape, [x, weight, residual])

    def matmul_gate_up(self, g: GraphContext, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        shape = packed_like(x, _n_rows([gate]))
        return self.node(g, native.REPKV_MATMUL_GATE_UP, shape, [x, gate, up])

    def store_kv(self, g: GraphContext, qkv: Tensor, k_arena: Tensor, v_arena: Tensor, cells: Tensor) -> Tensor:
        """Packed qkv -> rotated, scaled queries, packed; writes rotated keys and values to the arenas."""
        shape = packed_like(qkv, self.config.n_embd_q)
        return self.node(g, native.REPKV_STORE_KV, shape, [qkv, k_arena, v_arena, self.rope, cells])

    def attend_chunk(self, g: GraphContext, q: Tensor, k_arena: Tensor, v_arena: Tensor, cells: Tensor) -> Tensor:
        """Queries of `store_kv` -> heads, packed [n_panels, H * d, PANEL]."""
        shape = packed_like(q, self.config.n_embd_q)
        return self.node(g, native.REPKV_ATTEND_CHUNK, shape, [q, k_arena, v_arena, cells])

    def node(
        self,
        g: GraphContext,
        op: int,
        shape: tuple[int, ...],
        sources: list[Tensor],
        n_matrices: int = 0,
        n_biases: int = 0,
        **values: float,
    ) -> Tensor:
        """One op of `enum repkv_op`; `values` are fields of struct repkv_op_params."""
        c = self.config
        params = native_ffi.new("struct repkv_op_params *")
        params.eps, params.scale = c.norm_eps, c.head_dim**-0.5
        params.n_matrices, params.n_biases = n_matrices, n_biases
        params.n_head, params.n_head_kv, params.head_dim, params.rope_dim = (
            c.n_head,
            c.n_head_kv,
            c.head_dim,
            c.rope_dim,
        )
        params.n_threads = self.n_threads
        for name, value in values.items():
            setattr(params, name, value)
        params.scratch = native_ffi.cast("char *", self._scratch.ctypes.data)
        params.scratch_stride = self._scratch_stride
        _SCRATCH_OF[params] = self._scratch
        function = native.repkv_op_address(op)
        if self.traced:
            params.traced, function = function, native.repkv_traced_op_address()
        address = int(native_ffi.cast("uintptr_t", function))
        return g.custom(shape, sources, address, params)


def _n_rows(weights: Sequence[Tensor]) -> int:
    return sum(w.contents.ne[1] for w in weights)


def packed_like(x: Tensor, n_features: int) -> tuple[int, int, int]:
    """The shape of a packed tensor with the tokens of another."""
    return x.contents.ne[2], n_features, PANEL
