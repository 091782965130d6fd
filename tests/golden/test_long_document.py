"""`make run` finds a word near the start of a document that is longer than the demo model's trained context."""

import subprocess
import sys
from pathlib import Path

from pyggml_repkv.engine.model import Model
from pyggml_repkv.memory.config import MemoryConfig

ROOT = Path(__file__).parents[2]
LOGBOOK = ROOT / "docs" / "examples" / "logbook.txt"
QUESTION = "\n\nWhat is the secret word? The secret word is"


def test_the_document_is_what_its_tool_writes():
    made = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "make_logbook.py")], capture_output=True, text=True, check=True
    )
    assert made.stdout == LOGBOOK.read_text(encoding="utf-8")


def test_the_answer_is_found_beyond_the_trained_context(demo_model):
    with Model.load(demo_model, repack=False) as model, model.session(MemoryConfig(kv="repkv", n_ctx=16384)) as session:
        tokens = model.tokenizer.encode(LOGBOOK.read_text(encoding="utf-8") + QUESTION)
        assert len(tokens) > 1.5 * model.config.n_ctx_train
        logits = session.prefill(tokens)
        answer = []
        for _ in range(4):
            answer.append(int(logits.argmax()))
            logits = session.decode(answer[-1])
        assert "marigold" in model.tokenizer.decode(answer)
        assert session.stats()["far_positions"]
