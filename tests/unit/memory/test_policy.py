"""The configuration of a memory is checked once, with plain errors, and new policies need no other change."""

from dataclasses import FrozenInstanceError

import pytest

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError
from pyggml_repkv.memory.config import MemoryConfig, context_length
from pyggml_repkv.memory.full.memory import FullMemory
from pyggml_repkv.memory.policy import even_split
from pyggml_repkv.memory.registry import POLICIES
from pyggml_repkv.model.limits import MAX_CONTEXT
from tests.subprocesses import printed


@pytest.fixture
def model(tiny_model):
    with Model.load(tiny_model(n_layer=1, n_ctx=64), threads=1) as model:
        yield model


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_ctx": -1}, "-c is -1; it must be 0 (the trained context) or a number of tokens, at most 134217728"),
        ({"n_batch": 0}, "-b is 0; it must be between 1 and 1048576"),
        ({"type_k": "q4_0"}, "-ctk is 'q4_0'; it must be one of f16, bf16, f32, q8_0"),
        ({"type_v": ""}, "-ctv is ''; it must be one of f16, bf16, f32, q8_0"),
    ],
)
def test_a_bad_value_names_its_flag_and_what_would_be_right(fields, message):
    with pytest.raises(InputError) as caught:
        MemoryConfig(**fields)
    assert str(caught.value) == message


@pytest.mark.parametrize("kv", ["full", "window", "repkv"])
@pytest.mark.parametrize("n_ctx", [MAX_CONTEXT + 1, 2**31 - 1, 2**31, 2**62])
def test_more_tokens_than_kernels_can_count_are_refused(kv, n_ctx):
    with pytest.raises(InputError, match=f"-c is {n_ctx}; .*, at most {MAX_CONTEXT}"):
        MemoryConfig(kv=kv, n_ctx=n_ctx)


@pytest.mark.parametrize(
    "fields",
    [
        {"kv": "full"},
        {"kv": "window"},
        {"kv": "repkv"},
        {"kv": "repkv", "kv_dir": "DIR", "block": "semantic:16-4096", "index": "representatives:4"},
        {"kv": "repkv", "kv_dir": "DIR", "n_batch": 2**20},
    ],
)
def test_the_longest_context_works_or_says_what_it_lacks(tiny_model, tmp_path, fields):
    """Arenas of a hundred million rows are only address space until they are written."""
    source = """
import sys
from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import ComputeError
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.model.limits import MAX_CONTEXT
fields = {name: sys.argv[2] if value == "DIR" else value for name, value in eval(sys.argv[3]).items()}
try:
    session = Model.load(sys.argv[1], threads=1).session(MemoryConfig(n_ctx=MAX_CONTEXT, **fields))
    session.prefill([1, 2, 3])
    print(session.n_past)
except ComputeError as error:
    print(error)"""
    (line,) = printed(source, str(tiny_model(n_layer=2)), str(tmp_path / "blocks"), repr(fields))
    assert line == "3" or "need" in line or "not enough memory" in line


def test_a_configuration_is_fixed_and_comparable():
    config = MemoryConfig(n_ctx=100)
    assert config == MemoryConfig(n_ctx=100) != MemoryConfig()
    with pytest.raises(FrozenInstanceError):
        config.n_ctx = 200
    with pytest.raises(TypeError, match="n_context"):
        MemoryConfig(n_context=100)


@pytest.mark.parametrize(("n_ctx", "length"), [(0, 64), (1, 1), (63, 63), (1000, 1000)])
def test_no_length_means_the_trained_one(model, n_ctx, length):
    assert context_length(MemoryConfig(n_ctx=n_ctx), model.config.n_ctx_train, bounded=False) == length
    assert model.session(MemoryConfig(n_ctx=n_ctx)).n_ctx == length


@pytest.mark.parametrize(
    ("n_tokens", "n_batch", "sizes"),
    [(1, 1, [1]), (10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 512, [3]), (5, 1, [1] * 5)],
)
def test_a_prompt_is_read_in_even_steps(n_tokens, n_batch, sizes):
    assert even_split(n_tokens, n_batch) == sizes


def test_an_unknown_policy_lists_the_known_ones(model):
    with pytest.raises(InputError) as caught:
        model.session(MemoryConfig(kv="none"))
    assert str(caught.value) == f"--kv is 'none'; it must be one of {', '.join(POLICIES)}, or a file NAME.py"
    assert "full" in POLICIES


def test_a_new_policy_is_one_entry(model, monkeypatch):
    """No model or session names it, and every step uses it."""
    asked = []

    class Spy(FullMemory):
        name = "spy"

        def step_shape(self, n_past, n_tokens, preferred):
            asked.append((n_past, n_tokens))
            return super().step_shape(n_past, n_tokens, preferred)

    monkeypatch.setitem(POLICIES, "spy", Spy)
    with model.session(MemoryConfig(kv="spy", n_batch=4)) as session:
        session.prefill(range(9))
        session.decode(1)
        assert session.stats()["policy"] == "spy"
    assert asked == [(0, 4), (4, 4), (8, 1), (9, 1)]
