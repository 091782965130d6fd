"""Loads ggml through ggml-python, repairs its bindings, and gives its function addresses to the C extension.

The rest of the package reaches ggml only through this folder.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

from pyggml_repkv.errors import RepkvError
from pyggml_repkv.ffi.cpu import lacking_features
from pyggml_repkv.ffi.symbols import SYMBOLS

__all__ = ["describe", "g", "last_log", "native", "native_ffi"]

GGML_PYTHON_VERSION = "0.0.45"
GGML_VERSION = "0.15.3"

# ggml-python declares these results as a NewType of int. ctypes takes that for a 32-bit int and cuts the pointer.
_POINTER_RESULTS = (
    "ggml_backend_cpu_buffer_type",
    "ggml_backend_cpu_buffer_from_ptr",
)

_NATIVE_SYMBOLS = {
    "get_type_traits_cpu": "ggml_get_type_traits_cpu",
    "get_type_traits": "ggml_get_type_traits",
    "graph_compute": "ggml_backend_graph_compute",
    "set_abort_callback": "ggml_backend_cpu_set_abort_callback",
    "sched_graph_compute": "ggml_backend_sched_graph_compute",
    "log_set": "ggml_log_set",
}

_REINSTALL = "reinstall pyggml_repkv (`make venv` or `pip install .`), which builds the pinned one"


def _check_version() -> None:
    try:
        found = importlib.metadata.version("ggml-python")
    except importlib.metadata.PackageNotFoundError:
        raise RepkvError(f"ggml-python {GGML_PYTHON_VERSION} is not installed; {_REINSTALL}") from None
    if found != GGML_PYTHON_VERSION:
        raise RepkvError(f"ggml-python {found} is installed but {GGML_PYTHON_VERSION} is needed; {_REINSTALL}")


def _check_cpu() -> None:
    """Raises RepkvError if this CPU cannot run the extension, or ggml, which is compiled for the same CPU."""
    spec = importlib.util.find_spec("pyggml_repkv.native._native")
    lacking = lacking_features(Path(spec.origin)) if spec and spec.origin else []
    if lacking:
        raise RepkvError(
            f"pyggml_repkv was compiled for another CPU: this one lacks {', '.join(lacking)}; build it here "
            "(`make clean venv` or `pip install .`), or for both with REPKV_MARCH=x86-64-v3"
        )


# How long OpenMP threads spin at a barrier before they sleep. The default is far longer than a node takes. If another
# program runs, a spinning thread takes the core from the thread it waits for: decode took 100 ms a token instead of 4.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

_check_version()
_check_cpu()
try:
    from ggml import ggml as g
except (ImportError, OSError, RuntimeError, AttributeError) as error:
    raise RepkvError(f"ggml-python cannot be loaded ({error}); {_REINSTALL}") from None
try:
    from pyggml_repkv.native._native import ffi as native_ffi
    from pyggml_repkv.native._native import lib as native
except ImportError as error:
    raise RepkvError(f"the C extension cannot be loaded ({error}); {_REINSTALL}") from None


def _repair_bindings() -> None:
    for name in _POINTER_RESULTS:
        getattr(g.lib, name).restype = ctypes.c_void_p


def _symbol_address(name: str) -> int:
    try:
        address = ctypes.cast(getattr(g.lib, name), ctypes.c_void_p).value
    except AttributeError:
        address = None
    if not address:
        raise RepkvError(f"ggml lacks the symbol {name}; {_REINSTALL}")
    return address


def _bind_native() -> None:
    api = native_ffi.new("struct repkv_ggml_api *")
    for field, symbol in _NATIVE_SYMBOLS.items():
        setattr(api, field, native_ffi.cast("void *", _symbol_address(symbol)))
    if native.repkv_bind(api) != 0:
        raise RepkvError(f"the C extension could not bind to ggml; {_REINSTALL}")


def _self_test() -> None:
    """Raises RepkvError if the binary is not the one that the bindings and the extension were made for."""
    version = g.ggml_version().decode()
    if version != GGML_VERSION:
        raise RepkvError(f"ggml {version} is loaded but {GGML_VERSION} is needed; {_REINSTALL}")
    if ctypes.sizeof(g.ggml_tensor) != g.ggml_tensor_overhead() - 32:
        raise RepkvError(f"ggml's tensor layout is not the one ggml-python declares; {_REINSTALL}")
    if not g.ggml_backend_cpu_buffer_type():
        raise RepkvError(f"ggml has no CPU buffer type; {_REINSTALL}")


for _name in SYMBOLS:
    _symbol_address(_name)
_repair_bindings()
_bind_native()
_self_test()
g.ggml_cpu_init()


def last_log() -> str:
    """Returns the last warning or error that ggml logged in this thread, or "", and clears it."""
    text = native_ffi.string(native.repkv_last_log()).decode(errors="replace")
    native.repkv_clear_log()
    return text


_CPU_FEATURES = [
    *("sse3", "avx2", "fma", "f16c", "avx_vnni", "avx512", "avx512_vbmi", "avx512_vnni", "avx512_bf16", "amx_int8"),
    *("neon", "dotprod", "matmul_int8", "sve"),
]


def describe() -> dict[str, str]:
    """Returns versions and features of the native engine, for `--version` and bug reports."""
    features = [name for name in _CPU_FEATURES if getattr(g, f"ggml_cpu_has_{name}")()]
    return {
        "ggml-python": GGML_PYTHON_VERSION,
        "ggml": g.ggml_version().decode(),
        "llamafile sgemm": "on" if g.ggml_cpu_has_llamafile() else "off (prompts are read more slowly)",
        "cpu": f"{platform.machine()} {' '.join(features)}".strip(),
    }
