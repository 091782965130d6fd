"""Policies by name and from a file."""

import contextlib
import json
import sqlite3
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
        kv=str(kv), n_ctx=512, n_batch=48, n_sink=4, n_local=64, n_score=32, n_dense=0, block="fixed:16", budget=48,
        index="representatives:4", chunk_budget=48, positions="far",
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
        (
            "def make_policy(inputs): pass",
            r"it must define make_policy\(inputs\) -> Policy .*lacks begin_step, bounded",
        ),
        ("class make_policy:\n    forms = 'one'", "forms is 'one'; it must be a frozenset"),
        ("class make_policy:\n    evicts = None", "evicts is None; it must be a bool"),
    ],
)
def test_a_file_without_a_policy_is_one_line(model, tmp_path, source, message):
    path = tmp_path / "policy.py"
    if source is not None:
        path.write_text(source, encoding="utf-8")
    with pytest.raises(InputError, match=f"--kv .*policy.py: .*{message}"):
        model.session(memory(path))


def test_a_file_that_has_changed_is_another_policy(model, tmp_path):
    """Also where it keeps its name; and it does not matter from where it is given."""
    path = tmp_path / "mine.py"
    path.write_bytes(EXAMPLE.read_bytes())
    with model.session(memory(path), directory=tmp_path / "kept") as session:
        session.prefill(TOKENS[:200])
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / "mine.py")
    with model.resume(tmp_path / "kept", memory(moved)) as session:
        assert session.n_past == 200
    moved.write_text(moved.read_text(encoding="utf-8") + "# something else", encoding="utf-8")
    with pytest.raises(InputError, match=r"--kv was mine\.py .* and is mine\.py"):
        model.resume(tmp_path / "kept", memory(moved))


def test_a_program_that_a_directory_names_is_not_run(model, tmp_path):
    ran = tmp_path / "ran"
    path = tmp_path / "evil.py"
    path.write_text(f"open({str(ran)!r}, 'w')", encoding="utf-8")
    with model.session(memory("repkv"), directory=tmp_path / "kept") as session:
        session.prefill(TOKENS[:200])
    with contextlib.closing(sqlite3.connect(tmp_path / "kept" / "session.db")) as db:
        settings = json.loads(db.execute("SELECT value FROM meta WHERE key = 'settings'").fetchone()[0])
        db.execute("UPDATE meta SET value = ? WHERE key = 'settings'", (json.dumps(settings | {"--kv": str(path)}),))
        db.commit()
    with pytest.raises(InputError, match="give that memory to take it up"):
        model.resume(tmp_path / "kept")
    assert not ran.exists()


def test_a_policy_that_cannot_be_kept_says_so(model, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        EXAMPLE.read_text(encoding="utf-8") + "\n\nMeanKeyBlocks.checkpoint = lambda self: None\n", encoding="utf-8"
    )
    with pytest.raises(InputError, match="--kv mean-key cannot be kept in a directory"):
        model.session(memory(path), directory=tmp_path / "kept")
