"""`bench` as a user calls it: with the engine on a tiny model, and against a fake llama.cpp."""

import csv
import io
import json

import pytest

from pyggml_repkv.cli.main import main
from pyggml_repkv.errors import RepkvError
from pyggml_repkv.lab.bench import engines, measure
from pyggml_repkv.lab.inspect import builder
from pyggml_repkv.model.rope_options import RopeOptions

BUILT_GRAPH = builder.BuiltGraph
FAKE = """
import numpy as np
from pyggml_repkv.lab.bench.workers._worker import serve

class Engine:
    version, n_vocab, can_rewind = "fake llama", 288, True
    def __init__(self, **options): pass
    def open(self, n_ctx, flash_attn): self.n = 0
    def rewind(self, n_past): self.n = n_past
    def prefill(self, tokens): self.n += len(tokens)
    def decode(self, token): self.n += 1
    def place(self, tokens, n_past): self.n = n_past
    def memory(self): return {}

serve(Engine)
"""


@pytest.fixture
def path(tiny_model, monkeypatch):
    monkeypatch.setattr(measure, "REST_S", 0)
    monkeypatch.setattr(measure, "busy_cores", lambda: 0.0)
    return str(tiny_model(n_layer=2, n_ctx=512, head_dim=32))


def bench(capsys, path, *argv, code=0):
    assert main(["bench", "-m", path, "-t", "1", *argv]) == code
    return capsys.readouterr()


POLICIES = ("--kv", "full,window,repkv", "--n-local", "64", "--block", "fixed:16", "--n-dense", "0")


def test_every_policy_at_every_depth(path, capsys):
    out, _ = bench(capsys, path, "-p", "40", "-n", "3", "-d", "0,200", "-r", "2", *POLICIES, "-o", "json")
    records = json.loads(out)
    assert [(r["test"], r["policy"]) for r in records] == [
        (test, policy)
        for test in ("pp40", "tg3", "pp40 @ d200", "tg3 @ d200")
        for policy in ("full", "window", "repkv")
    ]
    for r in records:
        assert len(r["samples_ns"]) == len(r["depths"]) == 2
        assert min(r["samples_ns"]) > 0
        assert r["n_depth"] <= min(r["depths"])
        assert r["depth_is"] == "read"
        assert (r["of_memory_bandwidth"] is None) == (r["n_gen"] == 0)
        assert r["peak_rss_bytes"] > r["resident_kv_bytes"] > 0
    full = [r for r in records if r["policy"] == "full"]
    assert [r["depths"] for r in full] == [[0, 0], [0, 0], [200, 200], [200, 200]]


def test_against_llama_cpp(path, tmp_path, monkeypatch, capsys):
    (tmp_path / "llama.py").write_text(FAKE)
    monkeypatch.setattr(engines, "LLAMA_WORKER", (str(tmp_path / "llama.py"),))
    argv = ("-p", "40", "-n", "0", "-d", "300", "-r", "2", "--vs", "llama.cpp", "--synthetic-depth")
    out, err = bench(capsys, path, *argv, "--kv", "full", "--progress")
    lines = out.splitlines()
    assert [line.split("|")[6].strip() for line in lines[2:5]] == ["full", "llama.cpp -fa on", "llama.cpp -fa off"]
    assert lines[5] == ""
    assert lines[8].split("|")[1].strip() == "pp40 @ d300"
    assert "pp40 @ d300, round 2 of 2: llama.cpp -fa off" in err
    out, _ = bench(capsys, path, *argv, "--llama-fa", "on", "-o", "jsonl", "--kv", "full")
    full, on = map(json.loads, out.splitlines())
    assert set(full["vs"]) == {"llama.cpp -fa on"}
    assert (full["depth_is"], on["depth_is"], on["engine"], on["flash_attn"]) == (
        "repeated",
        "repeated",
        "llama.cpp",
        True,
    )


def test_quantized_values_leave_llama_cpp_flash_attention_alone(path, tmp_path, monkeypatch, capsys):
    (tmp_path / "llama.py").write_text(FAKE)
    monkeypatch.setattr(engines, "LLAMA_WORKER", (str(tmp_path / "llama.py"),))
    argv = ("-p", "40", "-n", "0", "-r", "1", "--vs", "llama.cpp", "-ctv", "q8_0", "-b", "4096", "-o", "jsonl")
    out, err = bench(capsys, path, *argv)
    assert [(r["policy"], r["n_batch"], r["n_ubatch"]) for r in map(json.loads, out.splitlines())] == [
        ("full", 4096, 4096), ("llama.cpp -fa on", 4096, 4096),
    ]  # fmt: skip
    assert "llama.cpp runs only with -fa on: -ctv q8_0 needs it\n" in err
    out, _ = bench(capsys, path, *argv[:-6], "-o", "jsonl")
    assert [json.loads(line)["n_batch"] for line in out.splitlines()] == [512, 2048, 2048]


@pytest.mark.parametrize(
    ("flags", "repacked"), [((), {"full": True, "window": False}), (("--no-repack",), {"full": False, "window": False})]
)
def test_weights_are_as_run_has_them(path, monkeypatch, capsys, flags, repacked):
    loads = {}
    monkeypatch.setattr(measure.Contender, "start", lambda c, stack: loads.setdefault(c.name, c.load))
    monkeypatch.setattr(measure, "check_same_vocabulary", stop)
    bench(capsys, path, "-p", "8", "--kv", "full,window", *flags, code=1)
    assert {name: load["repack"] for name, load in loads.items()} == repacked


def test_every_engine_scales_rope_alike(path, monkeypatch, capsys):
    loads, built = {}, []
    monkeypatch.setattr(builder, "BuiltGraph", lambda file, wanted: built.append(wanted.rope) or stop(None))
    flags = ("--rope-scaling", "yarn", "--rope-scale", "4")
    bench(capsys, path, "-p", "8", *flags, code=1)
    assert built == [RopeOptions("yarn", 4.0)]
    monkeypatch.setattr(builder, "BuiltGraph", BUILT_GRAPH)
    monkeypatch.setattr(measure.Contender, "start", lambda c, stack: loads.setdefault(c.name, c.load))
    monkeypatch.setattr(measure, "check_same_vocabulary", stop)
    bench(capsys, path, "-p", "8", "--vs", "llama.cpp", "--llama-fa", "on", *flags, code=1)
    rope = {"scaling": "yarn", "scale": 4.0, "freq_base": None, "orig_ctx": None}
    assert {name: load["rope"] for name, load in loads.items()} == {"full": rope, "llama.cpp -fa on": rope}


def test_the_share_of_memory_is_of_the_context_that_is_measured(path, monkeypatch, capsys):
    built, opened = [], []
    graph, ask = builder.BuiltGraph, engines.EngineProcess.ask

    def build(file, wanted):
        built.append(wanted.memory.n_ctx)
        return graph(file, wanted)

    def asked(engine, op, **fields):
        if op == "open":
            opened.append(fields["n_ctx"])
        return ask(engine, op, **fields)

    monkeypatch.setattr(builder, "BuiltGraph", build)
    monkeypatch.setattr(engines.EngineProcess, "ask", asked)
    bench(capsys, path, "-p", "0", "-n", "3", "-d", "250", "-r", "1", "--kv", "full,window")
    assert sorted(built) == sorted(opened) == [256, 512]


def stop(_):
    raise RepkvError("enough")


def test_csv(path, capsys):
    out, _ = bench(capsys, path, "-p", "8", "-n", "2", "-r", "1", "-o", "csv", "--no-warmup")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["test"] for row in rows] == ["pp8", "tg2"]
    assert json.loads(rows[0]["samples_ns"])[0] > 0


def test_a_text_is_read(path, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some words and more of them " * 20)
    argv = ("-p", "8", "-n", "2", "-r", "1", "-o", "json", "--no-warmup", "--text", str(tmp_path / "a.txt"))
    assert len(json.loads(bench(capsys, path, *argv)[0])) == 2
    _, err = bench(capsys, path, *argv, "-d", "9000", code=2)
    assert "tokens and the tests need 9" in err


def test_what_was_measured_is_printed_when_it_is_stopped(path, monkeypatch, capsys):
    whole = measure.measure

    def stopped(plan, say):
        results = next(whole(plan, say))
        for result in results:
            result.keep_rounds(1)
        yield results
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure", stopped)
    out, err = bench(capsys, path, "-p", "8", "-n", "0", "-d", "0,16", "-r", "2", "-o", "json", code=130)
    assert [(r["test"], len(r["samples_ns"])) for r in json.loads(out)] == [("pp8", 1)]
    assert "stopped: pp8 has 1 of 2 rounds\n" in err


def test_the_machine(capsys, monkeypatch):
    from pyggml_repkv.lab.bench import load, machine
    from pyggml_repkv.lab.inspect import peak

    monkeypatch.setattr(load, "busy_cores", lambda: 0.0)
    for module in (machine, peak):
        monkeypatch.setattr(module, "READ_BYTES", 2**24)
    assert main(["bench", "--machine", "-t", "1", "-o", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [t["type"] for t in report["types"]] == list(machine.TYPES)
    assert all(min(t["gflops"], t["gbytes_per_second"]) > 0 for t in report["types"])
    assert report["peak_gflops"] > 0
    assert main(["bench", "--machine", "-t", "1"]) == 0
    assert capsys.readouterr().out.count("\n") == 4 + len(machine.TYPES)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("-p", "0", "-n", "0"), "nothing to measure: give -p or -n"),
        (("-p", "x"), "-p/--n-prompt: must be a whole number from 0"),
        (("-r", "0"), "-r/--repetitions: must be a whole number from 1"),
        (("-d", "-1"), "-d/--n-depth: must be a whole number from 0"),
        (("-c", "512"), "bench sets the context from -p, -n and -d: leave -c out"),
        (("-o", "xml"), "-o/--output: invalid choice"),
        (("--vs", "mlx"), "--vs: invalid choice"),
        (("--llama-fa", "on"), "--llama-fa and --llama-python need --vs llama.cpp"),
        (("--llama-python", "python3"), "--llama-fa and --llama-python need --vs llama.cpp"),
        (("--vs", "llama.cpp", "--llama-fa", "off", "-ctv", "q8_0"), "llama.cpp needs flash attention for -ctv q8_0"),
        (("--kv", "full,full"), "names one twice"),
        (("-m", "/no/model.gguf"), "/no/model.gguf"),
    ],
)
def test_bad_usage_is_one_line(path, capsys, argv, message):
    out, err = bench(capsys, path, *argv, code=2)
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_without_llama_cpp_one_line(path, tmp_path, monkeypatch, capsys):
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('No module named llama_cpp')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    _, err = bench(capsys, path, "-p", "8", "-n", "0", "--vs", "llama.cpp", code=1)
    assert err.splitlines()[-1].startswith(
        "pyggml_repkv: error: llama.cpp -fa on: No module named llama_cpp: run `make b"
    )
