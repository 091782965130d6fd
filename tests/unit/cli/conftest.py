"""A command line with a fake model: `run(*argv)` calls it, and `model` is the model that it opened."""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pyggml_repkv.cli.main import main
from pyggml_repkv.engine import budget
from pyggml_repkv.engine.generate import Generation
from pyggml_repkv.errors import ContextFullError, InputError
from pyggml_repkv.model import names


class FakeTokenizer:
    """One token per byte; 256 is the end, 257 is special and spelled <s>."""

    eog_ids = frozenset({256})
    bos_id = 257
    add_bos = False

    def is_special(self, token):
        return token >= 256

    def encode(self, text, *, add_special=True, parse_special=False):
        tokens = [257] if add_special and self.add_bos else []
        for n, part in enumerate(text.split("<s>") if parse_special else [text]):
            tokens += ([257] if n else []) + list(part.encode())
        return tokens

    def decode(self, ids, *, special=True):
        return "".join({256: "<end>", 257: "<s>"}.get(token) or chr(token) for token in ids)

    def stream(self):
        return SimpleNamespace(push=lambda token: self.decode([token]), flush=lambda: "")


class FakeSession:
    """Gives the reply, reads prompts in batches, and fails on request."""

    def __init__(self, model, memory):
        self.model = model
        self.memory = memory
        self.n_ctx = memory.n_ctx
        self.n_ctx_train = model.config.n_ctx_train
        self.n_past = self.n_said = 0
        self.policy = SimpleNamespace(bytes_at=lambda n_tokens: {"keys and values": model.kv_bytes * n_tokens})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.model.closed.append("session")

    def prefill(self, tokens, *, on_progress=None):
        self.model.prompt = list(tokens)
        for n_done in range(0, len(tokens), self.memory.n_batch):
            self.n_past = n_done
            on_progress(n_done, len(tokens))
            self.fail("prefill")
        self.n_past = len(tokens)
        return self.logits()

    def decode(self, token):
        if self.n_past == self.n_ctx:
            raise ContextFullError("full")
        self.n_past += 1
        self.n_said += 1
        if self.n_said == 3:
            self.fail("decode")
        return self.logits()

    def fail(self, where):
        if self.model.failure is not None and self.model.failure[0] == where:
            raise self.model.failure[1]

    def logits(self):
        logits = np.zeros(258, dtype=np.float32)
        reply = [*self.model.reply.encode(), 256]
        logits[reply[min(self.n_said, len(reply) - 1)]] = 50
        return logits

    def budget(self, n_prompt, n_more=0):
        budget.check({"keys and values": self.model.kv_bytes * n_prompt}, n_prompt)
        return {"weights": 1_000_000, "keys and values": self.model.kv_bytes * (n_prompt + n_more)}

    def continue_text(self, prompt, config, *, drop):
        return Generation(self, self.model.tokenizer, prompt, config)

    def save(self):
        self.fail("save")

    def disk_need(self, n_tokens):
        return None

    def stats(self):
        return {"policy": self.memory.kv, "blocks": 0}


class FakeModel:
    """Records how it was opened, and stands in for `engine.model.Model`."""

    def __init__(self):
        self.config = SimpleNamespace(n_ctx_train=256)
        self.tokenizer = FakeTokenizer()
        self.chat_template = SimpleNamespace()
        self.load_ms = 12.5
        self.kv_bytes = 100
        self.reply = "Hello, world"
        self.failure = None
        self.prompt = None
        self.loaded = None
        self.closed = []

    def load(self, path, **options):
        self.loaded = (str(path), options)
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed.append("model")

    def session(self, memory, *, directory=None):
        self.memory, self.directory = memory, directory
        return FakeSession(self, memory)

    def chat_prompt(self, messages):
        if self.chat_template is None:
            raise InputError("this model has no chat template")
        tokens = [t for message in messages for t in (257, *f"{message['role']}:{message['content']}".encode())]
        return self.tokenizer.decode(tokens), tokens


@dataclass(frozen=True)
class Done:
    """A finished command line."""

    code: int
    out: str
    err: str

    @property
    def error_line(self):
        """The only line on stderr."""
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("pyggml_repkv: ")
        return self.err.removeprefix("pyggml_repkv: ").rstrip("\n")


@pytest.fixture
def model(monkeypatch):
    fake = FakeModel()
    monkeypatch.setitem(sys.modules, "pyggml_repkv.engine.model", SimpleNamespace(Model=fake))
    monkeypatch.setattr(names, "find_model", lambda name, progress: Path(f"{name}.gguf" if name == "demo" else name))
    return fake


@pytest.fixture
def run(model, capsys):
    def call(*argv, prompt="Hi"):
        prompt = () if prompt is None else ("-p", prompt)
        code = main(["run", *prompt, *argv])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return call
