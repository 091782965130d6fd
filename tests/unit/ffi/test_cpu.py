"""On a CPU that lacks a feature of the extension, the error is one line, before any of its code runs."""

import platform
import subprocess

import pytest

from pyggml_repkv.ffi import cpu
from pyggml_repkv.native import build
from tests.subprocesses import ROOT, run_python

EXTENSION = next(iter((ROOT / "pyggml_repkv" / "native").glob("_native*.so")))


def compiled(folder, march):
    """Returns a file with only the record of an extension that was compiled for `march`."""
    path = folder / f"{march}.so"
    command = ["cc", "-shared", f"-march={march}", str(build.FOLDER / "isa.c"), "-o", str(path)]
    subprocess.run(command, check=True)
    return path


@pytest.fixture
def old_cpu(tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    path.write_text(
        "processor\t: 0\nflags\t\t: fpu sse2 ssse3 sse4_1 sse4_2 popcnt\n\nprocessor\t: 1\nflags\t\t: avx\n"
    )
    monkeypatch.setattr(cpu, "CPUINFO", path)


def test_this_cpu_has_what_it_compiled(tmp_path):
    assert cpu.lacking_features(EXTENSION) == []
    assert b"repkv_isa:" in EXTENSION.read_bytes()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are names of x86")
@pytest.mark.parametrize(
    ("march", "lacking"),
    [
        ("x86-64-v2", []),
        ("haswell", ["movbe", "abm", "bmi1", "bmi2", "avx", "avx2", "fma", "f16c"]),
        ("x86-64-v4", ["movbe", "abm", "bmi1", "bmi2", "avx", "avx2", "fma", "f16c",
                       "avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"]),
    ],
)  # fmt: skip
def test_what_an_older_cpu_lacks_is_named(tmp_path, old_cpu, march, lacking):
    assert cpu.lacking_features(compiled(tmp_path, march)) == lacking


def test_where_nobody_says_nothing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "none")
    assert cpu.lacking_features(EXTENSION) == []
    other = tmp_path / "other.so"
    other.write_bytes(b"\x7fELF")
    assert cpu.lacking_features(other) == []


@pytest.mark.parametrize("entry", ["import", "command line"])
def test_another_cpu_is_one_line(tmp_path, entry):
    """Neither ggml nor the extension is loaded at that time."""
    (tmp_path / "cpuinfo").write_text("flags : fpu sse2\nFeatures : fp\n")
    source = f"""
import sys
from pathlib import Path
from pyggml_repkv.errors import RepkvError
from pyggml_repkv.ffi import cpu
cpu.CPUINFO = Path(sys.argv[1])
if {entry == "import"!r}:
    try:
        import pyggml_repkv.ffi.library
    except RepkvError as error:
        assert not {{"ggml", "pyggml_repkv.native._native"}} & set(sys.modules)
        sys.exit(f"pyggml_repkv: error: {{error}}")
from pyggml_repkv.cli.main import main
sys.exit(main(["run", "-m", "model.gguf", "-p", "Hi"]))"""
    done = run_python(source, str(tmp_path / "cpuinfo"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("pyggml_repkv: error: pyggml_repkv was compiled for another CPU: this one lacks ")
    assert done.stderr.endswith("or for both with REPKV_MARCH=x86-64-v3\n")
    assert done.stderr.count("\n") == 1
