"""A saved copy of a session that was in RAM, or in a file without a name, continues with the same bits."""

from dataclasses import replace

import numpy as np
import pytest

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import ComputeError, InputError, StoreError
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.store.block_store import BlockStore

TOKENS = np.random.default_rng(8).integers(0, 280, 500).tolist()
MEMORY = MemoryConfig(
    kv="repkv", n_ctx=1024, n_batch=48, n_sink=4, n_local=64, n_score=32, n_dense=0, block="fixed:16", budget=48,
    index="representatives:4", chunk_budget=48,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tests.tiny_models import TinySpec, write_tiny_model

    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_model(path, TinySpec(n_layer=2, n_ctx=200, head_dim=32))
    with Model.load(path, threads=2, repack=False) as loaded:
        yield loaded


def decode(session, first, n):
    return np.array([session.decode(t).copy() for t in TOKENS[first : first + n]])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_ram": 2**20},
        {"n_ctx": 0},  # far positions from the middle of the text on
        {"n_ctx": 0, "kv_ram": 2**20},
        {"positions": "exact", "type_k": "q8_0", "type_v": "f32"},
        {"per_head": True, "sticky": 0.7, "late": True},
        {"unit": "semantic:5-9", "block": "semantic:16-24"},
    ],
)
@pytest.mark.parametrize("index", ["representatives:4", "tokens:4", "tokens:2"])
def test_what_was_saved_goes_on_the_same(model, tmp_path, caplog, options, index):
    memory = replace(MEMORY, **options, index=index)
    if index != "representatives:4":
        memory = replace(memory, block="fixed:16")
    with model.session(memory) as session:
        session.prefill(TOKENS[:300])
        decode(session, 300, 10)
        session.save(tmp_path / "kept")
        want = decode(session, 310, 30)
        with model.resume(tmp_path / "kept", None if options else memory) as kept:
            assert kept.n_past == 310
            assert kept.tokens == TOKENS[:310]
            assert np.array_equal(decode(kept, 310, 30), want)
            kept.save()
        # From then on the directory is saved as it goes.
        with model.resume(tmp_path / "kept") as again:
            assert again.n_past == 340
            assert np.array_equal(decode(again, 340, 10), decode(session, 340, 10))
    # Missing parts would be computed again, with the same result.
    assert "again" not in caplog.text


def test_a_copy_has_what_a_prompt_needs(model, tmp_path):
    with model.session(MEMORY) as session:
        logits = session.prefill(TOKENS[:200]).copy()
        session.save_also(lambda n_past: {"sampler": n_past})
        session.save(tmp_path)
    with model.session(MEMORY, directory=tmp_path) as kept:
        resumed = kept.go_back_to(TOKENS[:200], lambda _: False)
        assert (resumed.n_past, resumed.extra) == (200, {"n_prompt": 200, "sampler": 200})
        assert np.array_equal(resumed.logits, logits)


def test_a_damaged_copy_is_read_again_in_the_same_steps(model, tmp_path, caplog):
    with model.session(MEMORY) as session:
        session.prefill(TOKENS[:300])
        decode(session, 300, 5)
        session.save(tmp_path)
        want = decode(session, 305, 10)
    data = bytearray((tmp_path / "blocks.kv").read_bytes())
    data[80] ^= 1  # a checksum in the first header
    (tmp_path / "blocks.kv").write_bytes(data)
    with model.resume(tmp_path) as kept:
        assert np.array_equal(decode(kept, 305, 10), want)
    assert "reading its 305 tokens again" in caplog.text


def test_a_copy_stays_far_from_the_start(model, tmp_path):
    memory = replace(MEMORY, n_dense=150)
    with model.session(memory) as session:
        session.prefill(TOKENS[:150])
        assert session.policy.rotation.long
        session.save(tmp_path)
        with model.resume(tmp_path) as kept:
            assert kept.policy.rotation.long
            assert np.array_equal(decode(kept, 150, 5), decode(session, 150, 5))


def test_a_short_session_has_no_blocks_yet(model, tmp_path):
    with model.session(MEMORY) as session:
        session.prefill(TOKENS[:10])
        session.save(tmp_path)
        with model.resume(tmp_path) as kept:
            assert np.array_equal(decode(kept, 10, 5), decode(session, 10, 5))


def test_a_kept_session_is_copied_elsewhere(model, tmp_path):
    with model.session(MEMORY, directory=tmp_path / "a") as session:
        session.prefill(TOKENS[:200])
        session.save(tmp_path / "b")
        session.save(tmp_path / "a" / ".." / "a")
        want = decode(session, 200, 5)
    with model.resume(tmp_path / "b") as copy:
        assert np.array_equal(decode(copy, 200, 5), want)


def test_what_cannot_be_saved_says_why(model, tmp_path):
    with model.session(MEMORY) as session:
        with pytest.raises(InputError, match="the session is empty"):
            session.save(tmp_path / "a")
        session.prefill(TOKENS[:200])
        with pytest.raises(InputError, match="say in which directory"):
            session.save()
        session.save(tmp_path / "a")
        with pytest.raises(InputError, match="has a session already"):
            session.save(tmp_path / "a")
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="must be a directory"):
            session.save(tmp_path / "file")
        for name in ("", "a\0b"):
            with pytest.raises(InputError, match="is no name of a directory"):
                session.save(name)
        session.policy._torn = True
        with pytest.raises(ComputeError, match="is not saved"):
            session.save(tmp_path / "b")
        assert not (tmp_path / "b").exists()
    with pytest.raises(InputError, match="closed"):
        session.save(tmp_path / "c")
    with model.session(MemoryConfig(n_ctx=64)) as session:
        session.prefill(TOKENS[:10])
        with pytest.raises(InputError, match="--kv full cannot be saved"):
            session.save(tmp_path / "d")
    with model.session(replace(MEMORY, kv_ram=2**20, type_evicted="q8_0")) as session:
        session.prefill(TOKENS[:10])
        with pytest.raises(InputError, match="rounded again"):
            session.save(tmp_path / "e")
        assert not (tmp_path / "e").exists()


def test_a_copy_that_failed_leaves_no_session(model, tmp_path, monkeypatch):
    def fail(store):
        raise StoreError("the disk is full", lost=False)

    with model.session(MEMORY) as session:
        session.prefill(TOKENS[:200])
        with monkeypatch.context() as patch:
            patch.setattr(BlockStore, "flush", fail)
            with pytest.raises(StoreError, match="the disk is full"):
                session.save(tmp_path)
        with pytest.raises(InputError, match="nothing was saved"):
            model.resume(tmp_path)
        session.save(tmp_path)
        with model.resume(tmp_path) as kept:
            assert np.array_equal(decode(kept, 200, 5), decode(session, 200, 5))
