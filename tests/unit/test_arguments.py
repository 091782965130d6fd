"""Wrong types are one clear message, whatever public thing they are given to."""

import numpy as np
import pytest

from pyggml_repkv import GenerationConfig, MemoryConfig, Model, SamplingConfig
from pyggml_repkv.arguments import check_number
from pyggml_repkv.errors import ContextFullError, InputError
from tests.tiny_models import TinySpec, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_model(path, TinySpec(n_layer=1))
    with Model.load(path, threads=1) as model:
        yield model


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (MemoryConfig, {"n_ctx": "4096"}, "n_ctx must be an integer, got '4096'"),
        (MemoryConfig, {"n_ctx": 4096.0}, "n_ctx must be an integer, got 4096.0"),
        (MemoryConfig, {"n_batch": None}, "n_batch must be an integer, got None"),
        (MemoryConfig, {"kv": 3}, "kv must be a text, got 3"),
        (MemoryConfig, {"late": "yes"}, "late must be True or False, got 'yes'"),
        (MemoryConfig, {"sticky": "1"}, "sticky must be a number, got '1'"),
        (MemoryConfig, {"kv_dir": "a\0b"}, "kv_dir must not hold a NUL, got 'a\\x00b'"),
        (MemoryConfig, {"kv_dir": None}, "kv_dir must be a text, got None"),
        (SamplingConfig, {"temp": "0.8"}, "temp must be a number, got '0.8'"),
        (SamplingConfig, {"temp": None}, "temp must be a number, got None"),
        (SamplingConfig, {"top_p": True}, "top_p must be a number, got True"),
        (SamplingConfig, {"top_k": 4.0}, "top_k must be an integer, got 4.0"),
        (SamplingConfig, {"seed": 1.5}, "seed must be an integer, got 1.5"),
        (SamplingConfig, {"seed": np.bool_(True)}, "seed must be an integer, got "),
    ],
)
def test_configurations(config, values, message):
    with pytest.raises(InputError) as caught:
        config(**values)
    assert str(caught.value).startswith(message)


def test_numbers_of_numpy_become_pythons():
    config = SamplingConfig(temp=np.float32(0.5), top_k=np.int64(3), seed=np.uint32(7), min_p=0)
    assert [type(value) for value in (config.temp, config.top_k, config.seed, config.min_p)] == [float, int, int, float]
    assert MemoryConfig(n_ctx=np.int32(64)).n_ctx == 64


def test_a_number_too_large_for_a_float_is_refused():
    with pytest.raises(InputError, match="x must be a number"):
        check_number("x", 10**400)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": "2"}, "threads must be an integer, got '2'"),
        ({"threads": 1.5}, "threads must be an integer, got 1.5"),
        ({"repack": "no"}, "repack must be True or False, got 'no'"),
        ({"exact_graph": None}, "exact_graph must be True or False, got None"),
        ({"normalize": 0}, "normalize must be True, False or None, got 0"),
        ({"path": ""}, "the model's path must not be empty"),
        ({"path": "a\0b"}, "the model's path must not hold a NUL, got 'a\\x00b'"),
        ({"path": b"x"}, "the model's path must be a path, got b'x'"),
        ({"path": None}, "the model's path must be a path, got None"),
        ({"path": 5}, "the model's path must be a path, got 5"),
    ],
)
def test_loading(tiny_model, options, message):
    with pytest.raises(InputError) as caught:
        Model.load(**{"path": tiny_model(n_layer=1), **options})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.session({"kv": "full"}), "memory must be a MemoryConfig, got {'kv': 'full'}"),
        (lambda model: model.session(directory=5), "directory must be a path, got 5"),
        (lambda model: model.session(directory="a\0b"), "directory must not hold a NUL"),
        (lambda model: model.session(directory=""), "directory must not be empty"),
        (lambda model: model.resume(None), "directory must be a path, got None"),
        (lambda model: model.chat_prompt("hello"), "messages: expected a list"),
        (lambda model: model.chat_prompt([{"role": "user", "content": 5}]), "messages[0].content is 5; it must be"),
        (lambda model: model.session().prefill([1.5, "a"]), "tokens must be a non-empty sequence of token ids"),
        (lambda model: model.session().prefill([1.0]), "tokens must be a non-empty sequence of token ids"),
        (lambda model: model.session().prefill(None), "tokens must be a non-empty sequence of token ids"),
        (lambda model: model.session().prefill("text"), "tokens must be a non-empty sequence of token ids"),
        (lambda model: model.session().prefill([True]), "tokens must be a non-empty sequence of token ids"),
        (lambda model: model.session().prefill([[1], [2, 3]]), "tokens must be a non-empty sequence of token ids"),
        (lambda model: model.session().prefill([2**70]), "tokens must be a non-empty sequence of token ids"),
        (lambda model: model.session().prefill([-1]), "token id -1 is not in the vocabulary"),
        (lambda model: model.session().prefill([1], on_progress=5), "on_progress must be a function, got 5"),
        (lambda model: model.session().decode(None), "token must be an integer, got None"),
        (lambda model: model.session().decode(1.0), "token must be an integer, got 1.0"),
        (lambda model: model.session().decode([1]), "token must be an integer, got [1]"),
        (lambda model: model.session().decode(10**6), "token id 1000000 is not in the vocabulary"),
        (lambda model: model.session().generate(None), "tokens must be a non-empty sequence of token ids"),
        (lambda model: model.session().generate(5), "tokens must be a non-empty sequence of token ids"),
        (lambda model: model.session().generate([1.5]), "tokens must be a non-empty sequence of token ids"),
        (lambda model: model.session().generate([10**6]), "token id 1000000 is not in the vocabulary"),
        (lambda model: model.session().generate("x", {"n_predict": 3}), "config must be a GenerationConfig, got"),
        (lambda model: model.session().generate([]), "the prompt is empty"),
        (lambda model: model.session().generate("x").prefill(7), "on_progress must be a function, got 7"),
        (lambda model: model.session().rewind("1"), "n_past must be an integer, got '1'"),
        (lambda model: model.session().repeat([2]), "n_past must be an integer, got [2]"),
        *(
            (lambda model, bad=bad: model.session().budget(bad), f"n_prompt must be an integer, got {bad!r}")
            for bad in ("x", None, 1.5, float("nan"), True, [])
        ),
        *(
            (lambda model, bad=bad: model.session().budget(1, bad), f"n_more must be an integer, got {bad!r}")
            for bad in ("x", None, 1.5, float("nan"), True, [])
        ),
        (lambda model: model.session().budget(-1), "n_prompt must be 0 or more, got -1"),
        (lambda model: model.session().budget(1, -1), "n_more must be 0 or more, got -1"),
        (lambda model: model.session().disk_need("x"), "n_tokens must be an integer, got 'x'"),
        (lambda model: model.session().disk_need(-1), "n_tokens must be 0 or more, got -1"),
        *(
            (
                lambda model, bad=bad: model.session().prefill_slices([1, 2], bad),
                f"first must be an integer, got {bad!r}",
            )
            for bad in ("x", None, 1.5, float("nan"), True, [])
        ),
        (lambda model: model.session().prefill_slices([1, 2], -1), "first must be 0 or more, got -1"),
        *(
            (
                lambda model, bad=bad: model.session().go_back_to(bad, bool),
                "tokens must be a non-empty sequence of token",
            )
            for bad in (5, "x", b"x", 1.5, [1, "a"], [2**70], {1: 2}, float("nan"), object())
        ),
        *(
            (lambda model, bad=bad: model.session().go_back_to([1], bad), f"may_resume must be a function, got {bad!r}")
            for bad in (None, 5, "x", [])
        ),
        (lambda model: model.session().go_back_to([1], bool, drop=1), "drop must be True or False, got 1"),
        (lambda model: model.session().go_back_to([10**6], bool), "token id 1000000 is not in the vocabulary"),
        (lambda model: model.session().save_also(5), "extra must be a function, got 5"),
        (lambda model: model.session().save_also(None), "extra must be a function, got None"),
        (lambda model: model.session().save(7), "directory must be a path, got 7"),
        (lambda model: model.session().save(), "the session is not kept anywhere"),
        (lambda model: model.tokenizer.encode(None), "text must be a string, got None"),
    ],
)
def test_models_and_sessions(model, call, message):
    with pytest.raises(InputError) as caught:
        call(model)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_budget_is_of_what_the_context_holds(model):
    """A list of the steps of 2**70 tokens would take all memory there is."""
    with model.session() as session:
        assert session.budget(session.n_ctx, 2**70)
        for n_prompt in (session.n_ctx + 1, 2**70):
            with pytest.raises(ContextFullError, match=f"{n_prompt} tokens do not fit"):
                session.budget(n_prompt)


def test_tokens_may_be_numpys(model):
    def logits(tokens, token):
        session = model.session()
        return [session.prefill(tokens).copy(), session.decode(token).copy()]

    plain = logits([1, 2, 3], 4)
    assert np.array_equal(logits(np.array([1, 2, 3], np.uint16), np.int64(4)), plain)
    assert np.array_equal(logits([np.int32(1), 2, np.uint8(3)], np.uint8(4)), plain)
    config = GenerationConfig(4, sampling=SamplingConfig(temp=0))
    texts = ["".join(model.session().generate(prompt, config)) for prompt in (np.array([1, 2, 3]), [1, 2, 3])]
    assert texts[0] == texts[1]
