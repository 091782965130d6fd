"""Reads a haystack once and asks questions about it, each of a fork of the session."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from pyggml_repkv.engine.checks import check_fits
from pyggml_repkv.engine.model import Model
from pyggml_repkv.engine.session import OnProgress, Session
from pyggml_repkv.errors import InputError
from pyggml_repkv.memory.config import MemoryConfig

log = logging.getLogger(__name__)

Progress = Callable[[int], AbstractContextManager[OnProgress | None]]

# The tokens of a question, and how many its answer may have.
Asked = tuple[Sequence[int], int]


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy answer. n_shared: the questions about the haystack that were asked of this one reading; shared_ms: what
    the reading took; prompt_ms: shared_ms / n_shared, so that it counts once, and what the question's own tokens took;
    decode_ms: of a token.
    """

    text: str
    n_shared: int
    shared_ms: float
    prompt_ms: float
    decode_ms: float
    kv_stats: dict[str, object]


def answers(
    model: Model,
    memory: MemoryConfig,
    haystack: Sequence[int],
    questions: Sequence[Asked],
    progress: Progress = lambda _: nullcontext(),
) -> Iterator[Answer]:
    """Yields the answer to each question. Reads the haystack once for all of them, or for each in a memory that cannot
    be forked. progress(n_tokens): yields a callback for the reading.

    Raises ContextFullError, before anything is read, if the memory's context is too small.
    """
    shares = len(questions) < 2 or _can_fork(model, memory)
    for group in [questions] if shares else [[question] for question in questions]:
        with model.session(memory) as session:
            n_most = max(len(tokens) + n_answer - 1 for tokens, n_answer in group)
            check_fits(session.policy, len(haystack) + n_most, 0, session.n_ctx_train)
            start = time.perf_counter()
            with progress(len(haystack)) as tell:
                _read(session, haystack, tell)
            shared_ms = 1e3 * (time.perf_counter() - start)
            for question in group:
                with session.fork() if len(group) > 1 else nullcontext(session) as fork:
                    yield _answer(model, fork, question, len(group), shared_ms)


def _can_fork(model: Model, memory: MemoryConfig) -> bool:
    with model.session(memory) as session:
        try:
            session.fork().close()
        except InputError as error:
            log.warning("the haystack is read for each question: %s", error)
            return False
    return True


def _read(session: Session, tokens: Sequence[int], tell: OnProgress | None) -> None:
    """Reads in whole steps: only the end of a question is read token by token, as that of a prompt is."""
    for begin in range(0, len(tokens), session.n_batch):
        session.read(tokens[begin : begin + session.n_batch])
        if tell is not None:
            tell(min(begin + session.n_batch, len(tokens)), len(tokens))


def _answer(model: Model, session: Session, question: Asked, n_shared: int, shared_ms: float) -> Answer:
    tokens, n_answer = question
    start = time.perf_counter()
    logits = session.prefill(tokens)
    read = time.perf_counter()
    said = [int(logits.argmax())]
    while len(said) < n_answer and said[-1] not in model.tokenizer.eog_ids:
        said.append(int(session.decode(said[-1]).argmax()))
    done = time.perf_counter()
    return Answer(
        text=model.tokenizer.decode([token for token in said if token not in model.tokenizer.eog_ids]),
        n_shared=n_shared,
        shared_ms=shared_ms,
        prompt_ms=shared_ms / n_shared + 1e3 * (read - start),
        # The first token came with the question.
        decode_ms=1e3 * (done - read) / max(len(said) - 1, 1),
        kv_stats=session.stats(),
    )
