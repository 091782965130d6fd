"""RepKV and a window in the engine equal the method in plain numpy, and RepKV full attention where it has room for
everything; in every family.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
from gguf import GGMLQuantizationType as QT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pyggml_repkv.engine.model import Model
from pyggml_repkv.memory.config import MemoryConfig
from tests.repkv_oracle import RepKVOracle
from tests.tiny_models import TinySpec, families, write_tiny_model

N_CTX = 512

# With `auto`, positions become far within the prompts below.
N_TRAINED = 100


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@st.composite
def memories(draw: st.DrawFn, **fixed: object) -> MemoryConfig:
    n_local = draw(st.sampled_from([32, 40, 64]))
    positions = draw(st.sampled_from(["exact", "far", "ordered", "auto"]))
    values = {
        "kv": "repkv",
        # A larger n_ctx would make `auto` far from the start.
        "n_ctx": draw(st.sampled_from([0, 0, N_CTX])) if positions == "auto" else N_CTX,
        "n_batch": draw(st.integers(2, 70)),
        "type_k": "f32",
        "type_v": "f32",
        "n_local": n_local,
        "n_sink": draw(st.sampled_from([0, 4, 17])),
        "block": draw(st.sampled_from(["fixed:16", "fixed:20", "fixed:32", "semantic:16-24"])),
        "budget": 32 * draw(st.integers(0, 3)),
        "chunk_budget": 16 * draw(st.integers(0, 4)),
        "n_dense": draw(st.sampled_from([0, 0, 70, 200])),
        "index": f"representatives:{draw(st.integers(1, 5))}",
        "score": draw(st.sampled_from(["dot", "dot", "attention"])),
        "n_score": draw(st.integers(1, n_local)),
        "relevance": draw(st.sampled_from(["lse", "lse", "mean", "max"])),
        "per_head": draw(st.booleans()),
        "sticky": draw(st.sampled_from([0.0, 0.0, 0.3, 1.5])),
        "late": draw(st.sampled_from([False, False, True])),
        "positions": positions,
    }
    return MemoryConfig(**{**values, **fixed})


def spec_of(draw_seed: int, n_head_kv: int, group: int, scaling: str, family: dict[str, Any]) -> TinySpec:
    # YaRN doubles its context, so that every model is trained on N_TRAINED.
    n_ctx = N_TRAINED // 2 if scaling == "yarn" else N_TRAINED
    return TinySpec(
        **family,
        n_layer=2, n_head=n_head_kv * group, n_head_kv=n_head_kv, head_dim=32, n_ff=64, n_ctx=n_ctx,
        weight_type=QT.F32, scaling_kind=scaling, scaling_factor=2.0 if scaling != "none" else 1.0,
        seed=draw_seed,
    )  # fmt: skip


@contextmanager
def keys_less_bias(centred: bool) -> Iterator[None]:
    """As quantised keys are stored, F32 ones too, so that no rounding hides an error; centred: whether they are."""
    with patch("pyggml_repkv.memory.centres.centres_keys", lambda memory, biases: centred):
        yield


models = {
    "centred": st.booleans(),
    "family": families(),
    "seed": st.integers(0, 1000),
    "n_head_kv": st.integers(1, 3),
    "group": st.integers(1, 3),
    "scaling": st.sampled_from(["none", "none", "linear", "yarn"]),
    "n_threads": st.integers(1, 3),
}


@given(memory=memories(), n_prompt=st.integers(40, 150), n_decode=st.integers(0, 20), **models)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_repkv_equals_the_oracle(
    memory, n_prompt, n_decode, centred, family, seed, n_head_kv, group, scaling, n_threads, tmp_path
):
    spec = spec_of(seed, n_head_kv, group, scaling, family)
    weights = write_tiny_model(tmp_path / "model.gguf", spec)
    tokens = np.random.default_rng(seed).integers(0, spec.n_vocab, n_prompt + n_decode).tolist()
    with (
        keys_less_bias(centred),
        Model.load(tmp_path / "model.gguf", threads=n_threads, repack=False) as model,
        model.session(memory) as s,
    ):
        got = [s.prefill(tokens[:n_prompt]).copy()]
        sizes = s.policy.split(n_prompt, memory.n_batch)
        got += [s.decode(token).copy() for token in tokens[n_prompt:]]
        scores = [s.policy.index.get_score(1, t) for t in range(len(tokens))]
        # Another test checks where the text is cut.
        bounds = [*s.policy.blocks.bounds, N_CTX] if memory.block.startswith("semantic") else None
        representatives = [s.policy.index.chosen[b][1].tolist() for b in range(s.policy.blocks.n_blocks)]
    oracle = RepKVOracle(spec, weights, memory, bounds)
    steps = sizes + [1] * n_decode
    want = [oracle.step(tokens[oracle.n_past : oracle.n_past + size])[-1] for size in steps]
    assert relative_error(np.array(got), np.array(want[len(sizes) - 1 :])) < 1e-4
    assert relative_error(np.array(scores), np.array(oracle.layers[1].scores)) < 1e-4
    assert representatives == oracle.layers[1].representatives


CODED = {
    "block": st.sampled_from(["fixed:16", "fixed:32", "fixed:48"]),
    "index": st.sampled_from(["tokens:4", "tokens:4", "tokens:2", "tokens:1"]),
    "unit": st.sampled_from(["16", "8", "1", "semantic:4-12"]),
    "stride": st.integers(1, 5),
    # Chunks of more than one group, and a choice for each of them.
    "group": st.sampled_from([0, 32]),
    "n_batch": st.sampled_from([7, 33, 64, 70]),
    "chunk_budget": st.sampled_from([0, 16, 32]),
    "n_question": st.sampled_from([0, 16]),
}

GROUPS = MemoryConfig(
    kv="repkv", n_ctx=N_CTX, n_batch=64, type_k="f32", type_v="f32", n_local=32, n_sink=4, n_dense=0, block="fixed:16",
    budget=32, chunk_budget=32, group=32, n_question=0, positions="exact",
)  # fmt: skip
"""Every chunk but the first ones has two groups, each with a choice."""


@given(
    memory=memories(late=False), coded=st.fixed_dictionaries(CODED), n_prompt=st.integers(40, 260),
    n_decode=st.integers(0, 20), **models,
)  # fmt: skip
@example(
    memory=GROUPS, coded={"index": "tokens:4"}, n_prompt=256, n_decode=3, centred=False,
    family={"arch": "qwen2", "optional": (), "joined": False}, seed=0, n_head_kv=2, group=2, scaling="none",
    n_threads=2,
)  # fmt: skip
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_an_index_of_all_tokens_equals_the_oracle(
    memory, coded, n_prompt, n_decode, centred, family, seed, n_head_kv, group, scaling, n_threads, tmp_path
):
    memory = replace(memory, **coded)
    spec = spec_of(seed, n_head_kv, group, scaling, family)
    weights = write_tiny_model(tmp_path / "model.gguf", spec)
    tokens = np.random.default_rng(seed).integers(0, spec.n_vocab, n_prompt + n_decode).tolist()
    with (
        keys_less_bias(centred),
        Model.load(tmp_path / "model.gguf", threads=n_threads, repack=False) as model,
        model.session(memory) as session,
    ):
        policy = session.policy
        policy.observed = True

        def engine(layer):
            index, end = policy.index, policy.blocks.sealed_end
            rows = policy.last_step.observed_selection(layer).tolist()
            return index.decoded(layer, memory.n_sink, end), [row[1 : 1 + row[0]] for row in rows], index.turn

        oracle, n_past = RepKVOracle(spec, weights, memory, engine=engine), 0
        for size in policy.split(n_prompt, memory.n_batch) + [1] * n_decode:
            got = session._reader.step(np.array(tokens[n_past : n_past + size], np.int32), "last")[-1]
            if memory.unit.startswith("semantic"):
                # Another test checks where the text is cut.
                oracle.bounds = [*policy.blocks.bounds, N_CTX]
                oracle.unit_bounds = policy.blocks.unit_bounds
            want = oracle.step(tokens[n_past : n_past + size])
            n_past += size
            assert relative_error(got, want[-1]) < 1e-4


@given(
    memory=memories(kv="window", block="fixed:16"), n_prompt=st.integers(40, 150), n_decode=st.integers(0, 20), **models
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_a_window_equals_the_oracle(
    memory, n_prompt, n_decode, centred, family, seed, n_head_kv, group, scaling, n_threads, tmp_path
):
    spec = spec_of(seed, n_head_kv, group, scaling, family)
    weights = write_tiny_model(tmp_path / "model.gguf", spec)
    tokens = np.random.default_rng(seed).integers(0, spec.n_vocab, n_prompt + n_decode).tolist()
    with (
        keys_less_bias(centred),
        Model.load(tmp_path / "model.gguf", threads=n_threads, repack=False) as model,
        model.session(memory) as s,
    ):
        got = [s.prefill(tokens[:n_prompt]).copy(), *(s.decode(token).copy() for token in tokens[n_prompt:])]
        sizes = s.policy.split(n_prompt, memory.n_batch)
    oracle = RepKVOracle(spec, weights, memory)
    want = [oracle.step(tokens[oracle.n_past : oracle.n_past + size])[-1] for size in sizes + [1] * n_decode]
    assert relative_error(np.array(got), np.array(want[len(sizes) - 1 :])) < 1e-4


@given(
    memory=st.sampled_from(["exact", "ordered"]).flatmap(
        lambda positions: memories(budget=1024, chunk_budget=1024, positions=positions)
    ),
    n_prompt=st.integers(40, 200),
    **models,
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_room_for_every_block_is_full_attention(
    memory, n_prompt, centred, family, seed, n_head_kv, group, scaling, n_threads, tmp_path
):
    spec = spec_of(seed, n_head_kv, group, scaling, family)
    write_tiny_model(tmp_path / "model.gguf", spec)
    tokens = np.random.default_rng(seed).integers(0, spec.n_vocab, n_prompt + 5).tolist()
    full = MemoryConfig(n_ctx=N_CTX, type_k="f32", type_v="f32")
    logits = []
    with keys_less_bias(centred), Model.load(tmp_path / "model.gguf", threads=n_threads, repack=False) as model:
        for config in (memory, full):
            with model.session(config) as session:
                logits.append([session.prefill(tokens[:n_prompt]).copy()])
                logits[-1] += [session.decode(token).copy() for token in tokens[n_prompt:]]
    assert relative_error(np.array(logits[0]), np.array(logits[1])) < 2e-5
