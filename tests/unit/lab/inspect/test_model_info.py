"""`model info` says what a session with the file would find."""

from dataclasses import asdict, replace
from math import prod

import pytest

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError, ModelFileError
from pyggml_repkv.lab.inspect.model_info import ModelInfo, PlanInputs
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.gguf_file import GGUFFile
from pyggml_repkv.model.weights import Weights
from tests.tiny_models import CHAT_TEMPLATE, MERGES, QT, VT, TinySpec, write_tiny_model

PLENTY = 2**40
REPKV = MemoryConfig(kv="repkv", n_batch=48, n_local=64, block="fixed:16", n_dense=0)
MIXED = {"head_dim": 64, "n_ff": 512, "weight_types": (("*ffn_down*", QT.Q8_0), ("blk.*", QT.Q4_K))}


def info_of(path) -> ModelInfo:
    return ModelInfo(GGUFFile.open(path))


def plan_of(path, memory, n_tokens, *, free=PLENTY, **options):
    return info_of(path).plans(PlanInputs([memory], n_tokens, **options), free)[0]


def edited(tmp_path, edit):
    write_tiny_model(tmp_path / "edited.gguf", TinySpec(), edit)
    return tmp_path / "edited.gguf"


def test_types_add_up_to_the_tensors_of_the_file(tiny_model):
    info = info_of(tiny_model(**MIXED))
    by_type = {t.type: t for t in info.types}
    assert by_type.keys() == {"F32", "Q8_0", "Q4_K"}
    assert [t.bytes for t in info.types] == sorted((t.bytes for t in info.types), reverse=True)
    for t in info.types:
        tensors = [x for x in info.file.tensors.values() if x.type.name == t.type]
        assert t.n_tensors == len(tensors)
        assert t.n_parameters == sum(prod(x.shape) for x in tensors)
        assert t.bytes == sum(x.n_bytes for x in tensors)
    assert [by_type[name].bits_per_weight for name in ("F32", "Q8_0", "Q4_K")] == [32, 8.5, 4.5]
    assert info.n_parameters == sum(prod(x.shape) for x in info.file.tensors.values())
    assert info.bits_per_weight == 8 * info.weight_bytes / info.n_parameters


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("type_", [QT.F32, QT.Q4_0, QT.Q4_K, QT.Q8_0, QT.IQ4_NL])
def test_what_is_repacked_is_what_loading_repacks(tiny_model, type_, tied):
    info = info_of(tiny_model(head_dim=64, n_ff=512, weight_type=type_, tied=tied))
    weights = Weights(info.file, info.config, repack=True, join=True)
    assert sum(info.repacked.values()) == weights.repacked_bytes
    weights.close()


def test_the_tokenizer_is_that_of_the_metadata(tiny_model):
    tokenizer = info_of(tiny_model(n_vocab=300)).tokenizer
    assert (tokenizer.kind, tokenizer.pre, tokenizer.supported) == ("gpt2", "qwen2", True)
    assert (tokenizer.n_tokens, tokenizer.n_merges, tokenizer.add_bos) == (300, len(MERGES), False)
    assert (tokenizer.bos.text, tokenizer.eos.text, tokenizer.eot) == ("<|endoftext|>", "<|im_end|>", None)
    assert tokenizer.eos.id == tokenizer.bos.id + 2
    assert tokenizer.chat_templates == ("default",)


def test_templates_are_named_and_an_unknown_tokenizer_is_no_error(tmp_path):
    def edit(metadata, _):
        del metadata["tokenizer.chat_template"]
        metadata["tokenizer.chat_template.tool_use"] = (CHAT_TEMPLATE, VT.STRING)
        metadata["tokenizer.ggml.pre"] = ("tekken", VT.STRING)

    tokenizer = info_of(edited(tmp_path, edit)).tokenizer
    assert (tokenizer.chat_templates, tokenizer.supported) == (("tool_use",), False)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("tokenizer.ggml.merges", None, "tokenizer.ggml.merges is missing"),
        ("tokenizer.ggml.pre", ("tekken", VT.STRING), "tokenizer.ggml.pre is 'tekken'"),
        ("tokenizer.ggml.token_type", ([1, 1], VT.ARRAY), "tokenizer.ggml.token_type is not an array of 288"),
    ],
)
def test_a_tokenizer_that_run_refuses_does_not_fit(tmp_path, key, value, problem):
    def edit(metadata, _):
        del metadata[key]
        if value is not None:
            metadata[key] = value

    info = info_of(edited(tmp_path, edit))
    assert info.tokenizer.problem.startswith(problem)
    (plan,) = info.plans(PlanInputs([MemoryConfig()], 100), 10**10)
    assert (plan.fits, plan.note) == (False, "`run` refuses the file's tokenizer")


def test_ids_that_are_no_tokens_are_none(tmp_path):
    keys = {"bos": (4294967295, VT.UINT32), "eos": ("\n", VT.STRING)}
    tokenizer = info_of(
        edited(tmp_path, lambda m, _: m.update({f"tokenizer.ggml.{role}_token_id": v for role, v in keys.items()}))
    ).tokenizer
    assert (tokenizer.bos, tokenizer.eos, tokenizer.supported) == (None, None, True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.merges", (7, VT.UINT32), "tokenizer.ggml.merges is not an array of strings"),
        ("qwen2.block_count", (3, VT.UINT32), "lacks the tensor blk.2.attn_norm.weight"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, key, value, message):
    with pytest.raises(ModelFileError, match=message):
        info_of(edited(tmp_path, lambda metadata, _: metadata.update({key: value})))


@pytest.mark.parametrize(
    "memory",
    [
        MemoryConfig(),
        MemoryConfig(n_ctx=4000, type_k="q8_0", type_v="f32"),
        MemoryConfig(kv="window", n_batch=48, n_local=64),
        replace(REPKV, n_ctx=4000),
        replace(REPKV, n_ctx=4000, kv_ram=2**24, late=True),
    ],
)
def test_a_plan_is_what_the_policy_of_a_session_says(tiny_model, tmp_path, memory):
    path = tiny_model(head_dim=32, n_ctx=512)
    memory = replace(memory, kv_dir=str(tmp_path / "kv") if memory.kv_ram else "")
    n_tokens = memory.n_ctx or 512
    plan = plan_of(path, memory, n_tokens)
    with Model.load(path, threads=1) as model, model.session(memory) as session:
        assert {**session.policy.bytes_at(n_tokens), "weights": model.weight_bytes, "compute": plan.ram["compute"]} == (
            plan.ram
        )
        need = session.disk_need(n_tokens)
        assert (need and need.total) == (plan.disk and plan.disk.total)
    assert next(iter(plan.ram)) == "weights"
    assert list(plan.ram)[-1] == "compute"
    assert (plan.fits, plan.most_tokens, plan.note) == (True, n_tokens, "")
    assert plan.ram_bytes == sum(plan.ram.values())


@pytest.mark.parametrize("type_", [QT.F32, QT.Q4_K])
@pytest.mark.parametrize(
    ("memory", "exact"),
    [
        (MemoryConfig(n_batch=64), False),
        (MemoryConfig(n_batch=64, flash_attn=False), False),
        (MemoryConfig(n_batch=64), True),
        (MemoryConfig(kv="window", n_batch=48, n_local=64), False),
        (REPKV, False),
    ],
)
def test_the_compute_buffer_is_that_of_a_session_that_read_as_much(tiny_model, type_, memory, exact):
    path, n_tokens = tiny_model(head_dim=64, n_ff=512, n_ctx=512, weight_type=type_), 512
    repack = memory.kv == "full"
    plan = plan_of(path, memory, n_tokens, exact=exact)
    with Model.load(path, threads=1, repack=repack, exact_graph=exact) as model, model.session(memory) as session:
        session.prefill([1] * n_tokens)
        # If matrices are repacked, the planned graph has them apart.
        assert plan.ram["compute"] == pytest.approx(session.compute_bytes, rel=0.05)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("type_", [QT.Q4_0, QT.F32])
def test_keys_less_their_bias_count_in_the_compute_buffer(tiny_model, type_, exact):
    """Ggml's nodes give them back with their bias: repacked weights have such nodes, the exact graph has none."""
    path = tiny_model(n_embd=256, n_head=8, n_head_kv=8, head_dim=64, n_ff=256, n_ctx=4096, weight_type=type_)
    memory = MemoryConfig(n_batch=32, type_k="q8_0")
    plan = plan_of(path, memory, 4096, exact=exact)
    with Model.load(path, threads=2, exact_graph=exact) as model, model.session(memory) as session:
        session.prefill([1] * 4096)
        assert plan.ram["compute"] == pytest.approx(session.compute_bytes, rel=0.05)


def test_copies_of_weights_count_beside_what_stays_in_the_file(tiny_model):
    path = tiny_model(**MIXED)
    info = info_of(path)
    if not info.repacked:
        pytest.skip("ggml has no other layout on this CPU")
    copied = sum(info.file.tensors[name].n_bytes for name in info.repacked)
    mapped = len(info.file.parts[0])
    assert plan_of(path, MemoryConfig(), 128).ram["weights"] == mapped - copied + sum(info.repacked.values())
    assert plan_of(path, MemoryConfig(), 128, repack=False).ram["weights"] == mapped
    assert plan_of(path, REPKV, 128).ram["weights"] == mapped


@pytest.mark.parametrize("memory", [MemoryConfig(), REPKV, replace(REPKV, kv_ram=2**30)])
def test_what_does_not_fit_is_counted_and_a_length_that_fits_is_said(tiny_model, tmp_path, memory):
    path, n_tokens = tiny_model(n_layer=8, head_dim=256), 2**27
    memory = replace(memory, n_ctx=n_tokens, kv_dir=str(tmp_path) if memory.kv_ram else "")
    free = 2**29
    plan = plan_of(path, memory, n_tokens, free=free)
    assert not plan.fits
    assert plan.ram_bytes > free
    if memory.kv == "full":
        assert plan.ram["keys and values"] == n_tokens * 8 * 2 * (2 * 256 * 2)
        assert "compute" not in plan.ram
    assert f"{n_tokens} tokens need" in plan.note
    assert f"about {plan.most_tokens} would fit" in plan.note
    fewer, more = (
        sum(n_bytes for part, n_bytes in plan_of(path, replace(memory, n_ctx=n), n).ram.items() if part != "compute")
        for n in (plan.most_tokens, plan.most_tokens + 4096)
    )
    # The compute buffer counts if the graph could be built.
    assert fewer + plan.ram.get("compute", 0) <= free < more + plan.ram.get("compute", 0)


def test_not_even_the_weights_may_fit(tiny_model):
    plan = plan_of(tiny_model(), MemoryConfig(), 128, free=1000)
    assert (plan.fits, plan.most_tokens) == (False, 0)
    assert plan.note.endswith("none would fit")


def test_a_full_disk_is_said(tiny_model, tmp_path):
    memory = replace(REPKV, n_ctx=4000, kv_dir=str(tmp_path), kv_disk_max=4096)
    plan = plan_of(tiny_model(), memory, 4000)
    assert not plan.fits
    assert "--kv-disk-max is 4 kB" in plan.note
    assert plan.disk.total > 4096


def test_settings_that_no_session_takes_are_refused(tiny_model):
    with pytest.raises(InputError, match="--kv-ram has room for 0 tokens"):
        plan_of(tiny_model(), replace(REPKV, kv_ram=1), 128)


def test_json_is_what_the_config_says(tiny_model):
    path = tiny_model(n_ctx=512, scaling_kind="yarn", scaling_factor=4.0, scaling_orig_ctx=128)
    info = info_of(path)
    plans = info.plans(PlanInputs([MemoryConfig(), REPKV], 512), PLENTY)
    found = info.as_json(plans, PLENTY)
    assert found["config"] == asdict(ModelConfig.from_gguf(GGUFFile.open(path)))
    assert found["config"]["rope_scaling"]["kind"] == "yarn"
    assert found["file"]["bytes"] == path.stat().st_size
    assert found["weights"]["bytes"] == sum(t["bytes"] for t in found["weights"]["types"])
    memory = found["memory"]
    assert (memory["n_tokens"], memory["free_bytes"]) == (512, PLENTY)
    assert [p["policy"] for p in memory["policies"]] == ["full", "repkv"]
    for plain, plan in zip(memory["policies"], plans, strict=True):
        assert plain["ram"] == plan.ram
        assert plain["ram_bytes"] == sum(plain["ram"].values())
        assert plain["disk"] is None


def test_a_vocabulary_has_no_weights_and_no_plan(golden_dir):
    info = info_of(golden_dir / "qwen2-vocab.gguf")
    assert (info.tokenizer.n_tokens, info.tokenizer.n_merges) == (152064, 151387)
    assert info.tokenizer.bos.text == "<｜begin▁of▁sentence｜>"
    assert info.types == ()
    assert info.plans(PlanInputs([MemoryConfig()], 512), PLENTY) == []
    found = info.as_json([], PLENTY)
    assert found["config"]["n_layer"] == 28
    assert found["config"]["tied_output"] is None
    assert found["memory"] is None
    assert found["weights"] == {"types": [], "n_parameters": 0, "bytes": 0, "bits_per_weight": 0.0}


@pytest.mark.parametrize("type_", [QT.F32, QT.Q4_K])
def test_no_matrix_is_read(tiny_model, monkeypatch, type_):
    asked, tensor_bytes = set(), GGUFFile.tensor_bytes

    def watched(file, name):
        asked.add(name)
        return tensor_bytes(file, name)

    monkeypatch.setattr(GGUFFile, "tensor_bytes", watched)
    info = info_of(tiny_model(head_dim=64, n_ff=512, weight_type=type_))
    info.plans(PlanInputs([MemoryConfig(), MemoryConfig(kv="window"), REPKV], 128), PLENTY)
    assert all(name.endswith(".bias") for name in asked)
