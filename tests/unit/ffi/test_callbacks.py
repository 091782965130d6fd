"""Ops written in Python: they run once, outlive their makers, and their exceptions reach the caller."""

import gc
import weakref

import numpy as np
import pytest

from pyggml_repkv.errors import ComputeError
from pyggml_repkv.ffi.callbacks import PythonOps
from pyggml_repkv.ffi.context import GraphContext
from pyggml_repkv.ffi.handles import Backend, GraphAllocator, tensor_array
from pyggml_repkv.ffi.library import g
from tests.subprocesses import printed


class Graph:
    """x + 0 [2, 3] through Python ops, each with the last one's value."""

    def __init__(self, *functions, n_threads=2):
        self.allocator, self.backend = GraphAllocator(), Backend(n_threads)
        self.ops, self.context = PythonOps(self.backend), GraphContext(128)
        self.x, self.zero = (self.context.input(g.GGML_TYPE_F32, (2, 3), name) for name in ("x", "zero"))
        # A node that all threads share: without it ggml would start only one thread.
        node = self.context.add(self.x, self.zero)
        for function in functions:
            node = self.ops.add(self.context, (2, 3), [node, node], function)
        self.node = self.context.output(node)
        self.allocator.allocate(self.context.graph)

    def compute(self):
        tensor_array(self.x)[...] = np.arange(6).reshape(2, 3)
        tensor_array(self.zero)[...] = 0
        try:
            self.backend.compute(self.context.native_graph)
        finally:
            self.ops.reraise()
        return tensor_array(self.node).copy()


@pytest.mark.parametrize("n_threads", [1, 4])
def test_a_function_is_a_node_that_runs_once(n_threads):
    calls = []

    def double(a, b):
        calls.append(a.shape)
        return a + b

    assert Graph(double, double, n_threads=n_threads).compute().tolist() == [[0, 4, 8], [12, 16, 20]]
    assert calls == [(2, 3), (2, 3)]


class Odd(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError("bad"), Odd("odd"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("last", [False, True])
def test_an_exception_stops_compute_and_is_raised_after_it(error, last):
    seen = []

    def fail(a, b):
        raise error

    def note(a, b):
        seen.append(a)
        return a

    graph = Graph(note, fail) if last else Graph(fail, note)
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            graph.compute()
        assert caught.value is error
    assert len(seen) == 2 * last


def test_compute_says_that_its_result_is_void():
    """It tells a caller that forgets to ask, too."""

    def fail(a, b):
        raise ValueError

    graph = Graph(fail)
    with pytest.raises(ComputeError, match="stopped"):
        graph.backend.compute(graph.context.native_graph)


def test_a_full_context_is_an_error():
    source = """
from pyggml_repkv.errors import ComputeError
from pyggml_repkv.ffi.callbacks import PythonOps
from pyggml_repkv.ffi.context import GraphContext
from pyggml_repkv.ffi.handles import Backend
ops, context = PythonOps(Backend(1)), GraphContext(64)
x = context.input(0, (4,), "x")
try:
    for _ in range(500):
        x = ops.add(context, (4,), [x], lambda a: a)
except ComputeError as error:
    print(error)"""
    (line,) = printed(source)
    assert line.endswith("is full")


def test_a_result_of_the_wrong_shape_is_an_error():
    with pytest.raises(ValueError, match="reshape"):
        Graph(lambda a, b: np.zeros(5)).compute()


def test_the_graph_works_again_after_an_error():
    errors = [ValueError("once")]

    def fail_once(a, b):
        if errors:
            raise errors.pop()
        return a

    graph = Graph(fail_once, lambda a, b: a + 1)
    with pytest.raises(ValueError, match="once"):
        graph.compute()
    assert graph.compute().tolist() == [[1, 2, 3], [4, 5, 6]]


def test_only_the_first_error_is_kept_and_only_once():
    def fail(a, b):
        raise ValueError(len(attempts))

    attempts = []
    graph = Graph(fail, fail)
    with pytest.raises(ValueError, match="0"):
        graph.compute()
    graph.ops.reraise()


def test_the_graph_keeps_its_functions():
    class Doubler:
        def __call__(self, a, b):
            return 2 * a

    function = Doubler()
    alive = weakref.ref(function)
    graph = Graph(function)
    graph.ops = PythonOps(graph.backend)
    del function
    gc.collect()
    assert graph.compute().tolist() == [[0, 2, 4], [6, 8, 10]]
    del graph
    gc.collect()
    assert alive() is None
