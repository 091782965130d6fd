"""bench_llama.py: turns, medians, the direction of the speed ratio, warnings."""

import json
import time

import _memory
import bench_llama
import pytest
from _engines import run_tool
from bench_llama import LLAMA_NAMES, OUR_NAMES, Measurement, load_warnings, row_of, rows_of, spread_warnings

NAMES = LLAMA_NAMES + OUR_NAMES


def call(*argv):
    return run_tool(bench_llama.main, argv)


@pytest.fixture
def idle(monkeypatch):
    monkeypatch.setattr(bench_llama, "REST_S", 0)
    monkeypatch.setattr(bench_llama, "busy_cores", lambda: 0.0)


def values_of(measurement, *columns):
    return {(measurement, name): list(column) for name, column in zip(NAMES, columns, strict=True)}


def test_more_tokens_per_second_is_faster():
    prefill = Measurement(512)
    values = values_of(prefill, (100, 110, 90), (80, 80, 80), (200, 300, 100), (50, 50, 50))
    on, off, ours, exact = rows_of([prefill], values)
    assert (on.speed, off.speed, ours.speed, exact.speed) == (None, None, 2.0, 0.5)
    assert ours.cells() == ("prefill 512", "ours", "tokens/s", "200.00", "100.00", "300.00", "3.00", "2.00")


def test_fewer_milliseconds_per_token_are_faster():
    decode = Measurement(64, 0)
    values = values_of(decode, (20, 20), (10, 10), (5, 5), (40, 40))
    assert row_of(decode, "ours", values).speed == 2.0
    assert row_of(decode, "ours --exact-graph", values).speed == 0.25
    assert row_of(decode, "ours", values).measurement == "decode 64 at 0"


def test_warnings():
    decode = Measurement(64, 0)
    rows = rows_of([decode], values_of(decode, (10, 12), (10, 13), (10, 14), (10, 10)))
    assert spread_warnings(rows) == ["decode 64 at 0 of ours varies by a factor of 1.40 (above 1.3)"]
    assert load_warnings([0.0, 0.1]) == []
    assert load_warnings([0.0, 1.25])[0].startswith("other programs kept up to 1.2 of the cores busy")


def test_busy_ticks_count_what_computes():
    start = bench_llama._busy_ticks()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    assert bench_llama._busy_ticks() - start >= 0.2 * bench_llama.os.sysconf("SC_CLK_TCK")


def test_rounds(fakes, model, idle, capsys):
    fakes()
    assert call("-m", model, "-p", "4,9", "-n", "2", "-d", "0,300", "-r", "2", "-t", "1", "--json") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert [(row["measurement"], row["engine"]) for row in report["rows"]] == [
        (name, engine) for name in ("prefill 4", "prefill 9", "decode 2 at 0", "decode 2 at 300") for engine in NAMES
    ]
    assert all(len(row["values"]) == 2 and min(row["values"]) > 0 for row in report["rows"])
    assert (report["n_rounds"], report["memory"]) == (2, [])
    assert err.splitlines()[:3] == ["warm-up", "round 1 of 2", "round 2 of 2"]


def test_engines_take_turns_and_the_warm_up_is_not_counted(fakes, model, idle, monkeypatch, capsys):
    fakes()
    taken = []

    def take(self, engine, stream):
        taken.append((self.name, engine.name))
        return float(len(taken))

    monkeypatch.setattr(Measurement, "take", take)
    assert call("-m", model, "-p", "4", "-n", "2", "-d", "0", "-r", "1", "--json") == 0
    turns = [LLAMA_NAMES[0], "ours", LLAMA_NAMES[1], "ours --exact-graph"]
    assert taken == [(name, engine) for name in ("prefill 4", "decode 2 at 0") for engine in turns] * 2
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["values"] for row in rows] == [[9.0], [11.0], [10.0], [12.0], [13.0], [15.0], [14.0], [16.0]]


def test_table_and_warnings(fakes, model, idle, monkeypatch, capsys):
    fakes()
    numbers = iter(range(1, 100))
    monkeypatch.setattr(Measurement, "take", lambda *_: float(next(numbers)))
    assert call("-m", model, "-p", "4", "-d", "", "-r", "2", "-t", "1") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "model.gguf, -t 1, -r 2, fake 1, fake 1"
    assert len(out.splitlines()) == 2 + len(NAMES)
    assert "warning: prefill 4 of ours varies by a factor of 1.67 (above 1.3)" in err


def test_memory_of_runs(tiny_model, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(bench_llama.Path(bench_llama.__file__).parents[1]))
    path = tiny_model(n_ctx=256)
    assert call("-m", str(path), "-p", "", "-d", "", "-r", "1", "-t", "1", "--memory", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = report["memory"]
    assert report["rows"] == []
    assert row["file_bytes"] == path.stat().st_size
    assert row["limit_bytes"] == row["file_bytes"] + row["kv_bytes"] + 60_000_000
    assert min(row["load_ms"], row["peak_rss_bytes"], row["kv_bytes"], row["n_prompt"]) > 0


def test_memory_takes_the_worst_peak_and_the_median_load(monkeypatch, model):
    peaks = iter([(5e6, 10), (9e7, 30), (6e6, 20)])

    def run(*_):
        peak, load_ms = next(peaks)
        kv = {"resident_bytes": 2000}
        return {"prompt_tokens": 9, "load_ms": load_ms, "peak_rss_bytes": int(peak), "kv": kv}

    monkeypatch.setattr(_memory, "_run", run)
    (row,) = _memory.measure_memory(bench_llama.Path(model), 1, (), 3)
    assert (row.load_ms, row.peak_rss_bytes, row.limit_bytes) == (20, 90_000_000, 60_003_000)
    assert row.cells()[0] == "9 + 32 tokens"
    assert row.cells()[-1] == "no"


def test_a_run_that_fails_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(bench_llama.Path(bench_llama.__file__).parents[1]))
    (tmp_path / "bad.gguf").write_bytes(b"no")
    assert call("-m", str(tmp_path / "bad.gguf"), "-p", "", "-d", "", "--memory") == 1
    assert "bad.gguf" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-p", "", "-d", ""], "nothing to measure"),
        (["-p", "0"], "-p/--prompts: must be a whole number from 1"),
        (["-r", "0"], "-r/--rounds: must be a whole number from 1"),
        (["-n", "0"], "-n/--n-decode: must be a whole number from 1"),
    ],
)
def test_bad_usage_is_one_line(argv, message, model, capsys):
    assert call("-m", model, *argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
