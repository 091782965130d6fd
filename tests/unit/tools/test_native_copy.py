"""Native code for other CPUs passes its tests."""

import platform

import pytest
from _native_copy import make_copy, run_tests

from pyggml_repkv.ffi import cpu


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are names of x86")
@pytest.mark.parametrize("march", ["x86-64-v2", "x86-64-v3"])
def test_a_portable_build_passes_the_tests_of_its_kernels(tmp_path, march):
    make_copy(tmp_path, REPKV_MARCH=march)
    (extension,) = (tmp_path / "pyggml_repkv" / "native").glob("_native*.so")
    needed = cpu.needed_features(extension)
    assert ("avx2" in needed) == (march != "x86-64-v2")
    assert "avx512f" not in needed
    if not cpu.lacking_features(extension):
        code, output = run_tests(tmp_path, "tests/unit/native", "-k", "ops")
        assert code == 0, output
