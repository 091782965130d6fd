import re

import numpy as np
import pytest

from pyggml_repkv.engine.generate import Begun, Generation, GenerationConfig, StopStrings
from pyggml_repkv.engine.sampling import SamplingConfig
from pyggml_repkv.errors import ComputeError, ContextFullError, InputError

EOG = 0
SPECIAL = 1
GREEDY = SamplingConfig(temp=0)


class LetterTokenizer:
    """Token n is the n-th letter; 0 ends the text and 1 is a special token."""

    alphabet = "$#abcdefghij"
    eog_ids = frozenset({EOG})

    def is_special(self, token):
        return token in (EOG, SPECIAL)

    def encode(self, text):
        return [self.alphabet.index(letter) for letter in text]

    def stream(self):
        return self

    def push(self, token):
        return self.alphabet[token]

    def flush(self):
        return "."


class ScriptedSession:
    """Gives `script` whatever it reads. decoded: counts its steps of one token."""

    n_ctx_train = 50

    def __init__(self, script, n_ctx=100):
        self.script = LetterTokenizer().encode(script)
        self.n_ctx = n_ctx
        self.n_past = 0
        self.read = []
        self.decoded = []

    def prefill(self, tokens, *, on_progress=None):
        if len(tokens) > self.n_ctx:
            raise ContextFullError("the prompt does not fit")
        start = self.n_past
        for n_done in [*range(0, len(tokens), 4), len(tokens)]:
            self.read = [*self.read[: self.n_past], *tokens[self.n_past - start : n_done]]
            self.n_past = start + n_done
            on_progress(n_done, len(tokens))
        return self.logits()

    def decode(self, token):
        if self.n_past == self.n_ctx:
            raise ContextFullError("full")
        self.decoded.append(token)
        self.n_past += 1
        return self.logits()

    def logits(self):
        logits = np.ones(len(LetterTokenizer.alphabet), dtype=np.float32)
        logits[self.script[len(self.decoded) % len(self.script)]] = 5
        return logits


def generate(script, n_ctx=100, prompt=(2, 3, 4), **config):
    session = ScriptedSession(script, n_ctx)
    generation = Generation(session, LetterTokenizer(), prompt, GenerationConfig(**{"sampling": GREEDY, **config}))
    return list(generation), generation.result(), session


def test_the_text_ends_with_the_models_end_token():
    pieces, result, session = generate("abc$")
    assert "".join(pieces) == result.text == "abc."
    assert result.finish_reason == "eos"
    assert result.tokens == (2, 3, 4, EOG)
    assert (result.n_prompt, result.n_decoded) == (3, 3)
    assert session.decoded == [2, 3, 4]


def test_n_predict_counts_tokens_and_spares_the_last_step():
    pieces, result, session = generate("abcdef", n_predict=4)
    assert pieces == ["a", "b", "c", "d", "."]
    assert result.finish_reason == "length"
    assert len(session.decoded) == result.n_decoded == 3


def test_n_predict_zero_only_reads_the_prompt():
    _, result, session = generate("abc", n_predict=0)
    assert (result.tokens, result.finish_reason, result.n_prompt) == ((), "length", 3)
    assert session.n_past == 3


def test_a_full_context_is_a_reason_of_its_own():
    _, result, session = generate("abcdef", n_ctx=6)
    assert result.finish_reason == "context"
    assert result.text == "abcd."
    assert session.n_past == session.n_ctx


def test_a_prompt_that_does_not_fit_is_an_error():
    with pytest.raises(ContextFullError, match="does not fit"):
        generate("abc", n_ctx=2)


def test_an_empty_prompt_is_an_error():
    with pytest.raises(InputError, match="prompt is empty"):
        generate("abc", prompt=())


def test_a_stop_string_across_tokens_never_shows():
    pieces, result, session = generate("abcdefgh", stop=("cde",))
    assert pieces == ["a", "b"]
    assert (result.text, result.finish_reason) == ("ab", "stop")
    assert result.tokens == (2, 3, 4, 5, 6)
    assert len(session.decoded) == 4


def test_what_only_began_a_stop_string_is_all_shown():
    pieces, result, _ = generate("abcd$", stop=("cdx", "zz"))
    assert "".join(pieces) == result.text == "abcd."
    assert pieces[:2] == ["a", "b"]


def test_a_stop_string_in_the_last_token_allowed_wins_over_length():
    _, result, _ = generate("abcd", stop=("d",), n_predict=4)
    assert (result.text, result.finish_reason) == ("abc", "stop")


def test_a_stop_string_can_end_in_the_flushed_text():
    _, result, _ = generate("ab$", stop=("b.",))
    assert (result.text, result.finish_reason) == ("a", "stop")


def test_special_tokens_are_shown_on_request():
    assert generate("a#b$")[1].text == "ab."
    assert generate("a#b$", special=True)[1].text == "a#b$."


def test_ignore_eos_never_draws_the_end():
    _, result, _ = generate("$", n_predict=5, ignore_eos=True)
    assert (result.finish_reason, EOG in result.tokens) == ("length", False)


def test_the_penalty_sees_the_prompt_and_the_text():
    sampling = SamplingConfig(temp=0, repeat_penalty=100.0)
    _, result, _ = generate("aaaa", n_predict=3, prompt=(3,), sampling=sampling)
    assert result.tokens == (2, 0)
    _, result, _ = generate("aaaa", n_predict=1, prompt=(2,), sampling=sampling)
    assert result.tokens == (0,)


def test_progress_reaches_the_caller_and_the_count():
    seen = []
    generation = Generation(ScriptedSession("ab$"), LetterTokenizer(), [2] * 10, GenerationConfig(sampling=GREEDY))
    generation.prefill(lambda n_done, n_total: seen.append((n_done, n_total)))
    assert seen == [(0, 10), (4, 10), (8, 10), (10, 10)]
    assert generation.result().n_prompt == 10
    assert "".join(generation) == "ab."


def test_an_interrupted_generation_keeps_its_result():
    session = ScriptedSession("abcdef")
    plain = session.decode

    def interrupted(token):
        if len(session.decoded) == 2:
            raise KeyboardInterrupt
        return plain(token)

    session.decode = interrupted
    generation = Generation(session, LetterTokenizer(), [2], GenerationConfig(sampling=GREEDY))
    with pytest.raises(KeyboardInterrupt):
        list(generation)
    result = generation.result()
    assert (result.text, result.finish_reason, result.n_decoded) == ("abc", None, 2)
    assert result.total_ms >= result.prompt_ms + result.predicted_ms


def test_an_interrupted_prompt_counts_what_was_read():
    session = ScriptedSession("abc")

    def prefill(tokens, *, on_progress):
        session.n_past = 4
        on_progress(4, len(tokens))
        raise KeyboardInterrupt

    session.prefill = prefill
    generation = Generation(session, LetterTokenizer(), [2] * 10)
    with pytest.raises(KeyboardInterrupt):
        list(generation)
    result = generation.result()
    assert (result.n_prompt, result.tokens, result.finish_reason) == (4, (), None)
    assert result.prompt_ms > 0


@pytest.mark.parametrize("stopped_at", [0, 4, 8, 10])
@pytest.mark.parametrize("n_before", [0, 3])
def test_a_prompt_is_read_once_however_often_it_is_stopped(stopped_at, n_before):
    session, prompt = ScriptedSession("ab$"), list(range(2, 12))
    session.read, session.n_past = prompt[:n_before], n_before
    generation = Generation(
        session, LetterTokenizer(), prompt, GenerationConfig(sampling=GREEDY), begun=Begun(n_read=n_before)
    )

    def stop(n_done, n_total):
        assert n_total == 10
        if n_done >= stopped_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generation.prefill(stop)
    generation.prefill()
    generation.prefill()
    assert (session.read, session.n_past, generation.result().n_prompt) == (prompt, 10, 10 - n_before)
    assert "".join(generation) == "ab."


def test_one_that_is_stopped_between_two_steps_goes_on_there():
    session, prompt = ScriptedSession("ab$"), list(range(2, 12))
    whole = session.prefill

    def stopped(tokens, *, on_progress):
        session.read, session.n_past = tokens[:n_read], n_read
        raise KeyboardInterrupt

    for n_read in (4, 10):
        session.n_past, session.prefill = 0, stopped
        generation = Generation(session, LetterTokenizer(), prompt, GenerationConfig(sampling=GREEDY))
        with pytest.raises(KeyboardInterrupt):
            generation.prefill()
        session.prefill = whole
        if n_read == 10:
            with pytest.raises(ComputeError, match="its logits are lost"):
                list(generation)
        else:
            assert "".join(generation) == "ab."
        assert session.read == prompt


def test_broken_logits_are_an_error():
    session = ScriptedSession("abc")
    session.logits = lambda: np.full(12, np.nan, dtype=np.float32)
    with pytest.raises(ComputeError, match="NaN"):
        list(Generation(session, LetterTokenizer(), [2]))


def test_rates_are_those_of_the_steps_measured():
    _, result, _ = generate("abcdef", n_predict=4)
    assert result.prompt_per_second == pytest.approx(3e3 / result.prompt_ms)
    assert result.predicted_per_second == pytest.approx(3e3 / result.predicted_ms)
    assert generate("ab", n_predict=1)[1].predicted_per_second == 0


def test_where_nobody_says_how_many_there_is_a_limit(monkeypatch):
    _, result, _ = generate("abcdef")
    assert (len(result.tokens), result.finish_reason) == (50, "length")
    monkeypatch.setattr("pyggml_repkv.engine.generate.MAX_UNASKED", 20)
    assert len(generate("abcdef")[1].tokens) == 20
    _, result, _ = generate("abcdef", n_predict=-2)
    assert (len(result.tokens), result.finish_reason) == (98, "context")
    assert generate("abcdef", n_predict=2**63)[1].finish_reason == "context"


def test_a_generation_is_over_once_it_was_iterated():
    generation = Generation(ScriptedSession("abc"), LetterTokenizer(), [2], GenerationConfig(n_predict=3))
    assert len(list(generation)) == 4
    assert list(generation) == []
    assert len(generation.result().tokens) == 3
    left = Generation(ScriptedSession("abc"), LetterTokenizer(), [2])
    assert next(iter(left))
    assert list(left) == []


def test_one_stop_string_needs_no_tuple():
    assert GenerationConfig(stop="END").stop == ("END",)
    assert GenerationConfig(stop=["a", "b"]).stop == ("a", "b")
    assert GenerationConfig(n_predict=np.int64(3)).n_predict == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_predict": 1.5}, "n_predict must be an integer, got 1.5"),
        ({"n_predict": "5"}, "n_predict must be an integer, got '5'"),
        ({"n_predict": True}, "n_predict must be an integer, got True"),
        ({"n_predict": float("nan")}, "n_predict must be an integer, got nan"),
        ({"n_predict": None}, "n_predict must be an integer, got None"),
        ({"stop": [1]}, "stop must be a text, or several, got 1"),
        ({"stop": None}, "stop must be a text, or several, got None"),
        ({"stop": ""}, "a stop string must not be empty"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1"),
        ({"special": "no"}, "special must be True or False, got 'no'"),
        ({"sampling": {"temp": 0}}, "sampling must be a SamplingConfig, got {'temp': 0}"),
    ],
)
def test_wrong_types_are_named(config, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        GenerationConfig(**config)


@pytest.mark.parametrize("config", [{"n_predict": -3}, {"stop": ("a", "")}])
def test_a_wrong_configuration_is_refused(config):
    with pytest.raises(InputError):
        GenerationConfig(**config)


def test_the_stop_string_that_is_complete_first_decides():
    splitter = StopStrings(["abcd", "bc"])
    assert [splitter.push(letter) for letter in "xabc"] == ["x", "", "", "a"]
    assert splitter.found
