"""The pins, the cached ggml-python wheel, the extension's build and the Makefile's first checks."""

from __future__ import annotations

import importlib.metadata
import os
import re
import stat
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import ggml_wheel
from ggml_wheel import Pin, WheelError, ensure_wheel, wheel_key
from pyggml_repkv.native import build

ROOT = Path(__file__).resolve().parents[2]
PIN = Pin.load()
MACHINE = {"platform": "linux-x86_64", "cxx": "#define __AVX2__ 1"}


def write_wheel(folder: Path) -> Path:
    path = folder / "ggml_python-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ggml/__init__.py", "x" * 1000)
    return path


class Builder:
    """Stands in for pip: writes a wheel, or fails, and counts its calls."""

    def __init__(self, step: Callable[[Path], object] = write_wheel) -> None:
        self.calls = 0
        self.step = step

    def __call__(self, pin: Pin, folder: Path, log: Path) -> None:
        self.calls += 1
        self.step(folder)


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    outer = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    env = {**outer, **environment}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


class TestPins:
    def test_every_requirement_names_one_version(self) -> None:
        table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        extras = table["project"]["optional-dependencies"].values()
        requirements = [
            *table["build-system"]["requires"],
            *table["tool"]["pyggml-repkv"]["dependencies"],
            *PIN.constraints,
            *(requirement for extra in extras for requirement in extra),
        ]
        assert len(requirements) > 10
        assert [r for r in requirements if not re.fullmatch(r"[a-z0-9-]+==[0-9.]+", r)] == []

    def test_installed_versions_are_the_pinned_ones(self) -> None:
        table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        pins = dict(r.split("==") for r in table["tool"]["pyggml-repkv"]["dependencies"])
        pins[PIN.name] = PIN.version
        assert {name: importlib.metadata.version(name) for name in pins} == pins

    def test_every_cmake_flag_has_a_reason(self) -> None:
        table = tomllib.loads(ggml_wheel.PIN_FILE.read_text(encoding="utf-8"))
        assert {flag for flag, entry in table["cmake"].items() if not entry["reason"].strip()} == set()
        assert "-DGGML_LLAMAFILE=ON" in PIN.cmake_args.split()

    def test_installed_ggml_is_the_release_and_has_the_flags(self) -> None:
        code = "import ggml; print(ggml.ggml_version().decode(), ggml.ggml_cpu_has_llamafile())"
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert output.stdout.split() == [PIN.ggml, "1"]


class TestKey:
    def test_depends_on_pin_and_machine_only(self) -> None:
        key = wheel_key(PIN, MACHINE)
        assert re.fullmatch("[0-9a-f]{16}", key)
        assert wheel_key(Pin.load(), dict(reversed(MACHINE.items()))) == key

    @pytest.mark.parametrize(
        "change",
        [
            {"sha256": "0" * 64},
            {"version": "0.0.46"},
            {"cmake": {**PIN.cmake, "GGML_LLAMAFILE": "OFF"}},
            {"constraints": ("cmake==4.0",)},
        ],
    )
    def test_changes_with_the_pin(self, change: dict[str, object]) -> None:
        changed = Pin(**{**vars(PIN), **change})
        assert wheel_key(changed, MACHINE) != wheel_key(PIN, MACHINE)

    def test_changes_with_cpu_and_flags(self, monkeypatch: pytest.MonkeyPatch) -> None:
        here = ggml_wheel.machine()
        assert wheel_key(PIN, {**here, "cxx": here["cxx"] + "#define __AVX1024__ 1\n"}) != wheel_key(PIN, here)
        monkeypatch.setenv("CXXFLAGS", "-O1")
        assert wheel_key(PIN, ggml_wheel.machine()) != wheel_key(PIN, here)

    def test_changes_with_the_cpus_it_is_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        here = wheel_key(PIN, ggml_wheel.machine())
        monkeypatch.setenv("REPKV_MARCH", "x86-64-v2" if "x86_64" in ggml_wheel.machine()["platform"] else "armv8-a")
        assert wheel_key(PIN, ggml_wheel.machine()) != here


class TestMachine:
    def test_asks_both_compilers_for_version_and_cpu(self) -> None:
        here = ggml_wheel.machine()
        assert "#define __VERSION__" in here["cc"]
        assert "#define __cplusplus" in here["cxx"]

    def test_missing_compiler_is_named_with_the_remedy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler -x")
        with pytest.raises(WheelError, match=r"^no C\+\+ compiler: no-such-compiler is not on PATH; .*CXX$"):
            ggml_wheel.machine()

    def test_broken_compiler_is_named_with_its_last_words(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        broken = script(tmp_path / "broken", "echo first >&2; echo no licence >&2; exit 3")
        monkeypatch.setenv("CC", str(broken))
        with pytest.raises(WheelError, match=r"^the C compiler does not work: .*broken .*: no licence$"):
            ggml_wheel.machine()


class TestCache:
    def test_builds_once(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        build = Builder()
        first = ensure_wheel(PIN, tmp_path, build)
        assert f"building ggml {PIN.ggml}" in capsys.readouterr().err
        assert ensure_wheel(PIN, tmp_path, build) == first
        assert capsys.readouterr().err == ""
        assert first.parent == tmp_path / wheel_key(PIN, ggml_wheel.machine())
        assert build.calls == 1

    def test_several_at_once_build_once(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        messages = ""

        def until_the_others_wait(folder: Path) -> None:
            nonlocal messages
            deadline = time.monotonic() + 10
            while messages.count("waiting for another process") < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
                messages += capsys.readouterr().err
            write_wheel(folder)

        build = Builder(until_the_others_wait)
        with ThreadPoolExecutor(3) as pool:
            found = [pool.submit(ensure_wheel, PIN, tmp_path, build) for _ in range(3)]
            assert len({future.result() for future in found}) == 1
        assert messages.count("waiting for another process") == 2
        assert build.calls == 1

    @pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
    def test_damaged_wheel_is_built_again(self, tmp_path: Path, damage: str) -> None:
        build = Builder()
        wheel = ensure_wheel(PIN, tmp_path, build)
        content = bytearray(wheel.read_bytes())
        content[500] ^= 1
        wheel.write_bytes({"truncated": content[:600], "flipped": content, "empty": b""}[damage])
        assert zipfile.ZipFile(ensure_wheel(PIN, tmp_path, build)).testzip() is None
        assert build.calls == 2

    def test_interrupted_build_leaves_no_wheel_and_does_not_block(self, tmp_path: Path) -> None:
        def interrupted(folder: Path) -> None:
            write_wheel(folder)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            ensure_wheel(PIN, tmp_path, Builder(interrupted))
        assert not (tmp_path / wheel_key(PIN, ggml_wheel.machine())).exists()
        assert ensure_wheel(PIN, tmp_path, Builder()).exists()

    def test_a_build_without_a_wheel_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(WheelError, match="left no usable wheel"):
            ensure_wheel(PIN, tmp_path, Builder(lambda folder: None))

    def test_unusable_cache_is_named_with_the_remedy(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(WheelError, match=r"cannot write the wheel cache .*file.*set XDG_CACHE_HOME"):
            ensure_wheel(PIN, tmp_path / "file", Builder())

    @pytest.mark.parametrize(("given", "root"), [("/var/c", "/var/c"), ("", "~/.cache"), ("relative", "~/.cache")])
    def test_follows_xdg(self, monkeypatch: pytest.MonkeyPatch, given: str, root: str) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert ggml_wheel.cache_root() == Path(root).expanduser() / "pyggml_repkv" / "wheels"


class TestPipBuild:
    def test_fails_with_the_tail_of_the_log(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        python = script(tmp_path / "python", "i=0; while [ $i -lt 99 ]; do i=$((i+1)); echo line $i; done; exit 1")
        monkeypatch.setattr(sys, "executable", str(python))
        with pytest.raises(WheelError, match=r"could not be built; the whole log is .*log$"):
            ggml_wheel.build_with_pip(PIN, tmp_path, tmp_path / "log")
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1] == "line 99"
        assert len(lines) == ggml_wheel.LOG_TAIL_LINES

    def test_pip_gets_the_hash_and_the_flags(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        python = script(tmp_path / "python", 'echo "$@"; echo "flags $CMAKE_ARGS."; echo "outer $MAKEFLAGS."')
        monkeypatch.setattr(sys, "executable", str(python))
        monkeypatch.setenv("MAKEFLAGS", "-j9")
        monkeypatch.setenv("CMAKE_ARGS", "-DGGML_LLAMAFILE=OFF")
        ggml_wheel.build_with_pip(PIN, tmp_path, tmp_path / "log")
        command, flags, outer = (tmp_path / "log").read_text().splitlines()
        assert {"--require-hashes", "--no-cache-dir", "--no-deps"} <= set(command.split())
        assert f"--hash=sha256:{PIN.sha256}" in (tmp_path / "requirement.txt").read_text()
        assert flags == f"flags {PIN.cmake_args}."
        assert outer == "outer ."

    def test_ggml_is_compiled_for_other_cpus_too(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        python = script(tmp_path / "python", 'echo "flags $CMAKE_ARGS."; echo "C $CFLAGS."; echo "C++ $CXXFLAGS."')
        monkeypatch.setattr(sys, "executable", str(python))
        monkeypatch.setenv("REPKV_MARCH", "x86-64-v3")
        monkeypatch.setenv("CFLAGS", "-g")
        monkeypatch.delenv("CXXFLAGS", raising=False)
        ggml_wheel.build_with_pip(PIN, tmp_path, tmp_path / "log")
        flags, c, cxx = (tmp_path / "log").read_text().splitlines()
        assert {"-DGGML_NATIVE=OFF", "-DGGML_AVX2=OFF", "-DGGML_LLAMAFILE=ON"} <= set(flags.split())
        assert "-DGGML_NATIVE=ON" not in flags
        assert (c, cxx) == ("C -g -march=x86-64-v3.", "C++ -march=x86-64-v3.")

    def test_cpus_that_the_compiler_does_not_know_are_its_own_words(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("REPKV_MARCH", "abacus")
        with pytest.raises(WheelError, match=r"^the C compiler does not work: .* -march=abacus "):
            ggml_wheel.machine()


class TestExtension:
    def test_sources_leave_out_the_generated_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("ops.c", "_native.c", "ops.h", "cdef.h"):
            (tmp_path / name).touch()
        monkeypatch.setattr(build, "FOLDER", tmp_path)
        assert [path.name for path in build.c_sources()] == ["ops.c"]
        assert [path.name for path in build.own_headers()] == ["ops.h"]

    @pytest.mark.parametrize("source", build.c_sources(), ids=lambda path: path.name)
    def test_c_compiles_without_a_warning(self, source: Path) -> None:
        include = f"-I{build.ggml_include_dir()}"
        command = ["cc", *build.COMPILE_FLAGS, "-D_GNU_SOURCE", "-Werror", include, "-c", str(source)]
        result = subprocess.run([*command, "-o", os.devnull], capture_output=True, text=True, check=False)
        assert result.stderr == ""
        assert result.returncode == 0

    def test_loads_without_ggml(self) -> None:
        code = "import sys, pyggml_repkv.native._native as n; print(n.__name__, 'ggml' in sys.modules)"
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert output.stdout.split() == [build.MODULE, "False"]


class TestMakefile:
    @pytest.mark.parametrize(
        ("probe", "message"),
        [
            ("version_info", "is not a Python 3.11 or later; name one: make PYTHON=python3.11"),
            ("ensurepip", "has no venv module; install it (Debian: apt-get install python3-venv)"),
            ("Python.h", "has no Python.h; install it (Debian: apt-get install python3-dev)"),
        ],
    )
    def test_says_what_the_machine_lacks(self, tmp_path: Path, probe: str, message: str) -> None:
        python = script(tmp_path / "python", f'case "$*" in *{probe}*) exit 1;; esac')
        result = make("venv", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
        assert result.returncode == 2
        assert result.stderr.splitlines()[0] == f"error: {python} {message}"
        assert not (tmp_path / "venv").exists()

    def test_clean_refuses_what_is_no_environment(self, tmp_path: Path) -> None:
        precious = tmp_path / "precious"
        precious.mkdir()
        result = make("clean", f"VENV={precious}")
        assert result.stderr.splitlines()[0] == f"error: {precious} is not a virtual environment"
        assert precious.exists()

    def test_help_is_the_default_and_names_every_target(self) -> None:
        result = make()
        phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert phony is not None
        targets = set(phony[1].split()) - {"help"}
        assert set(re.findall(r"^make (\w+)", result.stdout, re.MULTILINE)) == targets

    @pytest.mark.parametrize("target", ["run", "bench"])
    def test_a_model_can_be_named(self, target: str) -> None:
        assert '-m "qwen2.5-coder-0.5b" -n 1' in make("-n", target, "MODEL=qwen2.5-coder-0.5b", "ARGS=-n 1").stdout

    def test_ci_script_is_executable_and_parses(self) -> None:
        path = ROOT / ".ci" / "run"
        assert os.access(path, os.X_OK)
        subprocess.run(["bash", "-n", str(path)], check=True)
