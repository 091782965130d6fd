"""Loading a model: its arguments, its errors, and what closing it leaves."""

import gc
import weakref

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from pyggml_repkv.engine.model import Model
from pyggml_repkv.engine.threads import default_threads
from pyggml_repkv.errors import InputError, ModelFileError
from pyggml_repkv.memory.config import MemoryConfig
from tests.subprocesses import printed
from tests.tiny_models import TinySpec, write_tiny_model


@pytest.mark.parametrize("n_threads", [0, -1, 513])
def test_a_senseless_number_of_threads_is_refused(tiny_model, n_threads):
    with pytest.raises(InputError, match=f"-t is {n_threads}; it must be between 1 and 512"):
        Model.load(tiny_model(), threads=n_threads)


@pytest.mark.parametrize(("n_threads", "expected"), [(None, default_threads()), (3, 3)])
def test_it_computes_with_the_threads_it_was_given(tiny_model, n_threads, expected):
    with Model.load(tiny_model(n_layer=1), threads=n_threads) as model:
        assert model.backend.n_threads == expected


def test_a_file_that_is_no_model_is_named(tmp_path):
    for name, content in (("missing.gguf", None), ("text.gguf", b"Once upon a time"), ("empty.gguf", b"")):
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ModelFileError) as caught:
            Model.load(file)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_broken_vocabulary_is_known_at_once(tmp_path):
    path = tmp_path / "model.gguf"

    def edit(metadata, tensors):
        metadata["tokenizer.ggml.model"] = ("another", metadata["tokenizer.ggml.model"][1])

    write_tiny_model(path, TinySpec(n_layer=1), edit)
    with pytest.raises(ModelFileError, match=f"{path}.*another"):
        Model.load(path)


def test_it_knows_itself(tiny_model):
    with Model.load(str(tiny_model(n_layer=3, n_ctx=99))) as model:
        assert (model.config.n_layer, model.config.n_ctx_train) == (3, 99)
        assert model.tokenizer.decode(model.tokenizer.encode("the end")) == "the end"
        assert "<|im_start|>" in model.chat_template.render([{"role": "user", "content": "Hi"}])
        assert 0 < model.load_ms < 60_000


def test_a_conversation_is_one_call(tiny_model):
    with Model.load(tiny_model()) as model:
        prompt = model.chat_prompt([{"role": "user", "content": "Hi<|im_end|>"}])
        assert prompt.text == "<|im_start|>user\nHi<|im_end|><|im_end|>\n<|im_start|>assistant\n"
        assert sum(map(model.tokenizer.is_special, prompt.tokens)) == 3
        assert model.tokenizer.decode(prompt.tokens) == prompt.text
        model.chat_template = None
        with pytest.raises(InputError, match="no chat template"):
            model.chat_prompt([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("options", "normalizes"),
    [
        ({}, True),
        ({"exact_graph": True}, False),
        ({"normalize": False}, False),
        ({"exact_graph": True, "normalize": True}, True),
    ],
)
def test_text_is_composed_unless_the_graph_is_llama_cpps(tiny_model, options, normalizes):
    with Model.load(tiny_model(n_layer=1), **options) as model:
        assert model.tokenizer.decode(model.tokenizer.encode("e\u0301")) == ("é" if normalizes else "e\u0301")


def test_closing_closes_its_sessions(tiny_model):
    with Model.load(tiny_model()) as model:
        sessions = [model.session() for _ in range(3)]
        sessions[1].close()
    for session in sessions:
        with pytest.raises(InputError, match="the session is closed"):
            session.prefill([1])
    assert model.backend.closed
    model.close()


def test_a_closed_model_makes_no_sessions(tiny_model):
    """Its weights are gone, so a session would read memory that has another owner."""
    model = Model.load(tiny_model())
    model.close()
    with pytest.raises(InputError, match="the model is closed"):
        model.session()


@pytest.mark.parametrize("what", ["session", "model"])
def test_a_step_that_waits_while_another_thread_closes_is_an_error(tiny_model, what, monkeypatch):
    """Runs in another process, because a failure would read freed memory. The other thread closes before the step has
    the lock, which is then the last one.
    """
    monkeypatch.setenv("MALLOC_PERTURB_", "165")  # glibc overwrites what is freed
    source = f"""
import sys, threading, time
from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import RepkvError
from pyggml_repkv.memory.config import MemoryConfig

class Lock:
    def __init__(self):
        self.lock, self.before = threading.Lock(), []
    def __enter__(self):
        while self.before:
            self.before.pop()()
        self.lock.acquire()
    def __exit__(self, *_):
        self.lock.release()

model = Model.load(sys.argv[1], threads=1)
model.backend.lock = Lock()
session = model.session(MemoryConfig(n_batch=40))
session.prefill([1] * 40)
closing = threading.Thread(target={what}.close)

def close():
    closing.start()
    while not session._closed:
        time.sleep(1e-3)

model.backend.lock.before.append(close)
try:
    session.prefill([1] * 50)
except RepkvError as error:
    print(error)
closing.join()
print(session.n_past)"""
    assert printed(source, str(tiny_model())) == ["the session is closed", "80"]


def test_a_session_that_nobody_holds_is_collected(tiny_model):
    with Model.load(tiny_model()) as model:
        session = model.session()
        session.prefill([1, 2, 3])
        policy = weakref.ref(session.policy)
        del session
        gc.collect()
        assert policy() is None


def test_a_session_outlives_a_model_that_nobody_holds(tiny_model):
    session = Model.load(tiny_model(), threads=1).session()
    gc.collect()
    first = session.prefill([1, 2, 3])
    gc.collect()
    with Model.load(tiny_model(), threads=1) as model:
        assert np.array_equal(model.session().prefill([1, 2, 3]), first)


def test_the_end_of_the_program_needs_no_closing(tiny_model):
    source = """
import sys
from pyggml_repkv.engine.model import Model
model = Model.load(sys.argv[1])
session = model.session()
print(session.prefill([1, 2, 3]).shape)"""
    assert printed(source, str(tiny_model(n_layer=1, n_vocab=300))) == ["(300,)"]


@pytest.mark.parametrize(
    ("weight_type", "options", "forms"),
    [
        (QT.F32, {}, ["one", "ggml", "packed"]),
        (QT.F32, {"exact_graph": True}, ["ggml", "ggml", "ggml"]),
        (QT.Q4_0, {"repack": True}, ["ggml", "ggml", "ggml"]),
        (QT.Q4_0, {"repack": False}, ["one", "ggml", "packed"]),
    ],
)
def test_options_decide_what_a_step_is_built_of(tiny_model, weight_type, options, forms):
    with Model.load(tiny_model(n_layer=1, weight_type=weight_type), **options) as model:
        if options.get("repack") and not model.weights.repacked:
            pytest.skip("this CPU has no layout for Q4_0")
        found = [model.graph.form(1), model.graph.form(5), model.graph.form(32)]
    if not model.graph._packs:
        forms = [form if form != "packed" else "ggml" for form in forms]
    assert found == forms


def test_two_models_at_once(tiny_model):
    paths = tiny_model(seed=1), tiny_model(seed=2, n_layer=1, head_dim=32)
    alone = []
    for path in paths:
        with Model.load(path, threads=2) as model:
            alone.append(model.session().prefill(range(50)))
    with Model.load(paths[0], threads=2) as first, Model.load(paths[1], threads=2) as second:
        sessions = first.session(MemoryConfig()), second.session(MemoryConfig())
        together = [session.prefill(range(50)) for session in sessions]
    for a, b in zip(alone, together, strict=True):
        assert np.array_equal(a, b)
