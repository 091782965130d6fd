"""compare_llama.py: what counts as equal, and the same tokens for every engine."""

import json
from importlib.util import find_spec

import compare_llama
import numpy as np
import pytest
from _common import run_tool
from compare_llama import compare

from pyggml_repkv.lab.bench import engines
from pyggml_repkv.model.gguf_file import GGUFFile
from pyggml_repkv.model.tokenizer import Tokenizer
from tests.tiny_models import OPTIONAL


def call(*argv):
    return run_tool(compare_llama.main, argv)


def test_a_row_of_known_arrays():
    llama = np.array([[3, 4, 0], [0, 1, 0], [0, 0, 2]], np.float32)
    exact = llama + np.array([[0, 0, 0], [0, 0, 0.5], [0, 0, 0]], np.float32)
    default = np.array([[4, 3, 0], [0, 1, 0], [0, 0, 2.25]], np.float32)
    row = compare(7, True, llama, exact, default)
    assert (row.n_prompt, row.n_outputs, row.exact_equal, row.is_exact) == (7, 3, 2, False)
    assert (row.exact_prompt_diff, row.exact_decode_diff, row.default_diff) == (0.0, 0.5, 1.0)
    assert (row.default_min_cosine, row.default_same_top1) == (pytest.approx(24 / 25), 2)
    assert compare(7, True, llama[:1], exact[:1], default[:1]).is_exact


def test_equal_engines(fakes, model, capsys):
    fakes()
    assert call("-m", model, "--lengths", "1,300", "-n", "3", "-t", "2") == 0
    out, err = capsys.readouterr()
    about, prompts, header, *rows = out.splitlines()
    assert about == "model.gguf, -t 2, fake 1, fake 1"
    assert prompts == "prompts: random token ids, seed 1; after each 3 tokens decoded"
    assert [row.split()[:6] for row in rows] == [
        [n, "tokens", flash, "0", "0", "4/4"] for flash in ("on", "off") for n in ("1", "300")
    ]
    assert header.split()[0] == "prompt"
    assert err == ""


@pytest.mark.parametrize(
    "line", ["x[5] += self.exact * (len(self.tokens) == 9)", "x[0] += self.exact and self.flash_attn"]
)
def test_one_different_logit_is_an_error(line, fakes, model, capsys):
    fakes(repkv=line)
    assert call("-m", model, "--lengths", "7", "--json") == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["equal"] is False
    assert [row["n_outputs"] for row in report["rows"]] == [17, 17]
    assert "of 2 prompts give logits with --exact-graph that are not llama.cpp's" in err


def test_a_different_default_graph_is_none(fakes, model, capsys):
    fakes(repkv="x[5] += 0 if self.exact else 0.25")
    assert call("-m", model, "--lengths", "7", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [(row["exact_equal"], row["default_diff"]) for row in report["rows"]] == [(17, pytest.approx(0.25))] * 2


def test_every_engine_reads_the_tokens_that_llama_cpp_chose(fakes, model, capsys):
    # The default graph would choose another token, and the fakes' logits depend on every token read.
    fakes(repkv="x[7] += 0 if self.exact else 100")
    assert call("-m", model, "--lengths", "3", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["default_diff"] for row in rows] == pytest.approx([100, 100], rel=1e-6)


def test_logits_that_are_not_numbers_are_an_error(fakes, model, capsys):
    fakes(llama="x[3] = np.nan", repkv="x[3] = np.nan")
    assert call("-m", model, "--lengths", "3") == 1
    assert capsys.readouterr().err == "error: llama.cpp: a prompt of 3 tokens gives logits that are not finite\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lengths", ""], "--lengths is empty"),
        (["--lengths", "1,0"], "--lengths: must be a whole number from 1"),
        (["-f", "/no/text"], "/no/text: No such file or directory"),
        (["--wat"], "unrecognized arguments: --wat"),
    ],
)
def test_bad_usage_is_one_line(argv, message, fakes, model, capsys):
    fakes()
    assert call("-m", model, *argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_text_is_repeated_to_the_longest_prompt(tiny_model, tmp_path):
    text, path = tmp_path / "text", tiny_model()
    text.write_text("xyz")
    once = Tokenizer.from_metadata(GGUFFile.open(path).metadata).encode("xyz")
    args = compare_llama.parse(["-m", str(path), "-f", str(text), "--lengths", f"{2 * len(once) + 1},1"])
    assert compare_llama.text_tokens(args) == once * 3


def test_our_own_engine(tiny_model, tmp_path, monkeypatch, capsys):
    """The real engine's worker, compared with itself, rewound and opened again, stays the same."""
    path = tmp_path / "worker.py"
    path.write_text(
        "from pyggml_repkv.lab.bench.workers.repkv_worker import RepkvEngine, serve\n"
        "serve(lambda **options: RepkvEngine(**options, exact_graph=True))\n"
    )
    monkeypatch.setattr(engines, "LLAMA_WORKER", (str(path),))
    assert call("-m", str(tiny_model()), "--lengths", "1,40", "-t", "1", "-n", "4", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert min(row["default_min_cosine"] for row in rows) > 0.999


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed (make bench does)")
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("arch", OPTIONAL)
def test_llama_cpp_itself(tiny_model, arch, joined, capsys):
    """Files of every family, with only the required tensors, and with all optional ones."""
    for optional in ((), OPTIONAL[arch]):
        path = tiny_model(arch=arch, optional=optional, joined=joined)
        assert call("-m", str(path), "--lengths", "1,40", "-t", "1", "-n", "4") == 0, capsys.readouterr().err
