"""Logits in slices: the rows that are wanted, with the bits of a graph that makes all of them, in a slice's memory."""

from itertools import pairwise

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from pyggml_repkv.engine.model import Model
from pyggml_repkv.graph.head import N_ROWS, slices
from pyggml_repkv.memory.config import MemoryConfig
from tests.tiny_models import TinySpec, write_tiny_model

TOKENS = np.random.default_rng(5).integers(0, 280, 512)
TYPES = {"f32": QT.F32, "q8_0": QT.Q8_0, "q4_0": QT.Q4_0}


@pytest.mark.parametrize("first", [0, 1, 63, 64, 99, 150])
@pytest.mark.parametrize("n_rows", [1, 31, 64, 65, 95, 96, 128, 200])
def test_slices_cover_what_is_wanted(n_rows, first):
    found = list(slices(n_rows, min(first, n_rows - 1)))
    assert found[0][0] <= min(first, n_rows - 1) < found[0][1]
    assert found[-1][1] == n_rows
    assert all(a[1] == b[0] for a, b in pairwise(found))
    assert all(begin % N_ROWS == 0 and end - begin < N_ROWS * 3 // 2 for begin, end in found)
    assert found[-1][1] - found[-1][0] >= min(n_rows, N_ROWS // 2)


@pytest.mark.parametrize("options", [{}, {"repack": False}, {"exact_graph": True}], ids=["fused", "plain", "exact"])
@pytest.mark.parametrize("weight_type", TYPES.values(), ids=TYPES.keys())
def test_slices_have_the_bits_of_one_graph(tmp_path, weight_type, options):
    path = tmp_path / "tiny.gguf"
    write_tiny_model(path, TinySpec(n_ctx=512, seed=3, head_dim=32, n_ff=64, weight_type=weight_type))
    with Model.load(path, threads=2, **options) as model:
        for n_tokens in (2, 31, 32, 65, 96, 130, 200):
            with model.session() as session:
                whole = session._stepper.step(TOKENS[:n_tokens].astype(np.int32), "all")
                session.rewind(0)
                assert np.array_equal(session.prefill_all(TOKENS[:n_tokens]), whole)
                assert np.array_equal(session._stepper.logits, whole[-1])
                session.rewind(0)
                for first in (0, 1, n_tokens // 2, n_tokens - 1):
                    found = list(session.prefill_slices(TOKENS[:n_tokens], first))
                    session.rewind(0)
                    assert found[0][0] == first
                    assert np.array_equal(np.concatenate([rows for _, rows in found]), whole[first:])


@pytest.mark.parametrize("n_tokens", [2, 31, 32, 33, 64])
@pytest.mark.parametrize("kv", ["full", "window", "repkv"])
def test_what_was_returned_is_the_caller_s_own(tiny_model, kv, n_tokens):
    """Whatever is computed next, a single panel's rows too."""
    memory = MemoryConfig(kv=kv, n_local=64, n_score=32)
    with (
        Model.load(tiny_model(n_ctx=512, head_dim=32), threads=2, repack=False) as model,
        model.session(memory) as session,
        model.session(memory) as one_graph,
    ):
        (found,) = session.prefill_slices(TOKENS[:n_tokens])
        before = found[1].copy()
        want = one_graph._stepper.step(TOKENS[:n_tokens].astype(np.int32), "all")
        session.prefill_all(TOKENS[n_tokens : 2 * n_tokens])
        assert np.array_equal(found[1], before)
        assert np.array_equal(before, want)
        one_graph.prefill_all(TOKENS[n_tokens : 2 * n_tokens])
        assert np.array_equal(before, want)


@pytest.mark.parametrize("kv", ["full", "window", "repkv"])
def test_no_more_than_a_slice_is_in_memory(tmp_path, kv):
    """Also of a chunk whose logits are all wanted: a buffer for them would be of 10 MB."""
    path, n_vocab = tmp_path / "tiny.gguf", 5000
    write_tiny_model(path, TinySpec(n_vocab=n_vocab, n_ctx=512, seed=3, head_dim=32))
    with Model.load(path, threads=2) as model, model.session(MemoryConfig(kv=kv, n_batch=512, n_ctx=512)) as session:
        n_rows = [len(rows) for _, rows in session.prefill_slices(TOKENS)]
        assert sum(n_rows) == len(TOKENS)
        assert max(n_rows) < 2 * N_ROWS
        assert session.compute_bytes < 4 * n_vocab * 2 * N_ROWS


def test_tokens_before_the_first_wanted_one_have_no_logits(tiny_model, monkeypatch):
    with Model.load(tiny_model(n_ctx=512), threads=2) as model, model.session(MemoryConfig(n_batch=40)) as session:
        asked, step = [], session._stepper.step
        monkeypatch.setattr(session._stepper, "step", lambda *args: asked.append(args[1]) or step(*args))
        (found,) = session.prefill_slices(TOKENS[:120], 90)
        assert (found[0], len(found[1])) == (90, 30)
        assert asked == ["none", "none", "hidden"]
