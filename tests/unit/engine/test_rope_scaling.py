"""RoPE options in the engine: the same bits as the same values in the file, in every form and memory; and what is kept
with other ones is refused.
"""

import re
from dataclasses import replace
from itertools import repeat

import numpy as np
import pytest

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.model.rope_options import RopeOptions

SHAPE = {"n_layer": 2, "n_head": 4, "n_head_kv": 2, "head_dim": 32, "n_ctx": 64}
YARN = {"scaling_kind": "yarn", "scaling_factor": 4.0}
FLAGS = RopeOptions("yarn", 4)
TOKENS = np.random.default_rng(7).integers(0, 280, 256).tolist()
BOUNDED = MemoryConfig(
    kv="repkv", n_batch=48, n_sink=4, n_local=40, n_score=32, n_dense=0, block="fixed:16", budget=48,
    chunk_budget=48, n_ctx=256,
)  # fmt: skip
MEMORIES = {
    "full": MemoryConfig(n_batch=48, n_ctx=256),
    "full, scores stored": MemoryConfig(n_batch=48, n_ctx=256, flash_attn=False),
    "window": replace(BOUNDED, kv="window"),
    "window, exact": replace(BOUNDED, kv="window", positions="exact"),
    "repkv": BOUNDED,
    "repkv, exact": replace(BOUNDED, positions="exact"),
    "repkv, far": replace(BOUNDED, positions="far"),
    "repkv, ordered": replace(BOUNDED, positions="ordered"),
    "repkv, dot": replace(BOUNDED, index="representatives:4", score="dot", block="semantic:16-24", per_head=True),
    "repkv, on disk": replace(BOUNDED, kv_ram=10**6, late=True),
}


def logits_of(path, memory, rope, tmp_path, *, exact=False):
    """After the prompt and each of six tokens; TOKENS fill four times the original context."""
    if memory.kv_ram:
        memory = replace(memory, kv_dir=str(tmp_path))
    with Model.load(path, threads=2, repack=False, exact_graph=exact, rope=rope) as model:
        assert model.config.n_ctx_train == 256
        with model.session(memory) as session:
            return np.array([session.prefill(TOKENS[:250]).copy(), *(session.decode(t).copy() for t in TOKENS[250:])])


@pytest.mark.parametrize(("name", "arch"), [*zip(MEMORIES, repeat("qwen2")), ("full", "llama"), ("repkv", "llama")])
def test_flags_give_the_bits_of_the_file(tiny_model, tmp_path, name, arch):
    by_file = logits_of(tiny_model(arch=arch, **SHAPE, **YARN), MEMORIES[name], RopeOptions(), tmp_path)
    by_flags = logits_of(tiny_model(arch=arch, **SHAPE), MEMORIES[name], FLAGS, tmp_path)
    assert np.array_equal(by_flags, by_file)


@pytest.mark.parametrize("name", MEMORIES)
def test_every_memory_takes_the_scaling(tiny_model, tmp_path, name):
    path = tiny_model(**SHAPE)
    scaled, other = (
        logits_of(path, MEMORIES[name], rope, tmp_path) for rope in (FLAGS, replace(FLAGS, scale=8, orig_ctx=32))
    )
    assert not np.array_equal(scaled, other)


@pytest.mark.parametrize("flash_attn", [True, False])
def test_flags_give_the_bits_of_the_file_in_llama_cpps_graph(tiny_model, tmp_path, flash_attn):
    memory = replace(MEMORIES["full"], flash_attn=flash_attn)
    by_file = logits_of(tiny_model(**SHAPE, **YARN), memory, RopeOptions(), tmp_path, exact=True)
    assert np.array_equal(logits_of(tiny_model(**SHAPE), memory, FLAGS, tmp_path, exact=True), by_file)


def test_positions_are_exact_as_far_as_yarn_reaches(tiny_model, tmp_path):
    """`auto` is `exact` for all that is trained, and far from the first token after it."""
    path = tiny_model(**SHAPE)
    memories = [replace(BOUNDED, positions=positions, n_ctx=0) for positions in ("auto", "exact")]
    auto, exact = (logits_of(path, memory, FLAGS, tmp_path) for memory in memories)
    assert np.array_equal(auto, exact)
    with Model.load(path, threads=2, rope=FLAGS) as model, model.session(memories[0]) as session:
        session.prefill(TOKENS)
        assert not session.policy.rotation.far
        session.decode(5)
        assert session.policy.rotation.far


def test_options_are_options(tiny_model):
    with pytest.raises(InputError, match="rope must be a RopeOptions, got 'yarn'"):
        Model.load(tiny_model(**SHAPE), rope="yarn")


def test_full_holds_what_yarn_reaches(tiny_model):
    with Model.load(tiny_model(**SHAPE, **YARN)) as model, model.session() as session:
        assert session.n_ctx == 256


@pytest.fixture
def kept(tiny_model, tmp_path):
    """(model file, directory of a session that was read with FLAGS, directory of one without)"""
    path = tiny_model(**SHAPE)
    folders = []
    for name, rope in (("yarn", FLAGS), ("plain", RopeOptions())):
        folders.append(tmp_path / name)
        with (
            Model.load(path, threads=2, repack=False, rope=rope) as model,
            model.session(replace(BOUNDED, positions="exact"), directory=folders[-1]) as session,
        ):
            session.prefill(TOKENS[:200])
    return path, *folders


def resumed(path, rope, folder):
    with Model.load(path, threads=2, repack=False, rope=rope) as model, model.resume(folder) as session:
        assert session.n_past == 200
        return session.decode(5).copy()


def test_a_kept_session_is_taken_up_with_the_scaling_it_was_read_with(kept):
    path, with_yarn, plain = kept
    with_yarn, plain = resumed(path, FLAGS, with_yarn), resumed(path, RopeOptions(), plain)
    assert not np.array_equal(with_yarn, plain)


@pytest.mark.parametrize(
    ("of_yarn", "rope", "message"),
    [
        (True, RopeOptions(), "RoPE was yarn scaling by 4 from 64 tokens, base 10000 and is as in the file"),
        (True, RopeOptions("yarn", 8), "base 10000 and is yarn scaling by 8 from 64 tokens, base 10000"),
        (True, replace(FLAGS, orig_ctx=32), "from 64 tokens, base 10000 and is yarn scaling by 4 from 32 tokens"),
        (True, replace(FLAGS, freq_base=5e5), "base 10000 and is yarn scaling by 4 from 64 tokens, base 500000"),
        (False, FLAGS, "RoPE was as in the file and is yarn scaling by 4 from 64 tokens, base 10000"),
        (False, RopeOptions(freq_base=5e5), "RoPE was as in the file and is not scaled, base 500000"),
    ],
)
def test_a_kept_session_of_other_scaling_is_refused(kept, of_yarn, rope, message):
    path, with_yarn, plain = kept
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        resumed(path, rope, with_yarn if of_yarn else plain)
    assert str(caught.value).isprintable()
    resumed(path, FLAGS, with_yarn)


def test_flags_that_say_what_the_file_says_change_nothing(kept):
    path, _, plain = kept
    assert np.array_equal(resumed(path, RopeOptions(freq_base=10000.0), plain), resumed(path, RopeOptions(), plain))


def test_a_saved_copy_knows_its_scaling(tiny_model, tmp_path):
    path = tiny_model(**SHAPE)
    with Model.load(path, threads=2, repack=False, rope=FLAGS) as model, model.session(BOUNDED) as session:
        session.prefill(TOKENS[:200])
        with session.fork() as fork:
            assert np.array_equal(fork.decode(5), session.decode(5))
        session.save(tmp_path / "copy")
    with (
        Model.load(path, threads=2, repack=False) as model,
        pytest.raises(InputError, match="RoPE was yarn scaling by 4 from 64 tokens, base 10000 and is as in the file"),
    ):
        model.resume(tmp_path / "copy")


def test_a_session_from_before_such_options_is_the_files(kept):
    import sqlite3

    path, _, plain = kept
    with sqlite3.connect(plain / "session.db") as db:
        changed = "UPDATE meta SET value = json_remove(value, '$.RoPE') WHERE key = 'settings'"
        assert db.execute(changed).rowcount == 1
    db.close()
    resumed(path, RopeOptions(), plain)
    with pytest.raises(InputError, match="RoPE was as in the file and is yarn"):
        resumed(path, FLAGS, plain)
