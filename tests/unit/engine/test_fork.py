"""A fork has read what its parent has, and neither sees what the other reads."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pyggml_repkv import Model
from pyggml_repkv.errors import ComputeError, InputError
from pyggml_repkv.memory.config import MemoryConfig

TOKENS = np.random.default_rng(5).integers(0, 280, 700).tolist()
REPKV = MemoryConfig(
    kv="repkv", n_ctx=640, n_batch=48, n_sink=4, n_local=64, n_score=32, n_dense=0, block="fixed:16", top_blocks=3,
    chunk_blocks=3, kv_debug=True,
)  # fmt: skip
EXAMPLE = str(Path(__file__).parents[3] / "docs" / "examples" / "mean_key_blocks.py")
MEMORIES = {
    "full": MemoryConfig(n_ctx=640, n_batch=48),
    "window": replace(REPKV, kv="window"),
    "repkv": REPKV,
    "semantic": replace(REPKV, block="semantic:16-32"),
    "sticky and late": replace(REPKV, sticky=1.0, late=True),
    "on disk": replace(REPKV, kv_ram=2**17),
    "on disk, late": replace(REPKV, kv_ram=2**17, sticky=1.0, late=True),
    "file": replace(REPKV, kv=EXAMPLE),
    # It outgrows the trained context after the fork, so that what both share is rewritten.
    "goes far": replace(REPKV, n_ctx=0),
    "goes far on disk": replace(REPKV, n_ctx=0, kv_ram=2**17),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tests.tiny_models import TinySpec, write_tiny_model

    path = tmp_path_factory.mktemp("fork") / "model.gguf"
    write_tiny_model(path, TinySpec(n_layer=3, n_head=4, n_head_kv=2, head_dim=32, n_ctx=320, seed=2))
    with Model.load(path, threads=2, repack=False) as loaded:
        yield loaded


def go_on(session, first, n=100):
    """A chunk and some single tokens -> all logits."""
    return [session.prefill(TOKENS[first : first + n]), *(session.decode(t).copy() for t in TOKENS[first : first + 5])]


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES.keys())
def test_a_fork_says_what_a_fresh_session_says(model, memory):
    with model.session(memory) as session, model.session(memory) as fresh, model.session(memory) as third:
        for s in (session, fresh, third):
            s.prefill(TOKENS[:300])
            s.decode(7)
        with session.fork() as fork:
            assert fork.n_past == session.n_past == 301
            assert fork.tokens == session.tokens
            mine, others = go_on(session, 300), go_on(fork, 400)
            assert equal(mine, go_on(fresh, 300))
            assert equal(others, go_on(third, 400))
            with fork.fork() as second:
                assert equal(go_on(second, 500, 60), go_on(third, 500, 60))


def test_a_fork_outlives_its_parent(model):
    for memory in (REPKV, replace(REPKV, kv_ram=2**17), MEMORIES["full"]):
        session = model.session(memory)
        session.prefill(TOKENS[:300])
        fork = session.fork()
        want = go_on(session, 300)
        session.close()
        assert equal(go_on(fork, 300), want)
        fork.close()


def test_a_fork_of_a_kept_session_is_kept_nowhere(model, tmp_path):
    with model.session(REPKV, directory=tmp_path / "kept") as session:
        session.prefill(TOKENS[:300])
        with session.fork() as fork:
            want = go_on(fork, 300)
            with pytest.raises(InputError, match="say in which directory"):
                fork.save()
            fork.save(tmp_path / "fork")
            again = fork.decode(9)
    with model.resume(tmp_path / "kept") as kept, model.resume(tmp_path / "fork") as copy:
        assert kept.n_past == 300
        assert np.array_equal(copy.decode(9), again)
        assert equal(go_on(kept, 300), want)


def test_a_fork_that_loses_a_block_reads_its_tokens_again(model):
    from pyggml_repkv.ffi.library import native

    memory = replace(REPKV, kv_ram=2**17)
    with model.session(memory) as session:
        session.prefill(TOKENS[:300])
        with session.fork() as fork:
            want = go_on(session, 300)
            fork.policy.store.io.inject(read_at=1, keep=1, read_kind=native.REPKV_IO_CHECKSUM)
            assert equal(go_on(fork, 300), want)


def test_what_cannot_be_forked_says_so(model):
    with model.session(REPKV) as session:
        session.prefill(TOKENS[:300])
        session.policy._torn = True
        with pytest.raises(ComputeError, match="cannot be forked"):
            session.fork()
    with pytest.raises(InputError, match="closed"):
        session.fork()
    with model.session(MemoryConfig(flash_attn=False)) as session, pytest.raises(InputError, match="-fa off"):
        session.fork()


def test_closing_the_model_closes_forks(tmp_path):
    from tests.tiny_models import TinySpec, write_tiny_model

    write_tiny_model(tmp_path / "m.gguf", TinySpec(n_layer=1))
    model = Model.load(tmp_path / "m.gguf", threads=1)
    session = model.session(MemoryConfig(n_ctx=64))
    session.prefill([1, 2, 3])
    fork = session.fork()
    model.close()
    with pytest.raises(InputError, match="the session is closed"):
        fork.decode(1)
