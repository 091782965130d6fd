"""What happens between two slices of logits neither tears the session nor the iterator."""

import numpy as np
import pytest

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import ComputeError, ContextFullError, InputError
from pyggml_repkv.graph.head import HeadPlan
from pyggml_repkv.memory.config import MemoryConfig
from tests.tiny_models import TinySpec, write_tiny_model

TOKENS = np.random.default_rng(5).integers(0, 280, 512).tolist()
KINDS = ["full", "window", "repkv"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("slices") / "tiny.gguf"
    write_tiny_model(path, TinySpec(n_ctx=512, head_dim=32))
    with Model.load(path, threads=2, repack=False) as loaded:
        yield loaded


def memory_of(kv, **options):
    return MemoryConfig(kv=kv, n_ctx=512, n_batch=128, n_local=64, n_score=32, **options)


def is_over(slices):
    """It was refused, and is."""
    with pytest.raises(InputError, match=r"^the session was used since the last slice$"):
        next(slices)
    assert list(slices) == []


@pytest.mark.parametrize("n_slices", [0, 1, 2])
@pytest.mark.parametrize("kv", KINDS)
def test_reading_in_between_ends_it(model, kv, n_slices):
    """Or the chunks that follow would be written beyond the context. Two slices are a chunk."""
    with model.session(memory_of(kv)) as session, model.session(memory_of(kv)) as alone:
        slices = session.prefill_slices(TOKENS[:400])
        for _ in range(n_slices):
            next(slices)
        if n_slices:
            alone.prefill_all(TOKENS[: session.n_past])
        want = [s.prefill(TOKENS[100:400]) for s in (session, alone)]
        is_over(slices)
        assert session.tokens == alone.tokens
        assert np.array_equal(*want)
        assert np.array_equal(session._stepper.logits, want[0])
        assert np.array_equal(session.decode(1), alone.decode(1))


def test_going_back_in_between_ends_it(model):
    """Also where as much was read again, but something else."""
    with model.session(memory_of("full")) as session:
        slices = session.prefill_slices(TOKENS[:128])
        next(slices)
        session.rewind(0)
        want = session.prefill(TOKENS[128:256])
        is_over(slices)
        assert np.array_equal(session._stepper.logits, want)
        session.rewind(0)
        slices = session.prefill_slices(TOKENS[:400])
        next(slices)
        session.rewind(100)
        is_over(slices)
        assert session.tokens == TOKENS[:100]


def test_no_step_goes_beyond_the_context(model):
    with model.session(memory_of("full")) as session:
        session.read(TOKENS[:500])
        with pytest.raises(ContextFullError, match="13 tokens do not fit: 500 of 512"):
            session._reader.step(np.zeros(13, np.int32), "none")
        assert session.n_past == 500


@pytest.mark.parametrize("kv", KINDS)
def test_a_fork_in_between_changes_nothing(model, kv):
    with model.session(memory_of(kv)) as session, model.session(memory_of(kv)) as whole:
        want, found = whole.prefill_all(TOKENS[:400]), []
        for at, rows in session.prefill_slices(TOKENS[:400]):
            with session.fork() as fork:
                assert fork.tokens == session.tokens
                fork.prefill(TOKENS[400:500])
            assert at == sum(map(len, found))
            found.append(rows)
        assert np.array_equal(np.concatenate(found), want)


@pytest.mark.parametrize("n_slices", [0, 1, 2])
@pytest.mark.parametrize("kv", KINDS)
def test_closing_in_between_is_said(model, kv, n_slices):
    session = model.session(memory_of(kv))
    slices = session.prefill_slices(TOKENS[:400])
    for _ in range(n_slices):
        next(slices)
    session.close()
    with pytest.raises(InputError, match=r"^the session is closed$"):
        next(slices)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (1.5, "first must be an integer, got 1.5"),
        (None, "first must be an integer, got None"),
        (-3, "first must be 0 or more, got -3"),
    ],
)
def test_a_first_token_that_is_none(model, first, message):
    with model.session() as session:
        with pytest.raises(InputError) as caught:
            session.prefill_slices(TOKENS[:10], first)
        assert str(caught.value) == message


@pytest.mark.parametrize("first", [200, 2**70])
def test_where_no_logits_are_wanted_all_is_read(model, first):
    with model.session(memory_of("full")) as session, model.session(memory_of("full")) as other:
        assert list(session.prefill_slices(TOKENS[:200], first)) == []
        other.read(TOKENS[:200])
        assert session.tokens == TOKENS[:200]
        assert np.array_equal(session.decode(1), other.decode(1))


def test_a_save_on_the_way_has_the_logits(model, tmp_path):
    """So that `resume` need not read the last token again. Every chunk is saved, the last one once it has them."""
    for i, read in enumerate((lambda s, t: s.prefill_all(t)[-1], lambda s, t: list(s.prefill_slices(t))[-1][1][-1])):
        with model.session(memory_of("repkv"), directory=tmp_path / str(i)) as session:
            want = read(session, TOKENS[:384])
            session._keeper._saver.finish()
            assert session._store.checkpoints()[0][:2] == (384, True)
            assert np.array_equal(session._store.load(384, 2).logits, want)


def test_without_memory_for_logits_a_chunk_is_not_read(model, monkeypatch):
    def placed(plan, backend):
        raise ComputeError("no memory")

    with model.session(memory_of("full")) as session, model.session(memory_of("full")) as other:
        with monkeypatch.context() as full:
            full.setattr(HeadPlan, "placed", placed)
            with pytest.raises(ComputeError, match="no memory"):
                session.prefill_all(TOKENS[:200])
        assert session.n_past == 0
        assert np.array_equal(session.prefill_all(TOKENS[:200]), other.prefill_all(TOKENS[:200]))


def test_a_chunk_whose_logits_were_interrupted_is_read(model, monkeypatch):
    def compute(plan, backend, hidden):
        raise KeyboardInterrupt

    with model.session(memory_of("full")) as session, model.session(memory_of("full")) as other:
        with monkeypatch.context() as interrupted:
            interrupted.setattr(HeadPlan, "compute", compute)
            with pytest.raises(KeyboardInterrupt):
                session.prefill_all(TOKENS[:200])
        assert session.tokens == TOKENS[:128]
        other.prefill_all(TOKENS[:128])
        assert np.array_equal(session.prefill_all(TOKENS[128:200]), other.prefill_all(TOKENS[128:200]))
