"""Builds with REPKV_DEBUG, as of `make sanitize`, end the process if an op takes more scratch than it declares."""

import pytest

from pyggml_repkv.ffi.library import native
from tests.subprocesses import run_python

pytestmark = pytest.mark.skipif(native.REPKV_PIECE_GAP == 0, reason="only builds of make sanitize check it")


def test_an_op_that_takes_more_than_there_is_ends_the_process():
    done = run_python("""
import numpy as np
from tests.unit.native.op_bench import Bench, config
bench = Bench(config(), 1)
bench.kernels._scratch_stride = 64
x = bench.tensor(np.ones(64, np.float32))
bench.compute(bench.ops.norm_linear(x, x, [bench.tensor(np.ones((8, 64), np.float32))]))""")
    assert done.returncode != 0
    assert "bytes of scratch, and there are 64" in done.stderr
