"""The table of native ops, and that a maker cannot confuse two sources."""

import numpy as np
import pytest

from pyggml_repkv.ffi.library import g
from pyggml_repkv.lab.inspect.graph_reader import info_of, read_graph
from pyggml_repkv.ops.makers import Ops
from pyggml_repkv.ops.table import OPS
from tests.unit.native.op_bench import Bench, config


def test_a_row_tells_sources_effects_and_cost():
    info = OPS["attend_memory_one"]
    assert info.sources[:6] == ("qkv", "k_local", "v_local", "k_store", "v_store", "rope")
    assert (info.reads, info.writes, info.cost) == ((1, 2, 3, 4), (1, 2, 3, 4), "attention")
    assert (OPS["matmul"].many, OPS["pack"].many) == (True, False)
    assert OPS["block_topk"].n_required == 3
    assert OPS["store_kv"].reads == ()


def test_ops_have_addresses_of_their_own():
    assert len({info.address for info in OPS.values()}) == len(OPS) > 20


def test_every_op_of_a_model_has_a_maker():
    assert {name for name in OPS if not name.startswith("peak_")} <= set(dir(Ops))


def test_nothing_is_known_of_ops_of_ggml():
    assert info_of("mul_mat") == info_of("") == info_of("custom")
    assert info_of("repkv.pack") is OPS["pack"]


@pytest.mark.parametrize("traced", [False, True])
def test_a_node_is_found_by_its_name(traced):
    bench = Bench(config(), 1)
    ops = Ops(bench.graph, bench.kernels, traced=traced)
    bench.graph.expand(ops.pack(bench.tensor(np.zeros((1, 8), np.float32))))
    assert [node.op for node in read_graph(bench.graph).nodes] == ["repkv.pack"]


@pytest.mark.parametrize("names", [("x",), ("norm", "x"), ("x", "weight"), ("x", "norm", "gate")])
def test_wrong_sources_are_refused(names):
    bench = Bench(config(), 1)
    x = bench.context.new(g.GGML_TYPE_F32, (8,))
    with pytest.raises(AssertionError, match="norm_packed"):
        bench.ops.node("norm_packed", (1, 8, 32), **dict.fromkeys(names, x))


def test_a_rotation_needs_the_table_of_the_graph():
    bench = Bench(config(), 1)
    x = bench.context.new(g.GGML_TYPE_F32, (8,))
    with pytest.raises(AssertionError, match="attend takes"):
        bench.ops.attend(x, x, x, x)
