"""What a kept session does with a prompt: goes on, goes back, or refuses to drop what it holds."""

from dataclasses import replace

import numpy as np
import pytest

from pyggml_repkv.engine.generate import GenerationConfig
from pyggml_repkv.engine.model import Model
from pyggml_repkv.engine.sampling import SamplingConfig
from pyggml_repkv.errors import InputError
from tests.unit.engine.test_session_store import MEMORY, TOKENS


@pytest.fixture
def model(tiny_model):
    with Model.load(tiny_model(n_layer=2, n_ctx=512), threads=2, repack=False) as loaded:
        yield loaded


@pytest.fixture
def folder(model, tmp_path):
    """A session that has read 300 tokens."""
    path = tmp_path / "session"
    with model.session(MEMORY, directory=path) as session:
        session.prefill(TOKENS[:300])
    return path


def test_a_prompt_that_parts_is_read_from_the_last_save_before(model, folder):
    prompt = [*TOKENS[:290], 1, 2, 3]
    with model.session(MEMORY, directory=folder) as session, model.session(MEMORY) as fresh:
        resumed = session.go_back_to(prompt, lambda _: False)
        assert 0 < resumed.n_past <= 290
        assert np.array_equal(session.prefill(prompt[resumed.n_past :]), fresh.prefill(prompt))


def test_a_prompt_with_nothing_in_common_starts_again(model, folder):
    with model.session(MEMORY, directory=folder) as session, model.session(MEMORY) as fresh:
        assert session.go_back_to(TOKENS[::-1], lambda _: False).n_past == 0
        assert np.array_equal(session.prefill(TOKENS[::-1]), fresh.prefill(TOKENS[::-1]))
    with model.resume(folder, MEMORY) as session:
        assert session.tokens == TOKENS[::-1]


@pytest.fixture
def long_folder(model, tmp_path):
    """A session that has read a prompt of 900 tokens and 20 after it."""
    path = tmp_path / "long"
    with model.session(replace(MEMORY, n_ctx=4096), directory=path) as session:
        session.prefill((TOKENS * 3)[:900])
        for token in TOKENS[:20]:
            session.decode(token)
        session.save()
    return path


@pytest.mark.parametrize(("n_shared", "refused"), [(0, True), (387, True), (388, False), (900, False)])
def test_a_prompt_that_would_drop_much_of_the_last_one_is_refused(model, long_folder, n_shared, refused):
    prompt = [*(TOKENS * 3)[:n_shared], (TOKENS * 3)[n_shared] + 1, 7]
    memory = replace(MEMORY, n_ctx=4096)
    with model.session(memory, directory=long_folder) as session:
        if not refused:
            session.continue_text(prompt).prefill()
            assert session.tokens == prompt
            return
        with pytest.raises(InputError, match=f"prompt of 900 tokens, of which this one shares the first {n_shared}, "):
            session.continue_text(prompt)
        if n_shared == 0:
            with pytest.raises(InputError, match="shares the first 0"):
                session.prefill(prompt)
    with model.resume(long_folder) as session:
        assert session.n_past == 920
    with model.session(memory, directory=long_folder) as session:
        session.continue_text(prompt, drop=True).prefill()
        assert session.tokens == prompt


def test_part_of_the_last_prompt_is_another_one(model, long_folder):
    memory = replace(MEMORY, n_ctx=4096)
    with model.session(memory, directory=long_folder) as session:
        with pytest.raises(InputError, match="shares the first 300"):
            session.continue_text(TOKENS[:300])
        session.continue_text((TOKENS * 3)[:800]).prefill()


@pytest.fixture
def long_answer(model, tmp_path):
    """A session that has read a prompt of 40 tokens and 600 generated ones."""
    path = tmp_path / "answer"
    with model.session(replace(MEMORY, n_ctx=4096), directory=path) as session:
        for _ in session.continue_text(TOKENS[:40], GenerationConfig(n_predict=601, ignore_eos=True)):
            pass
        session.save()
    return path


@pytest.mark.parametrize("prompt", [TOKENS[:39], [*TOKENS[:39], TOKENS[39] + 1], [TOKENS[0] + 1]])
def test_another_prompt_that_would_drop_a_long_answer_is_refused(model, long_answer, prompt):
    with model.session(replace(MEMORY, n_ctx=4096), directory=long_answer) as session:
        with pytest.raises(InputError, match=r"and 600 generated after it: .* --session-new \(drop=True in Python\)"):
            session.continue_text(prompt)
        if len(prompt) == 1:
            with pytest.raises(InputError, match="shares the first 0, and 600 generated"):
                session.prefill(prompt)
    with model.resume(long_answer) as session:
        assert session.n_past == 640


def test_a_long_answer_makes_way_for_another_question_about_the_same_document(model, tmp_path, caplog):
    memory, document = replace(MEMORY, n_ctx=4096), [*TOKENS, *TOKENS][:640]
    with model.session(memory, directory=tmp_path / "kept") as session:
        for _ in session.continue_text([*document, 1], GenerationConfig(n_predict=601, ignore_eos=True)):
            pass
        session.save()
    with model.session(memory, directory=tmp_path / "kept") as session:
        session.continue_text([*document, 2])
    assert "session: drops 1 tokens of its prompt and 600 generated ones" in caplog.messages


@pytest.mark.parametrize(
    ("prompt", "drop", "dropped"),
    [
        (TOKENS[:40], False, (0, 600)),
        ([*TOKENS[:40], TOKENS[0] + 1], False, (0, 600)),
        ([*TOKENS[:30], TOKENS[30] + 1], True, (10, 600)),
        ([TOKENS[0] + 1], True, (40, 600)),
    ],
)
def test_what_is_dropped_is_said(model, long_answer, caplog, prompt, drop, dropped):
    with model.session(replace(MEMORY, n_ctx=4096), directory=long_answer) as session:
        session.continue_text(prompt, drop=drop)
    said = [(r.levelname, r.getMessage()) for r in caplog.records if "drops" in r.getMessage()]
    assert said == [("WARNING", "session: drops {} tokens of its prompt and {} generated ones".format(*dropped))]


@pytest.mark.parametrize("how", ["prefill", "continue_text"])
def test_few_tokens_that_are_dropped_are_a_note(model, tmp_path, caplog, how):
    caplog.set_level("INFO", "pyggml_repkv")
    with model.session(MEMORY, directory=tmp_path / "kept") as session:
        session.prefill(TOKENS[:40])
        session.save()
    with model.session(MEMORY, directory=tmp_path / "kept") as session:
        if how == "prefill":
            session.prefill([TOKENS[0] + 1])
        else:
            session.continue_text([TOKENS[0] + 1])
    said = [(r.levelname, r.getMessage()) for r in caplog.records]
    assert said == [("INFO", "session: drops 40 tokens of its prompt and 0 generated ones")]


def test_a_text_that_a_smaller_n_predict_shows_in_part_goes_on(model, tmp_path, caplog):
    memory = replace(MEMORY, n_ctx=4096)

    def config(n_predict):
        return GenerationConfig(n_predict=n_predict, ignore_eos=True, sampling=SamplingConfig(seed=3))

    with model.session(memory) as session:
        wanted = "".join(session.generate(TOKENS[:40], config(150)))
    with model.session(memory, directory=tmp_path / "kept") as session:
        for n, _ in enumerate(session.continue_text(TOKENS[:40], config(150))):
            if n == 100:
                break
        session.save()
    for n_predict in (0, 5, 150):
        with model.session(memory, directory=tmp_path / "kept") as session:
            generation = session.continue_text(TOKENS[:40], config(n_predict))
            assert len(generation.begun.tokens) >= 100
            text = "".join(generation)
            session.save()
    assert text == wanted
    assert "drops" not in caplog.text


def test_shared_tokens_that_are_read_again_are_said(model, tmp_path, caplog):
    memory = replace(MEMORY, n_ctx=4096)
    with model.session(memory) as session:
        session.prefill((TOKENS * 3)[:900])
        session.save(tmp_path / "copy")
    with model.session(memory, directory=tmp_path / "copy") as session:
        assert session.continue_text([*(TOKENS * 3)[:890], 1, 2]).begun.n_read == 0
    assert "has 890 more of the tokens, but no save there" in caplog.text


@pytest.mark.parametrize("n_before", [0, 3, 40])
@pytest.mark.parametrize("temp", [0.0, 0.9])
def test_an_interrupted_text_goes_on_with_the_tokens_it_would_have_had(model, tmp_path, monkeypatch, n_before, temp):
    from pyggml_repkv.engine.session import Session

    config = GenerationConfig(n_predict=60, ignore_eos=True, sampling=SamplingConfig(temp=temp, seed=3))
    with model.session(MEMORY) as session:
        whole = session.generate(TOKENS[:100], config)
        list(whole)
    decode = Session.decode

    def interrupted(self, token):
        if self.n_past == 100 + n_before:
            raise KeyboardInterrupt
        return decode(self, token)

    with model.session(MEMORY, directory=tmp_path / "s") as session, monkeypatch.context() as patch:
        generation = session.continue_text(TOKENS[:100], config)
        patch.setattr(Session, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(generation)
        session.save()
    with model.session(MEMORY, directory=tmp_path / "s") as session:
        again = session.continue_text(TOKENS[:100], config)
        assert len(again.begun.tokens) == n_before
        assert "".join(again) == whole.result().text
        assert again.result().tokens == whole.result().tokens
