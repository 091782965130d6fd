"""Attention of bounded memories: sinks, row runs, remainder and window in one softmax, against plain numpy.

Cells that no query may attend hold NaN, and runs beyond the number of runs name a sink.
"""

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pyggml_repkv.ffi.context import Tensor
from tests.unit.native.arenas import Arena, cache_names, fitting_cache
from tests.unit.native.op_bench import Bench, assert_close, config, packed, rotated


@given(
    n_rows=st.integers(1, 4), n_top=st.integers(0, 20), n_blocks=st.integers(1, 40), n_threads=st.integers(1, 5),
    seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=60)
def test_blocks_are_located(n_rows, n_top, n_blocks, n_threads, seed):
    """Each block is its own run, in the given order, even if two lie side by side."""
    rng = np.random.default_rng(seed)
    n_cells = rng.integers(1, 200, n_blocks)
    places = np.stack((np.cumsum(n_cells) - n_cells, n_cells, rng.integers(0, 1000, n_blocks)), 1)
    blocks = rng.integers(0, n_blocks, (n_rows, 1 + n_top))
    blocks[:, 0] = rng.integers(0, n_top + 1, n_rows)
    bench = Bench(config(), n_threads)
    node = bench.ops.locate(bench.integers(*blocks), bench.integers(*places))
    runs = bench.compute(node).view(np.int32).reshape(n_rows, 1 + 3 * n_top)
    for row, (n, *named) in zip(runs.tolist(), blocks.tolist(), strict=True):
        assert row[0] == n
        assert row[1 : 1 + 3 * n] == [value for block in named[:n] for value in places[block]]


@dataclass(frozen=True)
class Step:
    """Cells of the store are [sinks | slots, where the runs lie | remainder | n_spare, for the window and the step].

    runs: (first cell, cells) of each, a row for each key head or one for all.
    """

    n_sink: int
    n_slots: int
    n_remainder: int
    n_window: int
    n_tokens: int
    n_spare: int
    remainder: int
    local_base: int
    runs: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def local(self) -> int:
        return self.remainder + self.n_remainder

    @property
    def first(self) -> int:
        return self.local + self.n_window

    @property
    def store_base(self) -> int:
        return self.remainder - self.n_sink - self.n_slots

    @property
    def n_store(self) -> int:
        return max(1, self.n_sink + self.n_slots + self.n_remainder + self.n_spare)

    def attended(self, kv: int) -> list[int]:
        """Cells of the store that a key head attends, in order."""
        runs = self.runs[kv % len(self.runs)]
        cells = [c for first, n in runs for c in range(first, first + n)]
        at = self.n_sink + self.n_slots
        return [*range(self.n_sink), *cells, *range(at, at + self.n_remainder)]

    def regions(self, bench: Bench, far: bool) -> Tensor:
        return bench.regions(
            first=self.first, n_tokens=self.n_tokens, sink_end=self.n_sink, remainder=self.remainder,
            local=self.local, local_base=self.local_base, far=far, store_base=self.store_base,
        )  # fmt: skip

    def runs_tensor(self, bench: Bench) -> Tensor:
        rows = np.zeros((len(self.runs), 1 + 3 * (max(len(runs) for runs in self.runs) + 1)), np.int32)
        rows[:, 1:] = [0, 1, 0] * (rows.shape[1] // 3)
        for row, runs in zip(rows, self.runs, strict=True):
            row[0] = len(runs)
            row[1 : 1 + 3 * len(runs)] = np.ravel([(first, n, first) for first, n in runs])
        return bench.integers(*rows)


@st.composite
def steps(draw, n_rows: int, most_tokens: int) -> Step:
    """n_rows: of the runs."""
    n_sink, n_slots = draw(st.integers(0, 5)), draw(st.integers(0, 150))

    def run() -> tuple[int, int]:
        first = draw(st.integers(0, n_slots - 1))
        return n_sink + first, draw(st.integers(1, min(80, n_slots - first)))

    runs = tuple(tuple(run() for _ in range(draw(st.integers(0, 4 if n_slots else 0)))) for _ in range(n_rows))
    n_remainder, n_window = draw(st.integers(0, 70)), draw(st.integers(0, 100))
    remainder = n_sink + n_slots + draw(st.integers(0, 300))
    base = remainder + n_remainder - draw(st.sampled_from([0, 1, 5]))
    n_tokens = draw(st.integers(1, most_tokens))
    n_spare = draw(st.sampled_from([0, n_window, n_window + 1, n_window + n_tokens + 3]))
    return Step(n_sink, n_slots, n_remainder, n_window, n_tokens, n_spare, remainder, max(0, base), runs)


class Arenas:
    """k and v of window and store, with values only in attended cells."""

    def __init__(self, bench: Bench, step: Step, caches: tuple[str, str], rng: np.random.Generator, n_own: int) -> None:
        """n_own: how many tokens of the step are in the window's arenas."""
        names = [fitting_cache(name, bench.config.head_dim) for name in caches]
        window = slice(step.local - step.local_base, step.first + n_own - step.local_base)
        n_local = step.first + step.n_tokens - step.local_base + 2
        filled = sorted({cell for kv in range(len(step.runs)) for cell in step.attended(kv)})
        self.k_local, self.v_local = (Arena(bench, rng, name, n_local, window) for name in names)
        self.k_store, self.v_store = (Arena(bench, rng, name, step.n_store, filled) for name in names)
        self.step, self.window = step, range(window.start, step.first - step.local_base)

    def attention(self, q_near: np.ndarray, q_far: np.ndarray) -> np.ndarray:
        """q [T, H, d], scaled -> heads [T, H, d]; every token sees itself, and what comes before it in the window."""
        arenas = (self.k_local, self.v_local, self.k_store, self.v_store)
        k_local, v_local, k_store, v_store = (arena.values() for arena in arenas)
        out, group = np.empty_like(q_near), q_near.shape[1] // k_local.shape[1]
        for t, h in np.ndindex(*out.shape[:2]):
            kv = h // group
            far, near = self.step.attended(kv), [*self.window, *range(self.window.stop, self.window.stop + t + 1)]
            s = np.concatenate((k_store[far, kv] @ q_far[t, h], k_local[near, kv] @ q_near[t, h]))
            p = np.exp(s - s.max())
            out[t, h] = p / p.sum() @ np.concatenate((v_store[far, kv], v_local[near, kv]))
        return out


sizes = {
    "group": st.integers(1, 4),
    "head_dim": st.sampled_from([16, 32, 48, 64, 80, 128]),
    "caches": st.tuples(cache_names, cache_names),
    "sharp": st.sampled_from([1.0, 8.0]),
    "n_threads": st.integers(1, 6),
    "seed": st.integers(0, 999),
}
# Key heads, and rows of runs: one for each of them, or one for all.
heads = st.sampled_from([(1, 1), (2, 1), (3, 1), (2, 2), (3, 3)])


@given(data=st.data(), heads=heads, **sizes)
@settings(max_examples=80)
def test_a_chunk_attends_all_regions_in_one_softmax(data, heads, group, head_dim, caches, sharp, n_threads, seed):
    n_head_kv, n_rows = heads
    step = data.draw(steps(n_rows, 70))
    rng, n_head = np.random.default_rng(seed), n_head_kv * group
    bench = Bench(config(n_head=n_head, n_head_kv=n_head_kv, head_dim=head_dim), n_threads)
    arenas = Arenas(bench, step, caches, rng, step.n_tokens)
    q = sharp * rng.standard_normal((2, step.n_tokens, n_head, head_dim)) / np.sqrt(head_dim)
    near, far = (bench.tensor(packed(x.reshape(step.n_tokens, -1))) for x in q)
    node = bench.ops.attend_memory(
        near, arenas.k_local.tensor, arenas.v_local.tensor, far, arenas.k_store.tensor, arenas.v_store.tensor,
        step.runs_tensor(bench), step.regions(bench, False),
    )  # fmt: skip
    got = bench.compute_packed(node, step.n_tokens).reshape(q[0].shape)
    assert_close(got, arenas.attention(*q), 2e-5 * sharp)


@given(data=st.data(), heads=heads, far=st.booleans(), partly=st.booleans(), **sizes)
@settings(max_examples=120)
def test_one_token_attends_all_regions_and_is_stored(
    data, heads, far, partly, group, head_dim, caches, sharp, n_threads, seed
):
    """The new token is attended as stored. partly: only half of each head is rotated."""
    n_head_kv, n_rows = heads
    step = data.draw(steps(n_rows, 1))
    rng, n_head = np.random.default_rng(seed), n_head_kv * group
    rope_dim = head_dim // 2 if partly else head_dim
    bench = Bench(config(n_head=n_head, n_head_kv=n_head_kv, head_dim=head_dim, rope_dim=rope_dim), n_threads)
    arenas = Arenas(bench, step, caches, rng, 0)
    qkv = rng.standard_normal((n_head + 2 * n_head_kv, head_dim)).astype(np.float32)
    qkv[:n_head] *= np.float32(sharp)
    angle = rng.uniform(0, 6, (2, rope_dim // 2))
    angle[1] = angle[1] if far else angle[0]
    rope = bench.tensor(np.concatenate((np.cos(angle), np.sin(angle)), -1).astype(np.float32))
    node = bench.ops.attend_memory_one(
        bench.tensor(qkv.ravel()), arenas.k_local.tensor, arenas.v_local.tensor, arenas.k_store.tensor,
        arenas.v_store.tensor, rope, step.runs_tensor(bench), step.regions(bench, far),
    )  # fmt: skip
    partials = bench.compute(node).astype(np.float64).reshape(n_threads, n_head, 2 + head_dim)

    q, k, v = np.split(qkv.astype(np.float64), [n_head, n_head + n_head_kv])
    k_near = rotated(k, np.cos(angle[0]), np.sin(angle[0]))
    cell, store_cell = step.first - step.local_base, step.first - step.store_base
    arenas.k_local.assert_written(cell, k_near[None])
    arenas.v_local.assert_written(cell, v[None])
    # Without far positions the store has the window's key, which was rounded once.
    arenas.k_store.assert_written(store_cell, k[None] if far else k_near[None], n_roundings=1 if far else 2)
    arenas.v_store.assert_written(store_cell, v[None])

    near, older = (rotated(q, np.cos(a), np.sin(a))[None] / np.sqrt(head_dim) for a in angle)
    weights = np.exp(partials[..., 0] - partials[..., 0].max(0))
    summed = (weights[..., None] * partials[..., 1:]).sum(0)
    assert_close(summed[:, 1:] / summed[:, :1], arenas.attention(near, older)[0], 2e-5 * sharp)
