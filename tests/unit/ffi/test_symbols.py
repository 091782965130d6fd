"""The list of ggml functions that the start checks is the list that the package uses."""

import re
from pathlib import Path

import pyggml_repkv
from pyggml_repkv.ffi import library
from pyggml_repkv.ffi.symbols import SYMBOLS

PACKAGE = Path(pyggml_repkv.__file__).parent
TYPES = {"ggml_backend_sched_eval_callback", "ggml_custom_op_t", "ggml_init_params", "ggml_tensor"}


def test_symbols_are_those_in_use():
    used = set(library._NATIVE_SYMBOLS.values())
    for path in PACKAGE.rglob("*.py"):
        used |= set(re.findall(r"\b(?:g|ggml)\.(ggml_[a-z0-9_]+)", path.read_text()))
    assert sorted(used - TYPES) == list(SYMBOLS)
