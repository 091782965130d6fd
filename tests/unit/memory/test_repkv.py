"""RepKV's memory around the graph: failed steps, room in the window, errors, and statistics."""

from dataclasses import replace

import numpy as np
import pytest

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import ComputeError, InputError, StoreError
from pyggml_repkv.ffi.handles import Backend
from pyggml_repkv.memory.config import MemoryConfig

TOKENS = np.random.default_rng(5).integers(0, 280, 400).tolist()
MEMORY = MemoryConfig(
    kv="repkv",
    n_ctx=512,
    n_batch=48,
    n_sink=4,
    n_local=64,
    n_score=32,
    n_dense=0,
    block="fixed:16",
    index="representatives:4",
    budget=48,
)


@pytest.fixture
def model(tiny_model):
    with Model.load(tiny_model(n_layer=2, n_ctx=512), threads=2, repack=False) as loaded:
        yield loaded


def compute_and_fail(session, tokens):
    """Computes a step to its end and then fails it."""
    whole_compute = Backend.compute

    def compute(backend, graph, trace):
        whole_compute(backend, graph, trace)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backend, "compute", compute)
        with pytest.raises(KeyboardInterrupt):
            session.prefill_all(tokens)


@pytest.mark.parametrize("n_tokens", [1, 40])
def test_a_step_that_failed_counts_once(model, n_tokens):
    """The step had added scores when it was stopped; reading the tokens again must not add them twice."""
    with model.session(MEMORY) as session, model.session(MEMORY) as fresh:
        for s in (session, fresh):
            s.prefill(TOKENS[:200])
        compute_and_fail(session, TOKENS[200 : 200 + n_tokens])
        assert session.n_past == 200
        for s in (session, fresh):
            s.prefill_all(TOKENS[200 : 200 + n_tokens])
        for layer in range(2):
            for position in range(200 + n_tokens):
                scores = [s.policy.index.get_score(layer, position) for s in (session, fresh)]
                assert np.array_equal(*scores)
        assert np.array_equal(session.prefill(TOKENS[250:330]), fresh.prefill(TOKENS[250:330]))


@pytest.mark.parametrize("n_tokens", [1, 40])
def test_what_a_failed_step_selected_is_not_attended_by_the_next(model, n_tokens):
    memory = replace(MEMORY, late=True)
    with model.session(memory) as session, model.session(memory) as fresh:
        for s in (session, fresh):
            s.prefill(TOKENS[:200])
        held = [row[1:4].tolist() for layer in session.policy.kept.selection for row in layer]
        compute_and_fail(session, TOKENS[300 : 300 + n_tokens])
        assert [row[1:4].tolist() for layer in session.policy.kept.selection for row in layer] == held
        for token in TOKENS[200:206]:
            assert np.array_equal(session.decode(token), fresh.decode(token))
        assert [row[1:4].tolist() for layer in session.policy.kept.selection for row in layer] != held


@pytest.mark.parametrize("n_tokens", [1, 40])
def test_what_a_failed_step_selected_is_not_held_on_to(model, n_tokens):
    memory = replace(MEMORY, sticky=20.0)
    with model.session(memory) as session, model.session(memory) as fresh, model.session(MEMORY) as loose:
        for s in (session, fresh, loose):
            s.prefill(TOKENS[:200])
        held = session.policy.kept.selection[..., :4].copy()
        assert (held[..., 0] == 3).all()
        compute_and_fail(session, TOKENS[300 : 300 + n_tokens])
        assert np.array_equal(session.policy.kept.selection[..., :4], held)
        for token in TOKENS[200:206]:
            logits = [s.decode(token).copy() for s in (session, fresh, loose)]
            assert np.array_equal(logits[0], logits[1])
        assert not np.array_equal(logits[0], logits[2])
        # So large an advantage keeps the selection as long as only single tokens are read.
        assert np.array_equal(session.policy.kept.selection[..., :4], held)
        session.read(TOKENS[206:246])
        assert session.policy.kept.selection.size == 0


def test_the_window_moves_and_the_numbers_add_up(model):
    with model.session(MEMORY) as session:
        session.prefill(TOKENS)
        stats = session.stats()
        assert session.policy.local.base > 0
        # Of 400 tokens 64 are local and 4 sinks; the 332 between are 20 blocks of 16 and 12 that fill none yet.
        assert (stats["blocks"], stats["selected"], stats["far_tokens"]) == (20, 48, 336)
        assert stats["resident_bytes"] <= stats["ram_bytes"]
        assert stats["index_bytes"] > 0


def test_scores_can_be_set_and_decide_who_represents(model):
    with model.session(MEMORY) as session:
        session.prefill(TOKENS[:60])
        before = session.policy.index.get_score(1, 10)
        session.policy.index.set_score(1, 10, before + 100)
        assert np.array_equal(session.policy.index.get_score(1, 10), before + 100)
        session.prefill(TOKENS[60:200])
        assert (session.policy.index.chosen[0][1] == 10).any(1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exact_graph": True, "repack": False}, "--exact-graph is llama.cpp's graph, which has no --kv repkv"),
        ({"repack": True}, "--kv repkv needs the weights as in the file: load the model with --no-repack"),
    ],
)
def test_what_it_cannot_run_on_is_an_error(tiny_model, monkeypatch, options, message):
    with Model.load(tiny_model(), threads=1, **options) as model:
        # Whether anything is repacked depends on the CPU.
        monkeypatch.setattr(model.weights, "repacked", options["repack"])
        with pytest.raises(InputError, match=message):
            model.session(MEMORY)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_sink", -1),
        ("n_local", 16),
        ("budget", -1),
        ("n_score", 65),
    ],
)
def test_a_count_out_of_range_is_an_error(field, value):
    flag = f"--{field.replace('_', '-')}"
    with pytest.raises(InputError, match=f"{flag} is {value}; it must be between"):
        MemoryConfig(**{"kv": "repkv", "n_local": 64, "n_score": 32, field: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"index": "representatives:0"}, "--index is 'representatives:0'; it must be tokens:4"),
        ({"index": "tokens:3"}, "--index is 'tokens:3'; it must be tokens:4, :2 or :1, or representatives:N"),
        ({"index": "tokens"}, "--index is 'tokens'; it must be tokens:4"),
        ({"index": "tokens:4", "unit": "0"}, "--unit is '0'; it must be N or semantic:N-M"),
        ({"index": "tokens:4", "unit": "semantic:9-8"}, "--unit is 'semantic:9-8'; it must be N or semantic:N-M"),
        ({"index": "tokens:4", "unit": "12"}, "--block fixed:16 is no multiple of --unit 12"),
        ({"index": "tokens:4", "block": "semantic:16-32"}, "--block semantic:16-32 is for --index representatives:N"),
        ({"group": 16}, "--group is 16; it must be a multiple of 32, or 0 for whole chunks"),
    ],
)
def test_an_index_that_cannot_be_is_an_error(model, values, message):
    with pytest.raises(InputError, match=message):
        model.session(replace(MEMORY, **values))


def test_a_memory_torn_apart_says_so(model, monkeypatch):
    """A window that was stopped between two arenas is inconsistent, and must give no wrong text."""
    with model.session(MEMORY) as session:
        session.prefill(TOKENS[:150])
        with monkeypatch.context() as patch:

            def stop(*args):
                raise KeyboardInterrupt

            patch.setattr(session.policy.local, "make_room", stop)
            with pytest.raises(KeyboardInterrupt):
                session.decode(1)
        with pytest.raises(ComputeError, match="start a new session"):
            session.decode(1)


def test_a_step_that_never_began_takes_nothing_back(model, monkeypatch):
    with model.session(MEMORY) as session:
        session.prefill(TOKENS[:150])
        session.policy.index.set_score(1, 140, np.full(2, 7, np.float32))
        with monkeypatch.context() as patch:

            def stop(*args):
                raise KeyboardInterrupt

            patch.setattr(session.policy.blocks, "append", stop)
            with pytest.raises(KeyboardInterrupt):
                session.decode(1)
        assert (session.policy.index.get_score(1, 140) == 7).all()


def test_it_goes_far_when_the_trained_context_ends(tiny_model, caplog):
    memory = replace(MEMORY, n_ctx=0)
    with (
        Model.load(tiny_model(n_layer=2, n_ctx=128), threads=2, repack=False) as model,
        model.session(memory) as session,
    ):
        with caplog.at_level("INFO", "pyggml_repkv"):
            session.read(TOKENS[:120])
            assert not session.policy.rotation.far
            session.read(TOKENS[120:140])
        assert session.policy.rotation.far
        assert "past the 128 tokens the model was trained on" in caplog.text
        session.prefill(TOKENS[140:300])
        assert caplog.text.count("past the") == 1


def test_it_is_far_from_the_start_where_the_length_says_so(tiny_model, caplog):
    memory = replace(MEMORY, n_ctx=512, n_dense=100)
    with (
        Model.load(tiny_model(n_layer=2, n_ctx=128), threads=2, repack=False) as model,
        model.session(memory) as session,
    ):
        session.read(TOKENS[:100])
        assert session.policy.rotation.far
        assert session.policy.regions.budget == MEMORY.chunk_budget


def test_a_closed_session_reads_no_freed_memory(model):
    with model.session(MEMORY) as session:
        session.prefill(TOKENS[:200])
        before = session.stats()
    assert session.stats() == before
    with pytest.raises(InputError, match="the session is closed"):
        session.policy.stored_keys(1, np.arange(3))


@pytest.mark.parametrize("kv", ["repkv", "window"])
def test_scores_of_their_own_are_not_for_these(model, kv):
    with pytest.raises(InputError, match=f"-fa off stores attention scores, which --kv {kv} never does"):
        model.session(MemoryConfig(kv=kv, flash_attn=False))


def test_a_small_window_needs_no_second_flag():
    assert MemoryConfig(kv="repkv", n_local=64).n_scoring == 64
    assert MemoryConfig(kv="repkv").n_scoring == 256


def test_a_graph_has_room_for_the_units_that_there_are(tiny_model, monkeypatch):
    """It is built anew when their number has doubled; nothing else changes."""
    memory = replace(MEMORY, n_ctx=2**20, index="tokens:4", unit="1", group=32)
    tokens = np.random.default_rng(1).integers(0, 280, 300)
    logits, n_bytes = [], []
    with Model.load(tiny_model(n_ctx=2048), threads=2, repack=False) as model:
        for n_first in (16, 2**20):
            monkeypatch.setattr("pyggml_repkv.memory.repkv.memory.FIRST_ROOM", n_first)
            with model.session(memory) as session:
                logits.append(np.concatenate((session.prefill(tokens), session.decode(7))))
                n_bytes.append(session.compute_bytes)
    assert np.array_equal(*logits)
    assert 20 * n_bytes[0] < n_bytes[1]


@pytest.mark.parametrize(("budget", "works"), [(4096, True), (4097, False), (2**16, True)])
def test_a_choice_of_more_units_than_can_be_sorted_is_refused(model, budget, works):
    memory = replace(MEMORY, n_ctx=2**16, index="tokens:4", unit="1", budget=budget)
    if works:
        model.session(memory).close()
    else:
        with pytest.raises(InputError, match="--chunk-budget may be at most 4096 tokens with units of 1"):
            model.session(memory)


@pytest.mark.parametrize("damage", [lambda state: state[:, :-1], lambda state: -state])
def test_codes_of_another_matrix_are_refused(model, damage):
    with model.session(replace(MEMORY, index="tokens:4")) as session:
        session.prefill(TOKENS[:200])
        index, state = session.policy.index, session.policy.index.take_state(0, 0)
        index.put_state(0, 0, state)
        with pytest.raises(StoreError, match="index"):
            index.put_state(0, 0, damage(state).astype(np.float32))


def test_a_kept_selection_stays_within_the_budget(tiny_model):
    """Units of uneven sizes: as many as could be small, but all of them large."""
    from pyggml_repkv.memory.index.kept import Kept

    with Model.load(tiny_model(), threads=1, repack=False) as model:
        memory = replace(MEMORY, late=True, index="tokens:4", unit="semantic:2-16", budget=32)
        with model.session(memory) as session:
            kept: Kept = session.policy.kept
            shape = len(kept.tensors), 2, 1 + session.policy.n_top_max
            rows = np.zeros(shape, np.int32)
            rows[..., :4] = 3, 0, 1, 2
            settings = {"budget": 32, "n_most": 16, "even": False}
            kept.restore(rows, [4, 14, 24, 34, 80], **{**settings, "budget": 30})
            with pytest.raises(StoreError, match="what the last token selected is damaged"):
                kept.restore(rows, [4, 14, 24, 37, 80], **settings)


def test_the_index_takes_the_bytes_that_are_said(model):
    """Of the tokens in blocks, whole tiles of 16."""
    with model.session(replace(MEMORY, index="tokens:4")) as session:
        session.prefill(TOKENS)
        policy = session.policy
        used = [array[: policy.blocks.n_blocks].any(1).all() for array in policy.index._arrays]
        assert all(used)
        assert not any(array[policy.blocks.n_blocks :].any() for array in policy.index._arrays)
        n_bytes = sum(array[: policy.blocks.n_blocks].nbytes for array in policy.index._arrays)
        assert policy.bytes_at(len(TOKENS))["index"] == session.stats()["index_bytes"] == n_bytes


@pytest.mark.parametrize(("index", "n_groups"), [("tokens:4", 2), ("representatives:4", 1)])
def test_slots_for_what_all_groups_of_a_chunk_attend(model, index, n_groups):
    memory = replace(MEMORY, index=index, group=32, n_batch=64, chunk_budget=128)
    with model.session(memory) as session:
        assert session.policy.most_selected == n_groups * 128 // 16


@pytest.mark.parametrize("keeps", [{"late": True}, {"sticky": 1.0}])
def test_a_budget_without_room_for_a_unit_keeps_nothing(model, keeps):
    memory = replace(MEMORY, index="tokens:4", unit="semantic:2-16", budget=15, **keeps)
    with pytest.raises(InputError, match="--budget is 15; with --sticky or --late it must be 0 or at least 16"):
        model.session(memory)
    model.session(replace(memory, budget=16)).close()


def test_costs_count_the_queries_that_are_asked(model):
    with model.session(replace(MEMORY, index="tokens:4", stride=4)) as session:
        cost = session.policy.cost(400, 48)
        assert (cost.n_queries, cost.n_indexed, cost.n_scored) == (12, 320, 0)
        assert session.policy.cost(400, 1).n_queries == 1
