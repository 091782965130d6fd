"""Checks that all inputs are filled before a compute, by filling them over two different poisons."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from pyggml_repkv.ffi.context import Tensor
from pyggml_repkv.lab.inspect.builder import BuiltGraph
from pyggml_repkv.lab.inspect.graph_reader import address_of, graph_inputs
from pyggml_repkv.lab.inspect.verify import Finding

_POISONS = (0xA5, 0x5A)


def unfilled_inputs(built: BuiltGraph) -> list[Finding]:
    """Returns the inputs of which `fill` leaves bytes unchanged: a compute would read another node's values there."""
    inputs = graph_inputs(built.plan.context)
    untouched: dict[int, np.ndarray] = {}
    assert built.policy is not None
    tokens = np.zeros(built.wanted.n_tokens, np.int32)
    for poison in _POISONS:
        for tensor in inputs:
            _bytes_of(tensor)[:] = poison
        built.policy.begin_step(tokens, 0)
        built.plan.fill(tokens, 0)
        for tensor in inputs:
            same = _bytes_of(tensor) == poison
            address = address_of(tensor)
            untouched[address] = untouched[address] & same if address in untouched else same
    found = []
    for tensor in inputs:
        n = int(untouched[address_of(tensor)].sum())
        if n:
            name = tensor.contents.name.decode("utf-8", errors="replace")
            found.append(Finding("inputs", f"{n} bytes of the input {name} are not filled", (name,)))
    return found


def _bytes_of(tensor: Tensor) -> np.ndarray:
    t = tensor.contents
    n = int(t.ne[3] * t.nb[3])
    memory: Any = (ctypes.c_char * n).from_address(t.data) if t.data else b""
    return np.frombuffer(memory, np.uint8)
