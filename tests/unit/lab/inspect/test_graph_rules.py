"""`graph verify` accepts the graphs of `run`, and finds every fault that a test puts into one."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from pyggml_repkv.graph.plan import Plan
from pyggml_repkv.lab.inspect.builder import BuiltGraph, Wanted
from pyggml_repkv.lab.inspect.inputs import unfilled_inputs
from pyggml_repkv.lab.inspect.snapshot import Snapshot, TensorInfo
from pyggml_repkv.lab.inspect.verify import verify
from pyggml_repkv.memory.bounded.attention import BoundedOne
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.ops.makers import Ops
from tests.tiny_models import OPTIONAL, TinySpec, write_tiny_model

FAMILIES = {
    "qwen3": {"arch": "qwen3", "optional": ()},
    "llama": {"arch": "llama", "optional": ()},
    "llama with all": {"arch": "llama", "optional": OPTIONAL["llama"], "joined": True},
}
REPKV = MemoryConfig(
    kv="repkv", n_ctx=2048, n_batch=48, n_local=64, block="fixed:16", index="representatives:4", n_dense=0
)
WINDOW = MemoryConfig(kv="window", n_batch=48)
DISK = replace(REPKV, kv_ram=2**24)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_model(path, TinySpec(n_layer=4, n_ctx=512, head_dim=32))
    return path


def built(path, phase, memory, **options) -> BuiltGraph:
    return BuiltGraph(path, Wanted(phase, memory, n_threads=2, **options))


def snapshot(path, phase="decode", memory=REPKV, **options) -> Snapshot:
    with built(path, phase, memory, **options) as graph:
        return graph.snapshot()


GRAPHS = [
    ({"kv": "full", "n_ctx": 256, "n_batch": 48}, False),
    ({"kv": "full", "n_ctx": 256, "n_batch": 48}, True),
    ({"kv": "full", "n_ctx": 256, "n_batch": 5, "flash_attn": False}, False),
    ({"kv": "window", "n_batch": 48}, False),
    ({"kv": "repkv", "n_batch": 48}, False),
    ({"kv": "repkv", "n_batch": 48, "index": "representatives:4"}, False),
    ({"kv": "repkv", "n_batch": 48, "index": "representatives:4", "score": "dot", "per_head": True}, False),
    ({"kv": "repkv", "n_batch": 48, "index": "representatives:4", "relevance": "max", "positions": "far"}, False),
    ({"kv": "repkv", "n_batch": 48, "group": 32, "unit": "semantic:5-9"}, False),
    ({"kv": "repkv", "n_batch": 48, "positions": "ordered"}, False),
    ({"kv": "repkv", "n_batch": 48, "sticky": 1.0, "late": True, "kv_ram": 2**26}, False),
    *(({"kv": "repkv", "n_batch": 48, "kv_ram": 2**26, "late": late}, False) for late in (False, True)),
]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(("memory", "exact"), GRAPHS)
def test_what_is_run_is_proved(path, phase, memory, exact):
    with built(path, phase, MemoryConfig(**memory), exact=exact) as graph:
        found = graph.snapshot()
        assert verify(found) == []
        assert unfilled_inputs(graph) == []
    waited_for = [h.layer + i for h in found.hooks for i in range(h.n_layers)]
    assert waited_for == ([0, 1, 2, 3] if "kv_ram" in memory else [])


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(("kv", "exact"), [("full", False), ("full", True), ("window", False), ("repkv", False)])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_family_is_proved(tiny_model, family, kv, exact, phase):
    path = tiny_model(n_layer=3, n_ctx=512, head_dim=32, **family)
    with built(path, phase, MemoryConfig(kv=kv, n_batch=48), exact=exact) as graph:
        assert verify(graph.snapshot()) == []
        assert unfilled_inputs(graph) == []


LATE = MemoryConfig(
    kv="repkv", n_batch=48, n_local=64, n_dense=0, block="fixed:32", index="representatives:4", late=True, kv_ram=2**26
)


@pytest.mark.parametrize(("n_past", "n_points"), [(100, 4), (4000, 2)])
def test_layers_whose_blocks_are_known_are_waited_for_together(path, n_past, n_points):
    found = snapshot(path, memory=LATE, n_past=n_past)
    assert verify(found) == []
    assert [h.n_layers for h in found.hooks] == [4 // n_points] * n_points
    fewer = tuple(replace(h, n_layers=1) for h in found.hooks)
    assert ("hooks" in broken(replace(found, hooks=fewer, by_id={}))) == (n_points == 2)


def broken(found: Snapshot) -> set[str]:
    return {finding.rule for finding in verify(found)}


def changed(found: Snapshot, name: str, change: Callable[[TensorInfo], TensorInfo]) -> Snapshot:
    assert any(t.name == name for t in found.nodes)
    return replace(found, nodes=tuple(change(t) if t.name == name else t for t in found.nodes), by_id={})


def id_of(found: Snapshot, name: str) -> str:
    return next(t.id for t in (*found.nodes, *found.leaves) if t.name == name)


def without_source(found: Snapshot, name: str, source: str) -> Snapshot:
    gone = id_of(found, source)
    return changed(found, name, lambda t: replace(t, sources=tuple(s for s in t.sources if s != gone)))


def without(found: Snapshot, name: str) -> Snapshot:
    return replace(found, nodes=tuple(t for t in found.nodes if t.name != name), by_id={})


def swapped(found: Snapshot, a: str, b: str) -> Snapshot:
    nodes = list(found.nodes)
    i, j = (next(n for n, t in enumerate(nodes) if t.name == name) for name in (a, b))
    nodes[i], nodes[j] = nodes[j], nodes[i]
    return replace(found, nodes=tuple(nodes), by_id={})


@pytest.mark.parametrize(
    ("memory", "phase", "name", "source", "rules"),
    [
        # Without the edge, a token's key might be stored among those that its own score node reads.
        (REPKV, "decode", "block_relevance-2", "score_acc-2", {"consumed", "effects"}),
        (REPKV, "decode", "kqv_partial-1", "row_runs-1", {"consumed"}),
        (DISK, "decode", "kqv_partial-1", "row_runs-1", {"consumed", "hooks"}),
        (DISK, "decode", "row_runs-1", "block_topk-1", {"hooks"}),
        (WINDOW, "prefill", "kqv_out-1", "Qfar-1", {"consumed", "effects"}),
        (REPKV, "prefill", "score_acc-0", "Qcur-0", {"effects"}),
        (REPKV, "prefill", "block_relevance-1", "score_acc-1", {"consumed"}),
    ],
)
def test_a_dropped_edge_is_found(path, memory, phase, name, source, rules):
    found = snapshot(path, phase, memory)
    assert broken(without_source(found, name, source)) >= rules


@pytest.mark.parametrize("name", ["score_acc-2", "block_topk-0"])
def test_a_dropped_node_is_found(path, name):
    found = snapshot(path)
    gone = id_of(found, name)
    rest = replace(
        without(found, name),
        nodes=tuple(
            replace(t, sources=tuple(s for s in t.sources if s != gone)) for t in found.nodes if t.name != name
        ),
        by_id={},
    )
    assert "layers" in broken(rest)


@pytest.mark.parametrize(("a", "b"), [("score_acc-1", "kqv_partial-1"), ("ffn_inp-0", "ffn_swiglu-0")])
def test_swapped_nodes_are_found(path, a, b):
    assert "order" in broken(swapped(snapshot(path), a, b))


def test_swapped_hooks_are_found(path):
    found = snapshot(path, memory=DISK)
    hooks = list(found.hooks)
    hooks[1], hooks[2] = hooks[2], hooks[1]
    assert "hooks" in broken(replace(found, hooks=tuple(hooks), by_id={}))


def test_a_hook_at_no_node_is_found(path):
    found = snapshot(path, memory=DISK)
    hooks = tuple(replace(h, node="n9999") if h.layer == 2 else h for h in found.hooks)
    assert "hooks" in broken(replace(found, hooks=hooks, by_id={}))


def test_overlapping_memory_is_found(path):
    found = snapshot(path)
    source = found.by_id[id_of(found, "l_out-0")]
    # It is the residual of layer 1 until ffn_inp-1 has read it.
    assert "memory" in broken(changed(found, "qkv-1", lambda t: replace(t, offset=source.offset)))


def test_an_overwritten_input_is_found(path):
    found = snapshot(path)
    used_to_the_end = next(t for t in found.leaves if t.name == "kv_regions")
    assert "memory" in broken(changed(found, "ffn_inp-0", lambda t: replace(t, offset=used_to_the_end.offset)))


def test_one_name_for_two_is_found(path):
    found = snapshot(path)
    twice = changed(found, "score_acc-1", lambda t: replace(t, name="score_acc-0"))
    # Names may repeat along a chain, as the stages of llama.cpp's Qcur do, but not for nodes beside each other.
    assert "names" not in broken(twice)
    # The last layer's scores and far queries of a chunk do not depend on each other.
    chunk = snapshot(path, "prefill")
    assert "names" in broken(changed(chunk, "score_acc-1", lambda t: replace(t, name="Qfar-1")))


def test_an_edge_that_the_code_forgets_is_found(path, monkeypatch):
    """The fault is in the code that builds the graph: ggml drops a score node without users, in all layers alike."""
    forgetful = Ops.relevance_one

    def relevance_one(ops, qkv, index, rope, regions, marker, **options):
        return forgetful(ops, qkv, index, rope, regions, regions, **options)

    monkeypatch.setattr(Ops, "relevance_one", relevance_one)
    findings = verify(snapshot(path))
    assert {"present"} == {f.rule for f in findings}
    assert "layer 3 writes score_l" in findings[-1].message


@pytest.mark.parametrize(("phase", "name"), [("decode", "_tokens"), ("prefill", "_rope_table")])
def test_an_input_of_the_plan_that_is_not_filled_is_found(path, monkeypatch, phase, name):
    with built(path, phase, REPKV) as graph:
        monkeypatch.setattr(graph.plan, "fill", partial(_fill_but, graph.plan, name))
        findings = unfilled_inputs(graph)
    assert [f.rule for f in findings] == ["inputs"]


def _fill_but(plan: Plan, name: str, tokens, n_past: int) -> None:
    tensor = getattr(plan, name)
    before = bytes(_memory(tensor))
    Plan.fill(plan, tokens, n_past)
    _memory(tensor)[:] = before


def _memory(tensor):
    import ctypes

    t = tensor.contents
    return (ctypes.c_char * (t.ne[3] * t.nb[3])).from_address(t.data)


def test_an_input_of_the_policy_that_is_not_filled_is_found(path, monkeypatch):
    monkeypatch.setattr(BoundedOne, "fill", lambda step, n_past: None)
    with built(path, "decode", REPKV) as graph:
        findings = unfilled_inputs(graph)
    assert {f.ids[0] for f in findings} == {"kv_regions", "near_far_rope"}
