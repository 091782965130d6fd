"""The block store beside other threads and after errors; tests/properties/test_block_store.py tests its slots."""

import errno
import os
import threading

import numpy as np
import pytest

from pyggml_repkv.errors import ComputeError, StoreError
from pyggml_repkv.ffi.library import native
from tests.stores import StoreBench
from tests.subprocesses import printed


@pytest.fixture
def bench(tmp_path):
    """A store with twenty written blocks; the thread that requires blocks reads them itself."""
    with StoreBench(tmp_path, n_slots=2, n_threads=0, file_types=("q8_0", "q8_0")) as bench:
        rng = np.random.default_rng(1)
        for _ in range(20):
            bench.put(24, rng)
        bench.store.flush()
        yield bench


def test_a_read_leaves_a_requirement_alone(bench):
    """Even if both read at once, neither needs a second try, and both get their own block."""
    want = [[rows.copy() for rows in bench.store.read(0, block, 24)] for block in range(20)]
    end = threading.Event()

    def require():
        while not end.is_set():
            for block in range(10):
                bench.store.require(1, [block])

    thread = threading.Thread(target=require)
    thread.start()
    try:
        for n in range(2000):
            block = 10 + n % 10
            got = bench.store.read(0, block, 24)
            assert all(np.array_equal(a, b) for a, b in zip(got, want[block], strict=True))
    finally:
        end.set()
        thread.join()
    assert bench.store.stats.retries == 0


@pytest.mark.parametrize("n_threads", [0, 2])
def test_a_read_that_failed_is_forgotten_once_it_was_said(tmp_path, n_threads):
    """A block that can be read again is attended again: by the same layer, by another, and alone."""
    rng = np.random.default_rng(1)
    with StoreBench(tmp_path, n_slots=2, n_threads=n_threads) as bench:
        for _ in range(3):
            bench.put(10, rng)
        bench.store.flush()
        for _ in range(2):
            bench.store.inject(read_at=1, keep=1, read_kind=native.REPKV_IO_READ, error=errno.EIO)
            with pytest.raises(StoreError, match="block 1 of layer 0 could not be read"):
                bench.store.require(0, [1])
            with pytest.raises(StoreError, match="block 2 of layer 1 could not be read"):
                bench.store.read(1, 2, 10)
            bench.store.inject()
            bench.store.require(1, [1])
            bench.store.require(0, [1, 2])
            for layer, block in ((1, 1), (0, 1), (0, 2)):
                assert np.array_equal(bench.attended(layer, block)[0], bench.blocks[block][layer][0])
            assert np.array_equal(bench.store.read(1, 2, 10)[0], bench.blocks[2][1][0])
            bench.store.require(0, [0, 2])


def test_a_read_that_fails_beside_a_requirement_is_not_its_error(bench):
    bench.store.inject(read_at=1, keep=1, read_kind=native.REPKV_IO_SHORT)
    with pytest.raises(StoreError, match="block 7 of layer 1"):
        bench.store.read(1, 7, 24)
    bench.store.raise_error()
    bench.store.inject()
    bench.store.require(0, [3])


# Six units, of which each is a page: 16 tokens of 2 heads of 32 keys and values in F16.
PAGES = [16, 32, 48, 64, 80, 96]
PAGE = 4096


@pytest.mark.parametrize(
    ("n_lanes", "rows", "n_reads", "n_pages"),
    [
        (1, [[2]], 1, 1),
        (1, [[1, 2, 3]], 1, 3),
        (1, [[3, 1], [2]], 1, 3),  # two groups of queries
        (1, [[0, 2, 5]], 1, 6),  # what lies between costs less than another read
        (1, [[0, 4]], 2, 2),
        (1, [[5, 6]], 2, 2),  # of two blocks
        (2, [[2], []], 1, 1),
        (2, [[2], [2]], 2, 2),  # each head's is half a page
        (2, [[2, 3], []], 1, 1),
        (2, [[1, 2], []], 1, 2),
    ],
)
def test_only_what_is_wanted_is_read(tmp_path, n_lanes, rows, n_reads, n_pages):
    rng = np.random.default_rng(1)
    with StoreBench(tmp_path, n_slots=8, n_threads=0, n_lanes=n_lanes, max_tokens=96, max_unit=16) as bench:
        for _ in range(2):
            bench.put(96, rng, PAGES)
        bench.store.flush()
        with bench.store.trace() as events:
            bench.store.require(1, *rows)
        stats = bench.store.stats
        assert (stats.reads, stats.read_bytes) == (n_reads, n_pages * PAGE)
        wanted = {(r % n_lanes, unit) for r, row in enumerate(rows) for unit in row}
        assert stats.missed == stats.required == len(wanted)
        read = [event for event in events if event.kind == "read"]
        assert sum(event.n_units for event in read) == len(wanted)
        assert {(event.layer, event.lane) for event in read} == {(1, lane) for lane, _ in wanted}
        for lane, unit in wanted:
            pairs = zip(bench.attended(1, unit, lane), bench.stored(1, unit, lane), strict=True)
            assert all(np.array_equal(got, want) for got, want in pairs)


@pytest.mark.parametrize("n_threads", [0, 2])
def test_damage_of_one_unit_is_damage_of_no_other(tmp_path, n_threads):
    """Of the units that one read brings, and of the two lanes, only the damaged one is refused."""
    rng = np.random.default_rng(1)
    options = {"n_slots": 8, "n_threads": n_threads, "n_lanes": 2, "max_tokens": 96, "max_unit": 16}
    with StoreBench(tmp_path, name="blocks.kv", **options) as bench:
        bench.put(96, rng, PAGES)
        bench.store.flush()
        # Layer 0, lane 1, unit 2.
        at = bench.layout.header_bytes + 3 * PAGE + 2 * PAGE // 2 + 100
        with open(tmp_path / "blocks.kv", "r+b", buffering=0) as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 4]))
        bench.file.sync()
        whole = [1, 3, 4]
        bench.store.require(0, [2, *whole], whole)
        bench.store.require(1, [2, *whole], [2, *whole])
        with pytest.raises(StoreError, match="block 0 of layer 0 could not be read: its checksum is wrong"):
            bench.store.require(0, [0], [0, 2, 5])
        with pytest.raises(StoreError, match="block 0 of layer 0 could not be read: its checksum is wrong"):
            bench.store.read(0, 0, 96)
        bench.store.require(0, [0], [0, 5])
        for unit in (0, 5):
            pairs = zip(bench.attended(0, unit, 1), bench.stored(0, unit, 1), strict=True)
            assert all(np.array_equal(got, want) for got, want in pairs)


def test_slots_of_lanes_do_not_depend_on_each_other(tmp_path):
    """Each lane has its own units in the same rows; what one gives up stays in the other."""
    rng = np.random.default_rng(1)
    with StoreBench(tmp_path, n_slots=2, n_lanes=2, max_unit=8) as bench:
        for _ in range(2):
            bench.put(24, rng, [8, 16, 24])
        bench.store.require(0, [0, 1], [4, 5])
        bench.store.require(0, [2, 3], [4])
        assert [sorted(units) for units in bench.store.resident(0).tolist()] == [[2, 3], [4, 5]]
        for lane, unit in ((0, 2), (0, 3), (1, 4), (1, 5)):
            pairs = zip(bench.attended(0, unit, lane), bench.stored(0, unit, lane), strict=True)
            assert all(np.array_equal(got, want) for got, want in pairs)


@pytest.mark.parametrize("n_threads", [0, 2])
def test_more_than_there_are_slots_is_an_error_and_no_endless_wait(tmp_path, n_threads):
    rng = np.random.default_rng(1)
    with StoreBench(tmp_path, n_slots=2, n_lanes=2, n_threads=n_threads) as bench:
        for _ in range(6):
            bench.put(10, rng)
        bench.store.prefetch(1, [4, 5], [4, 5])
        with pytest.raises(ComputeError, match="layer 1 attends more at once than its 2 slots hold"):
            bench.store.require(1, [0], [0, 1], [1], [2])
        bench.store.require(1, [0], [0, 1], [1], [1])


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="only Linux has scheduling policies for batches")
@pytest.mark.parametrize("policy", ["SCHED_OTHER", "SCHED_BATCH", "SCHED_IDLE"])
def test_every_thread_keeps_the_policy_of_its_process(tmp_path, policy):
    """ggml's threads, the store's and the caller's keep it, during their life and after a compute."""
    source = f"""
import os, sys
from pathlib import Path
os.sched_setscheduler(0, os.{policy}, os.sched_param(0))
import numpy as np
from tests.stores import StoreBench
from tests.unit.native.op_bench import Bench, config
bench = Bench(config(), 3)
x = bench.tensor(np.ones((40, 64), np.float32))
bench.compute(bench.ops.pack(x))
with StoreBench(Path(sys.argv[1])) as store:
    store.put(20, np.random.default_rng(1))
    store.store.flush()
    store.store.require(0, [0])
    threads = [int(name) for name in os.listdir("/proc/self/task")]
    print(len(threads), {{os.sched_getscheduler(thread) for thread in threads}} == {{os.{policy}}})"""
    n_threads, kept = printed(source, str(tmp_path))[0].split()
    # Python's thread, two of ggml's, two that read and one that writes; numpy may have started more.
    assert int(n_threads) >= 6
    assert kept == "True"
