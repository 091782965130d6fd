"""The pass-key task: exact lengths, the key once in its place, and the command line."""

import json

import numpy as np
import pytest

from pyggml_repkv.cli.main import main
from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError
from pyggml_repkv.eval.passkey import FILLER, passkey_prompt


@pytest.fixture(scope="module")
def model(demo_model):
    with Model.load(demo_model) as loaded:
        yield loaded


@pytest.mark.parametrize("n_tokens", [150, 1000, 4097])
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.99])
def test_the_prompt_has_its_length_and_the_key_its_depth(model, n_tokens, depth):
    prompt = passkey_prompt(model, n_tokens, depth, "31415", model.tokenizer.encode(FILLER))
    text = model.tokenizer.decode(prompt)
    assert len(prompt) == n_tokens
    assert text.count("The pass key is 31415. Remember it. 31415 is the pass key.") == 1
    assert text.endswith("What is the pass key? The pass key is")
    assert abs(text.index("31415") / len(text) - depth) < 0.05 + 300 / len(text)


def test_a_prompt_without_room_is_an_error(model):
    with pytest.raises(InputError, match="is too short"):
        passkey_prompt(model, 20, 0.5, "31415", [1, 2, 3])


@pytest.mark.parametrize("kv", ["full", "repkv"])
def test_the_demo_model_finds_the_key(demo_model, capsys, kv):
    argv = ["eval", "passkey", "-m", str(demo_model), "--lengths", "1500", "--depths", "2", "--kv", kv, "--json"]
    assert main([*argv, "--n-local", "256", "--n-score", "128", "--positions", "far", "--n-dense", "0"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["found"] == {"1500": [2, 2]}
    blocks = [r["kv_stats"]["blocks"] for r in result["results"]]
    assert all(n > 0 for n in blocks) == (kv == "repkv")
    assert len({r["key"] for r in result["results"]}) == 2
    assert np.isfinite([r["decode_ms"] for r in result["results"]]).all()
