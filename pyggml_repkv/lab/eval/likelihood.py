"""Measures how well a memory predicts a text: llama.cpp's perplexity, likelihood by position, distance from `full`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.model.tokenizer import Tokenizer

# A shorter chunk has no token to judge.
MIN_CHUNK = 3


@dataclass(frozen=True, slots=True)
class Stretch:
    """Predictions after each of the tokens [begin, end). nll: mean negative log likelihood of the next token, nats; kl:
    mean divergence KL(full || this memory) of the next-token distribution, nats; top1: how often both find the same
    token most likely. kl and top1 are None without `full`.
    """

    begin: int
    end: int
    nll: float
    kl: float | None = None
    top1: float | None = None


def log_probs(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Returns the natural logarithms of probabilities [..., V] for logits [..., V]."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    return x


def chunk_perplexity(
    model: Model, memory: MemoryConfig, tokens: Sequence[int], n_chunk: int
) -> Iterator[tuple[int, float]]:
    """Yields (tokens judged so far, their perplexity) after each chunk. As llama-perplexity does, it reads each chunk
    of n_chunk tokens by itself and judges the second half. Raises as `chunks_of` does.
    """
    first, total, n_judged = n_chunk // 2, 0.0, 0
    for chunk in chunks_of(model.tokenizer, tokens, n_chunk):
        with model.session(memory) as session:
            for at, logits in session.prefill_slices(chunk, first):
                judged = _nll(logits, chunk[at + 1 : at + 1 + len(logits)])
                total += float(judged.sum())
                n_judged += len(judged)
        yield n_judged, float(np.exp(total / n_judged))


def chunks_of(tokenizer: Tokenizer, tokens: Sequence[int], n_chunk: int) -> Iterator[list[int]]:
    """Yields the whole chunks of a text; the start token, if the model has one, replaces the first token of each.

    Raises InputError if the text fills no chunk, or a chunk has no second half.
    """
    if n_chunk < MIN_CHUNK:
        raise InputError(f"-c {n_chunk}: a chunk needs at least {MIN_CHUNK} tokens, of which the last is judged")
    if len(tokens) < n_chunk:
        raise InputError(f"the text has {len(tokens)} tokens, one chunk takes {n_chunk}: give -c, or a longer text")
    bos = tokenizer.encode("")
    for start in range(0, len(tokens) - n_chunk + 1, n_chunk):
        yield [*bos, *tokens[start + len(bos) : start + n_chunk]]


def stretches(
    model: Model, memory: MemoryConfig, tokens: Sequence[int], n_each: int, full: MemoryConfig | None = None
) -> Iterator[Stretch]:
    """Reads a text in one session and yields a Stretch for every n_each tokens. full: the memory to compare with."""
    with ExitStack() as stack:
        session = stack.enter_context(model.session(memory))
        other = None
        if full is not None:
            # Equal chunks give equal slices.
            other = stack.enter_context(model.session(replace(full, n_batch=memory.n_batch)))
        nll: list[NDArray[np.float64]] = []
        kl: list[NDArray[np.float64]] = []
        same: list[NDArray[np.bool_]] = []
        begin = 0
        for start in range(0, len(tokens), memory.n_batch):
            chunk = tokens[start : start + memory.n_batch]
            expected = None if other is None else other.prefill_slices(chunk)
            for at, mine in session.prefill_slices(chunk):
                following = start + at + 1
                nll.append(_nll(mine, tokens[following : following + len(mine)]))
                if expected is not None:
                    _, theirs = next(expected)
                    kl.append(divergence(theirs, mine))
                    same.append(theirs.argmax(-1) == mine.argmax(-1))
            end = start + len(chunk)
            if end - begin >= n_each or end == len(tokens):
                # No token follows the last one, so the last stretch may have nothing to judge.
                judged = np.concatenate(nll)
                if len(judged):
                    yield Stretch(
                        begin, end, float(judged.mean()),
                        float(np.concatenate(kl).mean()) if kl else None,
                        float(np.concatenate(same).mean()) if same else None,
                    )  # fmt: skip
                nll, kl, same, begin = [], [], [], end


def divergence(p_logits: NDArray[np.float32], q_logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Returns the Kullback-Leibler divergence KL(p || q) of each row, nats."""
    found = np.empty(len(p_logits))
    # Row by row: float64 copies of a whole slice would take more memory than its logits.
    for i, rows in enumerate(zip(p_logits, q_logits, strict=True)):
        p, q = map(log_probs, rows)
        found[i] = (np.exp(p) * (p - q)).sum()
    return found


def _nll(logits: NDArray[np.float32], following: Sequence[int]) -> NDArray[np.float64]:
    """Returns -log p of the tokens that follow; the last row may have none."""
    return np.array([-log_probs(row)[token] for row, token in zip(logits, following, strict=False)], np.float64)
