"""Owners of ggml objects: each frees once, after its children, in any order of release."""

import gc
import weakref

import numpy as np
import pytest

from pyggml_repkv.errors import ComputeError
from pyggml_repkv.ffi.context import GraphContext, TensorContext
from pyggml_repkv.ffi.handles import (
    Backend,
    Buffer,
    GraphAllocator,
    Handle,
    aligned_zeros,
    tensor_array,
)
from pyggml_repkv.ffi.library import g
from tests.subprocesses import printed


class TestOrder:
    """Handles whose `free` writes the pointer into a log."""

    @pytest.fixture
    def log(self):
        return []

    @pytest.fixture
    def family(self, log):
        parent = Handle("parent", log.append)
        child = Handle("child", log.append, parent)
        return parent, child, Handle("grandchild", log.append, child)

    def test_closing_a_parent_closes_its_children_first(self, family, log):
        family[0].close()
        assert log == ["grandchild", "child", "parent"]
        assert all(handle.closed for handle in family)

    def test_nothing_is_freed_twice(self, family, log):
        for handle in (*family, *family):
            handle.close()
        assert sorted(log) == ["child", "grandchild", "parent"]

    def test_closing_a_child_leaves_its_parent(self, family, log):
        family[1].close()
        assert log == ["grandchild", "child"]
        assert not family[0].closed

    def test_a_child_keeps_its_parents_until_it_is_collected(self, log):
        parents = [Handle(name, log.append) for name in ("a", "b")]
        child = Handle("child", log.append, *parents)
        del parents
        gc.collect()
        assert log == []
        del child
        gc.collect()
        assert log[0] == "child"
        assert sorted(log[1:]) == ["a", "b"]

    def test_what_it_keeps_dies_after_it(self, log):
        class Memory:
            def __del__(self):
                log.append("memory")

        handle = Handle("handle", log.append, keep=Memory())
        gc.collect()
        assert log == []
        handle.close()
        assert log == ["handle", "memory"]

    def test_the_interpreter_frees_what_is_left_children_first(self):
        source = """
from pyggml_repkv.ffi.handles import Handle
parent = Handle("parent", print)
child = Handle("child", print, parent)
print("end")"""
        assert printed(source) == ["end", "child", "parent"]


class TestBuffer:
    @pytest.fixture
    def tensor(self):
        self.context = TensorContext(8)
        return self.context.new(g.GGML_TYPE_F32, (4, 8))  # 128 bytes

    @pytest.mark.parametrize("offset", [0, 64, 128])
    def test_a_tensor_lies_where_it_was_placed(self, tensor, offset):
        memory = aligned_zeros(256)
        Buffer.over(memory).place(tensor, offset)
        tensor_array(tensor)[...] = 1
        assert np.flatnonzero(memory.view(np.float32)).tolist() == list(range(offset // 4, offset // 4 + 32))

    @pytest.mark.parametrize("offset", [-1, 129, 256, 2**40])
    def test_a_place_outside_is_refused(self, tensor, offset):
        with pytest.raises(ComputeError, match=f"128 bytes does not fit at {offset} of 256"):
            Buffer.over(aligned_zeros(256)).place(tensor, offset)

    def test_the_array_lives_as_long_as_the_buffer(self):
        memory = aligned_zeros(64)
        alive, buffer = weakref.ref(memory), Buffer.over(memory)
        del memory
        gc.collect()
        assert alive() is not None
        buffer.close()
        assert alive() is None

    def test_too_large_is_an_error(self):
        with pytest.raises(ComputeError, match="not enough memory for a buffer of 1073741824 MiB"):
            Buffer.allocate(g.ggml_backend_cpu_buffer_type(), 2**50)


class TestMemory:
    @pytest.mark.parametrize("n_bytes", [0, 1, 63, 64, 65, 4096, 10**6 + 1])
    def test_zeroed_aligned_writable(self, n_bytes):
        memory = aligned_zeros(n_bytes)
        assert memory.shape == (n_bytes,)
        assert not memory.any()
        assert n_bytes == 0 or memory.ctypes.data % 64 == 0
        memory[...] = 255

    def test_too_much_is_an_error(self):
        with pytest.raises(ComputeError, match="not enough memory for 1099511627776 MiB"):
            aligned_zeros(2**60)


def test_a_backend_has_a_sane_number_of_threads():
    for n_threads in (0, -1, g.GGML_MAX_N_THREADS + 1):
        with pytest.raises(ComputeError, match=f"n_threads is {n_threads}"):
            Backend(n_threads)


def test_the_allocator_says_when_its_buffer_moved():
    allocator, graphs = GraphAllocator(), []
    for n in (1000, 1000, 10, 100_000, 1000):
        graph = GraphContext(128)
        a = graph.input(g.GGML_TYPE_F32, (n,), "a")
        graph.output(graph.add(a, a))
        graphs.append((allocator.allocate(graph.graph), allocator.size, graph))
    assert [moved for moved, *_ in graphs] == [True, False, False, True, False]
    assert graphs[0][1] == graphs[2][1] < graphs[3][1] == graphs[4][1]


def test_an_allocator_of_a_backend_is_closed_with_it():
    backend = Backend(1)
    allocator = GraphAllocator(backend)
    backend.close()
    assert allocator.closed


def test_an_unallocated_tensor_has_no_array():
    context = TensorContext(8)
    with pytest.raises(ComputeError, match="tensor lonely was not allocated"):
        tensor_array(context.new(g.GGML_TYPE_F32, (4,), "lonely"))


def test_an_array_is_a_view_outermost_first():
    context, memory = TensorContext(8), aligned_zeros(64)
    tensor = context.new(g.GGML_TYPE_I32, (2, 3))
    Buffer.over(memory).place(tensor, 0)
    tensor_array(tensor)[...] = [[1, 2, 3], [4, 5, 6]]
    assert memory.view(np.int32).tolist()[:6] == [1, 2, 3, 4, 5, 6]


USES_AFTER_CLOSE = {
    "new": "c = TensorContext(8); c.close(); c.new(0, (4,))",
    "place": "c = TensorContext(8); t = c.new(0, (4,)); b = Buffer.over(aligned_zeros(64)); b.close(); b.place(t, 0)",
    "allocate": "a = GraphAllocator(); a.close(); a.allocate(graph().graph)",
    "size": "a = GraphAllocator(); a.close(); a.size",
    "compute": "n = graph(); GraphAllocator().allocate(n.graph); b = Backend(1); b.close(); b.compute(n.native_graph)",
}


def test_a_closed_handle_is_an_error():
    """Runs in another process, because ggml would read freed memory."""
    attempts = "\n".join(f"attempt({use!r})" for use in USES_AFTER_CLOSE.values())
    source = f"""
from pyggml_repkv.errors import ComputeError
from pyggml_repkv.ffi.context import *
from pyggml_repkv.ffi.handles import *
def graph():
    c = GraphContext(128)
    x = c.input(0, (4,), "x")
    c.output(c.add(x, x))
    return c
def attempt(use):
    try:
        exec(use)
    except ComputeError as error:
        print(error)
{attempts}"""
    names = ("TensorContext", "Buffer", "GraphAllocator", "GraphAllocator", "Backend")
    assert printed(source) == [f"{name} was used after it was closed" for name in names]
