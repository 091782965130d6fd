"""Which nodes change memory that outlives the graph, and which read it: what a graph's edges alone do not say."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Effect:
    """Numbers of sources: those that a node reads rows of (not as a whole), and those that it writes."""

    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()


# As the headers in native/ say. A source that is read whole, like any other tensor's, is not named.
EFFECTS = {
    "set_rows": Effect(),  # its result is a view of what it writes
    "repkv.attend": Effect(reads=(1, 2), writes=(1, 2)),
    "repkv.store_kv": Effect(writes=(1, 2)),
    "repkv.attend_chunk": Effect(reads=(1, 2)),
    "repkv.store_far": Effect(writes=(1, 2)),
    "repkv.score_acc": Effect(reads=(1, 2), writes=(2,)),
    "repkv.score_acc_one": Effect(reads=(1, 2), writes=(2,)),
    "repkv.score_attention": Effect(reads=(1, 2), writes=(2,)),
    "repkv.score_attention_one": Effect(reads=(1, 2), writes=(2,)),
    "repkv.relevance": Effect(reads=(1,)),
    "repkv.relevance_one": Effect(reads=(1,)),
    # The half of kept-l that it reads is not the one that it writes.
    "repkv.block_topk": Effect(writes=(3,)),
    "repkv.attend_memory": Effect(reads=(1, 2, 4, 5, 7)),
    "repkv.attend_memory_one": Effect(reads=(1, 2, 3, 4, 7), writes=(1, 2, 3, 4)),
}

NONE = Effect()


def effect_of(op: str) -> Effect:
    return EFFECTS.get(op, NONE)
