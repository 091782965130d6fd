import ctypes
from collections.abc import Callable
from pathlib import Path

import ggml
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as QuantType
from gguf.quants import quantize
from hypothesis import given, settings

from pyggml_repkv.errors import ModelFileError
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.gguf_file import GGUFFile
from pyggml_repkv.model.tensors import MATRIX_TYPES, check_tensors, expected_tensors
from tests.tiny_models import WEIGHT_TYPES, Metadata, Packed, Tensors, TinySpec, tiny_specs, write_tiny_model

FLOATS = ctypes.POINTER(ctypes.c_float)
Edit = Callable[[Tensors], object]


def checked(path: Path, spec: TinySpec, edit: Edit | None = None) -> tuple[str, ...]:
    """Writes the model of `spec` with its tensors edited, and checks it."""

    def edit_tensors(metadata: Metadata, tensors: Tensors) -> None:
        if edit is not None:
            edit(tensors)

    write_tiny_model(path, spec, edit_tensors)
    file = GGUFFile.open(path)
    return check_tensors(file, ModelConfig.from_gguf(file))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(spec=tiny_specs())
def test_sound_models_pass_and_are_wholly_expected(tmp_path_factory: pytest.TempPathFactory, spec: TinySpec) -> None:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    assert checked(path, spec) == ()
    file = GGUFFile.open(path)
    specs = expected_tensors(ModelConfig.from_gguf(file), file.tensors)
    assert {name: s.shape for name, s in specs.items()} == {t.name: t.shape for t in file.tensors.values()}


@pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=lambda kind: kind.name)
def test_every_matrix_type_passes(tmp_path: Path, kind: QuantType) -> None:
    checked(tmp_path / "tiny.gguf", TinySpec(head_dim=64, n_ff=256, weight_type=kind))


@pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=lambda kind: kind.name)
def test_tiny_models_return_what_ggml_reads(tmp_path: Path, kind: QuantType) -> None:
    path = tmp_path / "tiny.gguf"
    weights = write_tiny_model(path, TinySpec(n_layer=1, head_dim=64, n_ff=256, weight_type=kind))
    file = GGUFFile.open(path)
    for name in ("token_embd.weight", "blk.0.ffn_down.weight", "output_norm.weight"):
        info, raw = file.tensors[name], file.tensor_bytes(name)
        values = raw.view(np.float32)
        if info.type is not QuantType.F32:
            values = np.empty(weights[name].size, np.float32)
            to_float = ggml.ggml_get_type_traits(int(info.type)).contents.to_float
            to_float(raw.ctypes.data, ctypes.cast(values.ctypes.data, FLOATS), values.size)
        assert np.allclose(weights[name].reshape(-1), values, rtol=1e-6, atol=1e-7)
        assert np.isfinite(values).all()
        assert np.abs(values).max() < 3


def test_matrix_types_are_those_that_ggml_multiplies() -> None:
    multiplied = {t for t in GGML_QUANT_SIZES if ggml.ggml_get_type_traits_cpu(int(t)).contents.vec_dot}
    assert multiplied == MATRIX_TYPES


def test_tensors_of_no_consequence_are_listed_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ("notes.weight", "cls\n", "v.one", "v.two")

    def edit(tensors: Tensors) -> None:
        tensors |= {name: Packed(np.zeros(4, np.float32), QuantType.F32) for name in names}

    assert checked(tmp_path / "tiny.gguf", TinySpec(), edit) == names
    (record,) = caplog.records
    assert record.message.endswith(r"tiny.gguf: tensors that are not used here: notes.weight, cls\n, v.one and 1 more")


def f32(name: str, *shape: int) -> Edit:
    return lambda tensors: tensors.update({name: Packed(np.zeros(shape, np.float32), QuantType.F32)})


def typed(name: str, kind: QuantType) -> Edit:
    return lambda tensors: tensors.update({name: Packed(quantize(tensors[name].data, kind), kind)})


def integers(name: str) -> Edit:
    return lambda tensors: tensors.update({name: Packed(tensors[name].data.astype(np.int32), QuantType.I32)})


def without(name: str) -> Edit:
    return lambda tensors: tensors.pop(name)


BAD_TENSORS: list[tuple[Edit, str]] = [
    (without("output_norm.weight"), r"lacks the tensor output_norm\.weight; the file is incomplete"),
    (without("token_embd.weight"), "lacks the tensor token_embd.weight"),
    (without("blk.1.attn_q.weight"), r"lacks the tensor blk\.1\.attn_q\.weight"),
    (without("blk.0.ffn_down.weight"), r"lacks the tensor blk\.0\.ffn_down\.weight"),
    (lambda tensors: tensors.clear(), "a vocabulary-only file cannot be run"),
    (f32("blk.0.attn_q.weight", 64, 32), r"attn_q\.weight has the shape \[64, 32\].* for \[64, 64\]"),
    (f32("blk.0.attn_k.weight", 64, 64), r"attn_k\.weight has the shape \[64, 64\].* for \[32, 64\]"),
    (f32("blk.0.attn_k.bias", 64), r"attn_k\.bias has the shape \[64\]"),
    (f32("blk.1.ffn_norm.weight", 1, 64), r"ffn_norm\.weight has the shape \[1, 64\]"),
    (f32("output.weight", 287, 64), r"output\.weight has the shape \[287, 64\]"),
    (typed("output_norm.weight", QuantType.Q8_0), r"output_norm\.weight is Q8_0; convert it to one of F32, F16, BF16$"),
    (integers("blk.0.attn_v.bias"), r"attn_v\.bias is I32; convert it to one of F32, F16, BF16$"),
    (integers("blk.0.ffn_up.weight"), r"ffn_up\.weight is I32; convert it to one of F32, F16, Q4_0"),
    (f32("rope_freqs.weight", 8), r"rope_freqs\.weight is no part of a qwen2 model of 2 layers"),
    (f32("rope_factors_long.weight", 8), "rope_factors_long"),
    (f32("blk.2.attn_norm.weight", 64), r"blk\.2\.attn_norm\.weight is no part"),
    (f32("blk.0.attn_output.bias", 64), r"attn_output\.bias is no part"),
    (f32("blk.0.attn_q_norm.weight", 16), r"attn_q_norm\.weight is no part"),
    (f32("blk.0.ffn_gate_exps.weight", 2, 96, 64), r"ffn_gate_exps\.weight is no part"),
    (f32("position_embd.weight", 128, 64), r"position_embd\.weight is no part"),
    (f32("blk.1.attn_qkv.bias", 128), r"attn_q\.bias is no part"),
    (f32("blk.1.attn_qkv.weight", 128, 64), r"attn_q\.weight is no part"),
    (f32("blk.1.attn_qkv.weight", 64, 64), r"attn_qkv\.weight has the shape \[64, 64\].* for \[128, 64\]"),
    (f32("output.bias", 287), r"output\.bias has the shape \[287\]"),
    (f32("blk.\n", 8), r"blk\.\\n is no part"),
]


@pytest.mark.parametrize(("edit", "expected"), BAD_TENSORS, ids=[expected for _, expected in BAD_TENSORS])
def test_bad_tensor_is_refused_in_one_line(tmp_path: Path, edit: Edit, expected: str) -> None:
    with pytest.raises(ModelFileError, match=expected) as caught:
        checked(tmp_path / "tiny.gguf", TinySpec(), edit)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_divisors_of_frequencies_are_positive_numbers(tmp_path: Path, value: float) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["rope_freqs.weight"].data[3] = value

    spec = TinySpec(arch="llama", optional=("rope_freqs.weight",))
    assert checked(tmp_path / "tiny.gguf", spec) == ()
    with pytest.raises(ModelFileError, match=r"rope_freqs\.weight has values that no frequency can be divided by"):
        checked(tmp_path / "tiny.gguf", spec, edit)
