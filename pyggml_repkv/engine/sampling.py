"""From logits to a token: llama.cpp's chain (penalty, top-k, top-p, min-p, temperature) over numpy."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.arguments import check_fields
from pyggml_repkv.errors import ComputeError, InputError

MAX_SEED = 2**32 - 1
NUCLEUS_GUESS = 512


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How the next token is chosen; the defaults are llama.cpp's. Raises InputError for a value out of range.

    temp: 0 takes the most likely token (lowest id on a tie), whatever the other fields say but the penalty.
    top_k: keep the k highest logits; 0 keeps all. top_p: keep the smallest set of the most likely tokens
    that holds at least this probability; 1 keeps all. min_p: keep tokens at least min_p times as likely as
    the most likely one; 0 keeps all. repeat_penalty: 1 is off. repeat_last_n: tokens looked back on; -1 is
    all. seed: -1 draws one from the operating system.
    """

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int = -1

    def __post_init__(self) -> None:
        check_fields(self)
        _check("temp", self.temp, math.isfinite(self.temp) and self.temp >= 0, "a finite number, 0 or more")
        _check("top_k", self.top_k, self.top_k >= 0, "0 or more")
        _check("top_p", self.top_p, 0 <= self.top_p <= 1, "from 0 to 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1")
        penalty = self.repeat_penalty
        _check("repeat_penalty", penalty, math.isfinite(penalty) and penalty > 0, "a finite number above 0")
        _check("repeat_last_n", self.repeat_last_n, self.repeat_last_n >= -1, "-1 or more")
        _check("seed", self.seed, -1 <= self.seed <= MAX_SEED, f"from -1 to {MAX_SEED}")


def _check(name: str, value: float, ok: bool, right: str) -> None:
    if not ok:
        raise InputError(f"{name} must be {right}, got {value!r}")


class Sampler:
    """Draws tokens; one generator per sampler, so equal seeds and logits give equal tokens.

    `banned` ids are never drawn. `seed` is the seed in use, also when the configuration left it open.
    """

    def __init__(self, config: SamplingConfig, banned: Iterable[int] = ()) -> None:
        self.config = config
        self.seed = config.seed if config.seed >= 0 else secrets.randbelow(MAX_SEED + 1)
        self._banned = np.array(sorted(banned), dtype=np.int64)
        self._rng = np.random.Generator(np.random.PCG64(self.seed))

    def sample(self, logits: NDArray[np.float32], recent: Sequence[int] = ()) -> int:
        """Token id for `logits` [n_vocab], which is left untouched; `recent` is the sequence so far.

        Raises ComputeError when a logit is NaN or when no token is possible.
        """
        ids, probs = self.distribution(logits, recent)
        if len(ids) == 1:
            return int(ids[0])
        mass = np.cumsum(probs)
        # u * total may round up to total, which would point past the last token that has any probability
        last = np.searchsorted(mass, mass[-1], side="left")
        drawn = np.searchsorted(mass, self._rng.random() * mass[-1], side="right")
        return int(ids[min(drawn, last)])

    def distribution(
        self, logits: NDArray[np.float32], recent: Sequence[int] = ()
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Ascending ids [n] that survive the chain and their probabilities [n], which sum to 1."""
        config = self.config
        logits = self._adjusted(logits, recent)
        peak = int(np.argmax(logits))  # argmax stops at the first NaN, so this look at one value finds any
        highest = float(logits[peak])
        if math.isnan(highest):
            raise ComputeError(f"the model's logits are not numbers (NaN at token {peak}); the file may be damaged")
        if highest == -math.inf:
            raise ComputeError("no token is possible: every logit is -inf")
        if config.temp == 0:
            return np.array([peak], dtype=np.int64), np.ones(1)

        ids = _highest(logits, config.top_k or len(logits))
        if highest == math.inf:
            ids = ids[logits[ids] == math.inf]
            return ids, np.full(len(ids), 1 / len(ids))
        below = logits[ids].astype(np.float64) - highest
        if config.top_p < 1:
            kept = _nucleus(np.exp(below), config.top_p)
            ids, below = ids[kept], below[kept]
        if config.min_p > 0:
            kept = np.flatnonzero(below >= math.log(config.min_p))
            ids, below = ids[kept], below[kept]
        with np.errstate(over="ignore"):
            weights = np.exp(below / config.temp)
        return ids, weights / weights.sum()

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on drawing the same tokens; only strings and integers."""
        return {"seed": self.seed, "rng": self._rng.bit_generator.state}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state()` was taken. Raises InputError when `state` is not one."""
        generator = np.random.PCG64(0)
        try:
            seed = int(state["seed"])
            generator.state = state["rng"]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"this is not a saved sampler state: {error}") from error
        self.seed = seed
        self._rng = np.random.Generator(generator)

    def _adjusted(self, logits: NDArray[np.float32], recent: Sequence[int]) -> NDArray[np.float32]:
        config = self.config
        n_last = len(recent) if config.repeat_last_n < 0 else min(config.repeat_last_n, len(recent))
        penalise = config.repeat_penalty != 1 and n_last > 0
        if not penalise and not len(self._banned):
            return logits
        logits = logits.copy()
        if penalise:
            seen = np.unique(np.array(recent[len(recent) - n_last :], dtype=np.int64))
            values = logits[seen].astype(np.float64)
            penalty = config.repeat_penalty
            with np.errstate(over="ignore"):
                logits[seen] = np.where(values > 0, values / penalty, values * penalty)
        logits[self._banned] = -math.inf
        return logits


def _highest(values: NDArray[Any], n: int) -> NDArray[np.int64]:
    """Ascending positions of the `n` highest of `values` [m]; among equals the lower position wins."""
    if n >= len(values):
        return np.arange(len(values))
    threshold = np.partition(values, len(values) - n)[len(values) - n]
    kept = np.flatnonzero(values >= threshold)
    if len(kept) > n:
        equal = np.flatnonzero(values[kept] == threshold)
        kept = np.delete(kept, equal[n - len(kept) :])
    return kept


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Ascending positions of the fewest highest `weights` [m] whose share of the sum reaches `top_p`."""
    target = top_p * weights.sum()
    n = min(NUCLEUS_GUESS, len(weights))
    # sorting a whole vocabulary takes most of the time, and the nucleus is nearly always a few tokens
    while True:
        mass = np.cumsum(np.sort(weights[_highest(weights, n)])[::-1])
        if mass[-1] >= target or n == len(weights):
            return _highest(weights, min(int(np.searchsorted(mass, target, side="left")) + 1, n))
        n = min(8 * n, len(weights))
