"""How well a memory predicts a text: llama.cpp's perplexity, likelihood by position, distance from `full`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.model.tokenizer import Tokenizer

# Of fewer nothing is judged.
MIN_CHUNK = 3


@dataclass(frozen=True, slots=True)
class Stretch:
    """After each of the tokens [begin, end): nll, the mean negative log likelihood of the one that follows, nats; kl,
    the mean divergence KL(full || this memory) of the next-token distribution, nats; top1, how often both find the same
    token most likely (both None where no `full` was asked).
    """

    begin: int
    end: int
    nll: float
    kl: float | None = None
    top1: float | None = None


def log_probs(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logits [n, V] -> natural logarithms of probabilities."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    return x


def chunk_perplexity(
    model: Model, memory: MemoryConfig, tokens: Sequence[int], n_chunk: int
) -> Iterator[tuple[int, float]]:
    """llama-perplexity's number: the text is cut into chunks of n_chunk tokens, each read by itself, and the second
    half of each is judged. Yields (tokens judged so far, perplexity of them) after each chunk. Raises as `chunks_of`.
    """
    first, total, n_judged = n_chunk // 2, 0.0, 0
    for chunk in chunks_of(model.tokenizer, tokens, n_chunk):
        with model.session(memory) as session:
            for begin in range(0, n_chunk, memory.n_batch):
                logits = session.prefill_all(chunk[begin : begin + memory.n_batch])
                nll = _nll(logits, chunk[begin + 1 : begin + 1 + len(logits)])
                judged = nll[max(0, first - begin) :]
                total += float(judged.sum())
                n_judged += len(judged)
        yield n_judged, float(np.exp(total / n_judged))


def chunks_of(tokenizer: Tokenizer, tokens: Sequence[int], n_chunk: int) -> Iterator[list[int]]:
    """Whole chunks, each beginning with the token that texts begin with, in place of its first.

    Raises InputError for a text that fills no chunk, and for chunks without a second half.
    """
    if n_chunk < MIN_CHUNK:
        raise InputError(f"-c {n_chunk}: a chunk takes {MIN_CHUNK} tokens at least, of which the last is judged")
    if len(tokens) < n_chunk:
        raise InputError(f"the text has {len(tokens)} tokens, one chunk takes {n_chunk}: give -c, or a longer text")
    bos = tokenizer.encode("")
    for start in range(0, len(tokens) - n_chunk + 1, n_chunk):
        yield [*bos, *tokens[start + len(bos) : start + n_chunk]]


def stretches(
    model: Model, memory: MemoryConfig, tokens: Sequence[int], n_each: int, full: MemoryConfig | None = None
) -> Iterator[Stretch]:
    """Reads a text in one session and judges every n_each tokens of it; full: what to compare with, step by step."""
    with ExitStack() as stack:
        session = stack.enter_context(model.session(memory))
        other = stack.enter_context(model.session(full)) if full is not None else None
        nll: list[NDArray[np.float64]] = []
        kl: list[NDArray[np.float64]] = []
        same: list[NDArray[np.bool_]] = []
        begin = 0
        for start in range(0, len(tokens), memory.n_batch):
            chunk = tokens[start : start + memory.n_batch]
            mine = session.prefill_all(chunk)
            nll.append(_nll(mine, tokens[start + 1 : start + 1 + len(chunk)]))
            if other is not None:
                theirs = other.prefill_all(chunk)
                kl.append(divergence(theirs, mine))
                same.append(theirs.argmax(-1) == mine.argmax(-1))
            end = start + len(chunk)
            if end - begin >= n_each or end == len(tokens):
                # The last token of all has none after it.
                judged = np.concatenate(nll)
                if len(judged):
                    yield Stretch(
                        begin, end, float(judged.mean()),
                        float(np.concatenate(kl).mean()) if kl else None,
                        float(np.concatenate(same).mean()) if same else None,
                    )  # fmt: skip
                nll, kl, same, begin = [], [], [], end


def divergence(p_logits: NDArray[np.float32], q_logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Kullback-Leibler divergence KL(p || q) of each row, nats."""
    p, q = log_probs(p_logits), log_probs(q_logits)
    found: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(-1)
    return found


def _nll(logits: NDArray[np.float32], following: Sequence[int]) -> NDArray[np.float64]:
    """Of the tokens that follow; the last row may have none."""
    n = len(following)
    found: NDArray[np.float64] = -log_probs(logits[:n])[np.arange(n), np.asarray(following, np.int64)]
    return found
