"""Policies by name and from a file."""

from pathlib import Path

import numpy as np
import pytest

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError
from pyggml_repkv.memory.config import MemoryConfig

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "mean_key_blocks.py"
TOKENS = np.random.default_rng(5).integers(0, 280, 400).tolist()


def memory(kv):
    return MemoryConfig(
        kv=str(kv), n_ctx=512, n_batch=48, n_sink=4, n_local=64, n_score=32, n_dense=0, block="fixed:16", top_blocks=3,
        chunk_blocks=3, positions="far",
    )  # fmt: skip


@pytest.fixture
def model(tiny_model):
    with Model.load(tiny_model(n_layer=2, n_ctx=512), threads=2, repack=False) as loaded:
        yield loaded


def test_the_example_in_the_documentation_is_a_policy(model):
    """Its index holds the mean of each block's keys, and it selects by them."""
    with model.session(memory(EXAMPLE)) as session:
        session.prefill(TOKENS)
        policy = session.policy
        assert session.stats()["policy"] == "mean-key"
        for block, (begin, end) in enumerate(zip(policy.blocks.bounds, policy.blocks.bounds[1:], strict=False)):
            mean = policy.stored_keys(1, np.arange(begin, end)).mean(0)
            assert np.allclose(policy.index.entries(1, block)[:, 0], mean, atol=2e-3)
        logits = session.decode(1)
    with model.session(memory("repkv")) as session:
        session.prefill(TOKENS)
        assert not np.array_equal(session.decode(1), logits)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "there is no such file"),
        ("x = 1", r"it must define make_policy\(inputs\) -> Policy"),
        ("import not_there", "ModuleNotFoundError: No module named 'not_there'"),
        ("def", "SyntaxError: invalid syntax"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("def make_policy(): pass", "TypeError: .*positional argument"),
        ("def make_policy(inputs): pass", r"it must define make_policy\(inputs\) -> Policy"),
    ],
)
def test_a_file_without_a_policy_is_one_line(model, tmp_path, source, message):
    path = tmp_path / "policy.py"
    if source is not None:
        path.write_text(source, encoding="utf-8")
    with pytest.raises(InputError, match=f"--kv .*policy.py: .*{message}"):
        model.session(memory(path))
