"""bench_depth.py: repeated cells, the line through chunk times, what is forgotten again, rounds, one-line errors."""

import json

import bench_depth
import numpy as np
import pytest
from _engines import run_tool
from bench_depth import ESTIMATED, LLAMA_NAMES, READ, REPEATED, Curve, Line, Row, rows_of
from llama_depth_worker import STATE_MAGIC, LlamaDepthEngine, LlamaDepthWorker, repeat_cells
from repkv_depth_worker import memory_of

from pyggml_repkv.errors import InputError, RepkvError
from pyggml_repkv.model.gguf_file import GGUFFile
from pyggml_repkv.model.tokenizer import Tokenizer

TOOLS = bench_depth.Path(bench_depth.__file__).parent
ON, OFF = LLAMA_NAMES.values()

LLAMA = """
import sys
sys.path[:0] = [{tools!r}]
import _worker
from llama_depth_worker import LlamaDepthWorker

class Engine:
    version, n_vocab = "fake llama", {n_vocab}
    def __init__(self, model, n_threads): pass
    def open(self, n_ctx, flash_attn): self.n_ctx, self.n_past = n_ctx, 0
    def rewind(self, n_past):
        assert n_past <= self.n_past
        self.n_past = n_past
    def prefill(self, tokens):
        assert 0 < len(tokens) <= 512
        self.n_past += len(tokens)
        assert self.n_past <= self.n_ctx
    def state(self): return None
    def restore(self, state, n_tokens): self.n_past = n_tokens

import llama_depth_worker
llama_depth_worker.repeat_cells = lambda state, n_cells: state
_worker.Worker = LlamaDepthWorker
_worker.serve(Engine)
"""

OURS = """
import sys
sys.path[:0] = [{tools!r}, {root!r}]
import _worker
from repkv_depth_worker import RepkvDepthWorker

class Engine:
    version, n_vocab = "fake ours", 49152
    def __init__(self, model, n_threads, memory): assert memory == "--kv repkv --top-blocks 3"
    def open(self, n_ctx, flash_attn): self.n_ctx, self.n_past = n_ctx, 0
    def decode(self, token):
        self.n_past += 1
        assert self.n_past <= self.n_ctx
    def read(self, tokens):
        assert self.n_past == 0
        self.n_past = len(tokens)
        ends = [*range(0, len(tokens) - 16, 512), len(tokens) - 16, len(tokens)]
        return [(end, 0.001 * end) for end in ends]

_worker.Worker = RepkvDepthWorker
_worker.serve(Engine)
"""


def call(*argv):
    return run_tool(bench_depth.main, argv)


def state_of(k, v, *, transposed=False):
    """A state as llama.cpp writes it. k, v: float16 [n_layers, n_cells, row]; cells at positions 0, 1, ..."""
    n_layers, n_cells, row = k.shape
    words = [STATE_MAGIC, 0, 1, n_cells]
    for position in range(n_cells):
        words += [position, 1, 0]
    state = np.array([*words, transposed, n_layers], "<u4").tobytes()
    for layer in k:
        state += np.array([1, 2 * row, 0], "<u4").tobytes() + layer.tobytes()
    for layer in v:
        header = [1, 2, row] if transposed else [1, 2 * row, 0]
        state += np.array(header, "<u4").tobytes() + (layer.T if transposed else layer).tobytes()
    return np.frombuffer(state, np.uint8)


@pytest.fixture
def cells():
    return np.random.default_rng(1).standard_normal((2, 3, 5, 4)).astype(np.float16)


@pytest.fixture
def idle(monkeypatch):
    monkeypatch.setattr(bench_depth, "REST_S", 0)
    monkeypatch.setattr(bench_depth.bench_llama, "busy_cores", lambda: 0.0)


@pytest.fixture
def fake_engines(tmp_path, monkeypatch, idle):
    def install(n_vocab=49152):
        names = {"tools": str(TOOLS), "root": str(TOOLS.parent), "n_vocab": n_vocab}
        for name, body in (("LLAMA_WORKER", LLAMA), ("REPKV_WORKER", OURS)):
            path = tmp_path / f"{name}.py"
            path.write_text(body.format(**names))
            monkeypatch.setattr(bench_depth, name, path)
        monkeypatch.setattr(bench_depth, "prompt_tokens", lambda paths, model, n: list(range(n)))

    return install


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("n_cells", [1, 5, 12])
def test_cells_are_repeated_in_every_layer(cells, transposed, n_cells):
    source = np.arange(n_cells) % 5
    expected = state_of(*cells[:, :, source], transposed=transposed)
    repeated = repeat_cells(state_of(*cells, transposed=transposed), n_cells)
    assert repeated.dtype == np.uint8
    assert repeated.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        (0, 7, "unknown layout: magic 0x7, 1 streams, 5 cells"),
        (2, 2, "unknown layout: .* 2 streams"),
        (3, 0, "unknown layout: .* 0 cells"),
        (5, 2, "unknown layout of cells"),
        (7, 9, "unknown layout of cells"),
        (20, 2, "has 104 bytes more than expected"),
        (20, 4, "ends too early"),
        (22, 2**31, "ends too early"),
    ],
)
def test_a_state_of_another_layout_is_an_error(cells, word, value, message):
    state = state_of(*cells).copy()
    state.view("<u4")[word] = value
    with pytest.raises(ValueError, match=message):
        repeat_cells(state, 8)


def test_a_state_that_is_cut_off_is_an_error(cells):
    state = state_of(*cells)
    for n_bytes in (0, 15, 30, 77, len(state) - 1):
        with pytest.raises(ValueError, match="ends too early"):
            repeat_cells(state[:n_bytes], 8)


class FakeLlama:
    """The functions that states need. A state of n bytes stands for n tokens, of which `lost` get lost."""

    def __init__(self, n_tokens, lost=0, fails=False):
        self.n_tokens, self.lost, self.fails = n_tokens, lost, fails

    def llama_state_seq_get_size(self, context, sequence):
        return self.n_tokens

    def llama_state_seq_get_data(self, context, target, size, sequence):
        for i in range(size):
            target[i] = 7
        return size - self.fails

    def llama_state_seq_set_data(self, context, source, size, sequence):
        assert [source[i] for i in range(size)] == [7] * size
        self.n_tokens = size - self.lost
        return 0 if self.fails else size

    def llama_get_memory(self, context):
        return self

    def llama_memory_seq_pos_min(self, memory, sequence):
        return 0

    def llama_memory_seq_pos_max(self, memory, sequence):
        return self.n_tokens - 1


def engine_of(llama):
    engine = object.__new__(LlamaDepthEngine)
    engine._llama, engine._context = llama, None
    return engine


def test_states_are_written_and_restored():
    engine = engine_of(FakeLlama(4))
    assert engine.state().tolist() == [7] * 4
    engine.restore(np.full(9, 7, np.uint8), 9)
    assert engine._llama.n_tokens == 9


def test_a_state_that_is_not_restored_is_an_error():
    state = np.full(9, 7, np.uint8)
    with pytest.raises(RuntimeError, match="could not restore a state of 9 tokens"):
        engine_of(FakeLlama(4, fails=True)).restore(state, 9)
    with pytest.raises(RuntimeError, match="restored positions 0 to 6 instead of 0 to 8"):
        engine_of(FakeLlama(4, lost=2)).restore(state, 9)
    with pytest.raises(RuntimeError, match="could not write its state"):
        engine_of(FakeLlama(4, fails=True)).state()


class RecordingEngine:
    version, n_vocab = "fake", 10

    def __init__(self):
        self.n_past, self.calls = 0, []

    def open(self, n_ctx, flash_attn):
        self.n_past = 0

    def prefill(self, tokens):
        self.calls.append((self.n_past, len(tokens)))
        self.n_past += len(tokens)

    def rewind(self, n_past):
        assert n_past <= self.n_past
        self.n_past = n_past


@pytest.fixture
def worker():
    made = LlamaDepthWorker(RecordingEngine)
    made.load()
    made.open(n_ctx=2048, flash_attn=True)
    return made


def test_a_prompt_is_read_in_chunks(worker):
    assert len(worker.read([1] * 1100)["seconds"]) == 3
    worker.read([1] * 600)
    assert worker._engine.calls == [(0, 512), (512, 512), (1024, 76), (0, 512), (512, 88)]


def test_the_depth_stays(worker):
    worker.read([1] * 512)
    worker._engine.calls.clear()
    worker.time_chunk([1, 2, 3], depth=300)
    assert len(worker.time_tokens([1, 2], depth=200)["seconds"]) == 2
    # the first token is read once more, untimed
    assert worker._engine.calls == [(300, 3), (200, 1), (200, 1), (200, 1)]
    assert worker._engine.n_past == 200


def test_line_through_chunk_times():
    line = Line.fit((0, 1000, 2000), (1.0, 1.5, 2.0))
    assert (line.at_zero, line.per_token) == (pytest.approx(1.0), pytest.approx(0.0005))
    assert line.at(4000) == pytest.approx(3.0)
    # chunks at 0, 512 and half of one at 1024
    assert line.prompt(1280) == pytest.approx(1.0 + 1.256 + 1.512 / 2)
    # least squares: one point off moves the line by a share of that
    assert Line.fit((0, 1, 2), (0.0, 3.0, 0.0)).at(1) == pytest.approx(1.0)


def test_curve():
    curve = Curve(ON, (0, 512, 1024), ((1.0, 2.0, 3.0), (1.0, 2.2, 3.0), (2.0, 4.0, 6.0)))
    assert curve.medians == [1.0, 2.2, 3.0]
    assert curve.off_line == pytest.approx((2.2 - 6.2 / 3) / (6.2 / 3))
    assert list(curve.estimates(1024)) == pytest.approx([1024 / 3, 1024 / (2 * 6.2 / 3 - 1), 1024 / 6])
    assert curve.text().startswith(f"{ON}: ms of a chunk 1000 at 0, 2200 at 512, 3000 at 1024; line 1067 + 1953.1 per")


def test_an_estimate_from_chunks_off_their_line_is_rough(fake_engines, model, monkeypatch, capsys):
    fake_engines()
    for deepest, warned in ((5.5, False), (9.0, True)):
        seconds = (1.0, 2.0, 3.0, 4.0, deepest)
        monkeypatch.setattr(bench_depth, "chunk_seconds", lambda *_, seconds=seconds: seconds)
        assert call("-m", model, "-d", "1024", "-r", "1", "--only", "llama") == 0
        assert ("warning: llama.cpp -fa on is off its line" in capsys.readouterr().err) is warned


def test_speed_is_over_the_better_llama_and_a_prompt_that_was_read():
    prompt, chunk, decode = ("prefill whole prompt of 2048", "chunk of 512 at 2048", "decode at 2048")
    values = {
        ON: {
            (prompt, READ, "tokens/s"): [100, 100, 130],
            (prompt, ESTIMATED, "tokens/s"): [500],
            (decode, REPEATED, "ms/token"): [20],
            (chunk, REPEATED, "ms"): [900],
        },
        OFF: {(prompt, READ, "tokens/s"): [80], (decode, REPEATED, "ms/token"): [10]},
        "ours": {
            (prompt, READ, "tokens/s"): [300],
            (chunk, READ, "ms"): [300],
            (decode, READ, "ms/token"): [5],
        },
    }
    rows = rows_of(2048, values)
    assert [(row.measurement, row.engine, row.context, row.speed) for row in rows] == [
        (prompt, ON, READ, None),
        (prompt, ON, ESTIMATED, None),
        (prompt, OFF, READ, None),
        (prompt, "ours", READ, 3.0),
        (chunk, ON, REPEATED, None),
        (chunk, "ours", READ, 3.0),
        (decode, ON, REPEATED, None),
        (decode, OFF, REPEATED, None),
        (decode, "ours", READ, 2.0),
    ]
    assert rows[0].cells() == (prompt, ON, READ, "tokens/s", "100.00", "100.00", "130.00", "")
    assert Row(decode, 2048, "ours", READ, "ms/token", (5.0,)).against([]).speed is None


def test_last_whole_chunk():
    assert bench_depth.last_whole_chunk([512, 1024, 1500, 1501], [4.0, 5.0, 6.0, 7.0]) == 5.0
    with pytest.raises(RepkvError, match="ours read no chunk of 512 tokens"):
        bench_depth.last_whole_chunk([500, 1000], [1.0, 1.0])


def test_memory_options():
    memory = memory_of("--kv repkv --top-blocks 3 -fa off")
    assert (memory.kv, memory.top_blocks, memory.flash_attn, memory.n_batch) == ("repkv", 3, False, 512)
    for bad in ("--kv", "--kv x", "-c 5", "-b 64", "--n-local 1", "'", "--wat", "x"):
        with pytest.raises(InputError) as error:
            memory_of(bad)
        assert str(error.value).startswith(f"--ours {bad!r}: ")
        assert "see --ours" not in str(error.value)


def test_rounds(fake_engines, model, tmp_path, capsys):
    fake_engines()
    path = tmp_path / "out.json"
    argv = ["-m", model, "-d", "1024,2100", "-r", "2", "-t", "1", "--full-up-to", "1024", "-fa", "both"]
    assert call(*argv, "--ours", "--kv repkv --top-blocks 3", "--json", str(path)) == 0
    out, err = capsys.readouterr()
    report = json.loads(path.read_text())
    deep, shallow = [], []
    for row in report["rows"]:
        (shallow if row["depth"] == 1024 else deep).append((row["measurement"], row["engine"], row["context"]))
        assert len(row["values"]) == 2
        assert min(row["values"]) > 0
        assert (row["speed"] is not None) == (row["engine"] == "ours")
    contexts = {ON: (READ, REPEATED), OFF: (READ, REPEATED), "ours": (READ,)}
    steps = ("chunk of 512 at 1024", "decode at 1024")
    assert set(shallow) == {(step, name, each) for step in steps for name in contexts for each in contexts[name]} | {
        ("prefill whole prompt of 1024", name, each) for name in (ON, OFF) for each in (READ, ESTIMATED)
    } | {("prefill whole prompt of 1024", "ours", READ)}
    assert {context for _, name, context in deep if name != "ours"} == {REPEATED, ESTIMATED}
    (ours,) = (row for row in report["rows"] if (row["engine"], row["measurement"]) == ("ours", "chunk of 512 at 2100"))
    assert ours["values"] == pytest.approx([512, 512])
    assert [curve["depths"] for curve in report["curves"]][::2] == [
        [0, 256, 512, 768, 1024],
        [0, 525, 1050, 1575, 2100],
    ]
    assert out.splitlines()[0] == "model.gguf, -t 1, -r 2, ours --kv repkv --top-blocks 3, fake llama, fake ours"
    assert err.splitlines()[:3] == [f"depth 1024, round 1 of 2: {name}" for name in (ON, OFF, "ours")]


def test_one_engine_alone(fake_engines, model, capsys):
    fake_engines()
    assert call("-m", model, "-d", "1024", "-r", "1", "--only", "llama") == 0
    out = capsys.readouterr().out
    assert "  ours  " not in out
    argv = ["-m", model, "-d", "1024", "-r", "1", "--only", "ours", "--llama-python", "/no/python"]
    assert call(*argv, "--ours", "--kv repkv --top-blocks 3") == 0
    assert "llama" not in capsys.readouterr().out


def test_another_vocabulary_is_an_error(fake_engines, model, capsys):
    fake_engines(n_vocab=7)
    assert call("-m", model, "-d", "1024", "--ours", "--kv repkv --top-blocks 3") == 1
    assert capsys.readouterr().err.startswith("error: the engines disagree on the number of tokens")


def test_texts_are_read_one_after_the_other_and_repeated(tiny_model, tmp_path):
    path = tiny_model()
    for name, text in (("a", "xy"), ("b", "z")):
        (tmp_path / name).write_text(text)
    once = Tokenizer.from_metadata(GGUFFile.open(path).metadata).encode("xy\nz")
    n_tokens = 2 * len(once) + 1
    assert bench_depth.prompt_tokens([tmp_path / "a", tmp_path / "b"], path, n_tokens) == (once * 3)[:n_tokens]
    (tmp_path / "b").write_text("")
    with pytest.raises(InputError, match="no tokens in it; give a text"):
        bench_depth.prompt_tokens([tmp_path / "b"], path, 5)


def test_our_own_engine(tiny_model, tmp_path, monkeypatch, idle, capsys):
    monkeypatch.setenv("PYTHONPATH", str(TOOLS.parent))
    path = tmp_path / "out.json"
    argv = ["-m", str(tiny_model()), "-d", "1024", "-r", "2", "-t", "1", "--only", "ours", "--ours", "--kv full"]
    assert call(*argv, "--json", str(path)) == 0, capsys.readouterr().err
    assert [row["measurement"] for row in json.loads(path.read_text())["rows"]] == [
        "prefill whole prompt of 1024",
        "chunk of 512 at 1024",
        "decode at 1024",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-d", ""], "--depths is empty"),
        (["-d", "1000"], "-d/--depths: must be a whole number from 1024"),
        (["-r", "0"], "-r/--rounds: must be a whole number from 1"),
        (["--full-up-to", "x"], "--full-up-to: must be a whole number from 0"),
        (["--ours", "--kv wat"], "--ours '--kv wat': argument --kv: "),
        (["--only", "x"], "--only: invalid choice"),
        (["--text", "/no/text"], "/no/text: No such file or directory"),
        (["--json", "/no/folder/out"], "/no/folder/out: No such file or directory; --json takes"),
        (["--wat"], "unrecognized arguments: --wat"),
    ],
)
def test_bad_usage_is_one_line(argv, message, model, capsys):
    assert call("-m", model, *argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_without_llama_cpp_the_remedy_is_named(tmp_path, monkeypatch, fake_engines, model, capsys):
    worker = bench_depth.LLAMA_WORKER
    fake_engines()
    monkeypatch.setattr(bench_depth, "LLAMA_WORKER", worker)
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('No module named llama_cpp')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert call("-m", model, "--only", "llama") == 1
    assert capsys.readouterr().err.endswith(
        "No module named llama_cpp: give an interpreter that has llama-cpp-python with --llama-python\n"
    )
