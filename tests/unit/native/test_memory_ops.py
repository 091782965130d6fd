"""Attention of bounded memories: sinks, row runs, remainder and window in one softmax, against plain numpy.

Cells that no query may attend hold NaN, and runs beyond the number of runs name a sink.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as QT
from hypothesis import given, settings
from hypothesis import strategies as st

from pyggml_repkv.ffi.context import Tensor
from pyggml_repkv.memory.bounded.rotation import Rotation
from pyggml_repkv.memory.centres import KeyCentres
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.model.rope import RopeTable, rope_params
from pyggml_repkv.ops.kernels import PANEL
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

    runs: (first cell, cells) of each, which is also its position: one row for all, or a row for each group of tokens
    and key head.
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

    def attended(self, row: int) -> list[int]:
        """Cells of the store that a row of the runs attends, in order."""
        runs = self.runs[row if len(self.runs) > 1 else 0]
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

    def store_positions(self) -> np.ndarray:
        cells = np.arange(self.n_store)
        return np.where(cells < self.n_sink + self.n_slots, cells, cells + self.store_base)


@st.composite
def steps(draw, n_rows: int, n_tokens: int) -> Step:
    """n_rows: of the runs."""
    n_sink, n_slots = draw(st.integers(0, 5)), draw(st.integers(0, 300))

    def run() -> tuple[int, int]:
        first = draw(st.integers(0, n_slots - 1))
        return n_sink + first, min(draw(st.sampled_from([1, 3, 16, 77, 128])), n_slots - first)

    runs = tuple(tuple(run() for _ in range(draw(st.integers(0, 6 if n_slots else 0)))) for _ in range(n_rows))
    n_remainder, n_window = draw(st.integers(0, 70)), draw(st.integers(0, 100))
    remainder = n_sink + n_slots + draw(st.integers(0, 300))
    base = remainder + n_remainder - draw(st.sampled_from([0, 1, 5]))
    n_spare = draw(st.sampled_from([0, n_window, n_window + 1, n_window + n_tokens + 3]))
    return Step(n_sink, n_slots, n_remainder, n_window, n_tokens, n_spare, remainder, max(0, base), runs)


class Arenas:
    """k and v of window and store, with values only in attended cells."""

    def __init__(
        self, bench: Bench, step: Step, caches: tuple[str, str], rng: np.random.Generator, n_own: int, centred: bool
    ) -> None:
        """n_own: how many tokens of the step are in the window's arenas; centred: whether keys lack a bias."""
        biases = rng.standard_normal((1, bench.config.n_embd_kv)).astype(np.float32) if centred else [None]
        self.rope = RopeTable(rope_params(bench.config), np.float64)
        memory = MemoryConfig(type_k="q8_0", positions="ordered")
        self.centres = KeyCentres(bench.config, memory, self.rope, biases, step.first + step.n_tokens)
        self.rotation = Rotation(bench.config, memory, self.rope, None)
        self.rotation.order_from(step.local, max(len(step.attended(row)) for row in range(len(step.runs))))
        names = [fitting_cache(name, bench.config.head_dim) for name in caches]
        window = slice(step.local - step.local_base, step.first + n_own - step.local_base)
        n_local = step.first + step.n_tokens - step.local_base + 2
        filled = sorted({cell for row in range(len(step.runs)) for cell in step.attended(row)})
        self.k_local, self.v_local = (Arena(bench, rng, name, n_local, window) for name in names)
        self.k_store, self.v_store = (Arena(bench, rng, name, step.n_store, filled) for name in names)
        self.step, self.window = step, range(window.start, step.first - step.local_base)

    def order(self, positions: str) -> Any:
        return self.rotation.order if positions == "ordered" else None

    def tables(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines, float64 [n, rope_dim / 2] each."""
        cosine, sine = np.split(self.rope(positions).T.astype(np.float64), 2, 1)
        return cosine, sine

    def keys(self, far: bool) -> tuple[np.ndarray, np.ndarray]:
        """Those of window and store that the arenas stand for; far: whether those of the store are before RoPE."""
        local, store, step = self.k_local.values(), self.k_store.values(), self.step
        local = self.centres.added(0, local, np.arange(len(local)) + step.local_base, rotated=True)
        return local, self.centres.added(0, store, step.store_positions(), rotated=not far)

    def attention(self, q_near: np.ndarray, q_far: np.ndarray, positions: str, share: int = 0) -> np.ndarray:
        """q [T, H, d], scaled -> heads [T, H, d]; every token sees itself, and what comes before it in the window.
        share: so many tokens share a row of the runs for each key head.
        """
        k_local, k_store = self.keys(positions != "exact")
        v_local, v_store = self.v_local.values(), self.v_store.values()
        out, n_head_kv = np.empty_like(q_near), k_local.shape[1]
        for t, h in np.ndindex(*out.shape[:2]):
            kv = h * n_head_kv // q_near.shape[1]
            far = self.step.attended((t // share if share else 0) * n_head_kv + kv)
            near = [*self.window, *range(self.window.stop, self.window.stop + t + 1)]
            k_far, q = k_store[far, kv], q_far[t, h]
            if positions == "ordered":
                compact = np.arange(self.step.local - len(far), self.step.local)
                k_far, q = rotated(k_far, *self.tables(compact)), q_near[t, h]
            s = np.concatenate((k_far @ q, k_local[near, kv] @ q_near[t, h]))
            p = np.exp(s - s.max())
            out[t, h] = p / p.sum() @ np.concatenate((v_store[far, kv], v_local[near, kv]))
        return out


sizes = {
    "group": st.integers(1, 4),
    "head_dim": st.sampled_from([16, 32, 48, 64, 80, 128]),
    "caches": st.tuples(cache_names, cache_names),
    "sharp": st.sampled_from([1.0, 8.0]),
    "centred": st.booleans(),
    "positions": st.sampled_from(["exact", "far", "ordered"]),
    "n_threads": st.integers(1, 6),
    "seed": st.integers(0, 999),
}


@given(
    data=st.data(), n_head_kv=st.integers(1, 3), share=st.sampled_from([None, 0, PANEL, 2 * PANEL]),
    n_tokens=st.integers(1, 110), **sizes,
)  # fmt: skip
@settings(max_examples=120)
def test_a_chunk_attends_all_regions_in_one_softmax(
    data, n_head_kv, share, n_tokens, positions, group, head_dim, caches, sharp, centred, n_threads, seed
):
    """share: tokens that share a row of the runs for each key head, 0: all; None: all key heads share one too."""
    n_groups = -(-n_tokens // share) if share else 1
    step = data.draw(steps(1 if share is None else n_groups * n_head_kv, n_tokens))
    rng, n_head = np.random.default_rng(seed), n_head_kv * group
    bench = Bench(config(n_head=n_head, n_head_kv=n_head_kv, head_dim=head_dim), n_threads)
    arenas = Arenas(bench, step, caches, rng, step.n_tokens, centred)
    q = sharp * rng.standard_normal((2, step.n_tokens, n_head, head_dim)) / np.sqrt(head_dim)
    near, older = (bench.tensor(packed(x.reshape(step.n_tokens, -1))) for x in q)
    node = bench.ops.centred(arenas.centres.of(0)).attend_memory(
        near, arenas.k_local.tensor, arenas.v_local.tensor, older, arenas.k_store.tensor, arenas.v_store.tensor,
        step.runs_tensor(bench), step.regions(bench, positions != "exact"), group=share or 0,
        order=arenas.order(positions),
    )  # fmt: skip
    got = bench.compute_packed(node, step.n_tokens).reshape(q[0].shape)
    assert_close(got, arenas.attention(*q, positions, share or 0), 2e-5 * sharp)


@given(
    data=st.data(), n_head_kv=st.integers(1, 3), per_head=st.booleans(), partly=st.booleans(),
    **sizes | {"group": st.integers(1, 9)},
)  # fmt: skip
@settings(max_examples=200)
def test_one_token_attends_all_regions_and_is_stored(
    data, n_head_kv, per_head, partly, positions, group, head_dim, caches, sharp, centred, n_threads, seed
):
    """The new token is attended as stored. partly: only half of each head is rotated."""
    step = data.draw(steps(n_head_kv if per_head else 1, 1))
    rng, n_head = np.random.default_rng(seed), n_head_kv * group
    rope_dim = head_dim // 2 if partly else head_dim
    bench = Bench(config(n_head=n_head, n_head_kv=n_head_kv, head_dim=head_dim, rope_dim=rope_dim), n_threads)
    arenas = Arenas(bench, step, caches, rng, 0, centred)
    qkv = rng.standard_normal((n_head + 2 * n_head_kv, head_dim)).astype(np.float32)
    qkv[:n_head] *= np.float32(sharp)
    far = positions != "exact"
    cosine, sine = arenas.tables(np.array([step.first, 77 if far else step.first]))
    rope = bench.tensor(np.concatenate((cosine, sine), -1).astype(np.float32))
    node = bench.ops.centred(arenas.centres.of(0)).attend_memory_one(
        bench.tensor(qkv.ravel()), arenas.k_local.tensor, arenas.v_local.tensor, arenas.k_store.tensor,
        arenas.v_store.tensor, rope, step.runs_tensor(bench), step.regions(bench, far), order=arenas.order(positions),
    )  # fmt: skip
    partials = bench.compute(node).astype(np.float64).reshape(n_threads, n_head, 2 + head_dim)

    q, k, v = np.split(qkv.astype(np.float64), [n_head, n_head + n_head_kv])
    k_stored = k - arenas.centres.added(0, np.zeros_like(k)[None], np.zeros(1, int), rotated=False)[0]
    k_near = rotated(k_stored, cosine[0], sine[0])
    cell, store_cell = step.first - step.local_base, step.first - step.store_base
    arenas.k_local.assert_written(cell, k_near[None])
    arenas.v_local.assert_written(cell, v[None])
    # Without far positions the store has the window's key, which was rounded once.
    arenas.k_store.assert_written(store_cell, k_stored[None] if far else k_near[None], n_roundings=1 if far else 2)
    arenas.v_store.assert_written(store_cell, v[None])

    near, older = (rotated(q, cosine[i], sine[i])[None] / np.sqrt(head_dim) for i in range(2))
    weights = np.exp(partials[..., 0] - partials[..., 0].max(0))
    summed = (weights[..., None] * partials[..., 1:]).sum(0)
    assert_close(summed[:, 1:] / summed[:, :1], arenas.attention(near, older, positions)[0], 2e-5 * sharp)


def test_sums_do_not_depend_on_where_runs_lie():
    """The same tokens at other rows of the store, in the same order: the same bits."""
    rng, partials = np.random.default_rng(0), []
    tokens = rng.standard_normal((2, 90, 2 * 64)).astype(np.float16)
    qkv = rng.standard_normal((6 + 2 * 2) * 64).astype(np.float32)
    for firsts in ([0, 16, 19, 20], [70, 3, 1, 100]):
        bench = Bench(config(n_head=6, n_head_kv=2, head_dim=64), 2)
        store, runs, done = np.zeros((2, 200, 2 * 64), np.float16), [4], 0
        for first, n in zip(firsts, [16, 3, 1, 70], strict=True):
            store[:, first : first + n] = tokens[:, done : done + n]
            runs += [first, n, done]
            done += n
        k_store, v_store, k_local, v_local = (
            bench.tensor(x, QT.F16) for x in (*store, *np.zeros((2, 1, 2 * 64), np.float16))
        )
        regions = bench.regions(first=500, n_tokens=1, remainder=500, local=500, local_base=500)
        rope = bench.tensor(np.ones((2, 64), np.float32))
        node = bench.ops.attend_memory_one(
            bench.tensor(qkv), k_local, v_local, k_store, v_store, rope, bench.integers(runs, runs), regions
        )
        partials.append(bench.compute(node))
    assert np.array_equal(*partials)
