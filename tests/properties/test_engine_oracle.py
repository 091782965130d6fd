"""The engine equals a plain numpy Qwen2: any shape, weight type, cache type, chunking and form of the graph."""

from unittest.mock import patch

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyggml_repkv.engine.model import Model
from pyggml_repkv.memory.config import MemoryConfig
from tests.oracle import oracle_logits
from tests.tiny_models import WEIGHT_TYPES, TinySpec, tiny_specs, write_tiny_model

# ggml rounds activations to the type of its dot product: F16 or BF16 for those weights, 8 bits for quantised ones.
_TOLERANCE = {QT.F32: 2e-5, QT.F16: 5e-3, QT.BF16: 3e-2}
_QUANTISED = 6e-2
_CACHE_TOLERANCE = {"f32": 0.0, "f16": 3e-3, "bf16": 2e-2, "q8_0": 3e-2}


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@given(data=st.data(), spec=tiny_specs())
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_prefill_and_decode_equal_the_oracle(data, spec, tmp_path):
    path = tmp_path / "model.gguf"
    weights = write_tiny_model(path, spec)
    n_prompt = data.draw(st.integers(1, min(70, spec.n_ctx_train - 8)), label="n_prompt")
    n_decode = data.draw(st.integers(1, 6), label="n_decode")
    n_batch = data.draw(st.integers(1, n_prompt + 1), label="n_batch")
    flash_attn = data.draw(st.booleans(), label="flash_attn")
    caches = ["f32", "f16", "bf16"] + (["q8_0"] if spec.head_dim % 32 == 0 else [])
    type_k = data.draw(st.sampled_from(caches), label="type_k")
    type_v = data.draw(st.sampled_from([c for c in caches if flash_attn or c != "q8_0"]), label="type_v")
    options = {
        "threads": data.draw(st.integers(1, 3), label="threads"),
        "repack": data.draw(st.booleans(), label="repack"),
        "exact_graph": data.draw(st.booleans(), label="exact_graph"),
    }
    tokens = data.draw(
        st.lists(st.integers(0, spec.n_vocab - 1), min_size=n_prompt + n_decode, max_size=n_prompt + n_decode)
    )

    # As quantised keys are stored, F32 ones too, so that no rounding hides an error.
    centred = data.draw(st.booleans(), label="centred")
    memory = MemoryConfig(n_batch=n_batch, type_k=type_k, type_v=type_v, flash_attn=flash_attn)
    with (
        patch("pyggml_repkv.memory.centres.centres_keys", lambda memory, biases: centred),
        Model.load(path, **options) as model,
        model.session(memory) as session,
    ):
        logits = [*session.prefill_all(tokens[:n_prompt])]
        logits += [session.decode(token).copy() for token in tokens[n_prompt:]]
        assert session.n_past == len(tokens)

    want = oracle_logits(spec, weights, tokens)
    tolerance = _TOLERANCE.get(spec.weight_type, _QUANTISED) + max(_CACHE_TOLERANCE[type_k], _CACHE_TOLERANCE[type_v])
    # ggml's flash attention sums in F16 in its one-row form, and rounds queries to the type of the keys.
    tolerance += 3e-3 if flash_attn and type_v == "f16" else 0
    assert relative_error(np.array(logits), want) < tolerance


@pytest.mark.parametrize("weight_type", WEIGHT_TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("repack", [True, False], ids=["repack", "no-repack"])
def test_every_weight_type(weight_type, repack, tmp_path):
    spec = TinySpec(n_layer=1, n_head=4, n_head_kv=2, head_dim=64, n_ff=512, weight_type=weight_type, seed=3)
    weights = write_tiny_model(tmp_path / "model.gguf", spec)
    tokens = list(range(20))
    memory = MemoryConfig(type_k="f32", type_v="f32")
    with (
        Model.load(tmp_path / "model.gguf", threads=2, repack=repack) as model,
        model.session(memory) as session,
    ):
        logits = [*session.prefill_all(tokens[:16]), *(session.decode(t).copy() for t in tokens[16:])]
    assert relative_error(np.array(logits), oracle_logits(spec, weights, tokens)) < _TOLERANCE.get(
        weight_type, _QUANTISED
    )
