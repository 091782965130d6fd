"""On a real model the default graph is closer to the weights in float64 than llama.cpp's graph."""

from typing import Any

import numpy as np
import pytest
from gguf.quants import dequantize

from pyggml_repkv.engine.model import Model
from pyggml_repkv.ffi.library import native
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.gguf_file import GGUFFile
from tests.oracle import oracle_logits
from tests.tiny_models import TinySpec

pytestmark = pytest.mark.slow

N_TOKENS = 64


def log_probs(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def tokens(golden_model: dict[str, Any]) -> list[int]:
    return golden_model["prompts"][4]["tokens"][:N_TOKENS]


@pytest.fixture(scope="module")
def truth(demo_model, tokens) -> np.ndarray:
    """Log-probabilities by the dequantised weights in float64, [N_TOKENS, n_vocab]."""
    file = GGUFFile.open(demo_model)
    c = ModelConfig.from_gguf(file)
    spec = TinySpec(
        n_layer=c.n_layer, n_head=c.n_head, n_head_kv=c.n_head_kv, head_dim=c.head_dim, n_ff=c.n_ff, n_vocab=c.n_vocab,
        n_embd=c.n_embd, tied=c.tied_output, rope_base=c.rope_base, norm_eps=c.norm_eps,
    )  # fmt: skip
    assert c.rope_scaling.kind == "none"
    weights = {}
    for name, info in file.tensors.items():
        raw = np.frombuffer(file.tensor_bytes(name), np.uint8).reshape(info.shape[0] if len(info.shape) == 2 else 1, -1)
        weights[name] = dequantize(raw, info.type).reshape(info.shape)
    return log_probs(oracle_logits(spec, weights, tokens))


def divergence(truth: np.ndarray, logits: np.ndarray) -> float:
    """KL(truth || logits), mean over the tokens, in nats."""
    return float((np.exp(truth) * (truth - log_probs(logits))).sum(-1).mean())


def kl(truth, demo_model, tokens, *, exact: bool, one_by_one: bool) -> float:
    with (
        Model.load(demo_model, threads=2, exact_graph=exact) as model,
        model.session(MemoryConfig(n_ctx=1024)) as session,
    ):
        logits = [session.decode(t) for t in tokens] if one_by_one else session.prefill_all(tokens)
        return divergence(truth, np.array(logits))


@pytest.mark.skipif(not native.repkv_has_fast_prefill(), reason="this CPU reads prompts with ggml's nodes")
def test_a_prompt_is_read_closer_to_the_weights(truth, demo_model, tokens):
    """llama.cpp rounds activations to 8 bits before each product; packed chunks do not."""
    default, exact = (kl(truth, demo_model, tokens, exact=exact, one_by_one=False) for exact in (False, True))
    assert abs(default) < 1e-4
    assert default < exact


def test_single_tokens_are_read_as_close_as_llama_cpp_reads_them(truth, demo_model, tokens):
    """Both round to 8 bits here, so either may come closer."""
    assert abs(kl(truth, demo_model, tokens, exact=False, one_by_one=True)) < 5e-3
