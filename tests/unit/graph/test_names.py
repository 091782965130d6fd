"""Tensors have llama.cpp's names, which the builder of the graph gives them, so that dumps of both can be compared."""

import numpy as np
import pytest

from pyggml_repkv.engine.model import Model
from pyggml_repkv.ffi.library import g
from pyggml_repkv.graph.plan import Plan, PlanCache, PlanKey
from pyggml_repkv.memory.config import MemoryConfig
from tests.tiny_models import OPTIONAL

N_LAYER = 3
# In the order of src/models/qwen2.cpp, qwen3.cpp and llama.cpp. Qwen2's three names of q and k are the product, the
# bias and the rotation.
NORM = ["norm", "attn_norm"]
HEADS = ["Qcur", "Kcur", "Vcur"]
ATTENDED = ["kqv_out", "attn_out", "ffn_inp", "norm", "ffn_norm"]
FFN = ["ffn_up", "ffn_gate", "ffn_swiglu", "ffn_out", "l_out"]
LAYERS = {
    "qwen2": [*NORM, *["Qcur"] * 2, *["Kcur"] * 2, *["Vcur"] * 2, *HEADS, *ATTENDED, *FFN],
    "qwen3": [*NORM, *HEADS, "norm", "Qcur_normed", "norm", "Kcur_normed", *HEADS, *ATTENDED, *FFN],
    "llama": [*NORM, *HEADS, *HEADS, *ATTENDED, *FFN],
    "llama with all": [
        *(*NORM, "wqkv", "wqkv_b", *HEADS, *ATTENDED),
        *("ffn_up", "ffn_up_b", "ffn_gate", "ffn_gate_b", "ffn_swiglu", "ffn_down", "ffn_out", "l_out"),
    ],
}
SPECS = {
    "qwen2": {},
    "qwen3": {"arch": "qwen3", "optional": ()},
    "llama": {"arch": "llama", "optional": ()},
    "llama with all": {"arch": "llama", "optional": OPTIONAL["llama"], "joined": True},
}


@pytest.fixture(params=[True, False], ids=["exact", "fused"])
def model(request, tiny_model):
    with Model.load(tiny_model(n_layer=N_LAYER), threads=1, exact_graph=request.param) as model:
        yield model


def make_plan(model, n_tokens, cb, outputs="all"):
    policy = model.graph.make_policy(model.graph.policy_inputs(MemoryConfig(), model._boundaries))
    shape = policy.step_shape(0, n_tokens, model.graph.form(n_tokens))
    return Plan(model.graph, policy, PlanKey(shape, outputs), cb)


def node_names(plan):
    graph = plan.context.graph
    return [g.ggml_graph_node(graph, i).contents.name.decode() for i in range(g.ggml_graph_n_nodes(graph))]


def calls_of(model, n_tokens, **options):
    calls = []
    make_plan(model, n_tokens, lambda tensor, name, layer: calls.append((name, layer)), **options)
    return calls


@pytest.mark.parametrize("n_tokens", [1, 7, 40])
@pytest.mark.parametrize("family", LAYERS)
def test_the_exact_graph_names_what_llama_cpp_names(tiny_model, family, n_tokens):
    layers = [(name, il) for il in range(N_LAYER) for name in LAYERS[family]]
    with Model.load(tiny_model(n_layer=N_LAYER, **SPECS[family]), threads=1, exact_graph=True) as model:
        found = calls_of(model, n_tokens)
    assert found == [("embd", -1), *layers, ("norm", -1), ("result_norm", -1), ("result_output", -1)]


@pytest.mark.parametrize("model", [True], indirect=True, ids=["exact"])
def test_names_are_on_the_nodes_that_compute(model):
    """They come in the order of compute: a value is there before its use."""
    policy = model.graph.make_policy(model.graph.policy_inputs(MemoryConfig(), model._boundaries))
    cache = PlanCache(model.graph, policy, model.backend)
    names = node_names(cache.get(PlanKey(policy.step_shape(0, 7, "ggml"), "all")))
    for il in range(N_LAYER):
        wanted = ["attn_norm", "Qcur", "kqv_out", "ffn_inp", "ffn_norm", "ffn_out", "l_out"]
        places = [names.index(f"{name}-{il}") for name in wanted]
        assert places == sorted(places)
        assert {f"Kcur-{il}", f"Vcur-{il}"} <= set(names)
    assert names.index("result_norm") < names.index("result_output") == len(names) - 1


def test_a_part_of_the_names_in_every_form(model):
    for n_tokens in (1, 40):
        calls = calls_of(model, n_tokens)
        assert calls[0] == ("embd", -1)
        assert calls[-1] == ("result_output", -1)
        for name in ("ffn_inp", "ffn_swiglu", "l_out"):
            assert [il for n, il in calls if n == name] == list(range(N_LAYER))


def test_without_an_output_the_last_layer_only_stores(model):
    calls = calls_of(model, 40, outputs="none")
    assert ("l_out", N_LAYER - 2) in calls
    assert not {("l_out", N_LAYER - 1), ("kqv_out", N_LAYER - 1), ("result_output", -1)} & set(calls)


@pytest.mark.parametrize("n_tokens", [1, 40])
def test_the_names_are_given_by_who_builds(model, n_tokens):
    """Every name comes through `cb`, each for another tensor, and nothing else gives names."""
    seen = []

    def cb(tensor, name, layer):
        seen.append(f"mine.{len(seen)}")
        g.ggml_set_name(tensor, seen[-1].encode())

    names = node_names(make_plan(model, n_tokens, cb))
    # ggml names a view after its source.
    assert sorted(name for name in names if name.startswith("mine.") and " " not in name) == sorted(seen)
    assert not [name for name in names if name.startswith(("l_out", "attn_norm", "result_"))]


def test_a_cache_passes_its_names_on(model):
    calls = []
    policy = model.graph.make_policy(model.graph.policy_inputs(MemoryConfig(), model._boundaries))
    cache = PlanCache(model.graph, policy, model.backend, cb=lambda tensor, name, layer: calls.append(name))
    plan = cache.of_step(0, 1, "all")
    plan.fill(np.array([5], np.int32), 0)
    plan.compute(model.backend)
    logits = plan.read()
    assert calls.count("l_out") == N_LAYER
    with model.session() as session:
        assert np.array_equal(session.prefill([5]), logits[0])
