"""The hook between nodes: blocks are there before they are attended, reads for the next token begin, failures stop."""

import errno
import threading
import time

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from pyggml_repkv.errors import ComputeError, StoreError
from pyggml_repkv.ffi.callbacks import PythonOps
from pyggml_repkv.ffi.handles import GraphAllocator, tensor_array
from pyggml_repkv.ffi.library import native
from pyggml_repkv.ffi.scheduler import Scheduler
from pyggml_repkv.memory.hook import StepHook
from pyggml_repkv.memory.policy import HookPoint
from pyggml_repkv.ops.kernels import LANES
from tests.stores import N_LAYER, StoreBench
from tests.unit.native.op_bench import Bench, config

N_BLOCKS, N_TOP, N_THREADS = 20, 3, 2

# The selection of each layer, a row for each of two key heads.
FIRST = [[[0, 3, 7], [3, 7, 9]], [[1, 2, 4], [2, 11, 12]]]
SECOND = [[[5, 7, 8], [8, 9, 16]], [[0, 1, 2], [2, 13, 19]]]


def union(rows, n_lanes):
    """Returns the (lane, block) that rows select; what two rows of a lane select is there once."""
    return {(r % n_lanes, block) for r, row in enumerate(rows) for block in row}


def n_units(selected, n_lanes):
    """Returns how many there are in all layers."""
    return sum(len(union(rows, n_lanes)) for rows in selected)


class HookBench:
    """A graph of block_topk for each layer, and after each a witness that checks whether the blocks are there.

    points: of the hook, each (layer of the node, layer, n_known); late: whether the last token's selection is attended;
    seen: layers whose witness ran; on_witness(layer): called by the witness.
    """

    def __init__(self, store, points, late=False):
        self.store, self.seen, self.on_witness = store, [], lambda layer: None
        self.bench = Bench(config(n_head=2, n_head_kv=2), N_THREADS)
        graph, self.backend, self.python = self.bench.graph, self.bench.backend, PythonOps(self.bench.backend)
        zeros = np.zeros(2 * (2 * LANES + 2 * N_THREADS), np.float32)
        self.relevance = [self.bench.tensor(zeros) for _ in range(N_LAYER)]
        self.kept = [self.bench.tensor(np.zeros((2, 2, 1 + N_TOP), np.int32), QT.I32) for _ in range(N_LAYER)]
        self.regions = self.bench.regions(n_units=N_BLOCKS, budget=N_TOP)
        # Units of one token.
        self.units = self.bench.tensor(np.arange(N_BLOCKS + 1, dtype=np.int32), QT.I32)
        nodes = [self.layer(i, late) for i in range(N_LAYER)]
        self.hook = StepHook(store.store, self.kept, self.backend, reads_ahead=late)
        for at, layer, n_known in points:
            self.hook.add(HookPoint(nodes[at], layer, late, n_known))
        allocator = GraphAllocator()
        allocator.allocate(graph.graph)
        keep = self.hook, allocator
        self.scheduler = Scheduler(self.backend, graph, self.hook.callback, self.hook.userdata, keep)

    def layer(self, layer, late):
        ops, kept = self.bench.ops, self.kept[layer] if late else None
        options = {"kind": "max", "n_rows": 2, "n_lines": 1, "n_padded": 2 * LANES, "kept": kept, "late": late}
        node = ops.block_topk(self.relevance[layer], self.units, self.regions, n_top=N_TOP, **options)
        ops.g.output(self.python.add(ops.g, (1,), [node], lambda rows: self.look(layer, rows)))
        return node

    def keep(self, selected, half):
        """Sets the last token's selection."""
        for kept, rows in zip(self.kept, selected, strict=True):
            tensor_array(kept)[half] = [[len(blocks), *blocks] for blocks in rows]

    def look(self, layer, rows):
        self.seen.append(layer)
        for r, (n, *blocks) in enumerate(rows.view(np.int32).tolist()):
            for at in ((layer, block, r % self.store.n_lanes) for block in blocks[:n]):
                pairs = zip(self.store.attended(*at), self.store.stored(*at), strict=True)
                assert all(np.array_equal(got, want) for got, want in pairs)
        self.on_witness(layer)
        return 0.0

    def step(self, selected, last=None):
        """Computes a step whose layers select these rows; returns the layers that were asked for, in order. last: half
        of kept-l with the last token's selection.
        """
        for relevance, rows in zip(self.relevance, selected, strict=True):
            x = tensor_array(relevance)[: 2 * 2 * LANES].reshape(2, -1)
            x[...] = 0
            for head, blocks in enumerate(rows):
                x[head, blocks] = 1
        tensor_array(self.regions)[-1] = -1 if last is None else last
        self.seen = []
        with self.store.store.trace() as events:
            self.hook.begin()
            try:
                self.backend.compute_scheduled(self.scheduler.address, self.scheduler.graph)
            except ComputeError:
                self.hook.check()
                raise
            finally:
                self.python.reraise()
            self.hook.check_complete()
        return [event.layer for event in events if event.kind == "selected"]

    @property
    def stats(self):
        return self.store.store.stats


EACH = [(0, 0, 0), (1, 1, 0)]
TOGETHER = [(0, 0, 2)]
EACH_KNOWN = [(0, 0, 1), (1, 1, 1)]


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n} lanes")
def make(tmp_path, request):
    """make(points, late, n_slots=..., ...) -> a HookBench on a store with N_BLOCKS written blocks, of one unit each.
    What its two key heads select is read for both, or for each alone.
    """
    stores = []

    def make_bench(points, late=False, **options):
        store = StoreBench(tmp_path, n_lanes=request.param, **{"n_slots": 12, **options})
        stores.append(store)
        rng = np.random.default_rng(1)
        for _ in range(N_BLOCKS):
            store.put(int(rng.integers(1, 25)), rng)
        store.store.flush()
        return HookBench(store, points, late)

    yield make_bench
    for store in stores:
        store.close()


@pytest.mark.parametrize("n_threads", [0, 3])
def test_what_a_layer_selects_is_there_when_the_next_node_runs(make, n_threads):
    """Slots may be just enough; a block that two heads of a lane select is asked for once."""
    bench = make(EACH, n_threads=n_threads, n_slots=5)
    for selected in (FIRST, SECOND, FIRST):
        assert bench.step(selected) == bench.seen == [0, 1]
    n = bench.store.n_lanes
    assert bench.stats.required == 2 * n_units(FIRST, n) + n_units(SECOND, n)
    assert bench.stats.issued == 0


def test_points_out_of_order_are_noticed(make):
    bench = make(EACH[::-1])
    bench.look = lambda layer, rows: 0.0
    with pytest.raises(ComputeError, match="hooks ran at 1 of 2 nodes"):
        bench.step(FIRST)


@pytest.mark.parametrize(("points", "begun"), [(EACH, [1, 2]), (EACH_KNOWN, [0, 1]), (TOGETHER, [0, 0])])
@pytest.mark.parametrize("half", [0, 1])
def test_what_the_next_token_attends_is_read_ahead(make, points, begun, half):
    """Each block is read once, and the next token misses none. begun: layers whose reads have begun when each witness
    runs. A layer of a group must have kept its selection first, so its reads begin at the next point; those of the last
    group begin after the step.
    """
    bench, issued = make(points, late=True), []
    n = bench.store.n_lanes
    bench.keep(FIRST, half)
    bench.on_witness = lambda layer: issued.append(bench.stats.issued)
    assert bench.step(SECOND, last=half) == [0, 1]
    ahead = [len(union(now, n) - union(last, n)) for now, last in zip(SECOND, FIRST, strict=True)]
    assert issued == [sum(ahead[:n_layers]) for n_layers in begun]
    assert (bench.stats.issued, bench.stats.used) == (sum(ahead), 0)
    assert bench.stats.missed == n_units(FIRST, n)

    bench.step(FIRST, last=1 - half)
    assert (bench.stats.missed, bench.stats.used) == (n_units(FIRST, n), sum(ahead))


def test_layers_known_before_the_step_are_asked_for_together(make):
    """One point asks for what each of them kept, before the second has selected anything."""
    bench, there = make(TOGETHER, late=True), []
    bench.keep(FIRST, 1)

    def look(layer):
        lanes = enumerate(bench.store.store.resident(1).tolist())
        there.append({(lane, unit) for lane, units in lanes for unit in units} >= union(FIRST[1], bench.store.n_lanes))

    bench.on_witness = look
    assert bench.step(SECOND, last=1) == bench.seen == [0, 1]
    assert there == [True, True]


@pytest.mark.parametrize(("points", "seen"), [(EACH, [0]), (TOGETHER, [])])
def test_a_block_that_cannot_be_read_stops_the_step(make, points, seen):
    """It stops before a node attends the block; the next step may try again."""
    bench = make(points, late=points is TOGETHER, n_threads=0)
    bench.keep(FIRST, 0)
    last = 0 if points is TOGETHER else None
    fails = {"read_kind": native.REPKV_IO_READ, "error": errno.EIO}
    bench.store.store.inject(read_at=len(union(FIRST[0], bench.store.n_lanes)) + 1, keep=1, **fails)
    with pytest.raises(StoreError, match="of layer 1 could not be read: Input/output error"):
        bench.step(FIRST, last)
    assert bench.seen == seen
    bench.store.store.inject()
    assert bench.step(FIRST, last) == bench.seen == [0, 1]


def test_a_compute_that_is_stopped_waits_no_longer(make):
    bench = make(EACH, n_threads=0)
    bench.store.store.inject(delay_us=200_000, seed=1)

    def stop():
        while bench.stats.reads == 0:
            time.sleep(0.001)
        bench.backend.stop()

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(ComputeError, match="the compute was stopped"):
        bench.step(FIRST)
    thread.join()
    assert bench.seen == []
    assert bench.stats.reads < len(union(FIRST[0], bench.store.n_lanes))


@pytest.mark.parametrize("debug", [True, False])
@pytest.mark.parametrize(
    ("points", "at", "seen"), [(EACH, 0, [0]), (EACH, 1, [0, 1]), (EACH_KNOWN, 0, [0]), (TOGETHER, 0, [0, 1])]
)
def test_a_slot_that_changes_while_it_is_attended_is_noticed(make, points, at, seen, debug):
    """Debug mode notices it at the next point or after the step."""
    bench = make(points, late=points is not EACH, debug=debug)
    bench.keep(FIRST, 0)
    last = None if points is EACH else 0
    table = np.zeros((1, bench.bench.config.rope_dim), np.float32)
    bench.on_witness = lambda layer: layer == at and bench.store.store.unrotate(table)  # which empties all slots
    if not debug:
        assert bench.step(FIRST, last) == [0, 1]
        return
    with pytest.raises(ComputeError, match="a slot was given to another block while it was attended"):
        bench.step(FIRST, last)
    assert bench.seen == seen
