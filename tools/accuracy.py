"""Measures how far each form of the graph is from the demo model in float64: `python tools/accuracy.py FILE`.

It takes a minute or two. Run it from the repository's root: the float64 model is the tests' oracle. FILE is a text; it
reads the first tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from gguf.quants import dequantize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pyggml_repkv.engine.model import Model
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.model.names import find_model
from tests.oracle import oracle_logits
from tests.tiny_models import TinySpec

N_TOKENS = 400
FORMS = (
    ("packed", {}, True),
    ("exact, -fa on", {"exact_graph": True}, True),
    ("exact, -fa off", {"exact_graph": True}, False),
)


def main(text_file: str) -> None:
    path = find_model("demo")
    with Model.load(path, repack=False) as model:
        tokens = model.tokenizer.encode(Path(text_file).read_text())[:N_TOKENS]
        true = log_probs(oracle_logits(oracle_spec(model), oracle_weights(model), tokens))
        with model.session(MemoryConfig(n_ctx=1024)) as session:
            report("one token", true, np.array([session.decode(token) for token in tokens]), tokens)
    for name, options, flash_attn in FORMS:
        memory = MemoryConfig(n_ctx=1024, flash_attn=flash_attn)
        with Model.load(path, repack=False, **options) as model, model.session(memory) as session:
            report(name, true, session.prefill_all(tokens), tokens)
    print(f"{'float64':16} NLL {nll(true, tokens):.5f}  {len(tokens)} tokens")


def report(name: str, true: np.ndarray, logits: np.ndarray, tokens: list[int]) -> None:
    got = log_probs(logits)
    kl = (np.exp(true) * (true - got)).sum(1).mean()
    same = (got.argmax(1) == true.argmax(1)).mean()
    print(f"{name:16} KL {kl:.2e}  NLL {nll(got, tokens):.5f}  same top-1 {same:.3f}", flush=True)


def nll(log_p: np.ndarray, tokens: list[int]) -> float:
    return float(-log_p[np.arange(len(tokens) - 1), tokens[1:]].mean())


def log_probs(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def oracle_weights(model: Model) -> dict[str, np.ndarray]:
    weights = {}
    for name, info in model.file.tensors.items():
        rows = model.file.tensor_bytes(name).reshape(info.shape[0] if len(info.shape) == 2 else 1, -1)
        weights[name] = dequantize(rows, info.type).reshape(info.shape)
    return weights


def oracle_spec(model: Model) -> TinySpec:
    c = model.config
    return TinySpec(
        n_layer=c.n_layer, n_head=c.n_head, n_head_kv=c.n_head_kv, head_dim=c.head_dim, n_ff=c.n_ff, n_vocab=c.n_vocab,
        n_ctx=c.n_ctx_train, tied=c.tied_output, rope_base=c.rope_base, norm_eps=c.norm_eps,
    )  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/accuracy.py TEXT_FILE")
    main(sys.argv[1])
