"""Arenas are lazy, and their forks share the rows that never change again."""

import mmap
from pathlib import Path

import numpy as np
import pytest

from pyggml_repkv.errors import ComputeError
from pyggml_repkv.ffi.library import g
from pyggml_repkv.memory.store.arenas import Arenas, Rows, as_rows

ROW = 1024  # bytes: four rows a page
N_ROWS = 1000


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def make(arenas, frozen=lambda n: n, name="rows"):
    """Rows of ROW bytes, of which the first frozen(n_past) never change again."""
    return arenas.new(g.GGML_TYPE_F32, (N_ROWS, ROW // 4), name, rows=lambda n_past: Rows(frozen(n_past), n_past))


def test_memory_is_zero_and_resident_where_it_was_written():
    arenas = Arenas(1)
    rows = as_rows(arenas.new(g.GGML_TYPE_F32, (2**16, ROW), "large"))
    before = resident()
    rows[:: 2**10] = 1
    assert resident() - before < 2**21
    assert not rows[1].any()
    arenas.close()


def test_more_than_there_are_addresses_is_an_error():
    with pytest.raises(ComputeError, match="not enough memory for"):
        Arenas(1).new(g.GGML_TYPE_F32, (2**40, 2**10), "too large")


def filled(rows, first, end, seed):
    values = np.random.default_rng(seed).integers(0, 256, (end - first, ROW), np.uint8)
    rows[first:end] = values
    return values


@pytest.mark.parametrize("frozen", [lambda n: 0, lambda n: n // 2, lambda n: n], ids=["nothing", "half", "all"])
def test_a_fork_has_what_there_was_and_goes_its_own_way(frozen):
    arenas = Arenas(1)
    rows = as_rows(make(arenas, frozen))
    before = filled(rows, 0, 101, 0)
    forks = [arenas.fork(101) for _ in range(2)]
    others = [as_rows(make(fork, frozen)) for fork in forks]
    written = [filled(r, 101, 140 + i, i + 1) for i, r in enumerate((rows, *others))]
    for r, values in zip((rows, *others), written, strict=True):
        assert np.array_equal(r[:101], before)
        assert np.array_equal(r[101 : 101 + len(values)], values)
        assert not r[101 + len(values) :].any()
    arenas.close()
    for r in others:
        assert np.array_equal(r[:101], before)
    for fork in forks:
        fork.close()


def test_a_fork_of_a_fork_shares_what_both_have_read():
    chain = [Arenas(1)]
    rows = [as_rows(make(chain[0]))]
    values = []
    for i in range(4):
        values.append(filled(rows[-1], 100 * i, 100 * (i + 1), i))
        chain.append(chain[-1].fork(100 * (i + 1)))
        rows.append(as_rows(make(chain[-1])))
    for arenas in chain[:-1]:
        arenas.close()
    assert np.array_equal(rows[-1][:400], np.concatenate(values))
    chain[-1].close()


def test_what_is_rewritten_after_a_fork_is_not_seen_by_it():
    """As when positions become far: stored keys change in place."""
    arenas = Arenas(1)
    tensor = make(arenas)
    rows = as_rows(tensor)
    before = filled(rows, 0, 200, 0)
    fork = arenas.fork(200)
    other = as_rows(make(fork))
    arenas.thaw(tensor)
    after = filled(rows, 0, 200, 1)
    assert np.array_equal(other[:200], before)
    later = arenas.fork(200)
    assert np.array_equal(as_rows(make(later))[:200], after)
    other[:200] = 7
    assert np.array_equal(rows[:200], after)
    for a in (arenas, fork, later):
        a.close()


def test_a_fork_takes_memory_for_its_own_rows_only():
    arenas = Arenas(1)
    rows = as_rows(arenas.new(g.GGML_TYPE_F32, (2**16, 1024), "large", rows=lambda n: Rows(n, n)))  # 256 MiB
    rows[: 2**14] = 1
    before = resident()
    forks = [arenas.fork(2**14) for _ in range(8)]
    others = [as_rows(f.new(g.GGML_TYPE_F32, (2**16, 1024), "large", rows=lambda n: Rows(n, n))) for f in forks]
    for r in others:
        r[2**14 : 2**14 + 64] = 2
    assert resident() - before < 2**22
    for a in (*forks, arenas):
        a.close()


def test_released_rows_are_zero_and_a_fork_does_not_mind():
    arenas = Arenas(1)
    tensor = make(arenas)
    rows = as_rows(tensor)
    values = filled(rows, 0, 400, 0)
    arenas.release_rows(tensor, 200)
    assert not rows[:200].any()
    fork = arenas.fork(400)
    other_tensor = make(fork)
    other = as_rows(other_tensor)
    fork.release_rows(other_tensor, 300)
    assert np.array_equal(other[300:400], values[300:])
    assert np.array_equal(rows[200:400], values[200:])
    for a in (arenas, fork):
        a.close()
