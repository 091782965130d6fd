"""The block store beside other threads and after errors; its slots have tests/properties/test_block_store.py."""

import errno
import threading

import numpy as np
import pytest

from pyggml_repkv.errors import StoreError
from pyggml_repkv.ffi.library import native
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


@pytest.mark.parametrize("n_threads", [0, 2])
def test_a_read_that_failed_is_forgotten_once_it_was_said(tmp_path, n_threads):
    """What can be read again is attended again: by the same layer, by another, and alone."""
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
