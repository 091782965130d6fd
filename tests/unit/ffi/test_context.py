"""Contexts and graphs refuse what ggml would abort on, and keep alive what C points to."""

import gc
import weakref

import numpy as np
import pytest

from pyggml_repkv.errors import ComputeError
from pyggml_repkv.ffi.context import GraphContext, set_name
from pyggml_repkv.ffi.handles import Backend, GraphAllocator, tensor_array
from pyggml_repkv.ffi.library import g
from tests.subprocesses import printed
from tests.unit.native.op_bench import Bench, config

OPS = {
    "new": "c.new(0, (4, 8))",
    "input": "c.input(0, (4, 8), 'x')",
    "view": "c.view(x, (4, 4), (32,), 0)",
    "reshape": "c.reshape(x, (8, 4))",
    "swap_rows_and_heads": "c.swap_rows_and_heads(heads)",
    "transpose": "c.transpose(x)",
    "get_rows": "c.get_rows(x, rows)",
    "set_rows": "c.set_rows(x, x, places)",
    "linear": "c.linear(x, x)",
    "add": "c.add(x, x)",
    "mul": "c.mul(x, x)",
    "rms_norm": "c.rms_norm(x, 1e-6)",
    "swiglu": "c.swiglu(x, x)",
    "swiglu_halves": "c.swiglu_halves(x)",
    "rope": "c.rope(heads, rows, Rope(8, 64, 1e4, 1.0, 0.0, 1.0, 32.0, 1.0))",
    "flash_attn": "c.flash_attn(heads, heads, heads, mask, 1.0)",
    "softmax": "c.softmax(x, x, 1.0)",
    "contiguous": "c.contiguous(c.swap_rows_and_heads(heads))",
    "custom": "c.custom((4,), [x], 1, native_ffi.new('struct repkv_op_params *'))",
}


def test_a_full_context_is_an_error_for_every_op():
    """Adds ops until one raises, in another process, because ggml would abort it."""
    loops = "\n".join(f"fill({name!r}, lambda c, x, heads, rows, places, mask: {op})" for name, op in OPS.items())
    source = f"""
from pyggml_repkv.errors import ComputeError
from pyggml_repkv.ffi.context import GraphContext, Rope
from pyggml_repkv.ffi.library import g, native_ffi
def fill(name, op):
    c = GraphContext(64)
    x = c.new(g.GGML_TYPE_F32, (4, 8))
    heads = c.new(g.GGML_TYPE_F32, (2, 4, 8))
    rows = c.new(g.GGML_TYPE_I32, (4 if name == "get_rows" else 2,))
    places = c.new(g.GGML_TYPE_I64, (4,))
    mask = c.new(g.GGML_TYPE_F16, (4, 4))
    try:
        for n in range(1000):
            op(c, x, heads, rows, places, mask)
    except ComputeError as error:
        print(name, n > 30, "is full" in str(error))
{loops}"""
    assert printed(source) == [f"{name} True True" for name in OPS]


GROWTH = {
    "node by node": "for _ in range(500): x = c.expand(c.add(x, x))",
    "in one leap": "for _ in range(500): x = c.add(x, x)\n    c.expand(x)",
    "almost in one leap": "for _ in range(99): x = c.add(x, x)\n    while True: c.expand(c.add(x, x))",
    "by leaves": "while True: c.expand(c.add(c.input(0, (4,), 'x'), c.input(0, (4,), 'y')))",
    "by foreign leaves": "for i in range(500): c.expand(c.add(other.new(0, (4,)), other.new(0, (4,))))",
}


@pytest.mark.parametrize("loop", GROWTH.values(), ids=GROWTH.keys())
def test_a_graph_too_large_is_an_error(loop):
    source = f"""
from pyggml_repkv.errors import ComputeError
from pyggml_repkv.ffi.context import GraphContext, TensorContext
c, other = GraphContext(128), TensorContext(2000)
x = c.input(0, (4,), "x")
try:
    {loop}
except ComputeError as error:
    print(error)"""
    lines = printed(source)
    assert len(lines) == 1
    assert lines[0].endswith("is full")


def test_shapes_are_in_numpy_order():
    context = GraphContext(128)
    x = context.input(g.GGML_TYPE_F32, (2, 3, 4), "x")
    node = context.output(context.contiguous(context.swap_rows_and_heads(x)))
    allocator, backend = GraphAllocator(), Backend(1)
    allocator.allocate(context.graph)
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    tensor_array(x)[...] = values
    backend.compute(context.native_graph)
    assert np.array_equal(tensor_array(node), values.transpose(1, 0, 2))


def test_what_is_contiguous_is_not_copied():
    context = GraphContext(128)
    x = context.input(g.GGML_TYPE_F32, (2, 3, 4), "x")
    assert context.contiguous(x) is x
    swapped = context.swap_rows_and_heads(x)
    assert context.contiguous(swapped) is not swapped


@pytest.mark.parametrize("shape", [(4,), (1, 1, 2, 2)])
def test_a_view_has_two_or_three_dimensions(shape):
    context = GraphContext(128)
    x = context.input(g.GGML_TYPE_F32, (4, 4), "x")
    with pytest.raises(ComputeError, match="views have 2 or 3 dimensions"):
        context.view(x, shape, (16,) * (len(shape) - 1), 0)


@pytest.mark.parametrize(("layer", "name"), [(-1, b"Qcur"), (0, b"Qcur-0"), (12, b"Qcur-12")])
def test_names_are_those_of_llama_cpp(layer, name):
    tensor = GraphContext(128).new(g.GGML_TYPE_F32, (1,))
    set_name(tensor, "Qcur", layer)
    assert tensor.contents.name == name


def test_op_parameters_and_scratch_live_as_long_as_the_graph():
    gc.collect()
    bench = Bench(config(), 2)
    x = np.arange(64, dtype=np.float32)[None]
    node = bench.ops.pack(bench.tensor(x))
    kernels = weakref.ref(bench.kernels)
    bench.ops = bench.kernels = None
    gc.collect()
    assert kernels() is not None
    assert np.array_equal(bench.compute(node)[:, 0], x[0])
    del bench
    gc.collect()
    assert kernels() is None
