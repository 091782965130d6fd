import json
import math
import os
import re
import sys
from types import SimpleNamespace

import pytest

from pyggml_repkv.cli import options
from pyggml_repkv.errors import ComputeError, StoreError
from pyggml_repkv.memory import config, registry
from pyggml_repkv.model.rope_options import RopeOptions

JSON_KEYS = {
    "text",
    "tokens",
    "prompt_tokens",
    "predicted_tokens",
    "load_ms",
    "prompt_ms",
    "predicted_ms",
    "prompt_per_second",
    "predicted_per_second",
    "peak_rss_bytes",
    "kv",
}


def test_the_text_goes_to_stdout_and_the_rest_to_stderr(run, model):
    done = run("--greedy")
    assert (done.code, done.out) == (0, "Hello, world\n")
    assert "using the demo model demo.gguf" in done.err
    assert model.prompt == list(b"Hi")
    assert model.closed == ["session", "model"]


def test_the_timings_have_llama_cpps_layout(run):
    budget, *lines = run("--greedy", "-m", "x.gguf").err.splitlines()
    each = r"\(\s*[\d.]+ ms per token,\s*[\d.]+ tokens per second\)"
    patterns = (
        r"perf:        load time =\s+12\.50 ms",
        rf"perf: prompt eval time =\s+[\d.]+ ms /\s+2 tokens {each}",
        rf"perf:        eval time =\s+[\d.]+ ms /\s+12 runs   {each}",
        r"perf:       total time =\s+[\d.]+ ms /\s+14 tokens",
        r"perf:    finish reason = eos",
        r"perf:           memory = 0 kB of keys and values, peak RSS [\d.]+ [MG]B",
    )
    assert budget.startswith("pyggml_repkv: memory for up to 256 tokens: 1 MB (weights 1 MB, keys and values 26 kB); ")
    assert len(lines) == 6
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), line


def test_quiet_leaves_stderr_empty(run):
    assert run("--quiet").err == ""


def test_json_is_one_object_and_nothing_else(run):
    done = run("--json", "--seed", "5", "-n", "4")
    assert done.code == 0
    assert done.out.count("\n") == 1
    answer = json.loads(done.out, parse_constant=lambda name: pytest.fail(name))
    assert answer.keys() == JSON_KEYS | {"finish_reason", "seed"}
    assert (answer["text"], answer["tokens"]) == ("Hell", list(b"Hell"))
    assert (answer["prompt_tokens"], answer["predicted_tokens"], answer["load_ms"]) == (2, 4, 12.5)
    assert (answer["finish_reason"], answer["seed"]) == ("length", 5)
    assert answer["peak_rss_bytes"] > 1e6
    assert answer["kv"] == {"policy": "full", "blocks": 0}
    assert all(math.isfinite(value) for value in answer.values() if isinstance(value, float))


def test_json_without_a_step_has_no_nan(run):
    answer = json.loads(run("--json", "-n", "0").out)
    assert (answer["predicted_ms"], answer["predicted_per_second"], answer["text"]) == (0, 0, "")


def test_every_option_reaches_its_place(run, model):
    run(
        "-m",
        "x.gguf",
        "-t",
        "3",
        "--no-repack",
        "--exact-graph",
        "--no-normalize",
        "-c",
        "99",
        "-b",
        "7",
        "-ctk",
        "q8_0",
        "-ctv",
        "bf16",
        "--rope-scaling",
        "yarn",
        "--rope-scale",
        "4",
        "--rope-freq-base",
        "5e5",
        "--yarn-orig-ctx",
        "32768",
    )
    loaded = {"threads": 3, "repack": False, "exact_graph": True, "normalize": False}
    assert model.loaded == ("x.gguf", loaded | {"rope": RopeOptions("yarn", 4.0, 5e5, 32768)})
    memory = model.memory
    assert (memory.kv, memory.n_ctx, memory.n_batch, memory.type_k, memory.type_v) == (
        "full",
        99,
        7,
        "q8_0",
        "bf16",
    )


def test_the_defaults_are_the_librarys(run, model):
    from pyggml_repkv.cli.run import _config
    from pyggml_repkv.engine.generate import GenerationConfig

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyggml_repkv.cli.run._config", lambda args: seen.append(_config(args)) or seen[0])
        run()
    assert set(seen) == {GenerationConfig()}
    expected = {"threads": options.default_threads(), "repack": True, "exact_graph": False, "normalize": None}
    assert model.loaded[1] == expected | {"rope": RopeOptions()}
    assert (model.memory.n_ctx, model.memory.n_batch, model.memory.type_k) == (256, 512, "f16")


def test_the_choices_are_what_the_memory_offers():
    assert tuple(registry.POLICIES) == options.KV_POLICIES
    assert set(options.CACHE_TYPES) == set(config.CACHE_TYPES)


def test_default_threads_are_at_most_the_cpus_of_the_process():
    assert 1 <= options.default_threads() <= len(os.sched_getaffinity(0))


def test_a_drawn_seed_is_said_and_reproduces_the_text(run, model):
    model.reply = ""
    first = run("--temp", "90", "--top-k", "0", "--top-p", "1", "--min-p", "0", "-n", "20", "--ignore-eos")
    seed = re.search(r"seed: (\d+)", first.err)[1]
    again = run("--temp", "90", "--top-k", "0", "--top-p", "1", "--min-p", "0", "-n", "20", "--ignore-eos", "-s", seed)
    assert first.out == again.out
    assert len(first.out) > 5


def test_the_file_comes_before_the_prompt_byte_for_byte(run, model, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes("über\r\n\n".encode())
    run("-f", str(file), prompt="?")
    assert bytes(model.prompt) == "über\r\n\n?".encode()
    run("-f", str(file), prompt=None)
    assert bytes(model.prompt) == "über\r\n\n".encode()


@pytest.mark.parametrize("given", ["-f", "-p"])
def test_a_byte_order_mark_is_no_text(run, model, tmp_path, monkeypatch, given):
    """Of UTF-8: dropped at the start, and only there; of UTF-16: the text must be converted."""
    file = tmp_path / "prompt.txt"

    def said(data):
        file.write_bytes(data)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read=lambda: data)))
        return run("-f", str(file), "-q", prompt=None) if given == "-f" else run("-q", prompt="-")

    assert said(b"\xef\xbb\xbfa\xef\xbb\xbfb").code == 0
    assert bytes(model.prompt) == b"a\xef\xbb\xbfb"
    for encoding in ("utf-16-le", "utf-16-be"):
        done = said("\ufeffab".encode(encoding))
        assert done.code == 2
        assert "UTF-16 text; convert it to UTF-8" in done.error_line


def test_a_dash_reads_stdin(run, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read=lambda: b"from a pipe\n")))
    run(prompt="-")
    assert bytes(model.prompt) == b"from a pipe\n"


@pytest.mark.parametrize("prompt", ["-n 5", "--help", "-5", "--", "-x=3", "- item"])
def test_a_prompt_may_begin_with_a_dash(run, model, prompt):
    assert run(prompt=prompt).code == 0
    assert bytes(model.prompt) == prompt.encode()


def test_special_tokens_in_the_prompt(run, model):
    run(prompt="<s>a")
    assert model.prompt == [257, ord("a")]
    run("--no-parse-special", prompt="<s>a")
    assert bytes(model.prompt) == b"<s>a"


def test_chat_applies_the_template(run, model):
    run("--chat", "--system", "Be brief", prompt="Why?")
    assert model.prompt == [257, *b"system:Be brief", 257, *b"user:Why?"]
    model.tokenizer.add_bos = True
    run("--chat", prompt="Why?")
    assert model.prompt == [257, *b"user:Why?"]


def test_what_is_shown_besides_the_text(run):
    assert run("--display-prompt", "--greedy").out == "HiHello, world\n"
    assert run("--special", "--greedy").out == "Hello, world<end>\n"
    assert "prompt: 2 tokens\n    72 -> 'H'\n   105 -> 'i'\n" in run("--verbose-prompt").err


def test_text_that_ends_a_line_gets_no_second_end(run, model):
    model.reply = "done\n"
    assert run("--greedy").out == "done\n"
    assert run("--greedy", "-n", "0").out == ""


def test_stop_strings_may_repeat(run):
    assert run("--greedy", "--stop", "zzz", "-r", "o, w").out == "Hell\n"


def test_a_full_context_is_said_even_when_quiet(run):
    done = run("--greedy", "-q", "-c", "6")
    assert (done.code, done.out) == (0, "Hello\n")
    assert "cut off after 5 tokens: the context of 6 is full" in done.error_line
    assert json.loads(run("--json", "-c", "6").out)["finish_reason"] == "context"


def test_what_ended_the_text_is_said(run, model):
    def reason(*argv):
        return json.loads(run("--json", "--greedy", *argv).out)["finish_reason"]

    assert [reason(), reason("-r", "wor"), reason("-n", "3"), reason("-c", "6")] == ["eos", "stop", "length", "context"]
    assert "perf:    finish reason = stop\n" in run("--greedy", "-r", "wor").err
    model.failure = ("decode", KeyboardInterrupt())
    assert "perf:    finish reason = interrupted\n" in run().err


def test_without_a_number_there_is_a_limit_and_it_is_said(run):
    done = run("--kv", "window", "--greedy", "--ignore-eos", "-q")
    assert (done.code, len(done.out)) == (0, 256 + 1)
    assert "cut off after 256 tokens without an end; -n N allows more, -n -2" in done.error_line
    assert run("--kv", "window", "--greedy", "--ignore-eos", "-q", "-n", "300").err == ""
    assert "cut off after 399 tokens: the context" in run("--greedy", "--ignore-eos", "-n", "-2", "-c", "400").err


@pytest.mark.parametrize(
    ("n_prompt", "argv", "n_ctx"),
    [
        (100, [], 0),
        (100, ["-n", "2000000000"], 0),
        (300, [], 2**20),
        (2**20 - 1, [], 2**20 + 255),
        (2**20 + 5, [], 2**20 + 261),
        (2**20 + 5, ["-n", "1000"], 2**20 + 1005),
        (2**20 + 5, ["-n", "-2"], 2**21 + 5),
        (2**20 + 5, ["-n", "2000000000"], 2**21 + 5),
    ],
)
def test_an_unbounded_context_holds_the_prompt_and_what_is_generated(run, model, n_prompt, argv, n_ctx, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"x" * n_prompt)
    run("--kv", "window", "-f", str(file), "-q", "-r", "H", "--greedy", *argv, prompt=None)
    assert model.memory.n_ctx == n_ctx


@pytest.mark.parametrize(
    ("n_prompt", "argv", "n_ctx"),
    [
        (100, [], 0),
        (2**20 - 5, ["-n", "5"], 0),
        (2**20 - 5, ["-n", "6"], 2**20 + 1),
        (2**20 + 5, ["-n", "1000"], 2**20 + 1005),
        (100, ["-n", "-2"], 2**20 + 100),
        (2**21 - 5, ["-n", "1000"], 2**21),
        (2**21 + 1, ["-n", "1000"], 2**21 + 1001),
    ],
)
def test_a_prompt_within_a_trained_context_above_a_million_fits(run, model, n_prompt, argv, n_ctx, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"x" * n_prompt)
    model.config.n_ctx_train = 2**21
    run("--kv", "window", "-f", str(file), "-q", "-r", "H", "--greedy", *argv, prompt=None)
    assert model.memory.n_ctx == n_ctx


@pytest.mark.parametrize(
    ("argv", "remedy"),
    [
        (["-c", "256"], "a larger -c holds more, or --kv repkv"),
        (["-c", "400"], "a larger -c holds more, or --kv repkv"),
        (["-c", "255"], "a larger -c holds more"),
        (["-c", "400", "--kv", "window"], "a larger -c holds more"),
    ],
)
def test_where_the_trained_context_is_full_another_memory_is_named(run, argv, remedy):
    done = run("--greedy", "--ignore-eos", "-n", "-2", "-q", *argv)
    n_ctx = argv[1]
    assert done.err.splitlines()[-1].endswith(f": the context of {n_ctx} is full; {remedy}")


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["-n", "10"], "memory for 12 tokens: 2 MB"),
        (["-n", "0"], "memory for 2 tokens: 1 MB"),
        ([], "memory for up to 256 tokens: 27 MB"),
        (["-c", "1000"], "memory for up to 258 tokens: 27 MB"),
        (["-c", "1000", "-n", "-2"], "memory for up to 1000 tokens: 101 MB"),
        (["-c", "1000", "-n", "5000"], "memory for 1000 tokens: 101 MB"),
    ],
)
def test_the_budget_is_that_of_the_longest_text(run, model, argv, wanted):
    model.kv_bytes = 100_000
    assert f"pyggml_repkv: {wanted} (weights 1 MB, keys and values " in run("--greedy", *argv).err


@pytest.mark.parametrize("error", [StoreError("the disk is full"), ComputeError("out of memory")])
@pytest.mark.parametrize("where", ["decode", "save"])
def test_json_shows_what_was_generated_before_a_failure(run, model, where, error):
    model.failure = (where, error)
    done = run("--json", "--greedy", "-q", "--kv", "repkv", "--session", "/nowhere")
    assert (done.code, done.error_line) == (1, f"error: {error}")
    found = json.loads(done.out)
    wanted = ("Hel", None) if where == "decode" else ("Hello, world", "eos")
    assert (found["text"], found["finish_reason"]) == wanted
    model.failure = ("prefill", error)
    assert run("--json").out == ""


def test_an_interrupt_ends_the_line_and_says_how_far_it_came(run, model):
    model.failure = ("decode", KeyboardInterrupt())
    done = run("--greedy")
    assert (done.code, done.out) == (130, "Hel\n")
    assert re.search(r"eval time = .* /\s+2 runs", done.err)
    assert model.closed == ["session", "model"]
    done = run("--json")
    assert (done.code, done.out) == (130, "")


def test_an_interrupt_in_the_prompt_says_how_far_it_came(run, model):
    model.failure = ("prefill", KeyboardInterrupt())
    done = run("-b", "1")
    assert (done.code, done.out) == (130, "")
    assert re.search(r"prompt eval time = .* /\s+0 tokens", done.err)


def test_a_run_that_cannot_fit_is_refused_before_anything_is_computed(run, model):
    model.kv_bytes = 2**50
    done = run("-m", "x.gguf", "-n", "10")
    assert done.code == 1
    assert re.search(r"error: 2 tokens need 2251799\.8 GB of memory \(keys .*\) and .* are free", done.err)
    assert model.prompt is None
