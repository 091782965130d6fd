"""report.py: stored results are not measured again, and the page shows them."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import _report_page
import _report_stored
import pytest
import report
from _common import run_tool
from _report_pictures import PICTURES, draw
from _report_stored import Stored

SPEED = {
    "build": "ours 1", "model_filename": "m.gguf", "model_type": "qwen2 1M F32", "n_threads": 2,
    "test_time": "2026-01-02T03:04:05+00:00", "resident_kv_bytes": 5_000_000, "peak_rss_bytes": 9_000_000,
    "depth_is": "read", "engine": "pyggml_repkv", "vs": {}, "peak_gbytes_per_second": 16.0,
}  # fmt: skip


def speeds(depth, policy, chunk_ts, token_ts, **fields):
    common = {**SPEED, "n_depth": depth, "policy": policy, **fields}
    return [
        {**common, "n_prompt": 512, "n_gen": 0, "test": f"pp512 @ d{depth}", "median_ts": chunk_ts,
         "of_memory_bandwidth": None},
        {**common, "n_prompt": 0, "n_gen": 32, "test": f"tg32 @ d{depth}", "median_ts": token_ts,
         "of_memory_bandwidth": 0.42},
    ]  # fmt: skip


def answer(task, kv, length, found, index=0, n_depths=3, seed=1, **memory):
    result = {"task": task, "kv": kv, "length": length, "found": found}
    asked = {"length": length, "depth_index": index, "n_depths": n_depths}
    settings = {"task": task, "seed": seed, "asked": asked, "memory": {"kv": kv, "n_ctx": length + 64, **memory}}
    return json.dumps({"settings": settings, "result": result}) + "\n"


@pytest.fixture
def stored(tmp_path):
    """A folder with a result of each kind."""
    results = tmp_path / "results"
    results.mkdir()
    ratio = {"llama.cpp -fa on": {"median": 9.0, "min": 8.0, "max": 9.5},
             "llama.cpp -fa off": {"median": 2.0, "min": 1.5, "max": 2.5}}  # fmt: skip
    llama = {"engine": "llama.cpp", "resident_kv_bytes": None}
    files = {
        "text": {"name": "book.txt", "bytes": 1234567, "sha256": "ab" * 32},
        "machine": {"cpu_info": "A CPU", "n_threads": 2, "peak_gbytes_per_second": 20.04, "peak_gflops": 300.4,
                    "types": [{"type": "Q4_1", "gflops": 123.4, "gbytes_per_second": 5.67}]},
        "speed": [*speeds(0, "repkv", 500.4, 100.0, vs=ratio), *speeds(0, "llama.cpp -fa on", 50.0, 11.0, **llama),
                  *speeds(0, "llama.cpp -fa off", 250.0, 50.0, **llama)],
        "speed_deep": speeds(32768, "full", 100.0, 10.0, depth_is="repeated"),
        "perplexity": {"stretches": {"window": [{"begin": 0, "end": 2048, "nll": 0.0}],
                                     "repkv": [{"begin": 0, "end": 2048, "nll": 1.0}]}},
        "perplexity_full": {"stretches": {"full": [{"begin": 0, "end": 2048, "nll": 2.0}]}},
        "fidelity_8": {"stretches": {"repkv": [
            {"begin": 0, "end": 100, "nll": 1.0, "kl": 9.0, "top1": 0.1},
            {"begin": 100, "end": 200, "nll": 1.0, "kl": 0.5, "top1": 0.9},
            {"begin": 200, "end": 500, "nll": 1.0, "kl": 0.1, "top1": 0.5}]}},
        "recall": {
            "n_tokens": 8000, "chunk": {"indexes": {"tokens:4": {"hits": 0.5, "mass": 0.25, "worst": None}}},
            "decode": {"indexes": {"tokens:4": {"hits": 0.9, "mass": 0.8, "worst": {"hits": 0.7, "layer": 3}}}},
        },
        "recall_json": {
            "n_tokens": 7990, "chunk": {"indexes": {"exact": {"hits": None, "mass": None, "worst": None}}},
            "decode": {"indexes": {"exact": {"hits": None, "mass": 0.1, "worst": None}}},
        },
        **{
            name: [{"median_ts": ts, "prefetch_hit": hit, "ram_bytes": 7e6, "disk_bytes": 8e7, "peak_rss_bytes": 2e8}]
            for name, ts, hit in (("ram", 50, None), ("disk", 40, 0.8), ("ram_late", 50, None), ("disk_late", 49, 1.0))
        },
        "trace": {"traceEvents": [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "steps"}},
            *({"ph": "X", "pid": 1, "tid": tid, "name": "x", "ts": ts, "dur": dur}
              for ts in (0.0, 1000.0) for tid, dur in ((1, 900.0), (2, 300.0), (4, 50.0), (10, 40.0)))]},
    }  # fmt: skip
    for name, value in files.items():
        (results / f"{name}.json").write_text(json.dumps(value))
    lines = [answer("passkey", "repkv", 8000, False), answer("passkey", "repkv", 8000, True),
             answer("passkey", "repkv", 8000, False, 1), answer("passkey", "full", 64000, False, n_depths=1),
             answer("passkey", "window", 16000, False)]  # fmt: skip
    (results / "passkey.jsonl").write_text("".join(lines))
    return tmp_path


def test_the_page_says_what_is_stored(stored, capsys):
    assert run_tool(report.main, ["--page-only", "--docs", str(stored)]) == 0
    text = (stored / "RESULTS.md").read_text()
    for line in (
        "ours 1; m.gguf (qwen2 1M F32), 2 threads, 2026-01-02.",
        "Text: book.txt, 1,234,567 bytes, SHA-256 abababababababab...",
        "Machine: A CPU, 2 threads: 20.0 GB/s from memory (the best of all runs), 300 GFLOP/s",
        "| Q4_1 | 123 | 5.7 |",
        # 42 % of 16 GB/s, as a share of 20.04; the ratio is to the better llama.cpp, -fa off.
        "| 0 | `repkv` | 500 | 10.0 | 34 % | 5 MB | 9 MB | 2.00 (1.50 to 2.50) | 2.00 (1.50 to 2.50) |",
        "| 32,768* | `full` | 100 | 100.0 | 34 % | 5 MB | 9 MB |  |  |",
        # The last answer to a question counts.
        "| `passkey` | `repkv` | 1 of 2 |  |",
        "| `passkey` | `window` |  | 0 of 1 |",
        "| 0 to 2,048 | 7.39 | 1.00 | 2.72 |",
        # The mean leaves out the first stretch, which the window holds, and is weighted by tokens.
        "| `repkv`, 1,024 tokens | 2,112 | 0.2000 | 60.0 % | 0.5000 | 0.1000 |",
        "| prose, 8,000 tokens | `tokens:4` | 0.900 | 0.800 | 0.700 (3) | 0.500 | 0.250 |",
        "| JSON, 7,990 tokens | `exact` |  | 0.100 |  |  |  |",
        "| default | 20.0 | 25.0 | 80.0 % | 7 MB | 80 MB | 200 MB | 200 MB |",
        "| `--sticky 1.4 --late` | 20.0 | 20.4 | 100.0 % |",
        "python -m pyggml_repkv bench --machine -o json",
    ):
        assert line in text
    # The page lists the commands of stored results.
    assert "\npython -m pyggml_repkv eval passkey --lengths 8000 --depths 3 --kv repkv\n" in text
    commands = text.rpartition("## Commands")[2].splitlines()
    assert len(set(commands) - {"", "```"}) == len([line for line in commands if line not in ("", "```")])
    assert "eval number" not in text
    for name in PICTURES:
        assert (stored / name).stat().st_size > 5000
        assert name in text
    assert capsys.readouterr().err.startswith(f"wrote {stored}/RESULTS.md")


def test_answers_of_other_settings_are_left_out(tmp_path):
    lines = [
        answer("passkey", "repkv", 8000, True, seed=2), answer("passkey", "repkv", 8000, True, 1, n_local=64),
        answer("passkey", "full", 8000, True, seed=2), answer("passkey", "repkv", 8000, True, 1, 5, n_local=1024),
        answer("passkey", "repkv", 8000, True, n_local=1024), answer("passkey", "repkv", 8000, False, n_local=1024),
        answer("passkey", "window", 8000, True, n_local=64),
    ]  # fmt: skip
    (tmp_path / "passkey.jsonl").write_text("".join(lines) + '{"settings": {"half')
    assert _report_stored.counts_of(Stored(tmp_path)) == {
        ("passkey", "repkv", 8000): (0, 1), ("passkey", "window", 8000): (1, 1),
    }  # fmt: skip


def test_commands_are_those_of_stored_results(tmp_path):
    (tmp_path / "passkey.jsonl").write_text(
        answer("passkey", "repkv", 8000, True) + answer("passkey", "full", 8000, True)
    )
    (tmp_path / "machine.json").write_text("{}")
    found = [step.of_what_is_stored(Stored(tmp_path)) for step in report.steps("x", llama=True)]
    assert [step.line().split(" ", 3)[3] for step in found if step] == [
        "eval passkey --lengths 8000 --depths 3 --kv full,repkv", "bench --machine -o json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recall.json", "{", "recall.json is not JSON"),
        ("number.jsonl", "x\n", "number.jsonl is not JSON"),
        ("number.jsonl", "{}\n", "a result is not what this version writes (KeyError"),
        ("number.jsonl", '{"settings": [], "result": {"kv": "full"}}\n', "a result is not what this version writes"),
        ("number.jsonl", '{"settings": {}, "result": []}\n', "a result is not what this version writes"),
        ("text.json", '{"a": 1}', "a result is not what this version writes (KeyError: 'name')"),
        ("machine.json", '{"a": 1}', "a result is not what this version writes"),
        ("speed.json", '{"a": 1}', "a result is not what this version writes"),
        ("recall.json", "[]", "a result is not what this version writes"),
        ("recall.json", "[1]", "a result is not what this version writes"),
    ],
)
def test_a_damaged_result_is_one_line(stored, capsys, name, content, message):
    (stored / "results" / name).write_text(content)
    assert run_tool(report.main, ["--page-only", "--docs", str(stored)]) == 2
    err = capsys.readouterr().err
    assert (message in err, err.count("\n")) == (True, 1)


def test_a_text_that_is_not_told_is_one_line(stored, tmp_path, capsys):
    (stored / "results/text.json").write_text("{}")
    (tmp_path / "other.txt").write_text("prose")
    assert run_tool(report.main, ["--text", str(tmp_path / "other.txt"), "--docs", str(stored)]) == 2
    assert "does not say which text it was" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["/no/folder", __file__])
def test_no_folder_is_one_line(folder, capsys):
    assert run_tool(report.main, ["--page-only", "--docs", folder]) == 2
    assert capsys.readouterr().err == f"error: --docs {folder}: no such folder\n"


def test_what_is_not_stored_is_left_out(tmp_path):
    assert _report_page.page(Stored(tmp_path), ["x"]).count("#") == 3
    assert draw(Stored(tmp_path), tmp_path) == []


def test_only_what_is_missing_is_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "book.txt").write_text("prose")
    ran = []

    def run(command, **_):
        ran.append(command[3:])
        if "-o" in command and command[-1].endswith(".part"):
            Path(command[-1]).write_text("{}")
        if "--out" in command:
            with open(command[-1], "a") as file:
                file.write(answer("passkey", "repkv", 8000, True))
        value = {"text": str(tmp_path / "book.txt"), "stretches": {}}
        return SimpleNamespace(returncode=0, stdout=json.dumps(value))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(report, "write_report", lambda *_: [])
    argv = ["--text", str(tmp_path / "book.txt"), "--docs", str(tmp_path), "--llama-python", "py"]
    assert run_tool(report.main, argv) == 0
    files = [step.file for step in report.steps("x", llama=True)]
    assert len(ran) == len(files)
    # Folders of this machine are not stored.
    assert json.loads((tmp_path / "results/perplexity.json").read_text())["text"] == "book.txt"
    assert [c for c in ran if "py" in c] == [c for c in ran if "--vs" in c] != []
    ran.clear()
    (tmp_path / "results/recall.json").unlink()
    assert run_tool(report.main, argv) == 0
    # Retrieval runs again: `eval` knows which answers it has.
    assert {c[1] for c in ran} == {"passkey", "number", "kv", "niah", "recall"}


def test_a_failure_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "book.txt").write_text("prose")
    codes = iter([0] * len(report.RETRIEVAL) + [0, 1])
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=next(codes), stdout="{}"))
    assert run_tool(report.main, ["--text", str(tmp_path / "book.txt"), "--docs", str(tmp_path)]) == 1
    assert "exit code 1; what was measured is kept" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "results/perplexity.json").exists()
    assert not (tmp_path / "results/perplexity_full.json").exists()


def test_results_of_another_text_are_not_mixed(stored, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("prose")
    assert run_tool(report.main, ["--text", str(tmp_path / "other.txt"), "--docs", str(stored)]) == 2
    assert "are of another text (book.txt)" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "message"), [([], "give a text"), (["--text", "/no/file"], "No such file")])
def test_bad_usage_is_one_line(argv, message, tmp_path, capsys):
    assert run_tool(report.main, [*argv, "--docs", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert (message in err, err.count("\n")) == (True, 1)
