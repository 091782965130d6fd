"""A fork has its parent's tokens, and neither sees what the other reads later."""

import gc
import os
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pyggml_repkv import Model
from pyggml_repkv.errors import ComputeError, InputError, StoreError
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.repkv.memory import RepKVMemory

TOKENS = np.random.default_rng(5).integers(0, 280, 700).tolist()
REPKV = MemoryConfig(
    kv="repkv", n_ctx=640, n_batch=48, n_sink=4, n_local=64, n_score=32, n_dense=0, block="fixed:16", budget=48,
    index="representatives:4", chunk_budget=48, kv_debug=True,
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
    "on disk, each head": replace(REPKV, kv_ram=2**17, per_head=True),
    "file": replace(REPKV, kv=EXAMPLE),
    # It outgrows the trained context after the fork, which rewrites more than a page of the rows that both share.
    "goes far": replace(REPKV, n_ctx=0, n_local=32),
    "goes far on disk": replace(REPKV, n_ctx=0, n_local=32, kv_ram=2**17),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tests.tiny_models import TinySpec, write_tiny_model

    path = tmp_path_factory.mktemp("fork") / "model.gguf"
    write_tiny_model(path, TinySpec(n_layer=3, n_head=4, n_head_kv=2, head_dim=32, n_ctx=320, seed=2))
    with Model.load(path, threads=2, repack=False) as loaded:
        yield loaded


def go_on(session, first, n=100):
    """Reads a chunk and some single tokens; returns all logits."""
    return [session.prefill(TOKENS[first : first + n]), *(session.decode(t).copy() for t in TOKENS[first : first + 5])]


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES.keys())
def test_a_fork_says_what_a_fresh_session_says(model, memory):
    assert_forks(model, memory)


@pytest.mark.parametrize("name", ["repkv", "on disk, late", "on disk, each head", "goes far on disk"])
@pytest.mark.parametrize("unit", ["16", "5", "semantic:5-9"])
def test_a_fork_has_its_parent_s_codes(model, name, unit):
    block = "fixed:20" if unit == "5" else "fixed:16"
    assert_forks(model, replace(MEMORIES[name], index="tokens:4", unit=unit, block=block))


def assert_forks(model, memory):
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


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES.keys())
def test_a_later_fork_is_one_of_what_there_is_then(model, memory):
    """Also where the first that either reads is a token, so that it holds on to what the last one selected."""

    def token_first(session):
        return [session.decode(7).copy(), *go_on(session, 200)]

    with model.session(memory) as session, model.session(memory) as fresh:
        for s in (session, fresh):
            s.prefill(TOKENS[:200])
            s.decode(7)
        first = session.fork()
        want = token_first(fresh)
        assert equal(token_first(session), want)
        with session.fork() as second, first.fork() as third:
            assert equal(token_first(third), want)
            third.prefill(TOKENS[600:660])
            assert equal(token_first(first), want)
            more = go_on(fresh, 400, 60)
            assert equal(go_on(second, 400, 60), more)
            assert equal(go_on(session, 400, 60), more)
        first.close()


def test_rows_that_are_shared_can_be_written_again_by_either(model):
    """A full memory goes back and reads something else into the rows that a fork has."""
    memory = MemoryConfig(n_ctx=640, n_batch=48)
    other = TOKENS[::-1]
    with model.session(memory) as session, model.session(memory) as fresh:
        session.prefill(TOKENS[:300])
        fork = session.fork()
        fork.rewind(96)
        fork.prefill(other[:150])
        session.rewind(192)
        session.prefill(TOKENS[192:300])
        fresh.prefill(TOKENS[:300])
        assert equal(go_on(session, 300), go_on(fresh, 300))
        with fork.fork() as second:
            fork.rewind(0)
            fork.prefill(other[:200])
            fresh.rewind(0)
            fresh.prefill(other[:200])
            assert equal(go_on(fork, 300), go_on(fresh, 300))
            second.rewind(96)
            second.prefill(other[:150])
        fork.close()


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


def test_a_fork_may_evict_while_the_directory_is_another_s(model, tmp_path):
    session = model.session(REPKV, directory=tmp_path)
    session.prefill(TOKENS[:300])
    fork = session.fork()
    session.close()
    with model.session(REPKV) as fresh:
        fresh.prefill(TOKENS[:300])
        with model.resume(tmp_path) as again, fresh.fork() as third:
            mine, others = go_on(again, 300), go_on(fork, 400)
            assert equal(mine, go_on(fresh, 300))
            assert equal(others, go_on(third, 400))
            again.save()
        with model.resume(tmp_path) as again:
            assert again.n_past == 405
            assert equal(go_on(again, 500, 60), go_on(fresh, 500, 60))
    fork.close()


def test_closing_forks_gives_everything_back(model, tmp_path):
    def held():
        # Addresses of the arenas: mappings, whatever of them is resident.
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), maps.count("memfd:repkv")

    gc.collect()
    for memory, folder in ((MEMORIES["full"], None), (REPKV, None), (MEMORIES["on disk, late"], None), (REPKV, "kept")):
        before = held()
        session = model.session(memory, directory=None if folder is None else tmp_path / folder)
        session.prefill(TOKENS[:300])
        forks = [session.fork() for _ in range(3)]
        forks += [f.fork() for f in forks]
        for fork in forks:
            fork.decode(3)
        session.close()
        for fork in forks:
            fork.close()
        del session, forks, fork
        gc.collect()
        assert held() == before


def test_forks_that_are_dropped_give_their_descriptors_back(model):
    with model.session(MEMORIES["on disk"]) as session:
        session.prefill(TOKENS[:300])
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            session.fork().decode(3)
            gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before


def test_what_a_fork_evicts_leaves_the_disk_with_it(model):
    """The limit is on what is there, not on what ever was."""
    memory = replace(REPKV, kv_ram=2**17)
    with model.session(memory) as session:
        session.prefill(TOKENS[:300])
        file = session.policy.disk.file
        held, taken = file.n_bytes, os.fstat(file.fd).st_blocks
        for _ in range(3):
            with session.fork() as fork:
                fork.prefill(TOKENS[300:600])
                fork.policy.disk.io.flush()
                assert file.n_bytes > held
                with fork.fork() as second:
                    second.decode(3)
            assert file.n_bytes == held
            # The file system takes some for the holes.
            assert os.fstat(file.fd).st_blocks - taken < 64
        fork = session.fork()
        want = go_on(session, 300)
        session.close()
        assert equal(go_on(fork, 300), want)
        fork.close()


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no second file system")
def test_a_kept_session_on_another_file_system_is_forked(model):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, model.session(REPKV, directory=folder) as session:
        session.prefill(TOKENS[:300])
        with session.fork() as fork:
            assert equal(go_on(fork, 300), go_on(session, 300))


@pytest.mark.parametrize("memory", [REPKV, MEMORIES["sticky and late"]], ids=["repkv", "sticky and late"])
@pytest.mark.parametrize("where", ["_compute", "settle", "begin_step", "of_step"])
def test_a_step_that_is_stopped_anywhere_counts_as_not_done(model, monkeypatch, memory, where):
    from pyggml_repkv.engine.step import Stepper
    from pyggml_repkv.graph.plan import PlanCache
    from pyggml_repkv.memory.index.representatives import Representatives

    owner = {"_compute": Stepper, "settle": Representatives, "begin_step": RepKVMemory, "of_step": PlanCache}[where]

    def stopped(self, *arguments):
        raise KeyboardInterrupt

    with model.session(memory) as session, model.session(memory) as fresh:
        for s in (session, fresh):
            s.prefill(TOKENS[:300])
            s.decode(7)
        with monkeypatch.context() as patched:
            patched.setattr(owner, where, stopped)
            with pytest.raises(KeyboardInterrupt):
                session.decode(8)
        assert session.n_past == 301
        for t in TOKENS[300:380]:
            assert np.array_equal(session.decode(t), fresh.decode(t))


def test_a_fork_is_made_between_two_steps(model):
    """While another thread reads on."""
    with model.session(REPKV) as session:
        session.prefill(TOKENS[:200])
        reader = threading.Thread(target=lambda: [session.decode(t) for t in TOKENS[200:300]])
        reader.start()
        forks = []
        while reader.is_alive():
            forks.append(session.fork())
        reader.join()
        assert len({fork.n_past for fork in forks}) > 1
        want = session.decode(5)
        for fork in forks[:: max(1, len(forks) // 4)]:
            assert fork.tokens == TOKENS[: fork.n_past]
            for t in TOKENS[fork.n_past : 300]:
                fork.decode(t)
            assert np.array_equal(fork.decode(5), want)
        for fork in forks:
            fork.close()


def test_a_fork_that_loses_a_block_reads_its_tokens_again(model):
    from pyggml_repkv.ffi.library import native

    memory = replace(REPKV, kv_ram=2**17)
    with model.session(memory) as session:
        session.prefill(TOKENS[:300])
        with session.fork() as fork:
            want = go_on(session, 300)
            fork.policy.store.io.inject(read_at=1, keep=1, read_kind=native.REPKV_IO_CHECKSUM)
            assert equal(go_on(fork, 300), want)


def test_reading_again_that_is_stopped_is_done_before_the_next_step(model, tmp_path, monkeypatch):
    """No token is lost by it: not of the session, and not in the directory."""
    from pyggml_repkv.engine.step import Stepper
    from pyggml_repkv.ffi.library import native

    compute = Stepper._compute

    def stopped(self, tokens, n_past, *others):
        if n_past == 96 and self.lost:
            raise KeyboardInterrupt
        return compute(self, tokens, n_past, *others)

    memory = replace(REPKV, kv_ram=2**17)
    with model.session(memory) as fresh:
        fresh.prefill(TOKENS[:300])
        want = [fresh.decode(7).copy(), *go_on(fresh, 300)]
    for folder in (None, tmp_path / "kept"):
        with model.session(memory, directory=folder) as session:
            session.prefill(TOKENS[:300])
            session.policy.store.io.inject(read_at=1, keep=1, read_kind=native.REPKV_IO_CHECKSUM)
            with monkeypatch.context() as patched:
                patched.setattr(Stepper, "_compute", stopped)
                with pytest.raises(KeyboardInterrupt):
                    session.decode(7)
            assert session.n_past == 300
            assert session.tokens == TOKENS[:300]
            with pytest.raises(StoreError, match="the next step does it"):
                session.fork()
            with pytest.raises(StoreError, match="the next step does it"):
                session.save(tmp_path / "copy")
            if folder is not None:
                with pytest.raises(StoreError, match="the next step does it"):
                    session.save()
            assert equal([session.decode(7).copy(), *go_on(session, 300)], want)
            if folder is not None:
                session.save()
    with model.resume(tmp_path / "kept", memory) as again:
        assert again.n_past == 406


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
