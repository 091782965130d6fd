"""`graph dump` and `graph diff`: a graph as data, and the differences between two."""

import json
from xml.etree import ElementTree

import pytest

from pyggml_repkv.cli.main import main
from pyggml_repkv.lab.inspect.builder import BuiltGraph, Wanted
from pyggml_repkv.lab.inspect.diff import diff
from pyggml_repkv.lab.inspect.snapshot import Snapshot
from pyggml_repkv.memory.config import MemoryConfig


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    from tests.tiny_models import TinySpec, write_tiny_model

    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_model(path, TinySpec(n_layer=3, n_ctx=512, head_dim=32))
    return str(path)


def snapshot(path, phase="decode", n_past=0, **memory) -> Snapshot:
    with BuiltGraph(path, Wanted(phase, MemoryConfig(n_batch=48, **memory), n_past=n_past, n_threads=2)) as built:
        return built.snapshot()


def dumped(path, capsys, *flags):
    assert main(["graph", "dump", "-m", path, "-t", "2", *flags]) == 0
    return capsys.readouterr().out


def test_two_dumps_are_the_same_bytes_and_come_back_whole(path, capsys):
    flags = ["--kv", "repkv", "--json"]
    first, second = dumped(path, capsys, *flags), dumped(path, capsys, *flags)
    assert first == second
    back = Snapshot.from_json(json.loads(first))
    assert json.dumps(back.as_json()) + "\n" == first


def test_what_a_node_costs(path):
    graph = snapshot(path, kv="full")
    qkv = next(t for t in graph.nodes if t.name == "qkv-1")
    config = {t.name: t for t in graph.leaves}
    weights = [config[f"blk.1.attn_{part}.weight"] for part in "qkv"]
    assert qkv.flops == sum(2 * t.shape[0] * t.shape[1] for t in weights)
    assert qkv.bytes_moved >= sum(t.bytes for t in weights)
    attention = [next(t for t in snapshot(path, n_past=n).nodes if t.name == "kqv_partial-1") for n in (99, 199)]
    assert attention[1].flops == 2 * attention[0].flops
    assert attention[1].bytes_moved > attention[0].bytes_moved


def test_filters_and_forms(path, capsys):
    table = dumped(path, capsys, "--layer", "1", "--op", "repkv.*").splitlines()
    assert [line.split()[1] for line in table[1:]] == ["qkv-1", "kqv_partial-1", "ffn_inp-1", "ffn_swiglu-1", "l_out-1"]
    dot = dumped(path, capsys, "--name", "*-1", "--dot")
    assert dot.startswith("digraph")
    assert 'label="cache_k_l1"' in dot
    assert "style=dashed" in dot
    assert main(["graph", "dump", "-m", path, "--name", "none"]) == 2


def test_the_picture_is_well_formed(path, tmp_path):
    assert main(["graph", "dump", "-m", path, "--kv", "repkv", "--svg", str(tmp_path / "g.svg")]) == 0
    boxes = ElementTree.parse(tmp_path / "g.svg").getroot().findall("{http://www.w3.org/2000/svg}g")
    assert len(boxes) == len(snapshot(path, kv="repkv").nodes)
    assert main(["graph", "dump", "-m", path, "--svg", str(tmp_path / "no" / "g.svg")]) == 1


def test_what_repkv_adds_to_full(path):
    full, coded = snapshot(path, kv="full"), snapshot(path, kv="repkv")
    scored = snapshot(path, kv="repkv", index="representatives:4")
    added = [{c.name for c in diff(full, other) if c.kind == "added"} for other in (coded, scored)]
    assert added[0] == {"unit_relevance", "block_topk", "row_runs"}
    assert added[1] == {"score_acc", "block_relevance", "block_topk", "row_runs"}
    changes = {(c.kind, c.name): c for c in diff(full, coded)}
    assert not any(kind == "removed" for kind, _ in changes)
    attention = changes["changed", "kqv_partial"]
    assert attention.layers == (0, 1, 2)
    assert "op repkv.attend -> repkv.attend_memory_one" in attention.what
    assert "writes cache_k, cache_v -> k_local, v_local, k_store, v_store" in attention.what


def test_diff_on_the_command_line(path, tmp_path, capsys):
    dump = tmp_path / "full.json"
    dump.write_text(dumped(path, capsys, "--json"))
    flags = ["graph", "diff", "-m", path, "-t", "2"]
    assert main([*flags, str(dump), "full"]) == 0
    assert capsys.readouterr().out == "no difference\n"
    assert main([*flags, str(dump), "--kv repkv --late"]) == 0
    assert "writes kept" in capsys.readouterr().out
    assert main([*flags, "--json", str(dump), "repkv"]) == 0
    assert {c["name"] for c in json.loads(capsys.readouterr().out)["changes"]} >= {"unit_relevance", "kqv_partial"}
    (tmp_path / "bad.json").write_text('{"schema": 9}')
    for bad in ("bad.json", "none.json"):
        assert main([*flags, str(tmp_path / bad), "full"]) == 2


def test_verify_on_the_command_line(path, capsys, monkeypatch):
    assert main(["graph", "verify", "-m", path, "--kv", "repkv", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []
    monkeypatch.setattr("pyggml_repkv.memory.bounded.attention.BoundedOne.fill", lambda step, n_past: None)
    assert main(["graph", "verify", "-m", path, "--kv", "repkv"]) == 1
    assert "inputs: 44 bytes of the input kv_regions are not filled" in capsys.readouterr().out
