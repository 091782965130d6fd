"""The worker's calls of llama.cpp: sizes of context and batches, types, attention, rewinding."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
from llama_worker import LlamaEngine

N_VOCAB = 4


class FakeLlama:
    """Logits are the number of tokens in the context, over and over."""

    __version__ = "9.9"
    LLAMA_FLASH_ATTN_TYPE_ENABLED, LLAMA_FLASH_ATTN_TYPE_DISABLED = 1, 0
    LLAMA_ROPE_SCALING_TYPE_YARN = 2
    llama_token = ctypes.c_int32

    def __init__(self):
        self.contexts, self.freed, self.batches, self.n_past = [], [], [], 0
        self.loads, self.status = True, 0

    def llama_backend_init(self): ...

    def llama_model_default_params(self):
        return SimpleNamespace(n_gpu_layers=99)

    def llama_model_load_from_file(self, path, params):
        assert params.n_gpu_layers == 0
        return path if self.loads else None

    def llama_model_get_vocab(self, model):
        return model

    def llama_vocab_n_tokens(self, vocab):
        return N_VOCAB

    def llama_context_default_params(self):
        return SimpleNamespace(n_ctx=0, n_batch=2048, n_ubatch=512)

    def llama_init_from_model(self, model, params):
        self.contexts.append(params)
        self.n_past = 0
        return params if params.n_ctx < 10**6 else None

    def llama_free(self, context):
        self.freed.append(context)

    def llama_batch_get_one(self, array, n_tokens):
        return list(array)[:n_tokens]

    def llama_batch_init(self, n_tokens, embd, n_seq_max):
        assert (embd, n_seq_max) == (0, 1)
        lists = {name: [None] * n_tokens for name in ("token", "pos", "n_seq_id", "logits")}
        return SimpleNamespace(**lists, seq_id=[[None] for _ in range(n_tokens)])

    def llama_batch_free(self, batch):
        self.freed.append(batch)

    def llama_get_logits(self, context):
        values = [float(i) for i in range(self.n_past) for _ in range(N_VOCAB)]
        return (ctypes.c_float * len(values))(*values)

    def llama_decode(self, context, batch):
        if isinstance(batch, SimpleNamespace):
            self.batches.append(batch)
            self.n_past = batch.n_tokens
            return self.status
        assert len(batch) <= context.n_batch
        self.batches.append(batch)
        self.n_past += len(batch)
        return self.status

    def llama_get_logits_ith(self, context, row):
        assert row == -1
        return (ctypes.c_float * N_VOCAB)(*[self.n_past] * N_VOCAB)

    def llama_get_memory(self, context):
        return self

    def llama_memory_seq_rm(self, memory, sequence, first, last):
        assert (sequence, last) == (0, -1)
        self.n_past = first
        return first != 13


@pytest.fixture
def llama():
    return FakeLlama()


def test_a_context_is_as_it_was_asked_for(llama):
    engine = LlamaEngine(llama, "m.gguf", 3, n_chunk=512, n_batch=2048, type_k="q8_0", type_v="bf16")
    assert (engine.version, engine.n_vocab) == ("llama-cpp-python 9.9", N_VOCAB)
    engine.open(8192, flash_attn=True)
    engine.open(256, flash_attn=False)
    first, second = llama.contexts
    assert llama.freed == [first]
    assert (first.n_ctx, first.n_batch, first.n_ubatch, first.flash_attn_type) == (8192, 2048, 512, 1)
    assert (second.n_ctx, second.n_batch, second.n_ubatch, second.flash_attn_type) == (256, 256, 256, 0)
    for params in (first, second):
        assert (params.n_threads, params.n_threads_batch, params.type_k, params.type_v) == (3, 3, 8, 30)
        assert not params.offload_kqv
        assert not params.op_offload


def test_rope_is_scaled_as_llama_cpps_flags_do(llama):
    rope = {"scaling": "yarn", "scale": 3.0, "freq_base": 5e5, "orig_ctx": 4096}
    for given in (rope, dict.fromkeys(rope)):
        LlamaEngine(llama, "m.gguf", 1, rope=given).open(256, flash_attn=True)
    first, second = llama.contexts
    assert (first.rope_scaling_type, first.rope_freq_base, first.yarn_orig_ctx) == (2, 5e5, 4096)
    assert first.rope_freq_scale == np.float32(1 / 3)
    # 0 leaves what the file says.
    assert (second.rope_freq_base, second.yarn_orig_ctx) == (0, 0)
    assert not hasattr(second, "rope_scaling_type")
    assert not hasattr(second, "rope_freq_scale")


@pytest.mark.parametrize(("n_batch", "sizes"), [(2048, [2048, 2048, 904]), (4096, [4096, 904])])
def test_a_prompt_is_read_in_batches(llama, n_batch, sizes):
    engine = LlamaEngine(llama, "m.gguf", 1, n_chunk=n_batch, n_batch=n_batch)
    engine.open(8192, flash_attn=True)
    assert engine.prefill(list(range(5000))).tolist() == [5000.0] * N_VOCAB
    assert [len(batch) for batch in llama.batches] == sizes
    assert [t for batch in llama.batches for t in batch] == list(range(5000))
    assert engine.decode(7)[0] == 5001
    assert llama.batches[-1] == [7]
    engine.rewind(5000)
    assert np.all(engine.decode(7) == 5001)


def test_logits_after_each_token(llama):
    engine = LlamaEngine(llama, "m.gguf", 1)
    engine.open(256, flash_attn=True)
    assert engine.all_logits([7, 8, 9]).tolist() == [[i] * N_VOCAB for i in (0, 1, 2)]
    (batch,) = llama.batches
    assert (batch.n_tokens, batch.token, batch.pos, batch.logits) == (3, [7, 8, 9], [0, 1, 2], [1, 1, 1])
    assert (batch.n_seq_id, batch.seq_id) == ([1, 1, 1], [[0], [0], [0]])
    llama.status = 1
    with pytest.raises(RuntimeError, match="could not read 3 tokens"):
        engine.all_logits([7, 8, 9])
    assert llama.freed == llama.batches


def test_what_llama_cpp_refuses_is_one_line(llama):
    engine = LlamaEngine(llama, "m.gguf", 1)
    with pytest.raises(RuntimeError, match="cannot make a context of 1000000 tokens"):
        engine.open(10**6, flash_attn=True)
    engine.open(256, flash_attn=True)
    with pytest.raises(RuntimeError, match="cannot forget the tokens from 13 on"):
        engine.rewind(13)
    llama.status = 1
    with pytest.raises(RuntimeError, match="could not read 2 tokens: llama_decode returned 1"):
        engine.prefill([1, 2])
    llama.loads = False
    with pytest.raises(RuntimeError, match=r"m\.gguf: llama\.cpp cannot load it"):
        LlamaEngine(llama, "m.gguf", 1)
