"""The notes of ggml's first thread, and the node of each note."""

from dataclasses import dataclass, field
from itertools import count

import numpy as np
import pytest

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import ComputeError
from pyggml_repkv.lab.inspect.node_trace import NodeTracer, _of_each_node
from pyggml_repkv.memory.config import MemoryConfig
from tests.tiny_models import TinySpec, write_tiny_model

addresses = count(1)


@dataclass(frozen=True)
class Node:
    """The fields of a RawTensor that the code reads."""

    op: str
    sources: tuple[int, ...] = ()
    is_output: bool = False
    address: int = field(default_factory=lambda: next(addresses))


def graph(*, n_users=1, is_output=False):
    """A norm and its product, two other nodes with a view between them, and perhaps a second reader of the norm."""
    first = Node("add")
    view = Node("view", (first.address,))
    norm = Node("rms_norm", (view.address,), is_output)
    mul = Node("mul", (norm.address,))
    last = Node("add", (norm.address,) if n_users == 2 else (mul.address,))
    return [first, view, norm, mul, last]


def notes(n):
    """n computes of 5 ns with 1 ns between."""
    return np.array([(6 * i, 6 * i + 5) for i in range(1, n + 1)], np.int64)


def test_a_product_that_ggml_fuses_takes_no_time_of_its_own():
    assert _of_each_node(notes(3), graph(), set()).tolist() == [[6, 11], [11, 11], [12, 17], [17, 17], [18, 23]]


def test_without_fusion_each_node_has_its_time():
    assert _of_each_node(notes(4), graph(), set()).tolist() == [[6, 11], [11, 11], [12, 17], [18, 23], [24, 29]]


@pytest.mark.parametrize(
    "nodes", [graph(n_users=2), graph(is_output=True), [Node("rms_norm"), Node("mul"), Node("add"), Node("add")]]
)
def test_what_ggml_cannot_fuse_is_not_taken_for_fused(nodes):
    assert len(_of_each_node(notes(4), nodes, set())) == len(nodes)
    with pytest.raises(ComputeError, match="ggml noted 3 computes in a graph of 4"):
        _of_each_node(notes(3), nodes, set())


def test_a_norm_after_which_a_hook_runs_is_not_fused():
    nodes = graph()
    with pytest.raises(ComputeError):
        _of_each_node(notes(3), nodes, {nodes[2].address})


@pytest.mark.parametrize("n", [0, 2, 5])
def test_a_wrong_number_of_notes_is_an_error(n):
    with pytest.raises(ComputeError):
        _of_each_node(notes(n), graph(), set())


@pytest.mark.parametrize("n_tokens", [1, 20])
def test_every_node_of_the_exact_graph_is_noted(tmp_path, n_tokens):
    write_tiny_model(tmp_path / "tiny.gguf", TinySpec(n_layer=2))
    tracer = NodeTracer()
    with (
        Model.load(tmp_path / "tiny.gguf", threads=2, exact_graph=True) as model,
        model.session(MemoryConfig(n_ctx=64)) as session,
        session.traced(tracer),
    ):
        session.prefill(list(range(n_tokens)))
    (step,) = tracer.steps
    nodes, times = tracer.graphs[step.plan].nodes, tracer.times(step)
    still = {node.op for node, (begin, end) in zip(nodes, times, strict=True) if begin == end}
    # The product is fused with the norm before it.
    assert still <= {"view", "reshape", "permute", "transpose", "mul"}
    assert "mul" in still
    assert (np.diff(times.ravel()) >= 0).all()
