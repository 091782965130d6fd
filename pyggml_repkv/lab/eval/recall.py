"""Recall of indexes: how much of the attention to evicted tokens their selections hold, from one reading of a text.

The engine reads the text as always. From its queries and keys, at the positions where it had them, numpy computes the
softmax over all tokens, and what each index selects (selections.py). Ordered positions are the exception: with them
older tokens are judged at the one distance at which they are selected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.engine.checks import check_fits
from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError
from pyggml_repkv.lab.eval.observed import FIRST_LAYER, N_DECODE, Array, Observed, OnProgress, read_observed
from pyggml_repkv.lab.eval.retrieval import reading_of
from pyggml_repkv.lab.eval.selections import BlockMasses, ByRepresentatives, Finder, Masses
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.cut.blocks import Scheme, parse_scheme
from pyggml_repkv.memory.index.representatives import Representatives
from pyggml_repkv.memory.repkv.memory import RepKVMemory

# A case is sharp where one query head gives one evicted token more than this.
SHARP = 0.1

# Of the JSON text, for the value that the question at its end asks for.
N_VALUE = 40


@dataclass(frozen=True, slots=True)
class Recall:
    """What selections held in the steps of one kind. Arrays are [n_layer, K], layers from FIRST_LAYER on: n_sharp: how
    many sharp cases there were; mass: attention to evicted tokens, summed over query heads and n_queries tokens; hits,
    held: by index, how much of these was in its selections.
    """

    n_queries: int
    n_sharp: NDArray[np.int64]
    mass: NDArray[np.float64]
    hits: dict[str, NDArray[np.int64]]
    held: dict[str, NDArray[np.float64]]


def json_tokens(model: Model, length: int, seed: int) -> list[int]:
    """The text of `eval kv` as token ids, at most `length`: a JSON object, the question for the pair in its middle, and
    the answer. Raises InputError for a length without room for them.
    """
    reading = reading_of(model, "kv", length - N_VALUE, 1, seed, None)
    (question,) = reading.questions
    end = model.tokenizer.encode(question.text + question.expected, add_special=False)
    return [*reading.haystack, *end][:length]


def run_recall(
    model: Model,
    memory: MemoryConfig,
    indexes: Sequence[str],
    tokens: Sequence[int],
    on_read: OnProgress | None = None,
    on_layer: OnProgress | None = None,
) -> dict[str, Recall]:
    """Returns the recall of each index in the last N_DECODE tokens (`decode`) and in the last whole chunk before them
    (`chunk`); with it that of exact scores: `exact` selects units as `tokens:BITS` does, `exact:blocks` blocks as
    `representatives:N` does.

    memory: how the text is read, by an index that holds what all others need. on_read(n_done, n_total), on_layer(same):
    called as tokens are read, then as layers are judged. Raises InputError for what cannot be judged, ContextFullError
    for too many tokens.
    """
    kinds = {name: replace(memory, index=name).index_kind for name in indexes}
    # Which tokens stand for a block the engine alone knows.
    index = next((name for name, (kind, _) in kinds.items() if kind == "representatives"), indexes[0])
    memory = replace(memory, index=index, n_ctx=memory.n_ctx or len(tokens))
    _check(model, memory)
    wholes = {kind == "representatives" for kind, _ in kinds.values()}
    schemes = {whole: parse_scheme(memory.block, None if whole else memory.unit) for whole in sorted(wholes)}
    _check_length(memory, schemes, len(tokens))
    with model.session(memory) as session:
        policy = session.policy
        assert isinstance(policy, RepKVMemory)
        check_fits(policy, len(tokens), 0, model.config.n_ctx_train)
        finders = _finders(policy, schemes, kinds)
        blocks = list(dict.fromkeys(finder.blocks for finder in finders))
        chunk, singles = read_observed(session, policy, blocks, tokens, on_read)
        done = {"decode": _nothing(singles, finders), "chunk": _nothing(chunk, finders)}
        n_layer = len(chunk.keys)
        for i in range(n_layer):
            stored = policy.stored_keys(FIRST_LAYER + i, np.arange(singles.starts[-1]))
            local = np.concatenate([chunk.keys[i], singles.keys[i]])
            scores = policy.index.scores[FIRST_LAYER + i] if isinstance(policy.index, Representatives) else None
            for finder in finders:
                finder.enter(stored[memory.n_sink :], scores)
            for observed, recall in ((singles, done["decode"]), (chunk, done["chunk"])):
                # Keys that no query meets are left out.
                keys = stored[: observed.starts[-1]], local[: observed.positions[-1] + 1 - chunk.starts[0]]
                _judge(observed, i, *keys, int(chunk.starts[0]), memory.n_sink, finders, recall)
            if on_layer is not None:
                on_layer(i + 1, n_layer)
    return done


def _check(model: Model, memory: MemoryConfig) -> None:
    if memory.kv != "repkv":
        raise InputError(f"recall judges the indexes of --kv repkv; --kv is {memory.kv}")
    if memory.keeps:
        raise InputError("recall judges what each token finds by itself: leave out --sticky and --late")
    if memory.on_disk:
        raise InputError("recall needs all keys in RAM: leave out --kv-ram and --kv-dir")
    if model.config.n_layer <= FIRST_LAYER:
        raise InputError(f"recall judges layers from {FIRST_LAYER} on; the model has {model.config.n_layer} layers")


def _check_length(memory: MemoryConfig, schemes: Mapping[bool, Scheme], n_tokens: int) -> None:
    n_blocks = 2 * max(scheme.largest_block for scheme in schemes.values())
    n_needed = memory.n_sink + n_blocks + memory.n_local + memory.n_batch + N_DECODE
    if n_tokens < n_needed:
        raise InputError(f"{n_tokens} tokens are too few for recall with these blocks: it needs {n_needed}")


def _finders(policy: RepKVMemory, schemes: Mapping[bool, Scheme], kinds: Mapping[str, tuple[str, int]]) -> list[Finder]:
    found: list[Finder] = []
    for whole, scheme in schemes.items():
        parts = policy.memory, scheme, policy.new_blocks(scheme), policy.n_dense
        found.append(BlockMasses("exact:blocks", *parts) if whole else Masses("exact", *parts))
        for name, (kind, number) in kinds.items():
            if whole == (kind == "representatives"):
                make = ByRepresentatives if whole else Masses
                found.append(make(name, *parts, number))
    return found


def _nothing(observed: Observed, finders: Sequence[Finder]) -> Recall:
    shape = len(observed.keys), observed.keys[0].shape[1]
    return Recall(
        len(observed.judged), np.zeros(shape, np.int64), np.zeros(shape),
        {f.name: np.zeros(shape, np.int64) for f in finders}, {f.name: np.zeros(shape) for f in finders},
    )  # fmt: skip


def _judge(
    observed: Observed, i: int, stored: Array, local: Array, first: int, n_sink: int, finders: Sequence[Finder],
    recall: Recall,
) -> None:  # fmt: skip
    """Adds what tokens attend in layer FIRST_LAYER + i. stored, local: keys [., K, d], of all tokens and of those from
    position `first` on, as older tokens and as the window's.
    """
    near, far, judged = observed.near[i], observed.far[i], observed.judged
    n_head_kv, group = stored.shape[1], near.shape[1] // stored.shape[1]
    positions, starts, ends = (of[judged] for of in (observed.positions, observed.starts, observed.ends))
    evicted = np.arange(n_sink, ends[-1])
    selected = {f.name: np.zeros((len(judged), n_head_kv, len(evicted)), bool) for f in finders}
    for end in np.unique(ends):
        rows, mine = np.flatnonzero(observed.ends == end), np.flatnonzero(ends == end)
        for finder in finders:
            mask = finder.select(far[rows], np.searchsorted(rows, judged[mine]), int(end), alone=observed.alone)
            selected[finder.name][mine, :, : end - n_sink] = mask
    for h in range(near.shape[1]):
        kv = h // group
        p = attention(near[:, h], far[judged, h], positions, starts, stored[:, kv], local[:, kv], first)
        p = np.where(evicted < ends[:, None], p[:, evicted], 0)
        sharp = p > SHARP
        recall.n_sharp[i, kv] += sharp.sum()
        recall.mass[i, kv] += p.sum(dtype=np.float64)
        for name, mask in selected.items():
            recall.hits[name][i, kv] += (sharp & mask[:, kv]).sum()
            recall.held[name][i, kv] += (p * mask[:, kv]).sum(dtype=np.float64)


def attention(
    near: Array, far: Array, positions: NDArray[np.integer], starts: NDArray[np.integer], stored: Array, local: Array,
    first: int,
) -> Array:  # fmt: skip
    """The probability that queries give each older token: [n, n_stored], 0 from where their windows start.

    near, far: queries [n, d] at `positions`, scaled, as the window and as older tokens meet them; stored, local: keys
    [., d] of all tokens and of those from position `first` on, as older tokens and as the window's.
    """
    scores, recent = far @ stored.T, near @ local.T
    scores[np.arange(len(stored)) >= starts[:, None]] = -np.inf
    at = first + np.arange(len(local))
    recent[(at < starts[:, None]) | (at > positions[:, None])] = -np.inf
    most = np.maximum(scores.max(1), recent.max(1))[:, None]
    p = np.exp(scores - most)
    total = p.sum(1, keepdims=True) + np.exp(recent - most).sum(1, keepdims=True)
    return np.asarray(p / total, np.float32)


def summary(recall: Recall) -> dict[str, Any]:
    """Returns the object of --json: shares in all, by layer, and by layer and key head; None where there was nothing to
    be found. worst: the least share of hits in a layer, and which layer that is.
    """
    indexes = {}
    for name, hits in recall.hits.items():
        held = recall.held[name]
        by_layer = _shares(hits.sum(1), recall.n_sharp.sum(1))
        worst = min(((share, FIRST_LAYER + i) for i, share in enumerate(by_layer) if share is not None), default=None)
        indexes[name] = {
            "hits": _shares(hits.sum(), recall.n_sharp.sum()),
            "mass": _shares(held.sum(), recall.mass.sum()),
            "worst": None if worst is None else {"hits": worst[0], "layer": worst[1]},
            "hits_by_layer": by_layer,
            "mass_by_layer": _shares(held.sum(1), recall.mass.sum(1)),
            "hits_by_head": _shares(hits, recall.n_sharp),
            "mass_by_head": _shares(held, recall.mass),
        }
    return {
        "first_layer": FIRST_LAYER, "n_queries": recall.n_queries, "n_sharp": int(recall.n_sharp.sum()),
        "n_sharp_by_head": recall.n_sharp.tolist(), "indexes": indexes,
    }  # fmt: skip


def _shares(part: Any, whole: Any) -> Any:
    """Lists of the arrays' shape; None where the whole is 0."""
    if np.ndim(whole):
        return [_shares(a, b) for a, b in zip(part, whole, strict=True)]
    return float(part / whole) if whole > 0 else None
