"""Two models compute in two threads at once: a failure of one never disturbs the other."""

import errno
import threading

import numpy as np
import pytest

from pyggml_repkv.engine.model import Model
from pyggml_repkv.ffi.library import native
from pyggml_repkv.memory.config import MemoryConfig
from tests.tiny_models import TinySpec, write_tiny_model

TOKENS = np.random.default_rng(3).integers(0, 280, 400).tolist()
MEMORY = MemoryConfig(
    kv="repkv", n_ctx=1024, n_batch=48, n_sink=4, n_local=64, n_score=32, n_dense=0, block="fixed:16", budget=48,
    index="representatives:4", chunk_budget=48, kv_ram=2**17, kv_debug=True,
)  # fmt: skip


@pytest.fixture
def models(tmp_path):
    path = tmp_path / "model.gguf"
    write_tiny_model(path, TinySpec(n_layer=3, n_head=4, n_head_kv=2, head_dim=32, n_ctx=150, seed=2))
    with Model.load(path, threads=2, repack=False) as one, Model.load(path, threads=2, repack=False) as two:
        yield one, two


def read(model):
    with model.session(MEMORY) as session:
        logits = [session.prefill(TOKENS[:300])]
        return np.array(logits + [session.decode(token) for token in TOKENS[300:320]])


def read_broken(model, n_failures):
    """Loses the last token's blocks at every token, so that its compute stops and all tokens are read again."""
    with model.session(MEMORY) as session:
        session.prefill(TOKENS[:300])
        for n in range(n_failures):
            broken = session.policy
            broken.disk.io.flush()
            broken.disk.io.inject(read_at=1, keep=1, read_kind=native.REPKV_IO_READ, error=errno.EIO)
            for token in TOKENS:
                session.decode(token)
                if session.policy is not broken:
                    break
            assert session.policy is not broken, n


def test_a_store_that_fails_stops_no_other_model(models, caplog):
    quiet, broken = models
    want = read(quiet)
    end, rounds, raised = threading.Event(), [], []

    def compute():
        try:
            while not end.is_set():
                rounds.append(np.array_equal(read(quiet), want))
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        read_broken(broken, 30)
    finally:
        end.set()
        thread.join()
    assert raised == []
    assert len(rounds) > 2
    assert all(rounds)
    assert caplog.text.count("could not be read") == 30
