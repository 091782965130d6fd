"""Measures engines in turn: in each round, every case runs in one engine after the other, while the others are idle."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from statistics import fmean, median, stdev
from typing import Any

from pyggml_repkv.lab.bench.engines import EngineProcess, check_same_vocabulary, context_size, start_llama, start_repkv
from pyggml_repkv.lab.bench.load import REST_S, busy_cores

# Ratio of the longest sample to the shortest; above it the machine is noisy.
MAX_SPREAD = 1.3
# Share of the depth by which a context may be deeper.
MAX_DRIFT = 0.1

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Case:
    """A test: read n_prompt tokens at once, or n_gen one by one (the other is 0), after `depth` others."""

    n_prompt: int
    n_gen: int
    depth: int = 0

    @property
    def n_tokens(self) -> int:
        return self.n_prompt or self.n_gen

    @property
    def name(self) -> str:
        """llama-bench's name of the test."""
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{name} @ d{self.depth}" if self.depth else name


@dataclass(frozen=True, slots=True)
class Contender:
    """An engine and its options. name: the policy, or llama.cpp with its flash attention."""

    name: str
    is_ours: bool
    load: dict[str, Any]
    flash_attn: bool
    can_rewind: bool
    python: str = ""

    def start(self, stack: ExitStack) -> EngineProcess:
        if self.is_ours:
            return start_repkv(stack, self.name, **self.load)
        return start_llama(stack, self.name, self.python, **self.load)


@dataclass(slots=True)
class Result:
    """A case of one engine. synthetic: whether the context consists of repeated keys and values.

    By round: seconds; depths: tokens in the context before, up to a tenth more if the engine cannot rewind; memories:
    the worker's report afterwards; hits, required: blocks in RAM when needed, and blocks needed.
    """

    case: Case
    contender: Contender
    synthetic: bool
    version: str = ""
    seconds: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    memories: list[dict[str, Any]] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)
    required: list[int] = field(default_factory=list)
    busy: float = 0.0

    def keep_rounds(self, n: int) -> None:
        """Drops all rounds after the first n."""
        for each in (self.seconds, self.depths, self.memories, self.hits, self.required):
            del each[n:]

    @property
    def memory(self) -> dict[str, Any]:
        """The worker's report after the last round."""
        return self.memories[-1] if self.memories else {}

    @property
    def prefetch_hit(self) -> float | None:
        """Share of the needed blocks that were in RAM; None if none was needed."""
        return sum(self.hits) / sum(self.required) if any(self.required) else None

    @property
    def rates(self) -> list[float]:
        """Tokens/s."""
        return [self.case.n_tokens / s for s in self.seconds]

    @property
    def mean_rate(self) -> float:
        return fmean(self.rates)

    @property
    def stddev_rate(self) -> float:
        return stdev(self.rates) if len(self.rates) > 1 else 0.0

    @property
    def median_rate(self) -> float:
        return median(self.rates)

    @property
    def spread(self) -> float:
        return max(self.seconds) / min(self.seconds)

    def speedups(self, other: Result) -> list[float]:
        """Returns, by round, how many times as fast as `other` this is."""
        return [theirs / own for own, theirs in zip(self.seconds, other.seconds, strict=True)]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. stream(n_tokens, n_vocab): the tokens to read; synthetic: engines that can (llama.cpp and
    `--kv full`) fill a depth with repeated keys and values.
    """

    cases: Sequence[Case]
    contenders: Sequence[Contender]
    rounds: int
    stream: Callable[[int, int], list[int]]
    warm_up: bool = True
    synthetic: bool = False

    def n_ctx(self, depth: int, contender: Contender) -> int:
        """Returns the context for this depth, no more: some engines reserve all of it, some memories depend on it."""
        return context_size(self.n_tokens(depth, can_rewind=contender.can_rewind))

    def n_tokens(self, depth: int, *, can_rewind: bool) -> int:
        """Returns the most tokens that a context of this depth holds."""
        # One token is read before those that are timed one by one.
        after = max(case.n_tokens + 1 for case in self.cases if case.depth == depth)
        return depth + after + (0 if can_rewind else drift(depth))


def drift(depth: int) -> int:
    """Returns by how many tokens the context of an engine that cannot rewind may be deeper before it starts again."""
    return int(MAX_DRIFT * depth)


def measure(plan: Plan, say: Say) -> Iterator[list[Result]]:
    """Yields the results of each depth, the least depth first. Raises RepkvError if an engine fails.

    This project's engines start first, because they say more about a bad file than llama.cpp does.
    """
    cases = sorted(plan.cases, key=lambda case: case.depth)
    with ExitStack() as stack:
        engines = [(c, c.start(stack)) for c in sorted(plan.contenders, key=lambda c: not c.is_ours)]
        n_vocab = check_same_vocabulary(engine for _, engine in engines)
        drifts = not all(c.can_rewind for c in plan.contenders)
        tokens = plan.stream(max(plan.n_tokens(c.depth, can_rewind=not drifts) for c in cases), n_vocab)
        for depth, group in groupby(cases, key=lambda case: case.depth):
            for contender, engine in engines:
                engine.ask("open", n_ctx=plan.n_ctx(depth, contender), flash_attn=contender.flash_attn)
            yield from _measure_depth(plan, list(group), engines, tokens, say)


def _measure_depth(
    plan: Plan, cases: Sequence[Case], engines: Sequence[tuple[Contender, EngineProcess]], tokens: list[int], say: Say
) -> Iterator[list[Result]]:
    results = {
        (case, contender.name): Result(case, contender, plan.synthetic and contender.can_rewind, engine.version)
        for case in cases
        for contender, engine in engines
    }
    busy = [0.0]
    try:
        for n_round in range(not plan.warm_up, plan.rounds + 1):
            busy.append(busy_cores())
            for case in cases:
                for contender, engine in engines:
                    turn = f"round {n_round} of {plan.rounds}" if n_round else "warm-up"
                    say(f"{case.name}, {turn}: {contender.name}")
                    _take(results[case, contender.name], engine, tokens, counts=n_round > 0)
        busy.append(busy_cores())
    finally:
        # Ctrl-C comes here too: whole rounds are kept.
        whole = min(len(result.seconds) for result in results.values())
        for result in results.values():
            result.keep_rounds(whole)
            result.busy = max(busy)
        if whole:
            yield list(results.values())


def _take(result: Result, engine: EngineProcess, tokens: list[int], *, counts: bool) -> None:
    case = result.case
    reached = engine.ask(
        "reach", tokens=tokens[: case.depth], slack=drift(case.depth), synthetic=result.synthetic
    )["n_past"]  # fmt: skip
    before = _prefetch(engine.ask("memory"))
    time.sleep(REST_S)
    op = "time_chunk" if case.n_prompt else "time_tokens"
    seconds = engine.ask(op, tokens=tokens[reached : reached + case.n_tokens])["seconds"]
    if not counts:
        return
    memory = engine.ask("memory")
    after = _prefetch(memory)
    result.seconds.append(seconds)
    result.depths.append(reached)
    result.memories.append(memory)
    result.hits.append(after[0] - before[0])
    result.required.append(after[1] - before[1])


def _prefetch(memory: dict[str, Any]) -> tuple[int, int]:
    prefetch = memory.get("prefetch") or {}
    return prefetch.get("hits", 0), prefetch.get("required", 0)


def best_of(results: Sequence[Result], case: Case) -> Result | None:
    """Returns llama.cpp's fastest result of a case by its median, or None."""
    theirs = [r for r in results if r.case == case and not r.contender.is_ours]
    return max(theirs, key=lambda r: r.median_rate, default=None)


def spread_warnings(results: Sequence[Result]) -> list[str]:
    return [
        f"{r.case.name} of {r.contender.name} varies by a factor of {r.spread:.2f} (above {MAX_SPREAD})"
        for r in results
        if r.spread > MAX_SPREAD
    ]
