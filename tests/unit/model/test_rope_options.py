"""RoPE options change a config as if the file had the values, and refuse what cannot be."""

import numpy as np
import pytest

from pyggml_repkv.errors import InputError
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.gguf_file import GGUFFile
from pyggml_repkv.model.rope_options import AS_IN_FILE, RopeOptions
from tests.tiny_models import TinySpec, write_tiny_model

FILES = {
    "plain": TinySpec(n_ctx=64),
    "linear": TinySpec(n_ctx=64, scaling_kind="linear", scaling_factor=2.0),
    "yarn": TinySpec(n_ctx=64, scaling_kind="yarn", scaling_factor=4.0, scaling_orig_ctx=64),
    "yarn, whole": TinySpec(n_ctx=256, scaling_kind="yarn", scaling_factor=4.0, scaling_orig_ctx=64),
}


@pytest.fixture
def config_of(tmp_path):
    def build(spec):
        write_tiny_model(tmp_path / "tiny.gguf", spec)
        return ModelConfig.from_gguf(GGUFFile.open(tmp_path / "tiny.gguf"))

    return build


@pytest.mark.parametrize("name", FILES)
def test_without_options_a_file_is_as_it_is(config_of, name):
    config = config_of(FILES[name])
    assert AS_IN_FILE.applied_to(config) == config


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        (RopeOptions("yarn", 4), FILES["yarn"]),
        (RopeOptions("yarn", 2.7), TinySpec(n_ctx=64, scaling_kind="yarn", scaling_factor=2.7)),
        (RopeOptions("linear", 3.3), TinySpec(n_ctx=64, scaling_kind="linear", scaling_factor=3.3)),
        (RopeOptions(freq_base=123456.789), TinySpec(n_ctx=64, rope_base=123456.789)),
        (RopeOptions("none"), TinySpec(n_ctx=64)),
        (RopeOptions("linear", 1), TinySpec(n_ctx=64)),
    ],
)
def test_a_flag_is_what_the_key_would_be(config_of, options, spec):
    """Also where the value is no float32."""
    assert options.applied_to(config_of(FILES["plain"])) == config_of(spec)


@pytest.mark.parametrize(
    ("name", "options", "kind", "factor", "orig", "n_trained"),
    [
        ("plain", RopeOptions("yarn", 4), "yarn", 4, 64, 256),
        ("plain", RopeOptions("yarn", 4, orig_ctx=32), "yarn", 4, 32, 128),
        ("plain", RopeOptions("linear", 4), "linear", 4, 64, 64),
        ("linear", RopeOptions("yarn"), "yarn", 2, 64, 128),
        ("linear", RopeOptions(scale=8), "linear", 8, 64, 64),
        ("yarn", RopeOptions("none"), "none", 1, 64, 64),
        ("yarn", RopeOptions(scale=2), "yarn", 2, 64, 128),
        ("yarn", RopeOptions(orig_ctx=16), "yarn", 4, 16, 64),
        ("yarn, whole", RopeOptions("yarn", 4), "yarn", 4, 64, 256),
        ("yarn, whole", RopeOptions("none"), "none", 1, 64, 64),
        ("yarn, whole", RopeOptions("linear"), "linear", 4, 64, 64),
        ("yarn, whole", RopeOptions(scale=8), "yarn", 8, 64, 512),
    ],
)
def test_what_is_not_given_is_the_files(config_of, name, options, kind, factor, orig, n_trained):
    config = options.applied_to(config_of(FILES[name]))
    scaling = config.rope_scaling
    assert (scaling.kind, scaling.factor, scaling.orig_context, config.n_ctx_train) == (kind, factor, orig, n_trained)
    assert scaling.ext_factor == (1.0 if kind == "yarn" else 0.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scaling": "longrope"}, "--rope-scaling is 'longrope'; it must be one of none, linear, yarn"),
        ({"scale": 0}, "--rope-scale is 0; it must be a number between 1e-06 and 1000000"),
        ({"scale": -4.0}, "--rope-scale is -4.0"),
        ({"scale": float("nan")}, "--rope-scale is nan"),
        ({"scale": float("inf")}, "--rope-scale is inf"),
        ({"scale": 10**400}, "--rope-scale is 1000"),
        ({"scale": "4"}, "--rope-scale is '4'"),
        ({"scale": True}, "--rope-scale is True"),
        ({"scale": np.float64("nan")}, "--rope-scale is "),
        ({"freq_base": 1.0}, "--rope-freq-base is 1.0; it must be a number between 1.001 and 1e+12"),
        ({"freq_base": float("inf")}, "--rope-freq-base is inf"),
        ({"orig_ctx": 0}, "--yarn-orig-ctx is 0; it must be a whole number between 1 and 134217728"),
        ({"orig_ctx": 4096.0}, "--yarn-orig-ctx is 4096.0"),
        ({"orig_ctx": 2**27 + 1}, "--yarn-orig-ctx is 134217729"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(InputError) as caught:
        RopeOptions(**values)
    assert str(caught.value).startswith(message)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("plain", RopeOptions(scale=4), "--rope-scale 4 has nothing to scale: add --rope-scaling yarn or linear"),
        ("yarn", RopeOptions("none", 4), "--rope-scale 4 has nothing to scale: leave it out"),
        ("plain", RopeOptions("linear", 4, orig_ctx=32), "--yarn-orig-ctx is for --rope-scaling yarn"),
        ("plain", RopeOptions(orig_ctx=32), "--yarn-orig-ctx is for --rope-scaling yarn"),
        (
            "plain",
            RopeOptions("yarn", 0.5),
            "yarn scaling needs a factor of at least 1, not 0.5",
        ),
        ("plain", RopeOptions("yarn", 1e6, orig_ctx=4096), "would be more than 134217728 tokens"),
    ],
)
def test_what_does_not_go_together_is_refused(config_of, name, options, message):
    config = config_of(FILES[name])
    with pytest.raises(InputError) as caught:
        options.applied_to(config)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(("name", "n_lines"), [("plain", 1), ("linear", 0), ("yarn", 0)])
def test_yarn_without_any_factor_is_told(config_of, caplog, name, n_lines):
    RopeOptions("yarn").applied_to(config_of(FILES[name]))
    assert len(caplog.messages) == n_lines
    assert all("scales nothing: the file names no factor; give --rope-scale" in line for line in caplog.messages)
