"""Perplexity, likelihood by position and divergence, against plain numpy on the same model."""

import json
from itertools import pairwise

import numpy as np
import pytest

from pyggml_repkv.cli.main import main
from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError
from pyggml_repkv.lab.eval.likelihood import chunk_perplexity, divergence, log_probs, stretches
from pyggml_repkv.memory.config import MemoryConfig
from tests.tiny_models import TinySpec, write_tiny_model

TOKENS = np.random.default_rng(5).integers(0, 280, 700).tolist()
FULL = MemoryConfig(n_ctx=1024, n_batch=48)
REPKV = MemoryConfig(kv="repkv", n_ctx=1024, n_batch=48, n_local=64, n_dense=0, block="fixed:16", budget=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_model(path, TinySpec(n_layer=3, n_ctx=1024, head_dim=32))
    with Model.load(path, threads=2, repack=False) as loaded:
        yield loaded


def logits_of(model, tokens, memory=FULL):
    with model.session(memory) as session:
        return session.prefill_all(tokens)


def test_perplexity_judges_the_second_half_of_each_chunk(model):
    found = list(chunk_perplexity(model, FULL, TOKENS, 200))
    assert [n for n, _ in found] == [99, 198, 297]
    nll = []
    for start in (0, 200, 400):
        chunk = TOKENS[start : start + 200]
        p = log_probs(logits_of(model, chunk))
        nll += [-p[j, chunk[j + 1]] for j in range(100, 199)]
    assert found[-1][1] == pytest.approx(np.exp(np.mean(nll)), rel=1e-6)
    assert found[0][1] == pytest.approx(np.exp(np.mean(nll[:99])), rel=1e-6)


def test_a_chunk_of_odd_length_and_a_text_without_one(model):
    ((n, _),) = chunk_perplexity(model, FULL, TOKENS[:101], 101)
    assert n == 101 - 50 - 1
    with pytest.raises(InputError, match="one chunk takes 701"):
        list(chunk_perplexity(model, FULL, TOKENS, 701))


def test_stretches_cover_the_text(model):
    found = list(stretches(model, REPKV, TOKENS, 96, FULL))
    assert [(s.begin, s.end) for s in found][:2] == [(0, 96), (96, 192)]
    assert found[-1].end == 700
    assert all(a.end == b.begin for a, b in pairwise(found))
    mine, full = logits_of(model, TOKENS, REPKV), logits_of(model, TOKENS)
    nll = -log_probs(mine)[np.arange(699), TOKENS[1:]]
    sizes = np.array([s.end - s.begin for s in found])
    judged = [min(s.end, 699) - s.begin for s in found]
    assert np.average([s.nll for s in found], weights=judged) == pytest.approx(nll.mean(), rel=1e-6)
    assert np.average([s.kl for s in found], weights=sizes) == pytest.approx(divergence(full, mine).mean(), rel=1e-5)
    same = full.argmax(-1) == mine.argmax(-1)
    assert [s.top1 for s in found] == pytest.approx([same[s.begin : s.end].mean() for s in found])
    assert 0 < same.mean() < 1
    # Within the window nothing is lost; beyond it two blocks are not enough.
    assert found[0].kl < found[-1].kl
    alone = list(stretches(model, FULL, TOKENS, 96))
    assert alone[0].kl is alone[0].top1 is None


def test_divergence_is_that_of_the_definition():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 4, 30)).astype(np.float32)
    p, q = (np.exp(x.astype(float)) / np.exp(x.astype(float)).sum(-1, keepdims=True) for x in (a, b))
    assert np.allclose(divergence(a, b), (p * np.log(p / q)).sum(-1))
    assert np.allclose(divergence(a, a), 0)
    assert np.isfinite(divergence(a * 1e4, b * 1e4)).all()


def test_the_command_line(demo_model, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("The sea was calm that morning, and the captain had gone below to write his letters. " * 40)
    base = ["-m", str(demo_model), "--text", str(text), "--json"]
    assert main(["eval", "perplexity", *base, "-c", "256", "--kv", "full,window"]) == 0
    done = json.loads(capsys.readouterr().out)["perplexity"]
    assert done["full"]["tokens"] == done["window"]["tokens"] == 127 * (done["full"]["tokens"] // 127)
    assert 1 < done["full"]["value"] < 3
    small = ["--n-local", "64", "--n-dense", "0", "-b", "64"]
    assert main(["eval", "fidelity", *base, "--lengths", "600", "--kv", "repkv", "--stretch", "256", *small]) == 0
    found = json.loads(capsys.readouterr().out)["stretches"]["repkv"]
    assert [(s["begin"], s["end"]) for s in found] == [(0, 256), (256, 512), (512, 600)]
    assert all(s["kl"] >= 0 and 0 <= s["top1"] <= 1 for s in found)
    assert main(["eval", "perplexity", *base[:-1], "--lengths", "600", "--kv", "full,window"]) == 0
    assert capsys.readouterr().out.count("NLL") == 2
