"""The start checks the installation; every fault is one line with the remedy."""

import ctypes

import pytest

from pyggml_repkv.errors import RepkvError
from pyggml_repkv.ffi import library
from pyggml_repkv.ffi.handles import Buffer
from pyggml_repkv.ffi.library import describe, g, last_log
from tests.subprocesses import run_python

REMEDY = "reinstall pyggml_repkv (`make venv` or `pip install .`), which builds the pinned one"

BROKEN = {
    "another version": (
        "metadata.version = lambda name: '0.0.44' if name == 'ggml-python' else real(name)",
        "ggml-python 0.0.44 is installed but 0.0.45 is needed; ",
    ),
    "not installed": ("metadata.version = missing", "ggml-python 0.0.45 is not installed; "),
    "cannot be imported": ("sys.modules['ggml'] = None", "ggml-python cannot be loaded ("),
    "lacks a function": (
        "from pyggml_repkv.ffi import symbols; symbols.SYMBOLS = ('ggml_no_such_thing',)",
        "ggml lacks the symbol ggml_no_such_thing; ",
    ),
    "no extension": ("sys.modules['pyggml_repkv.native._native'] = None", "the C extension cannot be loaded ("),
}


@pytest.mark.parametrize(("breakage", "message"), BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("entry", ["import", "command line"])
def test_a_broken_installation_is_one_line(breakage, message, entry):
    source = f"""
import sys
from importlib import metadata
real = metadata.version
def missing(name):
    raise metadata.PackageNotFoundError(name)
{breakage}
from pyggml_repkv.errors import RepkvError
if {entry == "import"!r}:
    try:
        import pyggml_repkv.ffi.library
    except RepkvError as error:
        sys.exit(f"pyggml_repkv: error: {{error}}")
from pyggml_repkv.cli.main import main
sys.exit(main(["run", "-m", "model.gguf", "-p", "Hi"]))"""
    done = run_python(source)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"pyggml_repkv: error: {message}")
    assert done.stderr.endswith(f"; {REMEDY}\n")
    assert done.stderr.count("\n") == 1


def test_another_ggml_is_found_out(monkeypatch):
    library._self_test()
    monkeypatch.setattr(library, "GGML_VERSION", "0.15.4")
    with pytest.raises(RepkvError, match=r"ggml 0\.15\.3 is loaded but 0\.15\.4 is needed"):
        library._self_test()


def test_another_layout_of_tensors_is_found_out(monkeypatch):
    class OtherTensor(ctypes.Structure):
        _fields_ = (*g.ggml_tensor._fields_, ("another", ctypes.c_void_p))

    monkeypatch.setattr(g, "ggml_tensor", OtherTensor)
    with pytest.raises(RepkvError, match="tensor layout"):
        library._self_test()


def test_pointers_come_back_whole():
    """Without the repair their upper halves are lost, and ggml would read the name from a wrong address."""
    assert g.ggml_backend_buft_name(g.ggml_backend_cpu_buffer_type()) == b"CPU"
    memory = ctypes.create_string_buffer(4096)
    address = -(-ctypes.addressof(memory) // 64) * 64
    buffer = Buffer(g.ggml_backend_cpu_buffer_from_ptr(address, 64))
    assert (buffer.base, buffer.size) == (address, 64)


def test_describe_names_the_engine():
    described = describe()
    assert list(described) == ["ggml-python", "ggml", "llamafile sgemm", "cpu"]
    assert described["ggml-python"] == library.GGML_PYTHON_VERSION
    assert described["ggml"] == library.GGML_VERSION
    machine, *features = described["cpu"].split()
    assert machine
    assert set(features) <= set(library._CPU_FEATURES)


def test_the_log_is_quoted_once():
    last_log()
    # Far more memory than there is: ggml logs why it returns NULL.
    assert not g.ggml_backend_buft_alloc_buffer(g.ggml_backend_cpu_buffer_type(), 2**60)
    assert "failed to allocate" in last_log()
    assert last_log() == ""
