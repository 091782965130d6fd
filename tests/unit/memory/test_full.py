"""`--kv full`: the places of keys and values, their bytes, and that every form of the graph stores the same."""

import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT
from gguf.quants import dequantize

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import ComputeError, InputError
from pyggml_repkv.ffi.handles import tensor_array
from pyggml_repkv.ffi.library import g
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.model.limits import MAX_CONTEXT
from tests.oracle import rms_norm, rotate
from tests.tiny_models import TinySpec, write_tiny_model
from tests.unit.native.op_bench import tensor_bytes

SPEC = TinySpec(n_layer=2, n_head=4, n_head_kv=2, head_dim=32, n_ctx=128, seed=4)
CACHES = {"f32": QT.F32, "f16": QT.F16, "bf16": QT.BF16, "q8_0": QT.Q8_0}
ROUNDING = {"f32": 2e-5, "f16": 1e-3, "bf16": 5e-3, "q8_0": 1e-2}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("full") / "model.gguf"
    write_tiny_model(path, SPEC)
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["fused", "exact"])
def model(request, path):
    with Model.load(path, threads=2, exact_graph=request.param) as model:
        yield model


def cells(arena, kind):
    """float64 [n_cells, K, d]."""
    raw = tensor_bytes(arena)
    raw = raw.view({QT.F32: np.float32, QT.F16: np.float16}.get(kind, np.uint8))
    return dequantize(raw, kind).reshape(len(raw), SPEC.n_head_kv, SPEC.head_dim).astype(np.float64)


def first_layer(weights, tokens, *, key_bias=True):
    """Keys and values of layer 0, float64 [T, K, d]."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    x = rms_norm(w["token_embd.weight"][tokens], w["blk.0.attn_norm.weight"], SPEC.norm_eps)
    k, v = (x @ w[f"blk.0.attn_{n}.weight"].T + w[f"blk.0.attn_{n}.bias"] for n in "kv")
    if not key_bias:
        k = k - w["blk.0.attn_k.bias"]
    k, v = (y.reshape(len(tokens), SPEC.n_head_kv, SPEC.head_dim) for y in (k, v))
    return rotate(SPEC, k.transpose(1, 0, 2), np.arange(len(tokens))).transpose(1, 0, 2), v


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("n_tokens", [1, 9, 70])
def test_the_token_at_position_p_is_in_row_p(model, path, name, n_tokens):
    tokens = np.random.default_rng(n_tokens).integers(0, SPEC.n_vocab, n_tokens + 1)
    weights = write_tiny_model(path.with_name("again.gguf"), SPEC)
    with model.session(MemoryConfig(type_k=name, type_v=name)) as session:
        session.prefill(tokens[:-1])
        session.decode(tokens[-1])
        arenas = session.policy.k_arenas[0], session.policy.v_arenas[0]
        # Quantised keys lie less their bias, but not in llama.cpp's graph.
        key_bias = name != "q8_0" or model.graph.exact
        for arena, want in zip(arenas, first_layer(weights, tokens, key_bias=key_bias), strict=True):
            got = cells(arena, CACHES[name])
            assert np.abs(got[: len(tokens)] - want).max() < ROUNDING[name] * np.abs(want).max()
            assert not got[len(tokens) :].any()


def test_without_flash_attention_values_are_transposed(path):
    tokens = np.arange(20)
    weights = write_tiny_model(path.with_name("again.gguf"), SPEC)
    memory = MemoryConfig(type_k="f32", type_v="f32", flash_attn=False)
    with Model.load(path, threads=1) as model, model.session(memory) as session:
        session.prefill(tokens)
        values = tensor_array(session.policy.v_arenas[0])  # [K * d, n_cells]
        want = first_layer(weights, tokens)[1].reshape(20, -1).T
        assert np.abs(values[:, :20] - want).max() < 2e-5 * np.abs(want).max()
        assert not values[:, 20:].any()


@pytest.mark.parametrize("n_ctx", [1, 100, 256, 257])
def test_arenas_are_whole_steps_of_the_padding(model, n_ctx):
    """The last tokens attend whole steps too."""
    with model.session(MemoryConfig(n_ctx=n_ctx, type_k="q8_0", type_v="f32")) as session:
        policy = session.policy
        assert policy.n_cells == -(-n_ctx // 256) * 256
        assert policy.n_ctx == n_ctx
        arenas = [arena for pair in zip(policy.k_arenas, policy.v_arenas, strict=True) for arena in pair]
        assert [a.contents.name for a in arenas] == [b"cache_k_l0", b"cache_v_l0", b"cache_k_l1", b"cache_v_l1"]
        bytes_per_token = 2 * (64 // 32 * 34 + 64 * 4)
        assert sum(g.ggml_nbytes(a) for a in arenas) == policy.n_cells * bytes_per_token
        session.prefill(range(1))
        assert session.stats()["resident_bytes"] == bytes_per_token


@pytest.mark.parametrize(
    ("n_past", "n_tokens", "n_kv"), [(0, 1, 256), (0, 256, 256), (0, 257, 512), (255, 1, 256), (256, 1, 512)]
)
def test_ggml_attends_whole_steps(model, n_past, n_tokens, n_kv):
    """llama.cpp's padding: it decides how the sums are split, hence their last bits."""
    with model.session(MemoryConfig(n_ctx=600)) as session:
        shape = session.policy.step_shape(n_past, n_tokens, "ggml")
        assert (shape.n_tokens, shape.form, shape.memory) == (n_tokens, "ggml", n_kv)
        fused = {session.policy.step_shape(n, n_tokens, "packed") for n in (0, 100, 300)}
        assert len(fused) == 1


@pytest.mark.parametrize("form", ["one", "packed"])
def test_without_flash_attention_nothing_is_fused(model, form):
    with model.session(MemoryConfig(flash_attn=False)) as session:
        assert session.policy.step_shape(0, 40, form).form == "ggml"


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"type_v": "q8_0", "flash_attn": False}, "-ctv q8_0 needs flash attention; leave out -fa off"),
        ({"type_k": "q8_0"}, "-ctk q8_0 needs a head size that 32 divides; this model's is 16"),
        ({"type_v": "q8_0"}, "-ctv q8_0 needs a head size that 32 divides; this model's is 16"),
    ],
)
def test_a_type_that_does_not_fit_is_refused(path, tiny_model, memory, message):
    file = path if "flash" in message else tiny_model(n_layer=1, head_dim=16)
    with Model.load(file, threads=1) as model, pytest.raises(InputError, match=message):
        model.session(MemoryConfig(**memory))


def test_more_than_the_machine_has_is_refused_before_it_is_used(model, monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 2**20, "SC_PAGE_SIZE": 4096}.__getitem__)
    with pytest.raises(
        ComputeError, match=r"keys and values of 134217728 tokens need .* GiB .* has 4.0: use a smaller -c"
    ):
        model.session(MemoryConfig(n_ctx=MAX_CONTEXT))


def test_a_long_context_costs_what_is_used(model):
    """A hundred tokens touch a few pages of 128 MiB."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    with model.session(MemoryConfig()) as warm:
        warm.prefill(range(100))
    with model.session(MemoryConfig(n_ctx=2**18)) as session:
        before = resident()
        session.prefill(range(100))
        assert resident() - before < 8 * 2**20


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_rows_are_repeated(model, flash_attn, kind):
    type_v = kind if flash_attn else "f16"
    memory = MemoryConfig(n_ctx=64, flash_attn=flash_attn, type_k=kind, type_v=type_v)
    with model.session(memory) as session:
        session.read([5, 6, 7, 8, 9])
        policy = session.policy
        policy.repeat(5, 23)
        for k, v in zip(policy.k_arenas, policy.v_arenas, strict=True):
            keys = tensor_bytes(k).reshape(64 * 4, -1)
            values = (
                tensor_bytes(v).reshape(64 * 4, -1) if flash_attn else tensor_bytes(v).view(np.int16).reshape(-1, 256).T
            )
            # Keys less their bias are rotated to their new places (tests/properties/test_key_bias.py).
            for rows in (values,) if policy.centres.in_use else (keys, values):
                assert np.array_equal(rows[:23], rows[np.arange(23) % 5])
                assert rows[:5].any()
                assert not rows[23:].any()
