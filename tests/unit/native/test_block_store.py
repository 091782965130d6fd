"""The block store beside other threads, and after errors; what lies in which slot: tests/properties/test_block_store.py."""

import threading

import numpy as np
import pytest

from tests.stores import StoreBench


@pytest.fixture
def bench(tmp_path):
    """Twenty written blocks; the thread that requires reads them itself."""
    with StoreBench(tmp_path, n_slots=2, n_threads=0, file_types=("q8_0", "q8_0")) as bench:
        rng = np.random.default_rng(1)
        for _ in range(20):
            bench.put(24, rng)
        bench.store.flush()
        yield bench


def test_a_read_leaves_a_requirement_alone(bench):
    """Also where both are on their way at once: neither needs a second try, both get their own block."""
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
