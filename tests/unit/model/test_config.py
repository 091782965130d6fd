from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType as ValueType
from hypothesis import given, settings

from pyggml_repkv.errors import ModelFileError
from pyggml_repkv.model.config import ModelConfig, RopeScaling
from pyggml_repkv.model.gguf_file import GGUFFile
from tests.tiny_models import Metadata, Tensors, TinySpec, tiny_specs, write_tiny_model

U32, F32, TEXT, ARRAY = ValueType.UINT32, ValueType.FLOAT32, ValueType.STRING, ValueType.ARRAY


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., ModelConfig]:
    """config_of(spec, {key: (value, type) or None}): a tiny model's config with keys set or removed."""

    def build(spec: TinySpec | None = None, keys: dict[str, Any] | None = None) -> ModelConfig:
        def edit(metadata: Metadata, tensors: Tensors) -> None:
            metadata.update(keys or {})
            for key in [k for k, value in metadata.items() if value is None]:
                del metadata[key]

        path = tmp_path / "tiny.gguf"
        write_tiny_model(path, spec or TinySpec(), edit)
        return ModelConfig.from_gguf(GGUFFile.open(path))

    return build


@settings(max_examples=30, deadline=None, derandomize=True)
@given(spec=tiny_specs())
def test_describes_the_model(tmp_path_factory: pytest.TempPathFactory, spec: TinySpec) -> None:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    weights = write_tiny_model(path, spec)
    config = ModelConfig.from_gguf(GGUFFile.open(path))
    assert (config.arch, config.family.name, config.name) == (spec.arch, spec.arch, "tiny")
    assert (config.n_layer, config.n_ff, config.n_ctx_train) == (spec.n_layer, spec.n_ff, spec.n_ctx_train)
    assert (config.n_vocab, config.n_embd) == weights["token_embd.weight"].shape
    parts = {"attn_q": config.n_embd_q, "attn_k": config.n_embd_kv, "attn_v": config.n_embd_kv}
    for name, n_rows in {"attn_qkv": sum(parts.values())}.items() if spec.joined else parts.items():
        assert weights[f"blk.0.{name}.weight"].shape == (n_rows, config.n_embd)
    assert config.n_gqa * config.n_head_kv == config.n_head == spec.n_head
    assert config.head_dim == config.rope_dim == spec.head_dim
    assert config.tied_output == spec.tied == ("output.weight" not in weights)
    assert config.rope_base == spec.rope_base
    assert config.norm_eps == pytest.approx(spec.norm_eps)
    assert config.rope_scaling.kind == spec.scaling_kind
    assert config.rope_scaling.freq_scale == 1 / spec.scaling_factor


def test_optional_keys_take_llama_cpps_defaults(config_of: Callable[..., ModelConfig]) -> None:
    spec = TinySpec(n_head=4, n_head_kv=4)
    keys = {"qwen2.attention.head_count_kv": None, "qwen2.rope.freq_base": None, "general.name": None}
    config = config_of(spec, keys)
    assert (config.n_head_kv, config.rope_base, config.name) == (4, 10000.0, "tiny")
    assert config.rope_scaling == RopeScaling("none", 1.0, spec.n_ctx, 0.0, 1.0, 32.0, 1.0)


def test_name_is_fit_for_a_terminal(config_of: Callable[..., ModelConfig]) -> None:
    assert config_of(None, {"general.name": ("a\x1b[31m\n", TEXT)}).name == "a\\x1b[31m\\n"


def test_partial_rope(config_of: Callable[..., ModelConfig]) -> None:
    assert config_of(TinySpec(rope_dim=8)).rope_dim == 8


TYPE, FACTOR = "qwen2.rope.scaling.type", "qwen2.rope.scaling.factor"
ORIG, ATTN = "qwen2.rope.scaling.original_context_length", "qwen2.rope.scaling.attn_factor"
OLD = "qwen2.rope.scale_linear"


@pytest.mark.parametrize(
    ("keys", "kind", "factor", "orig", "ext", "attn"),
    [
        ({TYPE: ("none", TEXT), FACTOR: (4.0, F32)}, "none", 1.0, 128, 0.0, 1.0),
        ({TYPE: ("linear", TEXT), FACTOR: (4.0, F32)}, "linear", 4.0, 128, 0.0, 1.0),
        ({FACTOR: (4.0, F32)}, "linear", 4.0, 128, 0.0, 1.0),
        ({FACTOR: (0.5, F32)}, "linear", 0.5, 128, 0.0, 1.0),
        ({FACTOR: (0.0, F32)}, "none", 1.0, 128, 0.0, 1.0),
        ({OLD: (2.0, F32)}, "linear", 2.0, 128, 0.0, 1.0),
        ({OLD: (2.0, F32), FACTOR: (4.0, F32)}, "linear", 4.0, 128, 0.0, 1.0),
        ({TYPE: ("yarn", TEXT), FACTOR: (4.0, F32)}, "yarn", 4.0, 128, 1.0, 1.0),
        ({TYPE: ("yarn", TEXT), FACTOR: (4.0, F32), ORIG: (32, U32)}, "yarn", 4.0, 32, 1.0, 1.0),
        ({TYPE: ("yarn", TEXT), FACTOR: (4.0, F32), ATTN: (0.5, F32)}, "yarn", 4.0, 128, 1.0, 0.5),
        ({TYPE: ("yarn", TEXT)}, "yarn", 1.0, 128, 1.0, 1.0),
    ],
)
def test_rope_scaling_as_llama_cpp_reads_it(
    config_of: Callable[..., ModelConfig],
    keys: dict[str, Any],
    kind: str,
    factor: float,
    orig: int,
    ext: float,
    attn: float,
) -> None:
    scaling = config_of(TinySpec(n_ctx=128), keys).rope_scaling
    assert scaling == RopeScaling(kind, factor, orig, ext, attn, 32.0, 1.0)
    assert scaling.freq_scale == 1 / factor


@pytest.mark.parametrize(
    ("keys", "n_trained"),
    [
        ({TYPE: ("yarn", TEXT), FACTOR: (4.0, F32)}, 512),
        ({TYPE: ("yarn", TEXT), FACTOR: (4.0, F32), ORIG: (128, U32)}, 512),
        ({TYPE: ("yarn", TEXT), FACTOR: (4.0, F32), ORIG: (32, U32)}, 128),
        ({TYPE: ("yarn", TEXT), FACTOR: (4.0, F32), ORIG: (256, U32)}, 128),
        ({TYPE: ("yarn", TEXT), FACTOR: (1.3, F32)}, 166),
        ({TYPE: ("yarn", TEXT), FACTOR: (1e6, F32), "qwen2.context_length": (2**20, U32)}, 2**27),
        ({TYPE: ("linear", TEXT), FACTOR: (4.0, F32)}, 128),
        ({}, 128),
    ],
)
def test_yarn_multiplies_a_context_that_is_the_original_one(
    config_of: Callable[..., ModelConfig], keys: dict[str, Any], n_trained: int
) -> None:
    assert config_of(TinySpec(n_ctx=128), keys).n_ctx_train == n_trained


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("yarn_ext_factor", 0.5), ("yarn_attn_factor", 0.5), ("yarn_beta_fast", 16.0), ("yarn_beta_slow", 2.0),
        ("yarn_log_multiplier", 0.125), ("alpha", 1000.0), ("anything", 1.0),
    ],
)  # fmt: skip
def test_scaling_that_nobody_reads_is_named_once(
    config_of: Callable[..., ModelConfig], caplog: pytest.LogCaptureFixture, key: str, value: float
) -> None:
    config = config_of(TinySpec(scaling_kind="yarn", scaling_factor=4.0), {f"qwen2.rope.scaling.{key}": (value, F32)})
    (line,) = caplog.messages
    assert line.endswith(f"ignored, as llama.cpp ignores it for this family: qwen2.rope.scaling.{key} = {value}")
    assert config.rope_scaling == RopeScaling("yarn", 4.0, 128, 1.0, 1.0, 32.0, 1.0)


def test_unread_scaling_of_any_kind_is_one_line(
    config_of: Callable[..., ModelConfig], caplog: pytest.LogCaptureFixture
) -> None:
    values = {
        "yarn_beta_fast": ([32.0, 1.0], ARRAY), "short_factor": ([1.0] * 5000, ARRAY), "names": (["a\n", "b"], ARRAY),
        "text": ("\n" * 10**5, TEXT), **{f"key{i}\n": (i, U32) for i in range(300)},
    }  # fmt: skip
    config_of(None, {f"qwen2.rope.scaling.{name}": value for name, value in values.items()})
    (line,) = caplog.messages
    assert line.isprintable()
    assert "rope.scaling.yarn_beta_fast (an array), qwen2.rope.scaling.short_factor (an array)" in line
    assert len(line) < 2000


def test_scaling_that_says_what_is_computed_anyway_is_not_named(
    config_of: Callable[..., ModelConfig], caplog: pytest.LogCaptureFixture
) -> None:
    values = {"yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_beta_fast": 32.0, "yarn_log_multiplier": 0.0}
    keys: dict[str, Any] = {f"qwen2.rope.scaling.{key}": (value, F32) for key, value in values.items()}
    config_of(None, {**keys, "qwen2.rope.scaling.finetuned": (True, ValueType.BOOL), TYPE: ("yarn", TEXT)})
    assert caplog.messages == []


REQUIRED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)


@pytest.mark.parametrize("key", [f"qwen2.{key}" for key in REQUIRED])
def test_missing_key_is_named(config_of: Callable[..., ModelConfig], key: str) -> None:
    with pytest.raises(ModelFileError, match=f"lacks the key {key}; convert"):
        config_of(None, {key: None})


EPS = "qwen2.attention.layer_norm_rms_epsilon"
BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"qwen2.block_count": (0, U32)}, r"block_count is 0, it must lie in 1\.\.512"),
    ({"qwen2.block_count": (2**31, U32)}, "block_count is 2147483648"),
    ({"qwen2.block_count": (-1, ValueType.INT32)}, "block_count is -1"),
    ({"qwen2.block_count": (2.0, F32)}, r"block_count is 2\.0, an integer is needed"),
    ({"qwen2.block_count": (True, ValueType.BOOL)}, "block_count is True, an integer is needed"),
    ({"qwen2.block_count": ("two\n", TEXT)}, r"block_count is 'two\\n', an integer"),
    ({"qwen2.context_length": (0, U32)}, "context_length is 0"),
    ({"qwen2.context_length": (2**31, U32)}, "context_length is 2147483648"),
    ({"qwen2.embedding_length": (2**32 - 1, U32)}, "embedding_length is 4294967295"),
    ({"qwen2.embedding_length": (66, U32)}, "an embedding of 66 cannot be split over 4 heads"),
    ({"qwen2.feed_forward_length": ([96, 96], ARRAY)}, "feed_forward_length is an array, one value"),
    ({"qwen2.attention.head_count": ([4, 4], ARRAY)}, "head_count is an array"),
    ({"qwen2.attention.head_count_kv": ([2, 2], ARRAY)}, "head_count_kv is an array"),
    ({"qwen2.attention.head_count_kv": (["2"], ARRAY)}, "head_count_kv is an array"),
    ({"qwen2.attention.head_count": (0, U32)}, "head_count is 0"),
    ({"qwen2.attention.head_count_kv": (0, U32)}, "head_count_kv is 0"),
    ({"qwen2.attention.head_count_kv": (3, U32)}, "4 query heads cannot share 3 key/value heads"),
    ({"qwen2.attention.head_count_kv": (8, U32)}, "4 query heads cannot share 8"),
    ({"qwen2.attention.key_length": (32, U32)}, "keys have 32 values per head and values 16"),
    ({"qwen2.attention.key_length": (2**20, U32)}, "key_length is 1048576"),
    ({"qwen2.rope.dimension_count": (17, U32)}, "dimension_count is 17"),
    ({"qwen2.rope.dimension_count": (7, U32)}, "dimension_count is 7, it must be even"),
    ({"qwen2.rope.freq_base": (0.0, F32)}, "freq_base is 0, it must be above 1"),
    ({"qwen2.rope.freq_base": (float("inf"), F32)}, "freq_base is inf"),
    ({"qwen2.rope.freq_base": (10000, U32)}, "freq_base is 10000, a float is needed"),
    ({EPS: (0.0, F32)}, "epsilon is 0, it must be above 0"),
    ({EPS: (-1e-6, F32)}, "epsilon is -1e-06"),
    ({EPS: (float("nan"), F32)}, "epsilon is nan"),
    ({TYPE: ("longrope", TEXT)}, "type is 'longrope'; none, linear and yarn are supported"),
    ({TYPE: ("mrope", TEXT)}, "type is 'mrope'; none, linear and yarn are supported"),
    ({TYPE: ("default", TEXT)}, "type is 'default'; none, linear and yarn are supported"),
    ({TYPE: (1, U32)}, "type is 1, a string is needed"),
    ({FACTOR: (-4.0, F32)}, "factor is -4"),
    ({FACTOR: (float("nan"), F32)}, "factor is nan"),
    ({FACTOR: (1e-30, F32)}, "linear scaling needs at least 1e-06"),
    ({TYPE: ("yarn", TEXT), FACTOR: (0.5, F32)}, "yarn scaling needs at least 1"),
    ({ATTN: (0.0, F32)}, "attn_factor is 0"),
    ({ORIG: (2**31, U32)}, "original_context_length is 2147483648"),
    ({"tokenizer.ggml.tokens": None}, "lacks the list of tokens tokenizer.ggml.tokens"),
    ({"tokenizer.ggml.tokens": ([1, 2], ARRAY)}, "lacks the list of tokens"),
    ({"tokenizer.ggml.tokens": ([*map(str, range(289))], ARRAY)}, "token_embd.weight has 288 rows for 289 tokens"),
    ({"tokenizer.ggml.tokens": ([[1, 2], [3, 4]], ARRAY)}, "lacks the list of tokens"),
    ({"general.type": ([1, 2], ARRAY)}, "not a model"),
    ({"general.type": ("adapter", TEXT)}, "general.type is 'adapter', not a model"),
    ({"qwen2.attention.causal": (False, ValueType.BOOL)}, "attention is not causal"),
    ({"qwen2.expert_count": (8, U32)}, "it is a mixture of 8 experts; give a dense model"),
]


@pytest.mark.parametrize(("keys", "expected"), BAD_VALUES, ids=[expected for _, expected in BAD_VALUES])
def test_bad_value_is_refused_in_one_line(
    config_of: Callable[..., ModelConfig], keys: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ModelFileError, match=expected) as caught:
        config_of(None, keys)
    assert str(caught.value).isprintable()
    assert "tiny.gguf: " in str(caught.value)
    assert "; " in str(caught.value)


def test_pairs_are_turned_in_the_whole_head(config_of: Callable[..., ModelConfig]) -> None:
    with pytest.raises(ModelFileError, match=r"llama\.rope\.dimension_count is 8, it must be the 16 of a head"):
        config_of(TinySpec(arch="llama", rope_dim=8))


@pytest.mark.parametrize(("arch", "shown"), [("gemma", "'gemma'"), ("qwen2\n", r"'qwen2\\n'")])
def test_other_architecture_is_named(config_of: Callable[..., ModelConfig], arch: str, shown: str) -> None:
    match = f"architecture is {shown}; give a text-generating model of one of the families qwen2, qwen3, llama$"
    with pytest.raises(ModelFileError, match=match):
        config_of(None, {"general.architecture": (arch, TEXT)})


def test_architecture_is_required(tmp_path: Path) -> None:
    path = tmp_path / "none.gguf"
    path.write_bytes(b"GGUF\x03" + bytes(19))
    with pytest.raises(ModelFileError, match=r"lacks the key general\.architecture"):
        ModelConfig.from_gguf(GGUFFile.open(path))


def test_a_scale_that_another_key_replaces_is_named(
    config_of: Callable[..., ModelConfig], caplog: pytest.LogCaptureFixture
) -> None:
    scales = {"qwen2.rope.scale_linear": (8.0, F32)}
    assert config_of(None, scales).rope_scaling.factor == 8
    assert not caplog.records
    assert config_of(None, scales | {"qwen2.rope.scaling.factor": (4.0, F32)}).rope_scaling.factor == 4
    assert caplog.messages[0].endswith("keys that are not used here: qwen2.rope.scale_linear")


def test_unread_keys_are_named_in_one_warning(
    config_of: Callable[..., ModelConfig], caplog: pytest.LogCaptureFixture
) -> None:
    names = ("attention.scale", "logit_scale", "sliding", "a\n", "vocab_size", "rope.unknown")
    config_of(None, {f"qwen2.{name}": (4, U32) for name in names} | {"llama.scale": (1.0, F32), "general.x": (1, U32)})
    (record,) = caplog.records
    end = "keys that are not used here: qwen2.attention.scale, qwen2.logit_scale, qwen2.sliding and 2 more"
    assert record.levelname == "WARNING"
    assert record.message.endswith(end)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "llama"])
def test_keys_that_are_read_or_harmless_are_not_warned_of(
    config_of: Callable[..., ModelConfig], caplog: pytest.LogCaptureFixture, arch: str
) -> None:
    spec = TinySpec(arch=arch, scaling_kind="yarn", scaling_factor=2.0, scaling_orig_ctx=64, n_embd=96)
    config_of(spec, {f"{arch}.vocab_size": (288, U32), f"{arch}.expert_used_count": (0, U32)})
    assert not caplog.records


def test_more_rows_than_tokens_are_left_out(config_of: Callable[..., ModelConfig]) -> None:
    assert config_of(None, {"tokenizer.ggml.tokens": ([*map(str, range(200))], ARRAY)}).n_vocab == 200
