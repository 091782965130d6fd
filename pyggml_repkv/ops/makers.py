"""The extension's ops as nodes of one graph; what each computes stands in native/ops.def.

Shapes: H query heads, K key/value heads, d head size, E embedding, F feed-forward size; packed as in kernels.py.
`regions` is the input of memory/regions.py. One-token makers of bounded memories take `rope` [2, rope_dim]: tables for
the true position and for the far distance.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from pyggml_repkv.ffi.context import GraphContext, Tensor
from pyggml_repkv.ffi.library import g, native
from pyggml_repkv.ops.kernels import LANES, PANEL, SCAN_ROWS, Kernels, n_panels, packed_like
from pyggml_repkv.ops.table import OPS, TRACED_OP

_RELEVANCE = {"lse": native.REPKV_LSE, "mean": native.REPKV_MEAN, "max": native.REPKV_MAX}


class Ops:
    """Makes nodes of the graph `g`.

    rope: the graph's table input, [2, rope_dim / 2] for one token, else packed [n_panels, rope_dim, PANEL]: cosines,
    then sines; None where no node rotates by it. traced: whether nodes note when they are computed.
    """

    def __init__(self, g: GraphContext, kernels: Kernels, rope: Tensor | None = None, traced: bool = False) -> None:
        self.g, self.kernels, self.config = g, kernels, kernels.config
        self._rope, self._traced = rope, traced
        self._centre: Any = None
        g.keep_alive(kernels)

    def centred(self, centre: Any) -> Ops:
        """The same, for nodes of a layer whose keys are stored less a centre (KeyCentres.of), which the graph must keep
        alive.
        """
        ops = copy.copy(self)
        ops._centre = centre
        return ops

    def node(
        self,
        op: str,
        shape: tuple[int, ...],
        values: Mapping[str, Any] | None = None,
        type_: int = g.GGML_TYPE_F32,
        /,
        **sources: Tensor | Sequence[Tensor] | None,
    ) -> Tensor:
        """A node of a row of native/ops.def, of `type_`. values: fields of struct repkv_op_params; sources: by name, in
        order, None for one that is left out. Raises AssertionError for sources that are not the row's.
        """
        info = OPS[op]
        given = {name: source for name, source in sources.items() if source is not None}
        info.check(given)
        tensors = list(given.values())
        if info.many:
            tensors[-1:] = tensors[-1]
        params, address = self.kernels.params(**values or {}), info.address
        if self._centre is not None:
            params.centre = self._centre
        if self._traced:
            params.traced, address = info.function, TRACED_OP
        return self.g.custom(shape, tensors, address, params, type_)

    def norm_linear(self, x: Tensor, norm: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> Tensor:
        """x [n_in] -> rms_norm(x) @ each weight + bias, one after another [sum of rows]."""
        shape = (_n_rows(weights),)
        return self.node("norm_linear", shape, _counts(weights, biases), x=x, norm=norm, matrices=[*weights, *biases])

    def qk_norm(self, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        """qkv [T, (H + 2 K) * d] -> the same; queries and keys by halves, and normed where there are norms [d]."""
        shape = qkv.contents.ne[1], qkv.contents.ne[0]
        return self.node("qk_norm", shape, self._pairs(), qkv=qkv, q_norm=q_norm, k_norm=k_norm)

    def attend(self, qkv: Tensor, k_arena: Tensor, v_arena: Tensor, cells: Tensor) -> Tensor:
        """qkv [(H + 2 K) * d] -> partial softmax sums [n_threads, H, 2 + d]; writes the new key and value."""
        arenas = {"k_arena": k_arena, "v_arena": v_arena}
        return self.node("attend", self._partial_shape(), qkv=qkv, **arenas, rope=self._rope, cells=cells)

    def attn_out(self, partials: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        """Partial sums of `attend` -> weight @ heads + residual [E]."""
        shape = (self.config.n_embd,)
        return self.node("attn_out", shape, partials=partials, weight=weight, residual=residual)

    def gate_up(self, x: Tensor, norm: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        """x [E] -> silu(gate @ rms_norm(x)) * (up @ rms_norm(x)) [F]."""
        return self.node("gate_up", (self.config.n_ff,), x=x, norm=norm, gate=gate, up=up)

    def linear_add(self, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        """x [n_in] -> weight @ x + residual [E]."""
        return self.node("linear_add", (self.config.n_embd,), x=x, weight=weight, residual=residual)

    def pack(self, x: Tensor) -> Tensor:
        """x [T, n] -> packed."""
        n, n_tokens = x.contents.ne[0], x.contents.ne[1]
        return self.node("pack", (n_panels(n_tokens), n, PANEL), x=x)

    def norm_packed(self, x: Tensor, norm: Tensor) -> Tensor:
        """Packed x -> rms_norm(x), packed."""
        return self.node("norm_packed", packed_like(x, x.contents.ne[1]), x=x, norm=norm)

    def matmul(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> Tensor:
        """Packed x -> its products with each weight, plus bias, one after another, packed."""
        shape = packed_like(x, _n_rows(weights))
        return self.node("matmul", shape, _counts(weights, biases), x=x, matrices=[*weights, *biases])

    def matmul_add(self, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        """Packed x and residual -> weight @ x + residual, packed."""
        return self.node("matmul_add", packed_like(x, _n_rows([weight])), x=x, weight=weight, residual=residual)

    def matmul_gate_up(self, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        """Packed x -> silu(gate @ x) * (up @ x), packed."""
        return self.node("matmul_gate_up", packed_like(x, _n_rows([gate])), x=x, gate=gate, up=up)

    def qk_norm_packed(self, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        """`qk_norm` of packed qkv."""
        shape = packed_like(qkv, qkv.contents.ne[1])
        return self.node("qk_norm_packed", shape, self._pairs(), qkv=qkv, q_norm=q_norm, k_norm=k_norm)

    def store_kv(self, qkv: Tensor, k_arena: Tensor, v_arena: Tensor, cells: Tensor) -> Tensor:
        """Packed qkv -> rotated, scaled queries, packed; writes rotated keys and values to the arenas."""
        shape, arenas = packed_like(qkv, self.config.n_embd_q), {"k_arena": k_arena, "v_arena": v_arena}
        return self.node("store_kv", shape, qkv=qkv, **arenas, rope=self._rope, cells=cells)

    def attend_chunk(self, q: Tensor, k_arena: Tensor, v_arena: Tensor, cells: Tensor) -> Tensor:
        """Queries of `store_kv` -> heads, packed [n_panels, H * d, PANEL]."""
        shape = packed_like(q, self.config.n_embd_q)
        return self.node("attend_chunk", shape, q=q, k_arena=k_arena, v_arena=v_arena, cells=cells)

    def less_bias(self, keys: Tensor, rows: Tensor) -> Tensor:
        """Keys F32 [T, K * d] -> what is stored of them, F32 [T, K * d]; rows I64 [T]: their positions, consecutive."""
        return self.shift_keys(keys, rows, sign=-1.0, type_=g.GGML_TYPE_F32)

    def with_bias(self, stored: Tensor) -> Tensor:
        """Stored keys [n, K * d] of positions from 0 on -> the keys, F16 [n, K * d]."""
        return self.shift_keys(stored, None, sign=1.0, type_=g.GGML_TYPE_F16)

    def shift_keys(self, keys: Tensor, rows: Tensor | None, *, sign: float, type_: int) -> Tensor:
        """Keys [n, K * d] -> the same plus `sign` times what is taken from stored ones, [n, K * d] of F32 or F16."""
        shape = keys.contents.ne[1], keys.contents.ne[0]
        return self.node("shift_keys", shape, {"sign": sign}, type_, keys=keys, rows=rows)

    def store_far(self, qkv: Tensor, k_store: Tensor, v_store: Tensor, rope: Tensor, regions: Tensor) -> Tensor:
        """Packed qkv -> queries rotated by the far distance (rope [rope_dim]), packed; stores keys before RoPE and
        values.
        """
        shape, store = packed_like(qkv, self.config.n_embd_q), {"k_store": k_store, "v_store": v_store}
        return self.node("store_far", shape, qkv=qkv, **store, rope=rope, regions=regions)

    def score_acc(self, q: Tensor, k_local: Tensor, score: Tensor, regions: Tensor, n_score: int) -> Tensor:
        """Adds the dot products with this chunk's queries to `score` [n_positions, K] -> a marker [1]."""
        values = {"n_score": n_score}
        return self.node("score_acc", (1,), values, q=q, k_local=k_local, score=score, regions=regions)

    def score_acc_one(
        self, qkv: Tensor, k_local: Tensor, score: Tensor, rope: Tensor, regions: Tensor, n_score: int
    ) -> Tensor:
        """`score_acc` for one token."""
        sources = {"qkv": qkv, "k_local": k_local, "score": score, "rope": rope, "regions": regions}
        return self.node("score_acc_one", (1,), {"n_score": n_score}, **sources)

    def score_attention(self, q: Tensor, k_local: Tensor, score: Tensor, regions: Tensor, n_score: int) -> Tensor:
        """Adds the attention probabilities of this chunk's queries to `score` -> a marker [1]."""
        values = {"n_score": n_score}
        return self.node("score_attention", (1,), values, q=q, k_local=k_local, score=score, regions=regions)

    def score_attention_one(
        self, qkv: Tensor, k_local: Tensor, score: Tensor, rope: Tensor, regions: Tensor, n_score: int
    ) -> Tensor:
        """`score_attention` for one token."""
        sources = {"qkv": qkv, "k_local": k_local, "score": score, "rope": rope, "regions": regions}
        return self.node("score_attention_one", (1,), {"n_score": n_score}, **sources)

    def relevance(
        self, q_far: Tensor, index: Tensor, regions: Tensor, marker: Tensor, *, n_repr: int, kind: str
    ) -> Tensor:
        """-> relevance of every block for every query head, flat [H * n_blocks_max + what each thread saw]."""
        values, sources = {"n_repr": n_repr, "relevance": _RELEVANCE[kind]}, {"regions": regions, "marker": marker}
        return self.node("relevance", self._relevance_shape(index), values, q_far=q_far, index=index, **sources)

    def relevance_one(
        self, qkv: Tensor, index: Tensor, rope: Tensor, regions: Tensor, marker: Tensor, *, n_repr: int, kind: str
    ) -> Tensor:
        """`relevance` for one token."""
        values = {"n_repr": n_repr, "relevance": _RELEVANCE[kind]}
        sources = {"qkv": qkv, "index": index, "rope": rope, "regions": regions, "marker": marker}
        return self.node("relevance_one", self._relevance_shape(index), values, **sources)

    def scan_tokens_one(
        self, qkv: Tensor, codes: Tensor, units: Tensor, turn: Tensor, rope: Tensor, regions: Tensor, *, bits: int,
        n_padded: int,
    ) -> Tensor:  # fmt: skip
        """-> relevance of every unit for every query head of one token, flat [H * n_padded + what each thread saw].

        codes: I8 [n_tiles, bytes of a row]; units: I32, bounds of units; turn: [d, d].
        """
        shape = (self.config.n_head * (n_padded + 2 * self.kernels.n_threads),)
        sources = {"qkv": qkv, "codes": codes, "units": units, "turn": turn, "rope": rope, "regions": regions}
        return self.node("scan_tokens_one", shape, {"bits": bits, "n_padded": n_padded}, **sources)

    def scan_tokens(
        self, q: Tensor, codes: Tensor, units: Tensor, turn: Tensor, regions: Tensor, *, bits: int, n_padded: int,
        n_groups: int, group: int, stride: int,
    ) -> Tensor:  # fmt: skip
        """-> weights of every unit for every group of `group` queries and key head, [n_groups * K * n_threads lines and
        what threads work with, n_padded]; for `block_topk` with n_threads lines a row.
        """
        n_rows = n_groups * self.config.n_head_kv
        shape = self.kernels.n_threads * (n_rows + SCAN_ROWS), n_padded
        values = {
            "bits": bits, "n_padded": n_padded, "n_rows": n_rows, "group": group, "stride": stride,
        }  # fmt: skip
        return self.node(
            "scan_tokens", shape, values, q=q, codes=codes, units=units, turn=turn, regions=regions
        )  # fmt: skip

    def block_topk(
        self,
        relevance: Tensor,
        units: Tensor,
        regions: Tensor,
        *,
        n_top: int,
        kind: str,
        n_rows: int,
        n_lines: int,
        n_padded: int,
        by_size: bool = False,
        sticky: float = 0.0,
        kept: Tensor | None = None,
        late: bool = False,
    ) -> Tensor:
        """-> I32 [n_rows, 1 + n_top], how many units and which; its memory is typed F32.

        relevance: [n_rows * n_lines, n_padded] and what goes with `lse`; units: I32, bounds of units; by_size: whether
        the weight of a token counts, not that of a unit; kept: I32 [2, n_rows, 1 + n_top], where the selection of the
        last token is, each unit of which ranks `sticky` nats higher, and where this one goes; late: whether the last
        token's is returned instead of it.
        """
        values = {
            "n_top": n_top, "relevance": _RELEVANCE[kind], "n_rows": n_rows, "n_lines": n_lines, "n_padded": n_padded,
            "by_size": int(by_size), "sticky": sticky, "late": int(late),
        }  # fmt: skip
        sources = {"relevance": relevance, "units": units, "regions": regions, "kept": kept}
        return self.node("block_topk", (n_rows, 1 + n_top), values, **sources)

    def locate(self, blocks: Tensor, places: Tensor) -> Tensor:
        """Blocks of `block_topk` -> I32 [n_rows, 1 + 3 n_top], how many runs of rows and the place of each."""
        n_rows, n_top = blocks.contents.ne[1], blocks.contents.ne[0] - 1
        return self.node("locate", (n_rows, 1 + 3 * n_top), blocks=blocks, places=places)

    def attend_memory(
        self, q_local: Tensor, k_local: Tensor, v_local: Tensor, q_far: Tensor, k_store: Tensor, v_store: Tensor,
        runs: Tensor, regions: Tensor, *, group: int = 0, order: Any = None,
    ) -> Tensor:  # fmt: skip
        """Packed queries and what `locate` found -> heads, packed. group: so many consecutive queries, a multiple of
        PANEL, share a row of the runs for each key head; 0: the whole chunk does. order: a struct repkv_order that the
        graph must keep alive, for older tokens in compact positions; None: they are as they were stored.
        """
        shape = packed_like(q_local, self.config.n_embd_q)
        n_groups = -(-shape[0] * PANEL // group) if group else 1
        assert group % PANEL == 0
        assert runs.contents.ne[1] in (1, n_groups * self.config.n_head_kv)
        values = {"group": group, **_order(order)}
        return self.node(
            "attend_memory", shape, values, q_local=q_local, k_local=k_local, v_local=v_local, q_far=q_far,
            k_store=k_store, v_store=v_store, runs=runs, regions=regions,
        )  # fmt: skip

    def attend_memory_one(
        self, qkv: Tensor, k_local: Tensor, v_local: Tensor, k_store: Tensor, v_store: Tensor, rope: Tensor,
        runs: Tensor, regions: Tensor, *, order: Any = None,
    ) -> Tensor:  # fmt: skip
        """qkv [(H + 2 K) * d] -> partial softmax sums [n_threads, H, 2 + d]; writes the new key and value. order: as of
        `attend_memory`.
        """
        return self.node(
            "attend_memory_one", self._partial_shape(), _order(order), qkv=qkv, k_local=k_local, v_local=v_local,
            k_store=k_store, v_store=v_store, rope=rope, runs=runs, regions=regions,
        )  # fmt: skip

    def _pairs(self) -> dict[str, int]:
        return {"pairs": int(self.config.family.rope == "pairs")}

    def _partial_shape(self) -> tuple[int, int, int]:
        return self.kernels.n_threads, self.config.n_head, 2 + self.config.head_dim

    def _relevance_shape(self, index: Tensor) -> tuple[int]:
        n_groups = index.contents.ne[1]
        return (self.config.n_head * (n_groups * LANES + 2 * self.kernels.n_threads),)


def _order(order: Any) -> dict[str, Any]:
    return {} if order is None else {"order": order}


def _n_rows(weights: Sequence[Tensor]) -> int:
    return sum(w.contents.ne[1] for w in weights)


def _counts(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> dict[str, int]:
    return {"n_matrices": len(weights), "n_biases": len(biases)}
