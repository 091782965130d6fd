"""`window`: sinks and recent tokens, bounded at any length."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from pyggml_repkv.engine.model import Model
from pyggml_repkv.memory.config import MemoryConfig

TOKENS = np.random.default_rng(8).integers(0, 280, 400).tolist()
WINDOW = MemoryConfig(kv="window", n_ctx=512, n_batch=16, type_k="f32", type_v="f32", n_sink=16, n_local=64, n_score=32)


@pytest.fixture
def model(tiny_model):
    with Model.load(tiny_model(n_layer=2, n_ctx=512, weight_type=QT.F32), threads=2, repack=False) as loaded:
        yield loaded


def logits(model, memory, n_read, n_more):
    with model.session(memory) as session:
        session.read(TOKENS[:n_read])
        chunk = session.prefill_all(TOKENS[n_read : n_read + n_more])
        return chunk, session.decode(TOKENS[n_read + n_more])


def test_what_fits_in_the_window_is_full_attention(model):
    for got, want in zip(
        logits(model, WINDOW, 32, 32), logits(model, MemoryConfig(type_k="f32", type_v="f32"), 32, 32), strict=True
    ):
        assert np.allclose(got, want, atol=2e-4)


def test_it_is_repkv_without_blocks(model):
    """Steps of 16 and blocks of 16: no token beyond the window is outside a block, and none is selected."""
    repkv = MemoryConfig(
        kv="repkv", n_ctx=512, n_batch=16, type_k="f32", type_v="f32", n_sink=16, n_local=64, n_score=32,
        n_dense=0, block="fixed:16", budget=0, chunk_budget=0, positions="far",
    )  # fmt: skip
    for got, want in zip(logits(model, WINDOW, 320, 16), logits(model, repkv, 320, 16), strict=True):
        assert np.allclose(got, want, atol=1e-5)


def test_it_does_not_grow(model):
    with model.session(WINDOW) as session:
        session.read(TOKENS[:200])
        before = session.stats()["resident_bytes"]
        session.read(TOKENS[200:])
        assert session.stats()["resident_bytes"] == before == sum(session.policy.bytes_at(10**6).values())
        assert session.policy.store.k[0].contents.ne[1] == WINDOW.n_sink


@pytest.mark.parametrize("n_sink", [0, 4])
def test_any_number_of_sinks(model, n_sink):
    memory = MemoryConfig(kv="window", n_batch=48, n_sink=n_sink, n_local=64, n_score=32)
    with model.session(memory) as session:
        assert np.isfinite(session.prefill(TOKENS)).all()
