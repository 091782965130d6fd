"""Dump, verify and diff over random settings: dumps load back unchanged, rules hold, and diffs agree both ways."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyggml_repkv.lab.inspect.builder import BuiltGraph, Wanted
from pyggml_repkv.lab.inspect.diff import diff, summary
from pyggml_repkv.lab.inspect.inputs import unfilled_inputs
from pyggml_repkv.lab.inspect.snapshot import Snapshot
from pyggml_repkv.lab.inspect.verify import verify
from pyggml_repkv.memory.config import PREFETCH, MemoryConfig
from tests.tiny_models import TinySpec, write_tiny_model

SIGN = {"added": "removed", "removed": "added", "changed": "changed"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_model(path, TinySpec(n_layer=5, n_head=4, n_head_kv=2, head_dim=32, n_ctx=512))
    return path


@st.composite
def graphs(draw) -> Wanted:
    """A graph for random flags."""
    kv = draw(st.sampled_from(["full", "window", "repkv"]))
    memory = {"kv": kv, "n_batch": draw(st.sampled_from([1, 5, 33, 64])), "n_ctx": draw(st.sampled_from([0, 2048]))}
    if kv == "full":
        memory["flash_attn"] = draw(st.booleans())
    else:
        memory["n_local"] = draw(st.sampled_from([32, 100]))
    if kv == "repkv":
        memory |= {
            "n_dense": draw(st.sampled_from([0, 256])),
            "block": draw(st.sampled_from(["fixed:16", "semantic:16-24"])),
            "budget": 32 * draw(st.integers(1, 3)),
            "index": f"representatives:{draw(st.integers(1, 4))}",
            "score": draw(st.sampled_from(["dot", "attention"])),
            "relevance": draw(st.sampled_from(["lse", "mean", "max"])),
            "per_head": draw(st.booleans()),
            "positions": draw(st.sampled_from(["auto", "far", "exact", "ordered"])),
            "sticky": draw(st.sampled_from([0.0, 1.4])),
            "late": draw(st.booleans()),
            "kv_ram": draw(st.sampled_from([0, 2**26])),
            "prefetch": draw(st.sampled_from(PREFETCH)),
        }
    exact = kv == "full" and draw(st.booleans())
    return Wanted(
        draw(st.sampled_from(["prefill", "decode"])), MemoryConfig(**memory), draw(st.sampled_from([0, 3, 400])),
        n_threads=draw(st.integers(1, 3)), exact=exact,
    )  # fmt: skip


def taken(path, wanted) -> tuple[Snapshot, list]:
    with BuiltGraph(path, wanted) as graph:
        found = graph.snapshot()
        return found, [*verify(found), *unfilled_inputs(graph)]


@settings(max_examples=60)
@given(wanted=graphs())
def test_every_graph_is_proved_and_comes_back_whole(path, wanted):
    found, findings = taken(path, wanted)
    assert findings == []
    text = json.dumps(found.as_json())
    assert json.dumps(taken(path, wanted)[0].as_json()) == text
    assert Snapshot.from_json(json.loads(text)) == found
    assert diff(found, found) == []
    assert all(a == b for a, b in summary(found, found).values())


@settings(max_examples=40)
@given(a=graphs(), b=graphs())
def test_a_difference_is_the_same_from_both_sides(path, a, b):
    a, b = taken(path, a)[0], taken(path, b)[0]
    there, back = (
        {(kind(c), c.name, layer) for c in changes for layer in c.layers}
        for changes, kind in ((diff(a, b), lambda c: c.kind), (diff(b, a), lambda c: SIGN[c.kind]))
    )
    assert there == back
    n_new, n_gone = (sum(len(c.layers) for c in diff(a, b) if c.kind == kind) for kind in ("added", "removed"))
    counted = [sum(t.op not in ("view", "reshape", "permute", "transpose") for t in s.nodes) for s in (a, b)]
    assert counted[1] - counted[0] == n_new - n_gone
