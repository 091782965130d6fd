"""compare_perplexity.py: llama.cpp gets the same chunks, and the exit code says whether it agrees."""

import json

import compare_perplexity
import pytest
from _common import run_tool

from pyggml_repkv.engine.model import Model
from pyggml_repkv.lab.bench import engines

# An engine with this project's logits: only the arithmetic around them is compared.
FAKE = """
import numpy as np
from pyggml_repkv.lab.bench.workers._worker import serve
from pyggml_repkv.lab.bench.workers.repkv_worker import RepkvEngine

class Engine(RepkvEngine):
    def all_logits(self, tokens):
        return self.session.prefill_all(tokens) {change}

serve(lambda model, n_threads: Engine(model, n_threads, exact_graph=True))
"""


@pytest.fixture
def run(demo_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "text").write_text("The sea was calm that morning, and the captain had gone below to write. " * 20)

    def call(change="", *argv):
        (tmp_path / "llama.py").write_text(FAKE.format(change=change))
        monkeypatch.setattr(engines, "LLAMA_WORKER", (str(tmp_path / "llama.py"),))
        command = ["-m", str(demo_model), "-t", "1", "--text", str(tmp_path / "text"), "-c", "64", *argv]
        return run_tool(compare_perplexity.main, command), *capsys.readouterr()

    return call


def test_the_same_logits_have_the_same_perplexity(run):
    code, out, _ = run("", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["llama.cpp"] == pytest.approx(found["ours --exact-graph"])
    assert found["llama.cpp"]["tokens"] % 31 == 0
    assert found["ours"]["perplexity"] == pytest.approx(found["llama.cpp"]["perplexity"], rel=0.02)


def test_other_logits_are_told(run):
    code, out, err = run("* np.float32(1.01)")
    assert (code, err) == (1, "error: --exact-graph has another perplexity than llama.cpp\n")
    assert out.splitlines()[0].split() == ["engine", "tokens", "perplexity"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [(("-c", "2"), "-c/--chunk: must be a whole number from 3"), (("-c", "2048"), "one chunk takes 2048"),
     (("--text", "/no/file"), "No such file")],
)  # fmt: skip
def test_bad_usage_is_one_line(run, argv, message):
    code, out, err = run("", *argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_chunk_begins_as_texts_do(demo_model, monkeypatch):
    with Model.load(demo_model) as model:
        monkeypatch.setattr(model.tokenizer, "add_bos", True)
        chunks = list(compare_perplexity.chunks_of(model.tokenizer, range(100, 110), 4))
    assert chunks == [[1, 101, 102, 103], [1, 105, 106, 107]]
