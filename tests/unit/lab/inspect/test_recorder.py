"""Tracing and recording do not change what is computed, and they report it."""

import json
from dataclasses import replace

import numpy as np
import pytest

from pyggml_repkv.cli.main import main
from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError
from pyggml_repkv.lab.inspect.recorder import n_traced_tokens, record_tensors, trace_steps
from pyggml_repkv.lab.inspect.trace import chrome_trace, rows
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.model.rows import Rows

TOKENS = np.random.default_rng(1).integers(0, 280, 600).tolist()
REPKV = MemoryConfig(kv="repkv", n_ctx=1024, n_batch=48, n_local=64, block="fixed:16", n_dense=0, budget=48)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    from tests.tiny_models import TinySpec, write_tiny_model

    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_model(path, TinySpec(n_layer=3, n_ctx=1024, head_dim=32))
    return path


@pytest.fixture(scope="module")
def model(path):
    with Model.load(path, threads=2, repack=False) as loaded:
        yield loaded


DISK = replace(REPKV, kv_ram=2**20)


@pytest.mark.parametrize("memory", [MemoryConfig(n_ctx=1024), REPKV, DISK, replace(DISK, late=True)])
@pytest.mark.parametrize("size", [1, 8, 40])
def test_a_traced_step_is_the_same_step(model, memory, size):
    n = 3
    with model.session(memory) as traced, model.session(memory) as plain:
        for session in (traced, plain):
            session.read(TOKENS[:110])
        done = trace_steps(traced, memory, TOKENS[110:], size, n)
        n_read = traced.n_past - plain.n_past
        assert n_read == n_traced_tokens(size, n)
        for first in range(110, 110 + n_read, size):
            plain.read(TOKENS[first : first + size])
        assert np.array_equal(traced.decode(7), plain.decode(7))
    assert len(done.steps) == len(done.plain_us) == len(done.traced_us) == n
    for step in done.steps:
        times = np.array(step.times)
        assert len(times) == len(step.snapshot.nodes)
        # In the order of the graph, one after another, within the step.
        assert (np.diff(times.ravel()) >= 0).all()
        assert step.begin <= times[0, 0]
        assert times[-1, 1] <= step.end
        assert step.node_us == pytest.approx(np.diff(times, axis=1).sum())
    table = rows(done.steps, None)
    assert sum(row.share for row in table) == pytest.approx(1)
    assert {row.name for row in table} >= {"embd", "ffn_inp"}
    if memory.kv_ram:
        assert any(e.kind == "selected" for step in done.steps for e in step.events)
    trace = json.loads(json.dumps(chrome_trace(done.steps)))
    nodes = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["tid"] == 3]
    assert len(nodes) == sum(len(step.snapshot.nodes) for step in done.steps)
    assert all(e["dur"] >= 0 for e in nodes)


def test_values_are_those_that_were_computed(path):
    with Model.load(path, threads=1, exact_graph=True, repack=False) as model:
        memory = MemoryConfig(n_ctx=256)
        found = {r.key: r for r in record_tensors(model, memory, TOKENS[:20], "*", decode=True).recorded}
        with model.session(memory) as session:
            session.read(TOKENS[:19])
            logits = session.decode(TOKENS[19])
        assert np.array_equal(found["result_output"].values, logits)
        embedding = Rows.of(model.file, "token_embd.weight").floats_in(model.file)[TOKENS[19]]
        assert np.allclose(found["embd"].values, embedding, atol=1e-6)
        # llama.cpp's stages of one name have different keys: matrix, bias, rotation.
        assert {"Qcur-1", "Qcur-1#1", "Qcur-1#2"} <= set(found)
        bias = Rows.of(model.file, "blk.1.attn_q.bias").floats_in(model.file)
        assert np.allclose(found["Qcur-1#1"].values - found["Qcur-1"].values, bias, atol=1e-5)


@pytest.mark.parametrize("memory", [REPKV, replace(REPKV, kv_ram=2**20)])
def test_a_selection_is_shown_with_blocks_on_disk_too(model, memory):
    (found,) = record_tensors(model, memory, TOKENS[:300], "block_topk-2", decode=True).recorded
    for selected in found.values.view(np.int32):
        assert selected[0] == 3
        assert (np.diff(selected[1:4]) > 0).all()


def test_a_name_that_no_node_has(model):
    with pytest.raises(InputError, match="matches no node of this graph"):
        record_tensors(model, REPKV, TOKENS[:50], "Zcur-*", decode=True)


def test_trace_on_the_command_line(path, tmp_path, capsys):
    flags = ["graph", "trace", "-m", str(path), "-t", "1", "-n", "2", "--kv", "repkv", "--n-local", "64", "-d", "200"]
    page = tmp_path / "t.html"
    assert main([*flags, "-o", str(tmp_path / "t.json"), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "attend_memory_one" in out
    assert "% of what this machine can do" in out
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    embedded = page.read_text().split('"times":', 1)[1]
    times, _ = json.JSONDecoder().raw_decode(embedded)
    assert list(times)[:2] == ["n0", "n1"]
    assert all(us >= 0 for us in times.values())
    assert max(times.values()) > 0
    assert main([*flags, "--no-peak", "--json", "--phase", "prefill", "-b", "32"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["n_tokens"] == 32
    assert done["n_past"] >= 200
    assert done["roofline"] is None
    assert done["nodes_us"] <= done["traced_us"]
    assert main([*flags, "-o", str(tmp_path / "no" / "t.json")]) == 1


def test_tensors_on_the_command_line(path, tmp_path, capsys):
    flags = ["graph", "tensors", "-m", str(path), "-t", "1", "--no-repack"]
    assert main([*flags, "--name", "qkv-1", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["tensors"]
    assert row["name"] == "qkv-1"
    assert row["min"] <= row["mean"] <= row["max"]
    saved = str(tmp_path / "a.npz")
    assert main([*flags, "--save", saved, "--npy", str(tmp_path / "each")]) == 0
    assert np.load(next((tmp_path / "each").glob("*-qkv-1.npy"))).shape == tuple(row["shape"])
    assert main([*flags, "--compare", saved]) == 0
    assert " the same" in capsys.readouterr().out
    assert main([*flags, "-ctk", "q8_0", "--compare", saved]) == 1
    out = capsys.readouterr().out
    # Only nodes that read the cache can differ, and layer 0's comes first.
    assert out.startswith("kqv_partial-0 is the first that differs")
    assert main([*flags, "-ctk", "q8_0", "--compare", saved, "--tolerance", "1"]) == 0


def test_what_cannot_be_compared_says_so(path, tmp_path, capsys):
    flags = ["graph", "tensors", "-m", str(path), "--compare"]
    assert main([*flags, str(tmp_path / "none.npz")]) == 2
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 and then nothing")
    assert main([*flags, str(tmp_path / "bad.npz")]) == 2
    (tmp_path / "text.npz").write_text("hello")
    assert main([*flags, str(tmp_path / "text.npz")]) == 2
    assert capsys.readouterr().err.count("give a file that --save wrote") == 3
