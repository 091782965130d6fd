"""Weights as tensors: in the mapped file if possible, copied if necessary, repacked if that is faster."""

from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT
from gguf import GGUFValueType as VT
from gguf.quants import dequantize, quantize

from pyggml_repkv.engine.model import Model
from pyggml_repkv.ffi.library import g, native
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.gguf_file import GGUFFile
from pyggml_repkv.model.weights import Repacker, Weights
from tests.oracle import oracle_logits
from tests.tiny_models import MIN_VOCAB, OPTIONAL, WEIGHT_TYPES, Packed, TinySpec, write_tiny_model
from tests.unit.native.op_bench import tensor_bytes

SPEC = TinySpec(n_layer=2, n_head=4, n_head_kv=2, head_dim=32, n_ff=96, seed=5)
TOKENS = np.random.default_rng(1).integers(0, MIN_VOCAB, 60).tolist()
EXACT_CACHE = MemoryConfig(type_k="f32", type_v="f32")
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def load(path, *, repack=False, join=True):
    file = GGUFFile.open(path)
    return file, Weights(file, ModelConfig.from_gguf(file), repack=repack, join=join)


def address(tensor):
    return tensor.contents.data


def logits_of(path, **options):
    """Returns the logits of a chunk, a short step and single tokens, in every form that the model has."""
    with Model.load(path, threads=2, **options) as model, model.session(EXACT_CACHE) as session:
        steps = [session.prefill_all(TOKENS[:40]), session.prefill_all(TOKENS[40:45])]
        return np.concatenate([*steps, *(session.decode(token)[None] for token in TOKENS[45:])])


def relative_error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.fixture
def q4_0(tmp_path):
    """Path, dequantised weights and spec of a model; its matrices have rows in multiples of 8, for repacking."""
    spec = TinySpec(n_layer=2, n_head=4, n_head_kv=2, head_dim=32, n_ff=128, weight_type=QT.Q4_0, seed=6)
    path = tmp_path / "q4_0.gguf"
    with_weights = write_tiny_model(path, spec)
    _, weights = load(path, repack=True)
    repacked = weights.repacked
    weights.close()
    if not repacked:
        pytest.skip("this CPU has no layout for Q4_0")
    return path, with_weights, spec


def test_tensors_lie_in_the_file(tmp_path):
    write_tiny_model(tmp_path / "m.gguf", SPEC)
    file, weights = load(tmp_path / "m.gguf")
    start = file.parts[0].ctypes.data
    for i, layer in enumerate(weights.layers):
        for part in MATRICES:
            assert address(getattr(layer, part)) == start + file.tensors[f"blk.{i}.{part}.weight"].offset
        assert layer.attn_qkv is None
        assert layer.ffn_gate_up is None
    assert not weights.repacked
    assert weights.repacked_bytes == 0


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_output_is_the_embedding(tmp_path, tied):
    spec = TinySpec(n_layer=1, tied=tied, seed=8)
    written = write_tiny_model(tmp_path / "m.gguf", spec)
    _, weights = load(tmp_path / "m.gguf")
    assert (address(weights.output) == address(weights.token_embd)) == tied
    assert relative_error(logits_of(tmp_path / "m.gguf"), oracle_logits(spec, written, TOKENS)) < 2e-5


@pytest.mark.parametrize("alignment", [8, 16, 64, 4096])
@pytest.mark.parametrize("options", [{}, {"exact_graph": True}], ids=["fused", "exact"])
def test_any_alignment_of_the_file(tmp_path, alignment, options):
    """Odd rows of Q8_0 give the tensors after them addresses that vector loads cannot use: those are copied."""

    def edit(metadata, tensors):
        metadata["general.alignment"] = (alignment, VT.UINT32)

    types = (("*attn_k.weight", QT.Q8_0), ("*ffn_up.weight", QT.Q4_0), ("*embd*", QT.Q8_0))
    spec = TinySpec(n_embd=32, n_head=3, n_head_kv=1, head_dim=32, n_ff=32, n_vocab=273, seed=9, weight_types=types)
    written = write_tiny_model(tmp_path / "m.gguf", spec, edit)
    file, weights = load(tmp_path / "m.gguf")
    misaligned = [name for name, info in file.tensors.items() if info.offset % 32]
    assert bool(misaligned) == (alignment < 32)
    for i, layer in enumerate(weights.layers):
        for part in MATRICES:
            tensor, name = getattr(layer, part), f"blk.{i}.{part}.weight"
            assert address(tensor) % 32 == 0
            assert np.array_equal(tensor_bytes(tensor).ravel(), file.tensor_bytes(name).ravel())
    want = oracle_logits(spec, written, TOKENS)
    assert relative_error(logits_of(tmp_path / "m.gguf", **options), want) < 2e-2


@pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=lambda kind: kind.name)
def test_weights_of_any_type_at_any_address(tmp_path, kind):
    """What an alignment of 8 puts at odd addresses gives the logits of a file of 64."""
    spec = TinySpec(n_layer=1, head_dim=64, n_ff=256, n_vocab=279, weight_type=kind, seed=2)

    def aligned(alignment):
        def edit(metadata, tensors):
            metadata["general.alignment"] = (alignment, VT.UINT32)
            # A tensor of 24 bytes before them moves all others.
            moved = {"first.weight": Packed(np.zeros(6, np.float32), QT.F32), **tensors}
            tensors.clear()
            tensors.update(moved)

        path = tmp_path / f"{alignment}.gguf"
        write_tiny_model(path, spec, edit)
        return path

    paths = {alignment: aligned(alignment) for alignment in (8, 64)}
    file = GGUFFile.open(paths[8])
    assert any(info.offset % 32 for name, info in file.tensors.items() if name.endswith("ffn_up.weight"))
    for options in ({"repack": False}, {"exact_graph": True}):
        assert np.array_equal(logits_of(paths[8], **options), logits_of(paths[64], **options))


@pytest.mark.parametrize("kind", [QT.F16, QT.BF16], ids=["F16", "BF16"])
@pytest.mark.parametrize("options", [{}, {"exact_graph": True}], ids=["fused", "exact"])
@pytest.mark.parametrize(("arch", "joined"), [("qwen2", False), ("qwen2", True), ("qwen3", False), ("llama", False)])
def test_vectors_of_half_precision_are_converted(tmp_path, kind, options, arch, joined):
    """As if the file had them in F32, rounded likewise."""
    spec = replace(SPEC, arch=arch, optional=OPTIONAL[arch], joined=joined)

    def edit(to):
        def vectors(_, tensors):
            for name in [name for name, packed in tensors.items() if packed.data.ndim == 1]:
                half = quantize(tensors[name].data, kind)
                tensors[name] = Packed(half, kind) if to is kind else Packed(dequantize(half, kind), QT.F32)

        return vectors

    for to in (kind, QT.F32):
        write_tiny_model(tmp_path / f"{to.name}.gguf", spec, edit(to))
    got, want = (logits_of(tmp_path / f"{to.name}.gguf", **options) for to in (kind, QT.F32))
    assert np.array_equal(got, want)


def join_qkv(*kinds):
    def edit(_, tensors):
        for i in range(SPEC.n_layer):
            for kind in kinds:
                parts = [tensors.pop(f"blk.{i}.attn_{c}.{kind}") for c in "qkv"]
                data = np.concatenate([part.data for part in parts])
                tensors[f"blk.{i}.attn_qkv.{kind}"] = Packed(data, parts[0].type)

    return edit


@pytest.mark.parametrize("kind", [QT.F32, QT.Q8_0, QT.Q4_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("joined", [("weight", "bias"), ("weight",), ("bias",)], ids="+".join)
def test_joined_weights_or_biases_are_the_separate_ones_bit_for_bit(tmp_path, kind, joined):
    spec = replace(SPEC, weight_type=kind)
    write_tiny_model(tmp_path / "separate.gguf", spec)
    write_tiny_model(tmp_path / "joined.gguf", spec, join_qkv(*joined))
    for options in ({}, {"repack": False}, {"exact_graph": True}, {"exact_graph": True, "repack": False}):
        got, want = (logits_of(tmp_path / f"{name}.gguf", **options) for name in ("joined", "separate"))
        assert np.array_equal(got, want), options


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [QT.F32, QT.Q4_0], ids=lambda kind: kind.name)
def test_rows_of_no_token_are_left_out(tmp_path, tied, kind):
    """The logits of the tokens are those of the file whose other rows have tokens too."""
    n_tokens = 273

    def fewer(metadata, _):
        for key in ("tokens", "token_type"):
            values, of = metadata[f"tokenizer.ggml.{key}"]
            metadata[f"tokenizer.ggml.{key}"] = (values[:n_tokens], of)

    spec = replace(SPEC, tied=tied, weight_type=kind, optional=OPTIONAL["qwen2"])
    write_tiny_model(tmp_path / "padded.gguf", spec)
    write_tiny_model(tmp_path / "fewer.gguf", spec, fewer)
    for options in ({}, {"exact_graph": True}):
        got, want = (logits_of(tmp_path / f"{name}.gguf", **options) for name in ("fewer", "padded"))
        assert got.shape[1] == n_tokens
        assert relative_error(got, want[:, :n_tokens]) < 1e-6


@pytest.mark.parametrize("join", [True, False])
def test_what_is_repacked_is_joined(q4_0, join):
    path, _, spec = q4_0
    file, weights = load(path, repack=True, join=join)
    assert weights.repacked
    assert weights.repacked_bytes >= sum(
        info.n_bytes for name, info in file.tensors.items() if name.startswith("blk.") and info.type == QT.Q4_0
    )
    for i, layer in enumerate(weights.layers):
        assert (layer.attn_qkv is not None) == (layer.ffn_gate_up is not None) == join
        if join:
            n_qkv = (spec.n_head + 2 * spec.n_head_kv) * spec.head_dim
            assert layer.attn_qkv.contents.ne[:2] == [spec.width, n_qkv]
            assert layer.ffn_gate_up.contents.ne[:2] == [spec.width, 2 * spec.n_ff]
            biases = np.concatenate([file.tensor_bytes(f"blk.{i}.attn_{n}.bias") for n in "qkv"])
            assert np.array_equal(tensor_bytes(layer.attn_qkv_bias).ravel(), biases.ravel())
        else:
            assert layer.attn_q.contents.extra


def test_repacking_and_joining_do_not_change_the_answer(q4_0):
    path, written, spec = q4_0
    plain = logits_of(path, exact_graph=True, repack=False)
    for options in ({"exact_graph": True}, {}):
        # The products are the same, in other places: only the order of a few sums differs.
        assert relative_error(logits_of(path, **options), plain) < 1e-6
    # ggml rounds activations to 8 bits, as the fused ops do for single tokens; packed chunks do not round them.
    want = oracle_logits(spec, written, TOKENS)
    fused = logits_of(path, repack=False)
    assert relative_error(plain, want) < 3e-2
    assert relative_error(fused[40:], want[40:]) < 3e-2
    if native.repkv_has_fast_prefill():
        assert relative_error(fused[:40], want[:40]) < 1e-5


def test_the_joined_graph_is_the_one_that_runs(q4_0):
    """It has one product for q, k and v, and its bias, if they are joined."""
    for options, expected in (({}, True), ({"exact_graph": True}, False)):
        with Model.load(q4_0[0], threads=1, **options) as model, model.session() as session:
            session.prefill([1, 2, 3])
            (plan,) = session._stepper.plans._plans.values()
            graph = plan.context.graph
            names = [g.ggml_graph_node(graph, i).contents.name for i in range(g.ggml_graph_n_nodes(graph))]
            assert (b"wqkv_b-0" in names) == (b"ffn_gate_up-0" in names) == expected


@pytest.mark.parametrize("join", [True, False])
def test_what_the_file_has_joined_is_whole_and_in_parts(tmp_path, join):
    """ggml's nodes get it whole, the fused ones in parts; both are in the file."""
    spec = replace(SPEC, joined=True)
    write_tiny_model(tmp_path / "m.gguf", spec)
    file, weights = load(tmp_path / "m.gguf", join=join)
    for i, layer in enumerate(weights.layers):
        whole = file.tensors[f"blk.{i}.attn_qkv.weight"]
        assert address(layer.attn_qkv) == address(layer.attn_q) == file.parts[0].ctypes.data + whole.offset
        parts = [tensor_bytes(getattr(layer, name)) for name in ("attn_q", "attn_k", "attn_v")]
        assert np.array_equal(np.concatenate(parts), tensor_bytes(layer.attn_qkv))
        biases = [tensor_bytes(bias).ravel() for bias in layer.qkv_biases]
        assert np.array_equal(np.concatenate(biases), tensor_bytes(layer.attn_qkv_bias).ravel())
        assert np.array_equal(biases[1], tensor_bytes(layer.attn_k_bias).ravel())


@pytest.mark.parametrize("bias", ["attn_q.bias", "attn_k.bias", "attn_v.bias"])
def test_zeros_stand_in_for_biases_that_only_others_have(tmp_path, bias):
    written = write_tiny_model(tmp_path / "m.gguf", replace(SPEC, optional=(bias,)))
    _, weights = load(tmp_path / "m.gguf")
    layer, field = weights.layers[1], bias.replace(".bias", "_bias")
    for name, tensor in zip(("attn_q_bias", "attn_k_bias", "attn_v_bias"), layer.qkv_biases, strict=True):
        given = getattr(layer, name)
        assert (given is not None) == (name == field)
        values = tensor_bytes(tensor).view(np.float32).ravel()
        assert np.array_equal(values, written[f"blk.1.{bias}"]) if name == field else not values.any()
    write_tiny_model(tmp_path / "m.gguf", replace(SPEC, optional=()))
    assert load(tmp_path / "m.gguf")[1].layers[1].qkv_biases == ()


def test_matrices_of_other_types_are_not_joined(tmp_path):
    spec = TinySpec(n_layer=1, n_head_kv=4, head_dim=32, n_ff=128, weight_type=QT.Q4_0, seed=3,
                    weight_types=(("*attn_v.weight", QT.Q8_0), ("*ffn_up.weight", QT.F32)))  # fmt: skip
    written = write_tiny_model(tmp_path / "m.gguf", spec)
    _, weights = load(tmp_path / "m.gguf", repack=True)
    (layer,) = weights.layers
    assert layer.attn_qkv is None
    assert layer.attn_qkv_bias is None
    assert layer.ffn_gate_up is None
    assert relative_error(logits_of(tmp_path / "m.gguf"), oracle_logits(spec, written, TOKENS)) < 2e-2


def test_closing_gives_everything_back(q4_0):
    _, weights = load(q4_0[0], repack=True)
    buffers = [*weights._buffers, *weights._maps]
    weights.close()
    weights.close()
    assert all(buffer.closed for buffer in buffers)


def test_the_tiles_of_amx_are_never_used():
    """ggml's code for them ends with SIGILL if GCC compiled it."""
    names = {g.ggml_backend_buft_name(type_) for type_ in Repacker()._buffer_types}
    assert b"AMX" not in names
