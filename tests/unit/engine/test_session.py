"""Tokens in, logits out: the same for any steps, and unchanged by steps that are refused or fail."""

import threading
import time

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import ComputeError, ContextFullError, InputError
from pyggml_repkv.ffi.handles import Backend
from pyggml_repkv.memory.config import MemoryConfig
from tests.oracle import oracle_logits
from tests.stopping import endless_requests
from tests.tiny_models import TinySpec, write_tiny_model

SPEC = TinySpec(n_layer=3, n_ctx=512, seed=7)
TOKENS = np.random.default_rng(0).integers(0, SPEC.n_vocab, 300).tolist()
EXACT_CACHE = MemoryConfig(type_k="f32", type_v="f32")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("session") / "model.gguf"
    write_tiny_model(path, SPEC)
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["fused", "exact"])
def model(request, path):
    with Model.load(path, threads=2, exact_graph=request.param) as model:
        yield model


def relative_error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("n_tokens", [1, 2, 31, 32, 33, 100, 257])
def test_the_last_row_of_all_is_the_last(model, n_tokens):
    with model.session(EXACT_CACHE) as one, model.session(EXACT_CACHE) as other:
        last, every = one.prefill(TOKENS[:n_tokens]), other.prefill_all(TOKENS[:n_tokens])
        assert last.shape == (SPEC.n_vocab,)
        assert every.shape == (n_tokens, SPEC.n_vocab)
        assert last.dtype == every.dtype == np.float32
        # The last row is computed as one token, with other sums than in a chunk.
        assert relative_error(last, every[-1]) < 1e-5
        assert one.n_past == other.n_past == n_tokens


@pytest.mark.parametrize("n_batch", [1, 2, 7, 32, 40, 99, 100, 512, 2**20])
def test_steps_do_not_change_the_answer(model, n_batch):
    memory = MemoryConfig(n_batch=n_batch, type_k="f32", type_v="f32")
    with model.session(EXACT_CACHE) as whole, model.session(memory) as last, model.session(memory) as every:
        want = whole.prefill_all(TOKENS[:100])
        assert relative_error(every.prefill_all(TOKENS[:100]), want) < 1e-5
        assert relative_error(last.prefill(TOKENS[:100]), want[-1]) < 1e-5
        following = [session.decode(5) for session in (whole, last, every)]
        assert relative_error(following[1], following[0]) < 1e-5
        assert relative_error(following[2], following[0]) < 1e-5


@pytest.mark.parametrize("flash_attn", [True, False])
def test_fused_and_exact_agree_at_every_step(path, flash_attn):
    memory = MemoryConfig(n_batch=48, type_k="f32", type_v="f32", flash_attn=flash_attn)
    results = []
    for exact in (False, True):
        with Model.load(path, threads=2, exact_graph=exact) as model, model.session(memory) as session:
            steps = [session.prefill_all(TOKENS[:130]), session.prefill(TOKENS[130:180])]
            steps += [session.decode(token) for token in TOKENS[180:190]]
            results.append([*steps, session.prefill(TOKENS[190:250])])
    for fused, exact in zip(*results, strict=True):
        assert relative_error(fused, exact) < 1e-5


BAD_TOKENS = {
    "none": [],
    "a vector of vectors": [[1, 2], [3, 4]],
    "ragged": [[1], [2, 3]],
    "floats": [1.0, 2.0],
    "booleans": [True],
    "text": "12",
    "strings": ["1"],
    "a number": 5,
    "nothing": None,
    "beyond 64 bits": [2**70],
}


@pytest.mark.parametrize("tokens", BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
def test_what_is_no_token_sequence_is_refused(model, tokens):
    with model.session() as session:
        for read in (session.prefill, session.prefill_all):
            with pytest.raises(InputError, match="tokens must be a non-empty sequence of token ids"):
                read(tokens)
        assert session.n_past == 0


@pytest.mark.parametrize("bad", [-1, SPEC.n_vocab, 2**31, 2**63, -(2**63)])
def test_a_token_outside_the_vocabulary_is_named(model, bad):
    """ggml would abort the process."""
    with model.session() as session:
        session.prefill(TOKENS[:3])
        message = f"token id {bad} is not in the vocabulary \\(0 to {SPEC.n_vocab - 1}\\)"
        with pytest.raises(InputError, match=message):
            session.decode(bad)
        with pytest.raises(InputError, match=message):
            session.prefill(np.array([1, bad], np.uint64 if bad >= 2**63 else np.int64))
        assert session.n_past == 3


@pytest.mark.parametrize("tokens", [(1, 2, 3), range(1, 4), np.array([1, 2, 3], np.uint8), np.array([1, 2, 3])])
def test_any_sequence_of_integers_will_do(model, tokens):
    with model.session() as one, model.session() as other:
        assert np.array_equal(one.prefill(tokens), other.prefill([1, 2, 3]))


@pytest.mark.parametrize("n_ctx", [1, 100, 256, 257])
def test_the_context_holds_just_what_was_asked_for(model, n_ctx):
    """The arenas are larger."""
    with model.session(MemoryConfig(n_ctx=n_ctx)) as session:
        session.prefill(TOKENS[: n_ctx - 1] or TOKENS[:1])
        if n_ctx > 1:
            session.decode(1)
        assert session.n_past == session.n_ctx == n_ctx
        with pytest.raises(ContextFullError, match=f"1 tokens do not fit: {n_ctx} of {n_ctx} are used; a larger -c"):
            session.decode(1)
        assert session.n_past == n_ctx


def test_too_many_tokens_are_refused_before_any_is_read(model):
    with model.session(MemoryConfig(n_ctx=100, n_batch=10)) as session:
        session.prefill(TOKENS[:20])
        calls = []
        for read in (lambda t: session.prefill(t, on_progress=lambda *args: calls.append(args)), session.prefill_all):
            with pytest.raises(ContextFullError, match="81 tokens do not fit: 20 of 100 are used"):
                read(TOKENS[:81])
        assert (session.n_past, calls) == (20, [])
        session.prefill(TOKENS[:80])


@pytest.mark.parametrize(
    ("n_batch", "calls"), [(10, [(10, 25), (20, 25), (25, 25)]), (25, [(25, 25)]), (512, [(25, 25)])]
)
def test_progress_is_told_after_each_step(model, n_batch, calls):
    seen = []
    with model.session(MemoryConfig(n_batch=n_batch)) as session:
        session.prefill(TOKENS[:25], on_progress=lambda *args: seen.append((*args, session.n_past)))
    assert seen == [(done, total, done) for done, total in calls]


def test_a_caller_who_stops_between_steps_may_go_on(model):
    class Enough(Exception):
        pass

    def stop(n_done, n_total):
        raise Enough

    with model.session(MemoryConfig(n_batch=40)) as session, model.session(MemoryConfig(n_batch=40)) as other:
        with pytest.raises(Enough):
            session.prefill(TOKENS[:100], on_progress=stop)
        assert session.n_past == 40
        assert np.array_equal(session.prefill(TOKENS[40:100]), other.prefill(TOKENS[:100]))


def test_sessions_do_not_disturb_each_other(model):
    """Interleaved sessions of different lengths and caches give the same logits as each alone."""
    memories = [MemoryConfig(), MemoryConfig(n_batch=9, type_k="f32"), MemoryConfig(n_ctx=200, type_v="bf16")]

    def steps(session, first):
        yield session.prefill(TOKENS[first : first + 60])
        for token in TOKENS[:5]:
            yield session.decode(token)
        yield session.prefill_all(TOKENS[first : first + 33])

    alone = []
    for i, memory in enumerate(memories):
        with model.session(memory) as session:
            alone.append([logits.copy() for logits in steps(session, i)])
    sessions = [model.session(memory) for memory in memories]
    together = zip(*(steps(session, i) for i, session in enumerate(sessions)), strict=True)
    for n, row in enumerate(together):
        for i, logits in enumerate(row):
            assert np.array_equal(logits, alone[i][n])
    for session in sessions:
        session.close()


def test_threads_take_turns(model, monkeypatch):
    """Two sessions in two threads share a model's backend and scratch, and never run two steps at once."""
    results, running, peaks = [[], []], [], []

    def compute(backend, graph, trace):
        running.append(graph)
        peaks.append(len(running))
        time.sleep(1e-3)
        whole_compute(backend, graph, trace)
        running.pop()

    def work(result):
        with model.session() as session:
            result.append(session.prefill(TOKENS[:100]))
            result.extend(session.decode(token) for token in TOKENS[100:120])

    whole_compute = Backend.compute
    monkeypatch.setattr(Backend, "compute", compute)
    threads = [threading.Thread(target=work, args=(result,)) for result in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = []
    work(expected)
    for result in results:
        assert np.array_equal(result, expected)
    assert set(peaks) == {1}


@pytest.mark.parametrize("n_tokens", [1, 5, 200])
def test_a_step_that_was_stopped_did_not_happen(model, n_tokens):
    with model.session() as session, model.session() as other:
        for s in (session, other):
            s.prefill(TOKENS[:40])
        n_stopped = 0
        with endless_requests(model.backend, 1e-4):
            for _ in range(200):
                try:
                    session.prefill(TOKENS[100 : 100 + n_tokens])
                except ComputeError:
                    n_stopped += 1
                    assert session.n_past == 40
                else:
                    session.rewind(40)
                if n_stopped == 3:
                    break
        assert n_stopped > 0
        for tokens in (TOKENS[40:42], [1], TOKENS[:100]):
            assert np.array_equal(session.prefill(tokens), other.prefill(tokens))


def test_a_closed_session_is_an_error(model):
    session = model.session()
    logits = session.prefill(TOKENS[:3])
    copy = logits.copy()
    session.close()
    session.close()
    for read in (session.prefill, session.prefill_all, lambda tokens: session.decode(tokens[0])):
        with pytest.raises(InputError, match="the session is closed"):
            read(TOKENS[:3])
    assert session.compute_bytes == 0
    assert np.array_equal(logits, copy)


def test_a_mixture_of_types_in_every_form(tmp_path):
    """q, k and v have three types; all forms read them: packed, token by token, and ggml's nodes."""
    types = (("*attn_q.weight", QT.Q4_0), ("*attn_k.weight", QT.Q8_0), ("*attn_v.weight", QT.Q6_K),
             ("*ffn_up.weight", QT.BF16), ("*ffn_down.weight", QT.Q4_1))  # fmt: skip
    spec = TinySpec(n_layer=2, n_embd=256, head_dim=64, n_ff=96, weight_type=QT.F16, weight_types=types)
    want = oracle_logits(spec, write_tiny_model(tmp_path / "m.gguf", spec), TOKENS[:80])
    for options in ({"repack": False}, {"repack": True}, {"exact_graph": True}):
        with Model.load(tmp_path / "m.gguf", threads=2, **options) as model, model.session(EXACT_CACHE) as session:
            got = [*session.prefill_all(TOKENS[:60]), *(session.decode(token) for token in TOKENS[60:80])]
        assert relative_error(np.array(got), want) < 3e-2
