"""The tools import each other as scripts do, from their own folder; their engines are fakes."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[3] / "tools"
sys.path.insert(0, str(TOOLS))

FAKE = """
import numpy as np
from pyggml_repkv.lab.bench.workers._worker import serve

class Engine:
    '''Its logits depend on all the tokens in the context, and on nothing else.'''
    version = "fake 1"
    n_vocab = 50
    can_rewind = True

    def __init__(self, model, n_threads, exact_graph=False, rope=None):
        self.exact = exact_graph

    def open(self, n_ctx, flash_attn):
        self.n_ctx, self.flash_attn, self.tokens = n_ctx, flash_attn, []

    def prefill(self, tokens):
        self.tokens += tokens
        assert len(self.tokens) <= self.n_ctx
        return self.logits()

    def decode(self, token):
        return self.prefill([token])

    def rewind(self, n_past):
        assert n_past <= len(self.tokens)
        del self.tokens[n_past:]

    def logits(self):
        x = np.random.default_rng(self.tokens).standard_normal(self.n_vocab, np.float32)
        {line}
        return x

serve(Engine)
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(1000))
    return str(path)


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """fakes(llama=..., repkv=...): the engines are fakes, and that line of code may change their logits x."""
    from pyggml_repkv.lab.bench import engines

    def install(llama: str = "pass", repkv: str = "pass") -> None:
        for name, line in (("LLAMA_WORKER", llama), ("REPKV_WORKER", repkv)):
            path = tmp_path / f"{name}.py"
            path.write_text(FAKE.format(line=line))
            monkeypatch.setattr(engines, name, (str(path),))

    return install
