"""How much memory `run` takes, against the model file and the keys and values that it holds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from _engines import say

from pyggml_repkv.errors import RepkvError

MEMORY_HEADER = ("memory of ours", "load ms", "peak RSS MB", "file MB", "KV MB", "file + KV + 60 MB", "within")
ALLOWANCE = 60_000_000
N_PREDICT = 32

# Nearly all tokenizers have one token for each of these words.
WORDS = ("the", "sun", "rose", "over", "the", "old", "house", "and")


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """`run` in fresh processes: the median load time and the highest peak of resident memory.

    file_bytes: all of the model file. kv_bytes: of the tokens in the context at the end.
    """

    n_prompt: int
    load_ms: float
    peak_rss_bytes: int
    file_bytes: int
    kv_bytes: int
    limit_bytes: int

    def cells(self) -> tuple[str, ...]:
        sizes = (self.peak_rss_bytes, self.file_bytes, self.kv_bytes, self.limit_bytes)
        within = "yes" if self.peak_rss_bytes <= self.limit_bytes else "no"
        name = f"{self.n_prompt} + {N_PREDICT} tokens"
        return name, f"{self.load_ms:.0f}", *(f"{size / 1e6:.1f}" for size in sizes), within


def measure_memory(model: Path, n_threads: int, prompts: Sequence[int], n_runs: int) -> list[MemoryRow]:
    """A short prompt, then one of about as many tokens as each of `prompts`. Raises RepkvError when a run fails."""
    return [_row(model, n_threads, n_words, n_runs) for n_words in (len(WORDS), *prompts)]


def _row(model: Path, n_threads: int, n_words: int, n_runs: int) -> MemoryRow:
    say(f"memory of `run -n {N_PREDICT}` with a prompt of {n_words} words")
    runs = [_run(model, n_threads, n_words) for _ in range(n_runs)]
    file_bytes, kv_bytes = model.stat().st_size, runs[0]["kv"]["resident_bytes"]
    return MemoryRow(
        n_prompt=runs[0]["prompt_tokens"],
        load_ms=median(run["load_ms"] for run in runs),
        peak_rss_bytes=max(run["peak_rss_bytes"] for run in runs),
        file_bytes=file_bytes,
        kv_bytes=kv_bytes,
        limit_bytes=file_bytes + kv_bytes + ALLOWANCE,
    )


def _run(model: Path, n_threads: int, n_words: int) -> dict[str, Any]:
    """What `run --json` says."""
    options = ["-m", str(model), "-t", str(n_threads), "--kv", "full", "--greedy", "--ignore-eos"]
    command = [sys.executable, "-m", "pyggml_repkv", "run", *options, "-n", str(N_PREDICT), "-p", "-", "-q", "--json"]
    prompt = " ".join(WORDS[i % len(WORDS)] for i in range(n_words))
    done = subprocess.run(command, input=prompt, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RepkvError(done.stderr.strip() or f"`run` ended with exit code {done.returncode}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report
