"""Generators in layers: logits to tokens, tokens up to the end, text pieces, text before a stop string."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.arguments import check_callable, check_fields, check_type
from pyggml_repkv.engine.sampling import Sampler, SamplingConfig
from pyggml_repkv.errors import ComputeError, ContextFullError, InputError

FinishReason = Literal["eos", "stop", "length", "context"]
Progress = Callable[[int, int], None]

# The most tokens that are generated where nobody says how many; no more than the model was trained on.
MAX_UNASKED = 32768


class TokenSession(Protocol):
    """What generation needs of a session; logits are [n_vocab] and valid until the next call."""

    @property
    def n_ctx_train(self) -> int: ...
    @property
    def n_past(self) -> int: ...
    def prefill(self, tokens: Sequence[int], *, on_progress: Progress | None = None) -> NDArray[np.float32]: ...
    def decode(self, token: int) -> NDArray[np.float32]: ...


class TokenDecoder(Protocol):
    """Bytes of tokens in, whole characters out."""

    def push(self, token: int, /) -> str: ...
    def flush(self) -> str: ...


class TextTokenizer(Protocol):
    """What generation needs of a tokenizer."""

    @property
    def eog_ids(self) -> frozenset[int]: ...
    def is_special(self, token: int, /) -> bool: ...
    def stream(self) -> TokenDecoder: ...


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """When to stop and what to show. Raises InputError for a value out of range.

    n_predict: most tokens to generate; -1 is as many as the model was trained on, at most MAX_UNASKED, and -2 has no
    limit but the context. stop: strings (or one) that end the text; none of them is part of it. ignore_eos:
    end-of-generation tokens are never drawn. special: special tokens appear in the text.
    """

    n_predict: int = -1
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    special: bool = False
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.n_predict < -2:
            raise InputError(f"n_predict must be -2 (until the context is full) or more, got {self.n_predict}")
        check_type("stop", self.stop, (str, tuple, list), "a text, or several")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for stop in self.stop:
            check_type("stop", stop, str, "a text, or several")
        if "" in self.stop:
            raise InputError("a stop string must not be empty")
        check_type("sampling", self.sampling, SamplingConfig, "a SamplingConfig")

    def limit(self, n_ctx_train: int) -> int | None:
        """The most tokens to generate, with a model that was trained on n_ctx_train; None: no limit."""
        if self.n_predict == -1:
            return min(n_ctx_train, MAX_UNASKED)
        return None if self.n_predict < 0 else self.n_predict


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """What came out. The clock follows llama.cpp: the first token is drawn from the prompt's own logits, so
    it belongs to `prompt_ms`; `predicted_ms` is the time of the `n_decoded` single-token steps after it.

    tokens: every id drawn, an end-of-generation token or those of a stop string included.
    n_prompt: prompt tokens read: all of them, less those that the session had and unless reading was interrupted.
    finish_reason: 'eos' (an end-of-generation token), 'stop' (a stop string), 'length' (n_predict), 'context' (full),
    or None when the generation was left before its end.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None
    n_prompt: int
    n_decoded: int
    prompt_ms: float
    predicted_ms: float
    total_ms: float

    @property
    def prompt_per_second(self) -> float:
        """Prompt tokens per second; 0 when the prompt was not read."""
        return 1e3 * self.n_prompt / self.prompt_ms if self.prompt_ms else 0.0

    @property
    def predicted_per_second(self) -> float:
        """Single-token steps per second; 0 when there was none."""
        return 1e3 * self.n_decoded / self.predicted_ms if self.predicted_ms else 0.0


@dataclass(frozen=True, slots=True)
class Begun:
    """What a session has read of a prompt, and of a text that was being generated after it, before a generation begins.

    n_read: prompt tokens; tokens: those of the text; logits: [n_vocab] after the last token, needed unless some of the
    prompt is left; sampler: its state, or None for a new one.
    """

    n_read: int = 0
    logits: NDArray[np.float32] | None = None
    tokens: tuple[int, ...] = ()
    sampler: Mapping[str, Any] | None = None


class StopStrings:
    """Splits streamed text at the first stop string to be complete, however the text is cut into pieces.

    Text that may yet turn out to begin a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> str:
        """Text that is now certain to precede any stop string."""
        text = self._held + piece
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        n_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        n_certain = len(text) - n_held
        self._held = text[n_certain:]
        return text[:n_certain]

    def flush(self) -> str:
        """Text held back, at the end of the input."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Generation:
    """One continuation of a session by `prompt` token ids: iterate it once for the pieces of text; then it is over.

    `result()` may be asked for at any time. Raises InputError for an empty prompt; iterating raises what
    `prefill` raises, and ComputeError when the model's output is not numbers.
    """

    def __init__(
        self,
        session: TokenSession,
        tokenizer: TextTokenizer,
        prompt: Sequence[int],
        config: GenerationConfig | None = None,
        *,
        sampler: Sampler | None = None,
        begun: Begun | None = None,
    ) -> None:
        if not prompt:
            raise InputError("the prompt is empty and this model has no start token: give it some text")
        check_type("config", config, (GenerationConfig, type(None)), "a GenerationConfig")
        self.config = config or GenerationConfig()
        self._limit = self.config.limit(session.n_ctx_train)
        self._iterated = False
        self._eog = tokenizer.eog_ids
        self.sampler = sampler or Sampler(self.config.sampling, self._eog if self.config.ignore_eos else ())
        self._begun_with = begun or Begun()
        if self._begun_with.sampler is not None:
            self.sampler.restore(self._begun_with.sampler)
        # As it was before the token was drawn that comes after those that the session has read.
        self._sampler_before = self.sampler.state()
        self._session = session
        self._tokenizer = tokenizer
        self._prompt = list(prompt)
        self._logits: NDArray[np.float32] | None = None
        self._tokens: list[int] = []
        self._text: list[str] = []
        self._finish_reason: FinishReason | None = None
        # Position of the first prompt token that this reads.
        self._start: int | None = None
        self._n_read = self._n_decoded = 0
        self._prompt_s = self._predicted_s = 0.0
        self._begun = self._ended = 0.0

    def prefill(self, on_progress: Progress | None = None) -> None:
        """Reads the prompt, as iterating does if need be, once: what was stopped goes on where it was.

        Raises ContextFullError when it does not fit; ComputeError where it was stopped after the last token.
        """
        check_callable("on_progress", on_progress)
        if self._logits is not None:
            return
        if self._start is None:
            self._start = self._session.n_past
        start = perf_counter()
        self._begun = self._begun or start
        try:
            self._logits = self._read(self._start, on_progress)
        finally:
            # Not what on_progress was told: a step may be over when Ctrl-C comes before that.
            self._n_read = self._session.n_past - self._start
            self._prompt_s += perf_counter() - start
        if on_progress is not None and self._n_read:
            on_progress(len(self._prompt), len(self._prompt))

    def _read(self, start: int, on_progress: Progress | None) -> NDArray[np.float32]:
        n_before = self._begun_with.n_read + self._session.n_past - start
        rest = self._prompt[n_before:]
        if not rest:
            if self._begun_with.logits is None or self._session.n_past > start:
                raise ComputeError("the prompt was read and its logits are lost: read it in a new session, or rewind")
            return self._begun_with.logits

        def tell(n_done: int, n_total: int) -> None:
            self._n_read = n_before - self._begun_with.n_read + n_done
            # The last call waits for the logits, which would be lost if it raised.
            if on_progress is not None and n_done < n_total:
                on_progress(n_before + n_done, n_before + n_total)

        return self._session.prefill(rest, on_progress=tell)

    def __iter__(self) -> Iterator[str]:
        if self._iterated:
            return
        self._iterated = True
        stops = StopStrings(self.config.stop)
        try:
            for piece in self._pieces():
                if text := stops.push(piece):
                    self._text.append(text)
                    yield text
                if stops.found:
                    self._finish_reason = "stop"
                    return
            if text := stops.flush():
                self._text.append(text)
                yield text
        finally:
            self._ended = perf_counter()

    def result(self) -> GenerationResult:
        """The text, tokens and timings so far."""
        now = self._ended or perf_counter()
        return GenerationResult(
            text="".join(self._text),
            tokens=tuple(self._tokens),
            finish_reason=self._finish_reason,
            n_prompt=self._n_read,
            n_decoded=self._n_decoded,
            prompt_ms=1e3 * self._prompt_s,
            predicted_ms=1e3 * self._predicted_s,
            total_ms=1e3 * (now - self._begun) if self._begun else 0.0,
        )

    @property
    def n_unread(self) -> int:
        """Prompt tokens that are still to be read."""
        return len(self._prompt) - self._begun_with.n_read

    @property
    def begun(self) -> Begun:
        """What the session had read, of the prompt and of the text after it, when this generation was made."""
        return self._begun_with

    def was_cut_off(self, saved: Mapping[str, Any]) -> bool:
        """Whether `saved` is the state of this very text before its end."""
        same = saved.get("n_prompt") == len(self._prompt) and saved.get("settings") == self._identity()
        return same and not saved.get("finished")

    def _identity(self) -> dict[str, Any]:
        """What must be equal for another run to go on with this text."""
        config = self.config
        return {"ignore_eos": config.ignore_eos, "stop": list(config.stop), **asdict(config.sampling)}

    def saved(self, n_past: int) -> dict[str, Any]:
        """What a session that has read n_past tokens keeps so that this text can go on: JSON."""
        unread = n_past - len(self._prompt) < len(self._tokens)
        # One that ended within what there was before it, as with a smaller n_predict, has ended nothing.
        is_all = len(self._tokens) >= len(self._begun_with.tokens)
        return {
            "n_prompt": len(self._prompt),
            "settings": self._identity(),
            "sampler": self._sampler_before if unread else self.sampler.state(),
            "finished": self._finish_reason if is_all else None,
        }

    def _pieces(self) -> Iterator[str]:
        decoder = self._tokenizer.stream()
        for token in self._until_end():
            hidden = token in self._eog or self._tokenizer.is_special(token)
            if self.config.special or not hidden:
                yield decoder.push(token)
        yield decoder.flush()

    def _until_end(self) -> Iterator[int]:
        if self._logits is None:
            self.prefill()
        if self._limit == 0:
            self._finish_reason = "length"
            return
        try:
            for token in self._steps():
                yield token
                if token in self._eog:
                    self._finish_reason = "eos"
                    return
                if len(self._tokens) == self._limit:
                    self._finish_reason = "length"
                    return
        except ContextFullError:
            self._finish_reason = "context"

    def _steps(self) -> Iterator[int]:
        assert self._logits is not None
        history = list(self._prompt)
        for token in self._begun_with.tokens:
            history.append(token)
            self._tokens.append(token)
            yield token
        while True:
            self._sampler_before = self.sampler.state()
            token = self.sampler.sample(self._logits, history)
            history.append(token)
            self._tokens.append(token)
            yield token
            start = perf_counter()
            self._logits = self._session.decode(token)
            self._predicted_s += perf_counter() - start
            self._n_decoded += 1
