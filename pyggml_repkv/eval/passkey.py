"""Pass-key retrieval: a five-digit key in one sentence somewhere in a long filler, asked for at the end.

The task of InfiniteBench's Retrieve.PassKey (arXiv 2402.13718) and of Landmark Attention (arXiv 2305.16300) before it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError
from pyggml_repkv.memory.config import MemoryConfig

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n\n"
)
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"
N_ANSWER = 8


@dataclass(frozen=True, slots=True)
class PasskeyResult:
    """One question. depth: 0 is the beginning, 1 the end; times of the prompt and of one decoded token."""

    kv: str
    n_tokens: int
    depth: float
    key: str
    answer: str
    found: bool
    prompt_ms: float
    decode_ms: float
    kv_stats: dict[str, object]


def passkey_prompt(model: Model, n_tokens: int, depth: float, key: str, haystack: Sequence[int]) -> list[int]:
    """Token ids of exactly n_tokens. Raises InputError where they have no room for the question."""
    encode = model.tokenizer.encode
    head, needle, question = encode(TASK), encode(NEEDLE.format(key=key)), encode(QUESTION)
    n_filler = n_tokens - len(head) - len(needle) - len(question)
    if n_filler < 0:
        raise InputError(f"--lengths {n_tokens} is too short: the question alone takes {n_tokens - n_filler} tokens")
    filler = (list(haystack) * (n_filler // len(haystack) + 1))[:n_filler]
    at = int(n_filler * depth)
    # Between two sentences where the filler repeats one.
    at -= at % len(haystack) if len(haystack) < n_filler else 0
    return [*head, *filler[:at], *needle, *filler[at:], *question]


def run_passkey(
    model: Model,
    memory: MemoryConfig,
    lengths: Sequence[int],
    n_depths: int,
    seed: int,
    text: str | None = None,
) -> Iterator[PasskeyResult]:
    """Asks at n_depths evenly spaced depths for each length; keys depend on the seed alone.

    text: the haystack, repeated where it is too short; None is the classic filler.
    """
    haystack = model.tokenizer.encode(text or FILLER)
    rng = np.random.default_rng(seed)
    for n_tokens in lengths:
        for i in range(n_depths):
            key = str(rng.integers(10000, 100000))
            depth = (i + 0.5) / n_depths
            prompt = passkey_prompt(model, n_tokens, depth, key, haystack)
            yield _ask(model, memory, prompt, depth, key)


def _ask(model: Model, memory: MemoryConfig, prompt: list[int], depth: float, key: str) -> PasskeyResult:
    with model.session(memory) as session:
        start = time.perf_counter()
        logits = session.prefill(prompt)
        read = time.perf_counter()
        tokens = []
        for _ in range(N_ANSWER):
            tokens.append(int(logits.argmax()))
            logits = session.decode(tokens[-1])
        done = time.perf_counter()
        answer = model.tokenizer.decode(tokens)
        return PasskeyResult(
            kv=memory.kv,
            n_tokens=len(prompt),
            depth=depth,
            key=key,
            answer=answer,
            found=key in answer,
            prompt_ms=1e3 * (read - start),
            decode_ms=1e3 * (done - read) / N_ANSWER,
            kv_stats=session.stats(),
        )


def summary(results: Sequence[PasskeyResult]) -> dict[str, object]:
    """What `--json` prints."""
    lengths = sorted({r.n_tokens for r in results})
    found = {n: [r.found for r in results if r.n_tokens == n] for n in lengths}
    return {
        "task": "passkey",
        "found": {str(n): [sum(hits), len(hits)] for n, hits in found.items()},
        "results": [asdict(r) for r in results],
    }
