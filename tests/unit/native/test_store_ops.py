"""Ops that write keys and values to arenas, and the rotation of stored keys, against plain numpy."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pyggml_repkv.ffi.library import native, native_ffi
from tests.unit.native.arenas import CACHES, Arena, cache_names, fitting_cache
from tests.unit.native.op_bench import Bench, assert_close, config, packed, rotated

# Cells that the arena lacks for the stored tokens; negative: spare ones.
lengths = st.one_of(st.integers(-40, 0), st.integers(0, 110))
sizes = {
    "n_head_kv": st.integers(1, 3),
    "head_dim": st.sampled_from([16, 32, 48, 64, 80, 128]),
    "partly": st.booleans(),  # only half of each head is rotated
    "seed": st.integers(0, 999),
}


@given(
    far=st.booleans(), n_tokens=st.one_of(st.integers(1, 100), st.sampled_from([31, 32, 33, 64, 65])),
    group=st.integers(1, 4), n_past=st.integers(0, 70), base=st.integers(0, 60), n_missing=lengths,
    caches=st.tuples(cache_names, cache_names), n_threads=st.integers(1, 5), **sizes,
)  # fmt: skip
@settings(max_examples=120)
def test_a_chunk_is_stored_as_far_as_there_are_cells(
    far, n_tokens, group, n_past, base, n_missing, caches, n_threads, n_head_kv, head_dim, partly, seed
):
    """far: store_far, which turns all queries by one table and stores keys unrotated, at cells that count from a base;
    else store_kv.
    """
    rng = np.random.default_rng(seed)
    n_head, rope_dim = n_head_kv * group, head_dim // 2 if partly else head_dim
    bench = Bench(config(n_head=n_head, n_head_kv=n_head_kv, head_dim=head_dim, rope_dim=rope_dim), n_threads)
    n_cells = max(1, n_past + n_tokens - n_missing)
    arenas = [Arena(bench, rng, fitting_cache(name, head_dim), n_cells, slice(n_past)) for name in caches]
    tensors = [arena.tensor for arena in arenas]
    qkv = rng.standard_normal((n_tokens, n_head + 2 * n_head_kv, head_dim)).astype(np.float32)
    x = bench.tensor(packed(qkv.reshape(n_tokens, -1)))
    angle = rng.uniform(0, 6, (1 if far else n_tokens, rope_dim // 2))
    table = np.concatenate((np.cos(angle), np.sin(angle)), -1).astype(np.float32)
    if far:
        regions = bench.regions(first=n_past + base, n_tokens=n_tokens, store_base=base)
        node = bench.ops.store_far(x, *tensors, bench.tensor(table[0]), regions)
    else:
        bench.rotate_by(packed(table))
        node = bench.ops.store_kv(x, *tensors, bench.integers(n_past, n_tokens))
    got = bench.compute_packed(node, n_tokens).reshape(n_tokens, n_head, head_dim)

    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    q, k, v = np.split(qkv.astype(np.float64), [n_head, n_head + n_head_kv], axis=1)
    assert_close(got, rotated(q, cos, sin) / np.sqrt(head_dim), 1e-5)
    arenas[0].assert_written(n_past, k if far else rotated(k, cos, sin))
    arenas[1].assert_written(n_past, v)


@given(cache=cache_names, first=st.integers(0, 5), n_rows=st.integers(0, 20), **sizes)
@settings(max_examples=80)
def test_rows_are_rotated_in_place(cache, first, n_rows, n_head_kv, head_dim, partly, seed):
    """Each row by its own table, and no other row; scratch is two rows."""
    rng, rope_dim = np.random.default_rng(seed), head_dim // 2 if partly else head_dim
    bench = Bench(config(n_head=n_head_kv, n_head_kv=n_head_kv, head_dim=head_dim, rope_dim=rope_dim), 1)
    arena = Arena(bench, rng, fitting_cache(cache, head_dim), first + n_rows + 3, slice(None))
    angle = rng.uniform(0, 6, (n_rows, rope_dim // 2))
    table = np.concatenate((np.cos(angle), np.sin(angle)), -1).astype(np.float32)
    want = rotated(arena.values()[first : first + n_rows], np.cos(angle)[:, None], np.sin(angle)[:, None])
    width = n_head_kv * head_dim
    scratch = np.full(2 * width + 1, -7, np.float32)
    row_bytes = arena.before.shape[1]
    native.repkv_rotate_rows(
        native_ffi.cast("char *", arena.tensor.contents.data + first * row_bytes), int(CACHES[arena.cache]), row_bytes,
        n_rows, n_head_kv, head_dim, native_ffi.cast("float *", table.ctypes.data), rope_dim,
        native_ffi.cast("float *", scratch.ctypes.data),
    )  # fmt: skip
    arena.assert_written(first, want)
    assert scratch[-1] == -7
