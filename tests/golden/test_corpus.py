"""The evaluations on the text that comes with the repository, with the demo model."""

from pathlib import Path

import pytest

from pyggml_repkv.engine.model import Model
from pyggml_repkv.lab.eval.likelihood import chunk_perplexity, stretches
from pyggml_repkv.memory.config import MemoryConfig

LOGBOOK = Path(__file__).resolve().parents[2] / "docs" / "examples" / "logbook.txt"

# llama.cpp's perplexity of the first four chunks of 512 tokens (llama-cpp-python 0.3.36, AVX-512, -fa on). With -fa off
# it is 8.7498: rounding alone makes that difference.
LLAMA_CPP = 8.7997


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True], ids=["fused", "exact"])
def test_perplexity_is_llama_cpps(demo_model, exact):
    with Model.load(demo_model, threads=2, repack=False, exact_graph=exact) as model:
        tokens = model.tokenizer.encode(LOGBOOK.read_text("utf-8"))
        *_, (n, perplexity) = chunk_perplexity(model, MemoryConfig(n_ctx=512), tokens[:2048], 512)
    assert n == 4 * 255
    assert perplexity == pytest.approx(LLAMA_CPP, rel=0.01)


@pytest.mark.slow
def test_what_each_memory_costs_in_likelihood(demo_model):
    """A window forgets what the text repeats later; blocks bring it back."""
    settings = {"n_ctx": 4096, "n_local": 256, "n_dense": 0, "positions": "far", "chunk_budget": 2048}
    full = MemoryConfig(n_ctx=4096)
    with Model.load(demo_model, threads=2, repack=False) as model:
        tokens = model.tokenizer.encode(LOGBOOK.read_text("utf-8"))[:3072]
        found = {
            kv: list(stretches(model, MemoryConfig(kv=kv, **settings), tokens, 1536, full))[-1]
            for kv in ("window", "repkv")
        }
    assert 0 < found["repkv"].kl < found["window"].kl
    assert found["repkv"].top1 > found["window"].top1
