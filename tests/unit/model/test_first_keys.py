"""Layer 0's keys of single tokens are those of the model, in every family."""

import numpy as np
import pytest

from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.first_keys import FirstLayerKeys
from pyggml_repkv.model.gguf_file import GGUFFile
from tests.oracle import layer_weights, project, rms_norm
from tests.tiny_models import QKV_BIASES, TinySpec, write_tiny_model

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
