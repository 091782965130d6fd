"""A ggml context and graph, with the ops this project uses. Shapes are in numpy order (outermost first)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyggml_repkv.errors import ComputeError
from pyggml_repkv.ffi.handles import Handle
from pyggml_repkv.ffi.library import g, native_ffi

Tensor = Any
"""A ctypes pointer to a ggml_tensor, valid as long as the context that made it."""


@dataclass(frozen=True, slots=True)
class Rope:
    """The parameters of ggml_rope_ext besides the positions, with ggml's names and meanings."""

    n_dims: int
    n_ctx_orig: int
    freq_base: float
    freq_scale: float
    ext_factor: float
    attn_factor: float
    beta_fast: float
    beta_slow: float


class TensorContext(Handle):
    """Holds tensor descriptions, not their data."""

    def __init__(self, n_tensors: int, *, extra_bytes: int = 0) -> None:
        mem_size = n_tensors * g.ggml_tensor_overhead() + extra_bytes
        pointer = g.ggml_init(g.ggml_init_params(mem_size=mem_size, mem_buffer=None, no_alloc=True))
        if not pointer:
            raise ComputeError("not enough memory for a ggml context")
        super().__init__(pointer, g.ggml_free)
        self._capacity = mem_size

    def reserve(self) -> None:
        """Raises ComputeError if there is no room for one more tensor."""
        # ggml aborts when a context is full, so the last places stay empty.
        if g.ggml_used_mem(self.pointer) + 4 * g.ggml_tensor_overhead() > self._capacity:
            raise ComputeError(f"a ggml context of {self._capacity} bytes is full")

    def new(self, type_: int, shape: Sequence[int], name: str = "") -> Tensor:
        self.reserve()
        ne = (ctypes.c_int64 * len(shape))(*reversed(shape))
        tensor = g.ggml_new_tensor(self.pointer, type_, len(shape), ne)
        if name:
            g.ggml_set_name(tensor, name.encode())
        return tensor


class GraphContext(TensorContext):
    """Builds one graph node by node. It computes and allocates nothing."""

    def __init__(self, max_nodes: int) -> None:
        # ggml aborts when a graph is full. A graph holds tensors of this context and their sources, at most
        # GGML_MAX_SRC each, so with this size the context is full first, which raises.
        size = max_nodes * g.GGML_MAX_SRC
        overhead = g.ggml_graph_overhead_custom(size, False)
        super().__init__(max_nodes, extra_bytes=overhead + 4096)
        # Nodes and inputs are tensors of this context; the weights and arenas that they read are fewer than max_nodes.
        self.max_tensors = 2 * max_nodes
        self.graph = g.ggml_new_graph_custom(self.pointer, size, False)
        graph_address = ctypes.cast(self.graph, ctypes.c_void_p).value
        self.native_graph = native_ffi.cast("void *", graph_address)
        self._alive: list[object] = []

    @property
    def n_nodes(self) -> int:
        return g.ggml_graph_n_nodes(self.graph)

    def keep_alive(self, thing: object) -> None:
        """Keeps an object as long as the graph, because C points to it: op parameters, scratch, callbacks."""
        self._alive.append(thing)

    def input(self, type_: int, shape: Sequence[int], name: str) -> Tensor:
        """Returns a tensor to fill before every compute: ggml reuses its memory after the last use."""
        tensor = self.new(type_, shape, name)
        g.ggml_set_input(tensor)
        return tensor

    def output(self, tensor: Tensor) -> Tensor:
        """Marks a result, which stays readable after compute, and adds it to the graph. Returns the tensor."""
        g.ggml_set_output(tensor)
        return self.expand(tensor)

    def expand(self, tensor: Tensor) -> Tensor:
        """Adds the tensor and everything it depends on to the graph, in order. Returns the tensor."""
        g.ggml_build_forward_expand(self.graph, tensor)
        return tensor

    def view(self, a: Tensor, shape: Sequence[int], strides: Sequence[int], offset: int) -> Tensor:
        """Returns a view. strides: bytes for all dimensions but the innermost, which is contiguous; offset: bytes."""
        self.reserve()
        ne, nb = list(reversed(shape)), list(reversed(strides))
        if len(ne) == 2:
            return g.ggml_view_2d(self.pointer, a, *ne, *nb, offset)
        if len(ne) == 3:
            return g.ggml_view_3d(self.pointer, a, *ne, *nb, offset)
        raise ComputeError(f"views have 2 or 3 dimensions, not {len(ne)}")

    def reshape(self, a: Tensor, shape: Sequence[int]) -> Tensor:
        self.reserve()
        if len(shape) == 2:
            return g.ggml_reshape_2d(self.pointer, a, *reversed(shape))
        return g.ggml_reshape_3d(self.pointer, a, *reversed(shape))

    def swap_rows_and_heads(self, a: Tensor) -> Tensor:
        """[a, b, d] -> [b, a, d], without moving data."""
        self.reserve()
        return g.ggml_permute(self.pointer, a, 0, 2, 1, 3)

    def transpose(self, a: Tensor) -> Tensor:
        """[..., m, n] -> [..., n, m], without moving data."""
        self.reserve()
        return g.ggml_transpose(self.pointer, a)

    def get_rows(self, a: Tensor, rows: Tensor) -> Tensor:
        self.reserve()
        return g.ggml_get_rows(self.pointer, a, rows)

    def set_rows(self, a: Tensor, b: Tensor, rows: Tensor) -> Tensor:
        """Writes b's rows to `rows` (I64) of a, converted to a's type; returns a view of a."""
        self.reserve()
        return g.ggml_set_rows(self.pointer, a, b, rows)

    def linear(self, weight: Tensor, x: Tensor) -> Tensor:
        """x [T, n_in] @ weight [n_out, n_in].T -> [T, n_out] F32."""
        self.reserve()
        return g.ggml_mul_mat(self.pointer, weight, x)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        self.reserve()
        return g.ggml_add(self.pointer, a, b)

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        self.reserve()
        return g.ggml_mul(self.pointer, a, b)

    def rms_norm(self, x: Tensor, eps: float) -> Tensor:
        self.reserve()
        return g.ggml_rms_norm(self.pointer, x, eps)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        self.reserve()
        return g.ggml_swiglu_split(self.pointer, gate, up)

    def swiglu_halves(self, gate_up: Tensor) -> Tensor:
        """[T, 2 n] -> silu(first half) * second half [T, n]."""
        self.reserve()
        return g.ggml_swiglu(self.pointer, gate_up)

    def rope(
        self, x: Tensor, positions: Tensor, rope: Rope, factors: Tensor | None = None, *, pairs: bool = False
    ) -> Tensor:
        """x [T, n_head, head_dim], positions I32 [T]: turns values i and i + n/2 together, or pairs 2i and 2i + 1.

        factors F32 [n / 2]: what each frequency is divided by.
        """
        self.reserve()
        mode = g.GGML_ROPE_TYPE_NORMAL if pairs else g.GGML_ROPE_TYPE_NEOX
        return g.ggml_rope_ext(
            self.pointer, x, positions, factors, rope.n_dims, mode, rope.n_ctx_orig, rope.freq_base,
            rope.freq_scale, rope.ext_factor, rope.attn_factor, rope.beta_fast, rope.beta_slow,
        )  # fmt: skip

    def flash_attn(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        """q [H, T, d], k and v [H_kv, n_kv, d], mask F16 [T, n_kv] -> [T, H, d]."""
        self.reserve()
        out = g.ggml_flash_attn_ext(self.pointer, q, k, v, mask, scale, 0.0, 0.0)
        g.ggml_flash_attn_ext_set_prec(out, g.GGML_PREC_F32)
        return out

    def softmax(self, scores: Tensor, mask: Tensor, scale: float) -> Tensor:
        """softmax(scores * scale + mask) over the innermost dimension; mask F32 or F16 [T, n_kv]."""
        self.reserve()
        return g.ggml_soft_max_ext(self.pointer, scores, mask, scale, 0.0)

    def contiguous(self, a: Tensor) -> Tensor:
        """Returns a copy in row-major order, or `a` itself if it is in that order."""
        if g.ggml_is_contiguous(a):
            return a
        self.reserve()
        return g.ggml_cont(self.pointer, a)

    def custom(
        self, shape: Sequence[int], sources: Sequence[Tensor], op_address: int, params: Any,
        type_: int = g.GGML_TYPE_F32,
    ) -> Tensor:  # fmt: skip
        """Returns a tensor that a native op computes. params: a cffi struct, kept alive."""
        self.reserve()
        if len(sources) >= g.GGML_MAX_SRC:
            raise ComputeError(f"a custom op takes fewer than {g.GGML_MAX_SRC} sources, not {len(sources)}")
        args = (ctypes.POINTER(g.ggml_tensor) * len(sources))(*sources)
        self.keep_alive(params)
        ne = [*reversed(shape), 1, 1, 1][:4]
        userdata = int(native_ffi.cast("uintptr_t", params))
        op = g.ggml_custom_op_t(op_address)
        return g.ggml_custom_4d(self.pointer, type_, *ne, args, len(sources), op, -1, userdata)


def set_name(tensor: Tensor, name: str, layer: int = -1) -> None:
    """Names a tensor as llama.cpp does: `name-layer`, or `name` outside the layers. It is the graphs' default `cb`."""
    g.ggml_set_name(tensor, (f"{name}-{layer}" if layer >= 0 else name).encode())
