"""One call at a time uses a session, of whatever thread; what closes it waits for the step that runs."""

import threading
import time

import numpy as np
import pytest

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError
from pyggml_repkv.ffi.handles import Backend
from pyggml_repkv.memory.config import MemoryConfig
from tests.tiny_models import TinySpec, write_tiny_model

TOKENS = np.random.default_rng(0).integers(0, 280, 300).tolist()
MEMORY = MemoryConfig(n_batch=40)
REPKV = MemoryConfig(
    kv="repkv", n_ctx=512, n_batch=48, n_sink=4, n_local=64, n_score=32, n_dense=0, block="fixed:16", budget=48,
    index="representatives:4", chunk_budget=48,
)  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("exclusive") / "model.gguf"
    write_tiny_model(path, TinySpec(n_layer=3, n_ctx=512, seed=7))
    return path


@pytest.fixture
def model(path):
    with Model.load(path, threads=2, repack=False) as loaded:
        yield loaded


def in_thread(call):
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


CALLS = {
    "prefill": lambda s: s.prefill(TOKENS[:3]),
    "read": lambda s: s.read(TOKENS[:3]),
    "decode": lambda s: s.decode(1),
    "prefill_all": lambda s: s.prefill_all(TOKENS[:3]),
    "prefill_slices": lambda s: next(s.prefill_slices(TOKENS[:3])),
    "generate": lambda s: list(s.generate(TOKENS[:3])),
    "continue_text": lambda s: s.continue_text(TOKENS[:3]),
    "go_back_to": lambda s: s.go_back_to(None, lambda _: False),
    "rewind": lambda s: s.rewind(0),
    "repeat": lambda s: s.repeat(200),
    "save": lambda s: s.save(),
    "budget": lambda s: s.budget(10),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("where", ["another thread", "the call that calls you back"])
def test_a_call_within_another_is_an_error_at_once(model, call, where):
    """In the midst of a prompt, which goes on as if nothing had been."""
    refused = []

    def other():
        with pytest.raises(InputError, match=f"^this session is in use by {where}: wait for it"):
            call(session)
        refused.append(session.n_past)

    def on_progress(n_done, n_total):
        in_thread(other) if where == "another thread" else other()

    with model.session(MEMORY) as session, model.session(MEMORY) as alone:
        logits = session.prefill(TOKENS[:120], on_progress=on_progress)
        assert refused == [40, 80, 120]
        assert np.array_equal(logits, alone.prefill(TOKENS[:120]))
        # Afterwards another thread may use it.
        in_thread(lambda: session.decode(1))
        assert session.n_past == 121


def test_a_token_read_in_a_callback_does_not_stand_in_the_prompt(model):
    with model.session(MemoryConfig(n_batch=4)) as session:
        with pytest.raises(InputError, match="in use by the call that calls you back"):
            session.prefill(range(1, 11), on_progress=lambda n_done, _: session.decode(7) if n_done == 4 else None)
        assert session.tokens == [1, 2, 3, 4]
        session.prefill(range(5, 11))
        assert session.tokens == list(range(1, 11))


def test_a_fork_may_be_made_meanwhile(model):
    forks = []
    with model.session(MEMORY) as session, model.session(MEMORY) as alone:
        session.prefill(TOKENS[:80], on_progress=lambda *_: forks.append(session.fork()))
        alone.prefill(TOKENS[:40])
        assert [fork.n_past for fork in forks] == [40, 80]
        assert np.array_equal(forks[0].decode(1), alone.decode(1))


def test_closing_waits_for_the_step_that_runs(model, monkeypatch):
    session = model.session()
    closing = threading.Thread(target=session.close)

    def compute(backend, graph, trace):
        closing.start()
        closing.join(0.1)
        assert closing.is_alive()
        whole_compute(backend, graph, trace)

    whole_compute = Backend.compute
    monkeypatch.setattr(Backend, "compute", compute)
    session.prefill(TOKENS[:40])
    closing.join()


def close_elsewhere(session):
    """Returns the thread, once closing has begun; it cannot end before the call that is in progress does."""
    thread = threading.Thread(target=session.close)
    thread.start()
    while not session._closed:
        time.sleep(1e-3)
    return thread


@pytest.mark.parametrize("n_read", [48, 96, 240, 300])
def test_closing_in_another_thread_loses_nothing(model, tmp_path, n_read):
    """The prompt ends with one line; what was read is kept, and the directory is free again."""
    threads, session = [], model.session(REPKV, directory=tmp_path / "kept")

    def on_progress(n_done, n_total):
        if n_done == n_read:
            threads.append(close_elsewhere(session))

    if n_read == len(TOKENS):
        session.prefill(TOKENS, on_progress=on_progress)
    else:
        with pytest.raises(InputError, match=r"^the session is closed$"):
            session.prefill(TOKENS, on_progress=on_progress)
    threads[0].join()
    with model.resume(tmp_path / "kept", REPKV) as again, model.session(REPKV) as fresh:
        assert again.tokens == TOKENS[:n_read]
        (fresh.prefill if n_read == len(TOKENS) else fresh.read)(TOKENS[:n_read])  # a prompt's last steps are smaller
        assert np.array_equal(again.decode(1), fresh.decode(1))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("closed", ["session", "model"])
def test_closing_in_a_callback_ends_the_call(path, tmp_path, closed, kept):
    model = Model.load(path, threads=2, repack=False)
    session = model.session(REPKV, directory=tmp_path / "kept" if kept else None)
    with pytest.raises(InputError, match=r"^the session is closed$"):
        session.prefill(TOKENS, on_progress=lambda *_: (session if closed == "session" else model).close())
    assert session._freed
    session.close()
    model.close()
    if kept:
        with Model.load(path, threads=1, repack=False) as model, model.resume(tmp_path / "kept", REPKV) as again:
            assert again.tokens == TOKENS[:48]


def test_a_close_that_is_interrupted_is_done_by_the_next(model, tmp_path, monkeypatch):
    session = model.session(REPKV, directory=tmp_path / "kept")
    session.prefill(TOKENS[:100])

    def finish(saver):
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(type(session._keeper._saver), "finish", finish)
        with pytest.raises(KeyboardInterrupt):
            session.close()
    session.close()
    with model.resume(tmp_path / "kept", REPKV) as again:
        assert again.n_past == 100


def test_what_fails_to_close_does_not_keep_the_rest_open(model, tmp_path, monkeypatch):
    session = model.session(REPKV, directory=tmp_path / "kept")
    session.prefill(TOKENS[:100])

    def close():
        raise RuntimeError("no")

    with monkeypatch.context() as failing:
        failing.setattr(session._stepper, "close", close)
        with pytest.raises(RuntimeError):
            session.close()
    with model.resume(tmp_path / "kept", REPKV) as again:
        assert again.n_past == 100
    session._stepper.close()


CLOSED = CALLS | {"fork": lambda s: s.fork(), "disk_need": lambda s: s.disk_need(10)}


@pytest.mark.parametrize("call", CLOSED.values(), ids=CLOSED.keys())
def test_a_closed_session_is_said_to_be_closed(model, call):
    session = model.session(MEMORY)
    session.prefill(TOKENS[:3])
    session.close()
    with pytest.raises(InputError, match=r"^the session is closed$"):
        call(session)
