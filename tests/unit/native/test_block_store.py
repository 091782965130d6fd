"""The block store beside other threads and after errors; tests/properties/test_block_store.py tests its slots."""

import errno
import os
import threading

import numpy as np
import pytest

from pyggml_repkv.errors import StoreError
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
