"""Blocks on disk change nothing but time: RepKV's logits are the same bit for bit wherever its blocks are."""

import errno
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError, StoreError
from pyggml_repkv.ffi.library import native
from pyggml_repkv.memory.config import PREFETCH, MemoryConfig
from pyggml_repkv.memory.cut.blocks import parse_block
from tests.tiny_models import TinySpec, write_tiny_model

N_TRAINED, N_LAYER = 150, 3
TOKENS = np.random.default_rng(8).integers(0, 280, 700).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("disk") / "model.gguf"
    write_tiny_model(path, TinySpec(n_layer=N_LAYER, n_head=4, n_head_kv=2, head_dim=32, n_ctx=N_TRAINED, seed=2))
    with Model.load(path, threads=2, repack=False) as loaded:
        yield loaded


def token_bytes(memory):
    """The bytes of a token in all layers."""
    k, v = ({"f16": 128, "q8_0": 68, "f32": 256}[t] for t in (memory.type_k, memory.type_v))
    return N_LAYER * (k + v)


def slot_bytes(memory):
    """The bytes of one block in all layers."""
    return token_bytes(memory) * parse_block(memory.block).max_size


CODES, REPRESENTATIVES = ["tokens:4", "tokens:1"], [f"representatives:{n}" for n in range(1, 5)]


@st.composite
def memories(draw):
    coded = draw(st.booleans())
    positions = draw(st.sampled_from(["exact", "far", "ordered", "auto", "auto"]))
    return MemoryConfig(
        kv="repkv",
        n_ctx=0 if positions == "auto" else 1024,
        n_batch=draw(st.integers(20, 60)),
        n_sink=draw(st.sampled_from([0, 5])),
        n_local=draw(st.sampled_from([32, 64])),
        n_score=20,
        n_dense=draw(st.sampled_from([0, 100])),
        block=draw(st.sampled_from(["fixed:16", "fixed:24"] if coded else ["fixed:16", "fixed:24", "semantic:16-32"])),
        unit=draw(st.sampled_from(["8", "4", "semantic:5-9"])),
        group=draw(st.sampled_from([0, 32])),
        budget=draw(st.integers(0, 3)) * 32,
        chunk_budget=draw(st.integers(0, 3)) * 32,
        index=draw(st.sampled_from(CODES if coded else REPRESENTATIVES)),
        positions=positions,
        per_head=draw(st.booleans()),
        sticky=draw(st.sampled_from([0.0, 1.0])),
        late=draw(st.booleans()),
        type_k=draw(st.sampled_from(["f16", "q8_0", "f32"])),
        type_v=draw(st.sampled_from(["f16", "q8_0", "f32"])),
        relevance=draw(st.sampled_from(["lse", "mean"])),
        prefetch=draw(st.sampled_from(PREFETCH)),
        kv_debug=True,
    )


def read(session, n_prompt, n_decode):
    logits = [session.prefill(TOKENS[:n_prompt]).copy()]
    return np.array(logits + [session.decode(t).copy() for t in TOKENS[n_prompt : n_prompt + n_decode]])


@given(
    memory=memories(),
    n_prompt=st.integers(150, 500),
    n_decode=st.integers(0, 30),
    n_more=st.integers(0, 20),
    faults=st.sampled_from([{}, {}, {"delay_us": 300}, {"reorder": 1, "delay_us": 100}]),
)
@settings(max_examples=80, suppress_health_check=list(HealthCheck))
def test_logits_do_not_depend_on_where_blocks_are(model, tmp_path_factory, memory, n_prompt, n_decode, n_more, faults):
    folder = str(tmp_path_factory.mktemp("kv"))
    with model.session(memory) as here:
        # The fewest slots that it can have, and some more.
        n_slots = max(1, here.policy.most_selected) + n_more
        ram = token_bytes(memory) * n_slots * here.policy.scheme.largest_unit
        with model.session(replace(memory, kv_dir=folder, kv_ram=ram)) as there:
            there.policy.disk.io.inject(seed=n_prompt, **faults)
            assert np.array_equal(read(here, n_prompt, n_decode), read(there, n_prompt, n_decode))
            prefetch = there.stats()["prefetch"]
            assert prefetch["required"] == prefetch["hits"] + prefetch["late"] + prefetch["missed"]
            for layer in range(N_LAYER):
                stored = (s.policy.stored_keys(layer, np.arange(here.n_past)) for s in (here, there))
                assert np.array_equal(*stored)
            assert there.stats()["disk_written_bytes"] <= there.stats()["disk_bytes"]


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("prefetch", ["on", "off"])
def test_late_blocks_are_there_when_asked_for(model, per_head, prefetch):
    memory = replace(MEMORY, late=True, sticky=0.0, prefetch=prefetch, per_head=per_head)
    with model.session(replace(memory, kv_ram=slot_bytes(MEMORY) * 14)) as session:
        session.prefill(TOKENS[:400])
        before = session.stats()["prefetch"]
        for token in TOKENS[400:440]:
            session.decode(token)
            # A read has a whole token's time, but a tiny model's token is too short for any read.
            time.sleep(0.005)
        done = {key: value - before[key] for key, value in session.stats()["prefetch"].items()}
    if prefetch == "off":
        assert done["issued"] < done["missed"]
    else:
        # Only the first token after a chunk needs blocks that were not read ahead.
        assert done["missed"] <= 3 * (2 if per_head else 1) * N_LAYER
        assert done["issued"] > 40


MEMORY = MemoryConfig(
    kv="repkv", n_ctx=1024, n_batch=48, n_sink=4, n_local=64, n_score=32, n_dense=0, block="fixed:16", budget=48,
    index="representatives:4", chunk_budget=48, sticky=0.5, kv_debug=True,
)  # fmt: skip
CODED = {"index": "tokens:4", "unit": "8"}
SMALL = slot_bytes(MEMORY) * 4


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["READ", "SHORT", "CHECKSUM"])
@pytest.mark.parametrize("n_prompt", [300, 230])
@pytest.mark.parametrize("coded", [False, True])
def test_a_lost_block_is_made_again_from_the_tokens(model, caplog, kind, n_prompt, late, coded):
    """Bad bytes never give a wrong logit: a block that cannot be read is computed again, and the log says so."""
    memory = replace(MEMORY, late=late, **(CODED if coded else {}))
    with model.session(memory) as here, model.session(replace(memory, kv_ram=SMALL)) as there:
        want = read(here, n_prompt, 40)
        got = [there.prefill(TOKENS[:n_prompt]).copy()]
        there.policy.disk.io.flush()
        broken = there.policy
        broken.disk.io.inject(read_at=1, keep=1, read_kind=getattr(native, f"REPKV_IO_{kind}"), error=errno.EIO)
        got += [there.decode(t).copy() for t in TOKENS[n_prompt : n_prompt + 40]]
        assert np.array_equal(want, got)
        assert there.policy is not broken
    assert "reading its" in caplog.text
    assert "could not be read" in caplog.text


def test_a_block_that_is_lost_again_and_again_is_an_error(model, monkeypatch):
    from pyggml_repkv.memory.store.block_store import BlockStore

    opened = BlockStore.__init__

    def broken(self, *args, **options):
        opened(self, *args, **options)
        self.inject(read_at=1, keep=1, read_kind=native.REPKV_IO_READ, error=errno.EIO)

    monkeypatch.setattr(BlockStore, "__init__", broken)
    with model.session(replace(MEMORY, kv_ram=SMALL)) as session, pytest.raises(StoreError, match="could not be read"):
        read(session, 400, 200)


@pytest.mark.parametrize("nth", range(1, 12, 2))
def test_a_full_disk_ends_the_run_with_one_line(model, nth):
    with model.session(replace(MEMORY, kv_ram=SMALL)) as session:
        session.policy.disk.io.inject(write_at=nth, keep=1, error=errno.ENOSPC)
        with pytest.raises(StoreError, match="could not be written: No space left on device"):
            session.prefill(TOKENS)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("coded", [False, True])
def test_too_little_ram_for_what_is_attended_at_once_is_said_with_the_number(model, per_head, coded):
    """Units of 16, or of 8 tokens; each head has as many slots, of which each takes its share of a row."""
    memory = replace(MEMORY, per_head=per_head, n_ctx=2**16, budget=16000, **(CODED if coded else {}))
    n_tokens = 16000
    ram = token_bytes(memory) * n_tokens
    least = -(-ram // 2**20)
    with pytest.raises(InputError, match=f"up to {n_tokens} are attended at once: give at least {least}M"):
        model.session(replace(memory, kv_ram=ram - 1))
    with model.session(replace(memory, kv_ram=ram)) as session:
        session.prefill(TOKENS[:300])
        slots = session.stats()["slots"] * session.policy.scheme.largest_unit
        assert slots == n_tokens


def test_eight_bits_on_disk_must_fit_a_head_where_each_is_read_alone(tmp_path):
    write_tiny_model(tmp_path / "model.gguf", TinySpec(n_layer=1, n_head=4, n_head_kv=2, head_dim=16))
    memory = replace(MEMORY, kv_ram=SMALL, type_evicted="q8_0")
    with Model.load(tmp_path / "model.gguf", threads=1, repack=False) as model:
        model.session(memory).close()
        with pytest.raises(InputError, match="--cache-type-evicted q8_0 needs a head size that 32 divides"):
            model.session(replace(memory, per_head=True))


def test_the_file_is_gone_with_the_session(model, tmp_path):
    with model.session(replace(MEMORY, kv_dir=str(tmp_path), kv_ram=SMALL)) as session:
        session.prefill(TOKENS[:300])
        assert list(tmp_path.iterdir()) == []
        assert session.stats()["disk_bytes"] > 0


def test_scores_of_evicted_tokens_are_not_kept(model):
    with model.session(replace(MEMORY, kv_ram=SMALL)) as session:
        session.prefill(TOKENS[:300])
        assert session.policy.index.get_score(0, 290).shape == (2,)
        with pytest.raises(InputError, match="not kept"):
            session.policy.index.get_score(0, 10)


def test_quantised_evicted_blocks_change_little(model):
    with model.session(MEMORY) as here, model.session(replace(MEMORY, kv_ram=SMALL, type_evicted="q8_0")) as there:
        want, got = read(here, 400, 20), read(there, 400, 20)
        assert there.policy.disk.io.n_bytes < 0.62 * 400 * N_LAYER * 256 + 25 * 4096 * (1 + N_LAYER)
    cosine = (want * got).sum(1) / np.linalg.norm(want, axis=1) / np.linalg.norm(got, axis=1)
    assert cosine.min() > 0.99
    assert not np.array_equal(want, got)
