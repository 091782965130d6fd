"""ggml's scheduler calls a callback between nodes, also a Python one, and stops if it says so."""

import numpy as np
import pytest

from pyggml_repkv.errors import ComputeError
from pyggml_repkv.ffi.callbacks import PythonOps
from pyggml_repkv.ffi.context import GraphContext, set_name
from pyggml_repkv.ffi.handles import Backend, GraphAllocator, tensor_array
from pyggml_repkv.ffi.library import g
from pyggml_repkv.ffi.scheduler import Scheduler, python_callback


@pytest.fixture
def chain():
    """x + 1, three times: the nodes, and a function that computes them with a callback."""
    backend = Backend(2)
    with_ops, context = PythonOps(backend), GraphContext(16)
    x = context.input(g.GGML_TYPE_F32, (4,), "x")
    nodes = []
    for i in range(3):
        nodes.append(with_ops.add(context, (4,), [nodes[-1] if nodes else x], lambda a: a + 1))
        set_name(nodes[-1], "step", i)
    context.output(nodes[-1])
    allocator = GraphAllocator(backend)
    allocator.allocate(context.graph)

    def compute(observe):
        callback, keep = python_callback(observe)
        scheduler = Scheduler(backend, context, callback, 0, keep)
        tensor_array(x)[...] = np.arange(4)
        backend.compute_scheduled(scheduler.address, scheduler.graph)
        return tensor_array(nodes[-1]).copy()

    compute.backend = backend
    yield compute
    allocator.close()
    context.close()
    backend.close()


def name(node):
    return node.contents.name.decode()


def test_observed_nodes_are_seen_as_soon_as_they_are_computed(chain):
    seen = []

    def observe(node, ask):
        if ask:
            return name(node) == "step-1"
        seen.append((name(node), tensor_array(node).tolist()))
        return True

    assert chain(observe).tolist() == [3, 4, 5, 6]
    assert seen == [("step-1", [2, 3, 4, 5])]


def test_a_callback_that_cancels_and_asks_for_an_abort_stops_the_compute(chain):
    seen = []

    def observe(node, ask):
        if not ask:
            seen.append(name(node))
            chain.backend.stop()
        return ask

    with pytest.raises(ComputeError, match="stopped"):
        chain(observe)
    assert seen == ["step-0"]
