"""Layer 0's keys of single tokens are those of the model, in every family."""

import numpy as np
import pytest

from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.first_keys import FirstLayerKeys
from pyggml_repkv.model.gguf_file import GGUFFile
from tests.oracle import layer_weights, project, rms_norm
from tests.tiny_models import QKV_BIASES, Packed, TinySpec, write_tiny_model

SPECS = {
    "qwen2": TinySpec(),
    "qwen2 without biases": TinySpec(optional=()),
    "qwen2 joined": TinySpec(joined=True),
    "qwen3": TinySpec(arch="qwen3", optional=()),
    "qwen3 joined, with biases": TinySpec(arch="qwen3", optional=QKV_BIASES, joined=True),
    "llama": TinySpec(arch="llama", optional=()),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_keys_are_the_models(spec, tmp_path):
    weights = write_tiny_model(tmp_path / "m.gguf", spec)
    file = GGUFFile.open(tmp_path / "m.gguf")
    keys = FirstLayerKeys(file, ModelConfig.from_gguf(file))
    tokens = [0, 5, 280]
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    x = rms_norm(w["token_embd.weight"][tokens], w["blk.0.attn_norm.weight"], spec.norm_eps)
    _, k, _ = project(spec, layer_weights(w, 0), x)  # [K, T, d]
    got = np.array([keys(token) for token in tokens])
    np.testing.assert_allclose(got, k.transpose(1, 0, 2).reshape(len(tokens), -1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("joined", ["weight", "bias"])
def test_a_joined_matrix_may_have_separate_biases_and_the_reverse(joined, tmp_path):
    def edit(_, tensors):
        parts = [tensors.pop(f"blk.0.attn_{c}.{joined}") for c in "qkv"]
        tensors[f"blk.0.attn_qkv.{joined}"] = Packed(np.concatenate([part.data for part in parts]), parts[0].type)

    write_tiny_model(tmp_path / "separate.gguf", TinySpec())
    write_tiny_model(tmp_path / "joined.gguf", TinySpec(), edit)
    files = (GGUFFile.open(tmp_path / f"{name}.gguf") for name in ("separate", "joined"))
    want, got = (FirstLayerKeys(file, ModelConfig.from_gguf(file)) for file in files)
    assert all(np.array_equal(got(token), want(token)) for token in (0, 5, 280))
