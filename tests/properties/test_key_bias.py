"""Quantised keys of a model with huge key biases, as Qwen2's are: they cost next to nothing in any form and memory."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError
from pyggml_repkv.memory.bounded.rotation import rotate_rows
from pyggml_repkv.memory.config import MemoryConfig
from tests.oracle import oracle_logits
from tests.tiny_models import TinySpec, write_tiny_model

BIAS, LIMIT = 300.0, 0.01
SPEC = TinySpec(n_layer=2, n_head=4, n_head_kv=2, head_dim=64, n_ff=256, n_ctx=512)
SPECS = {
    "qwen2": SPEC,
    "llama": replace(SPEC, arch="llama"),
    "yarn": replace(SPEC, n_ctx=128, scaling_kind="yarn", scaling_factor=4.0),
    "short yarn": replace(SPEC, n_ctx=32, scaling_kind="yarn", scaling_factor=4.0),
    "repacked": replace(SPEC, weight_type=QT.Q4_0),
    "llama repacked": replace(SPEC, arch="llama", weight_type=QT.Q4_0),
}
TOKENS = np.random.default_rng(1).integers(0, SPEC.n_vocab, 260).tolist()
# Packed chunks, chunks of ggml's nodes, single tokens: all forms write and read the same cache.
SIZES = (100, 20, 1, 1, 70, 5, 1, 1, 1, 60)
BOUNDED = MemoryConfig(kv="window", n_ctx=500, n_batch=40, n_sink=4, n_local=48, type_k="f32", type_v="f32")
REPKV = replace(BOUNDED, kv="repkv", block="fixed:16", index="representatives:4", n_dense=0, budget=96, chunk_budget=96)
BOUNDED_KINDS = {
    "window": BOUNDED,
    "window exact": replace(BOUNDED, positions="exact"),
    "repkv exact": replace(REPKV, positions="exact"),
    "repkv far": replace(REPKV, positions="far"),
    # All blocks, since heads of a random model choose between many that are almost equal.
    "repkv per head": replace(REPKV, positions="exact", per_head=True, score="dot", budget=512, chunk_budget=512),
    "repkv by codes": replace(REPKV, positions="exact", index="tokens:4", budget=512, chunk_budget=512),
    "repkv on disk": replace(REPKV, positions="exact", kv_ram=2**20),
}


def biased(metadata, tensors):
    """The fastest pair turns once in six tokens, the slowest not at all."""
    for name, tensor in tensors.items():
        if name.endswith("attn_k.bias"):
            heads = tensor.data.reshape(SPEC.n_head_kv, SPEC.head_dim)
            heads[:, [0, 1]], heads[:, -1] = (BIAS, -BIAS), BIAS


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> (path, weights)."""
    made = {}

    def model(name):
        if name not in made:
            path = tmp_path_factory.mktemp("biased") / "model.gguf"
            made[name] = path, write_tiny_model(path, SPECS[name], biased)
        return made[name]

    return model


def log_softmax(logits):
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def divergence(got, want):
    p, q = log_softmax(want), log_softmax(got)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def read(session, sizes=SIZES, tokens=TOKENS):
    """Logits of all tokens, read in steps of these sizes."""
    parts = np.split(np.array(tokens), np.cumsum(sizes)[:-1])
    return np.concatenate([session.prefill_all(part.tolist()) for part in parts])


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("repack", [True, False])
@pytest.mark.parametrize("name", SPECS)
def test_all_forms_of_full_attention(models, name, repack, flash_attn):
    path, weights = models(name)
    memory = MemoryConfig(n_ctx=len(TOKENS), type_k="f32", type_v="f32", flash_attn=flash_attn)
    with Model.load(path, threads=2, repack=repack) as model:
        with model.session(memory) as session:
            want = read(session)
        with model.session(replace(memory, type_k="q8_0")) as session:
            got = read(session)
    assert divergence(got, want) < LIMIT
    if SPECS[name].weight_type == QT.F32:
        assert divergence(got, oracle_logits(SPECS[name], weights, TOKENS)) < LIMIT


@pytest.mark.parametrize("type_k", ["f32", "q8_0"])
@pytest.mark.parametrize("repack", [True, False])
@pytest.mark.parametrize("name", ["qwen2", "llama", "llama repacked"])
def test_keys_are_put_by_halves_only_where_somebody_needs_it(models, name, repack, type_k):
    """Fused forms, or a bias that is taken from them."""
    with (
        Model.load(models(name)[0], threads=2, repack=repack) as model,
        model.session(MemoryConfig(type_k=type_k)) as session,
    ):
        assert model.graph.by_halves(session.policy) == (not model.weights.repacked or type_k == "q8_0")


@pytest.mark.parametrize("name", ["qwen2", "llama", "yarn"])
def test_repeated_keys_are_those_at_their_new_positions(models, name):
    """Their bias is added there: with the rotation of where they were, a key would belong to two positions."""
    memory = MemoryConfig(n_ctx=len(TOKENS), type_k="f32", type_v="f32")
    found = {}
    with Model.load(models(name)[0], threads=2) as model:
        for type_k in ("f32", "q8_0"):
            with model.session(replace(memory, type_k=type_k)) as session:
                session.read(TOKENS[:50])
                session.repeat(180)
                rope, config = model.graph.precise_rope_table, model.config
                for at in range(50, 180, 50) if type_k == "f32" else ():
                    table = np.tile(rope([at])[:, 0] / rope([0])[0, 0], (min(50, 180 - at), 1))
                    for keys in session.policy.k_arenas:
                        rotate_rows(config, keys, at, table)
                found[type_k] = session.prefill_all(TOKENS[180:])
    assert divergence(found["q8_0"], found["f32"]) < LIMIT


def test_the_exact_graph_stores_keys_as_llama_cpp_does(models):
    path, weights = models("qwen2")
    with (
        Model.load(path, threads=2, exact_graph=True) as model,
        model.session(MemoryConfig(type_k="q8_0", type_v="f32")) as session,
    ):
        got = read(session)
    assert divergence(got, oracle_logits(SPEC, weights, TOKENS)) > 10 * LIMIT


@pytest.mark.parametrize("kind", BOUNDED_KINDS)
@pytest.mark.parametrize("name", ["qwen2", "llama", "yarn"])
def test_bounded_memories(models, name, kind):
    memory = BOUNDED_KINDS[kind]
    with Model.load(models(name)[0], threads=2, repack=False) as model:
        with model.session(memory) as session:
            want = read(session)
        with model.session(replace(memory, type_k="q8_0")) as session:
            assert divergence(read(session), want) < LIMIT
        if memory.on_disk:
            with model.session(replace(memory, type_evicted="q8_0")) as session:
                assert divergence(read(session), want) < LIMIT


@pytest.mark.parametrize("types", [{"type_k": "q8_0"}, {"type_evicted": "q8_0", "kv_ram": 2**20}])
def test_keys_that_become_far_lose_their_rotation(models, types):
    """The trained context ends within the prompt: stored keys are turned back, on disk as they are read."""
    path = models("short yarn")[0]
    memory = replace(REPKV, n_ctx=0)
    with Model.load(path, threads=2, repack=False) as model:
        with model.session(memory) as session:
            want = read(session)
            assert session.stats()["far_positions"]
        with model.session(replace(memory, **types)) as session:
            assert divergence(read(session), want) < LIMIT


@pytest.mark.parametrize("kind", ["repkv exact", "repkv far"])
def test_forks_and_kept_sessions_go_on(models, kind, tmp_path):
    memory = replace(BOUNDED_KINDS[kind], type_k="q8_0")
    begin, rest, sizes = TOKENS[:200], TOKENS[200:], (50, *(1,) * 10)
    with Model.load(models("qwen2")[0], threads=2, repack=False) as model:
        with model.session(BOUNDED_KINDS[kind]) as session:
            session.prefill(begin)
            exact = read(session, sizes, rest)
        with model.session(memory) as session:
            session.prefill(begin)
            with session.fork() as fork:
                want = read(fork, sizes, rest)
            # Heads of a random model choose between blocks that are almost equal.
            assert divergence(want, exact) < 2 * LIMIT
            session.save(tmp_path / "kept")
            assert np.array_equal(read(session, sizes, rest), want)
        with model.resume(tmp_path / "kept", memory) as session:
            assert np.array_equal(read(session, sizes, rest), want)


def test_a_session_that_holds_keys_with_their_bias_is_refused(models, tmp_path, monkeypatch):
    """Programs before this one stored quantised keys so."""
    memory = replace(BOUNDED_KINDS["repkv exact"], type_k="q8_0")
    with Model.load(models("qwen2")[0], threads=2, repack=False) as model:
        with monkeypatch.context() as before:
            before.setattr("pyggml_repkv.engine.model.centres_keys", lambda *_: False)
            with model.session(memory, directory=tmp_path / "kept") as session:
                session.prefill(TOKENS)
                session.save()
        with pytest.raises(InputError, match="stored keys was with their bias and is less their bias"):
            model.resume(tmp_path / "kept", memory)
        shutil.rmtree(tmp_path / "kept")


def test_without_biases_keys_are_stored_as_before(tmp_path):
    """Also where a norm comes after the bias: then keys are no product plus a bias."""
    for i, spec in enumerate((replace(SPEC, optional=()), replace(SPEC, arch="qwen3"))):
        write_tiny_model(tmp_path / f"{i}.gguf", spec, biased)
        with (
            Model.load(tmp_path / f"{i}.gguf", threads=2) as model,
            model.session(MemoryConfig(type_k="q8_0")) as session,
        ):
            assert not any(session.policy.centres.of(layer) for layer in range(spec.n_layer))
