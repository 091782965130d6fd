import errno
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QuantType

from pyggml_repkv.errors import InputError, ModelFileError, RepkvError
from pyggml_repkv.model import demo
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.gguf_file import GGUFFile
from pyggml_repkv.model.tensors import check_tensors
from tests.tiny_models import TinySpec, write_tiny_model

ROOT = Path(__file__).parents[3]
SHAPE = {"n_layer": 2, "n_head": 6, "n_head_kv": 2, "head_dim": 16, "weight_type": QuantType.Q4_1, "tied": True}
LLAMA = TinySpec(arch="llama", optional=(), **SHAPE)
QWEN2 = TinySpec(optional=(), **SHAPE)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    path = tmp_path / "llama.gguf"
    write_tiny_model(path, LLAMA)
    return path


def test_conversion_renames_keys_and_reorders_rows(tmp_path: Path, llama: Path) -> None:
    converted = tmp_path / "converted.gguf"
    demo.convert_smollm2(llama, converted)
    file, source = GGUFFile.open(converted), GGUFFile.open(llama)
    config = ModelConfig.from_gguf(file)
    assert check_tensors(file, config) == ()
    assert replace(config, arch="llama") == ModelConfig.from_gguf(source)
    assert file.tensors == source.tensors
    for name, info in file.tensors.items():
        got, want = (f.tensor_bytes(name).reshape(info.shape[0], -1) for f in (file, source))
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            pairs = want.reshape(-1, QWEN2.head_dim, want.shape[1])
            want = np.concatenate((pairs[:, ::2], pairs[:, 1::2]), 1).reshape(want.shape)
        assert np.array_equal(got, want), name
    for key, (start, end) in source.value_spans.items():
        if key != "general.architecture":
            moved = file.value_spans[key.replace("llama.", "qwen2.", 1)]
            assert bytes(file.parts[0][slice(*moved)]) == bytes(source.parts[0][start:end]), key


def test_conversion_replaces_in_place_and_leaves_nothing_else(tmp_path: Path, llama: Path) -> None:
    demo.convert_smollm2(llama, llama)
    assert GGUFFile.open(llama).metadata["general.architecture"] == "qwen2"
    assert [path.name for path in tmp_path.iterdir()] == ["llama.gguf"]


def test_only_plain_llama_models_are_converted(tmp_path: Path, llama: Path) -> None:
    target = tmp_path / "out.gguf"
    write_tiny_model(tmp_path / "qwen2.gguf", QWEN2)
    with pytest.raises(ModelFileError, match="its architecture is 'qwen2'; SmolLM2 is a 'llama' model"):
        demo.convert_smollm2(tmp_path / "qwen2.gguf", target)
    for spec in (
        replace(LLAMA, optional=("rope_freqs.weight",)),
        replace(LLAMA, optional=("attn_q.bias",)),
        replace(LLAMA, joined=True),
    ):
        write_tiny_model(llama, spec)
        with pytest.raises(ModelFileError, match=r"llama\.gguf: is no plain llama model"):
            demo.convert_smollm2(llama, target)
    assert not target.exists()


def test_write_errors_are_one_line_and_leave_nothing(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RepkvError, match=r"missing/out\.gguf: cannot be written: No such file or directory"):
        demo.convert_smollm2(llama, tmp_path / "missing" / "out.gguf")
    with pytest.raises(InputError, match="is a directory; give the name of a file"):
        demo.convert_smollm2(llama, tmp_path)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(RepkvError, match="MB are needed and 0 MB are free; make room"):
            demo.convert_smollm2(llama, tmp_path / "out.gguf")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RepkvError, match=r"out\.gguf: cannot be written: No space left on device; check"):
        demo.convert_smollm2(llama, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["llama.gguf"]


def test_tool_converts_a_file(tmp_path: Path, llama: Path) -> None:
    tool = [sys.executable, str(ROOT / "tools" / "make_demo_model.py")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = tmp_path / "out.gguf"
    done = subprocess.run(
        [*tool, "--from", str(llama), "--out", str(out)], env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}\n", "")
    assert GGUFFile.open(out).metadata["general.architecture"] == "qwen2"
    done = subprocess.run(
        [*tool, "--from", str(out), "--out", str(out)], env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {out}: its architecture is 'qwen2'")
    assert subprocess.run([*tool, "--out", "x"], env=env, capture_output=True, check=False).returncode == 2
