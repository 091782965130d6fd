"""The nodes of bounded memories: store, score, select, attend (native/score_ops.h, select_ops.h, memory_ops.h)."""

from __future__ import annotations

from pyggml_repkv.ffi.context import GraphContext, Tensor
from pyggml_repkv.ffi.library import native
from pyggml_repkv.graph.fused_ops import FusedOps, packed_like

RELEVANCE = {"lse": native.REPKV_LSE, "mean": native.REPKV_MEAN, "max": native.REPKV_MAX}

# Blocks whose representatives lie side by side in the index.
LANES = 16


class MemoryOps:
    """`regions` is the step's input as in native/regions.h."""

    def __init__(self, ops: FusedOps) -> None:
        self._ops, self.config = ops, ops.config

    def store_near(self, g: GraphContext, qkv: Tensor, k_arena: Tensor, v_arena: Tensor, cells: Tensor) -> Tensor:
        """Packed qkv -> rotated, scaled queries, packed; writes rotated keys and values to the arenas."""
        return self._ops.store_kv(g, qkv, k_arena, v_arena, cells)

    def store_far(
        self, g: GraphContext, qkv: Tensor, k_store: Tensor, v_store: Tensor, rope: Tensor, regions: Tensor
    ) -> Tensor:
        """Packed qkv -> queries rotated by the far distance, packed; stores keys before RoPE and values."""
        shape = packed_like(qkv, self.config.n_embd_q)
        return self._ops.node(g, native.REPKV_STORE_FAR, shape, [qkv, k_store, v_store, rope, regions])

    def score_dot(
        self, g: GraphContext, q: Tensor, k_local: Tensor, score: Tensor, regions: Tensor, n_score: int
    ) -> Tensor:
        """Adds the dot products with this chunk's queries to `score` [n_positions, K] -> a marker [1]."""
        return self._ops.node(g, native.REPKV_SCORE_ACC, (1,), [q, k_local, score, regions], n_score=n_score)

    def score_dot_one(
        self, g: GraphContext, qkv: Tensor, k_local: Tensor, score: Tensor, rope: Tensor, regions: Tensor, n_score: int
    ) -> Tensor:
        sources = [qkv, k_local, score, rope, regions]
        return self._ops.node(g, native.REPKV_SCORE_ACC_ONE, (1,), sources, n_score=n_score)

    def score_attention(
        self, g: GraphContext, q: Tensor, k_local: Tensor, score: Tensor, regions: Tensor, n_score: int
    ) -> Tensor:
        """Adds the attention probabilities of this chunk's queries to `score` -> a marker [1]."""
        sources = [q, k_local, score, regions]
        return self._ops.node(g, native.REPKV_SCORE_ATTENTION, (1,), sources, n_score=n_score)

    def score_attention_one(
        self, g: GraphContext, qkv: Tensor, k_local: Tensor, score: Tensor, rope: Tensor, regions: Tensor, n_score: int
    ) -> Tensor:
        sources = [qkv, k_local, score, rope, regions]
        return self._ops.node(g, native.REPKV_SCORE_ATTENTION_ONE, (1,), sources, n_score=n_score)

    def relevance(
        self, g: GraphContext, q_far: Tensor, index: Tensor, regions: Tensor, marker: Tensor, *, n_repr: int, kind: str
    ) -> Tensor:
        """-> relevance of every block for every query head, flat [H * n_blocks_max + what each thread saw]."""
        counts = {"n_repr": n_repr, "relevance": RELEVANCE[kind]}
        return self._ops.node(
            g, native.REPKV_RELEVANCE, self._relevance_shape(index), [q_far, index, regions, marker], **counts
        )

    def relevance_one(
        self, g: GraphContext, qkv: Tensor, index: Tensor, rope: Tensor, regions: Tensor, marker: Tensor, *,
        n_repr: int, kind: str,
    ) -> Tensor:  # fmt: skip
        counts = {"n_repr": n_repr, "relevance": RELEVANCE[kind]}
        sources = [qkv, index, rope, regions, marker]
        return self._ops.node(g, native.REPKV_RELEVANCE_ONE, self._relevance_shape(index), sources, **counts)

    def block_topk(
        self,
        g: GraphContext,
        relevance: Tensor,
        regions: Tensor,
        n_top: int,
        *,
        kind: str,
        per_head: bool,
        sticky: float = 0.0,
        kept: Tensor | None = None,
        keeps: bool = False,
        late: bool = False,
    ) -> Tensor:
        """-> I32 [1 or K, 1 + n_top], how many blocks and which; its memory is typed F32.

        kept: I32 [2, 1 or K, 1 + n_top], where the selection of the last token is, each block of which ranks `sticky`
        nats higher; keeps: whether this one goes there too; late: whether the last token's is returned instead of it.
        """
        shape = (self.config.n_head_kv if per_head else 1, 1 + n_top)
        counts = {"n_top": n_top, "relevance": RELEVANCE[kind], "per_head": int(per_head)}
        sources = [relevance, regions, *([kept] if kept else []), *([kept] if kept and keeps else [])]
        return self._ops.node(g, native.REPKV_BLOCK_TOPK, shape, sources, sticky=sticky, late=int(late), **counts)

    def attend(self, g: GraphContext, sources: list[Tensor]) -> Tensor:
        """Sources as of repkv_attend_memory -> heads, packed."""
        shape = packed_like(sources[0], self.config.n_embd_q)
        return self._ops.node(g, native.REPKV_ATTEND_MEMORY, shape, sources, **_selection(sources[6]))

    def attend_one(self, g: GraphContext, sources: list[Tensor]) -> Tensor:
        """Sources as of repkv_attend_memory_one -> partial softmax sums."""
        shape = (self._ops.n_threads, self.config.n_head, 2 + self.config.head_dim)
        return self._ops.node(g, native.REPKV_ATTEND_MEMORY_ONE, shape, sources, **_selection(sources[6]))

    def _relevance_shape(self, index: Tensor) -> tuple[int]:
        n_groups = index.contents.ne[1]
        return (self.config.n_head * (n_groups * LANES + 2 * self._ops.n_threads),)


def _selection(selected: Tensor) -> dict[str, int]:
    n_top, n_rows = selected.contents.ne[0] - 1, selected.contents.ne[1]
    return {"n_top": n_top, "per_head": int(n_rows > 1)}
