"""The slots of a block store, under any order of puts, requirements and reads ahead, and under faults."""

import errno
import os

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pyggml_repkv.errors import StoreError
from pyggml_repkv.ffi.library import native
from pyggml_repkv.memory.store.block_file import BlockHeader, checksum
from tests.stores import MAX_BLOCKS, MAX_TOKENS, MAX_UNITS, N_LAYER, StoreBench

DECAY, MAX_UNIT = 0.9, 10


@given(st.binary(max_size=300), st.integers(0, 40))
def test_the_checksum_is_xxh64(data, skip):
    # From any alignment.
    data = data * 3
    assert checksum(bytearray(data)[skip:]) == xxhash.xxh64_intdigest(data[skip:])


@st.composite
def cuts(draw):
    """Where the units of a block end: at least one, at most MAX_UNITS, of any sizes up to MAX_UNIT."""
    sizes = draw(st.lists(st.integers(1, MAX_UNIT), min_size=1, max_size=MAX_UNITS))
    ends = np.cumsum(sizes)
    return ends[ends <= MAX_TOKENS].tolist()


class StoreMachine(RuleBasedStateMachine):
    """Compares the store with a plain model that decays every score at every call. It reads nothing ahead."""

    folder: object

    @initialize(
        n_slots=st.integers(1, 6), n_lanes=st.integers(1, 2), n_threads=st.integers(0, 3), seed=st.integers(0, 99)
    )
    def start(self, n_slots, n_lanes, n_threads, seed):
        self.bench = StoreBench(
            self.folder, n_slots=n_slots, n_threads=n_threads, n_lanes=n_lanes, max_unit=MAX_UNIT
        )  # fmt: skip
        self.rng = np.random.default_rng(seed)
        self.where, self.score, self.last = (
            {(layer, lane): {} for layer in range(N_LAYER) for lane in range(n_lanes)} for _ in range(3)
        )
        self.now = [0] * N_LAYER

    def teardown(self):
        if hasattr(self, "bench"):
            self.bench.close()

    @precondition(lambda self: len(self.bench.blocks) < MAX_BLOCKS)
    @rule(ends=cuts())
    def put(self, ends):
        self.bench.put(ends[-1], self.rng, ends)

    @precondition(lambda self: self.bench.blocks)
    @rule(data=st.data(), layer=st.integers(0, N_LAYER - 1), n_groups=st.integers(1, 3))
    def require(self, data, layer, n_groups):
        """Each lane wants other units; groups of queries want some of those that their lane can hold."""
        n, n_lanes = len(self.bench.units), self.bench.n_lanes
        units = st.lists(st.integers(max(0, n - 20), n - 1), max_size=self.bench.n_slots, unique=True)
        at_most = [data.draw(units) for _ in range(n_lanes)]
        parts = [st.lists(st.sampled_from(at), unique=True) if at else st.just([]) for at in at_most]
        rows = [data.draw(parts[r % n_lanes]) for r in range(n_groups * n_lanes)]
        wanted = [{unit for row in rows[lane::n_lanes] for unit in row} for lane in range(n_lanes)]
        self.now[layer] += 1
        before = [self.before(layer, lane, wanted[lane]) for lane in range(n_lanes)]

        self.bench.store.require(layer, *rows)

        for lane in range(n_lanes):
            self.after(layer, lane, wanted[lane], *before[lane])

    def before(self, layer, lane, wanted):
        """-> units that must be read, how many free slots there are for them, and what may give way."""
        where, score = self.where[layer, lane], self.score[layer, lane]
        for unit in score:
            score[unit] *= DECAY
        missing = [unit for unit in wanted if unit not in where]
        return missing, self.bench.n_slots - len(where), [unit for unit in where if unit not in wanted]

    def after(self, layer, lane, wanted, missing, n_free, idle):
        where, score, last = (of[layer, lane] for of in (self.where, self.score, self.last))
        resident = self.bench.store.resident(layer)[lane].tolist()
        victims = [unit for unit in where if resident[where[unit]] != unit]
        assert len(victims) == max(0, len(missing) - n_free)
        for victim in victims:
            assert victim not in wanted
            for survivor in set(idle) - set(victims):
                # If two scores differ by rounding only, either unit may go.
                assert score[victim] <= score[survivor] * (1 + 1e-9)
        for victim in victims:
            del where[victim], score[victim], last[victim]
        for unit in missing:
            where[unit], score[unit] = resident.index(unit), 0.0
        for unit in wanted:
            score[unit] += 1
            last[unit] = self.now[layer]
            assert_attended(self.bench, layer, unit, lane)

    @precondition(lambda self: self.bench.blocks)
    @rule(data=st.data(), layer=st.integers(0, N_LAYER - 1), flush=st.booleans())
    def read(self, data, layer, flush):
        """Reads from a staging buffer, or from disk."""
        if flush:
            self.bench.store.flush()
        block = data.draw(st.integers(0, len(self.bench.blocks) - 1))
        want = self.bench.blocks[block][layer]
        for got, rows in zip(self.bench.store.read(layer, block, len(want[0])), want, strict=True):
            assert np.array_equal(got, rows)

    @invariant()
    def every_slot_holds_what_it_should(self):
        if hasattr(self, "bench"):
            for (layer, lane), where in self.where.items():
                resident = self.bench.store.resident(layer)[lane].tolist()
                assert {b: i for i, b in enumerate(resident) if b >= 0} == where


def assert_attended(bench, layer, unit, lane=0):
    for got, want in zip(bench.attended(layer, unit, lane), bench.stored(layer, unit, lane), strict=True):
        assert np.array_equal(got, want)


def test_slots_hold_the_units_that_were_required(tmp_path):
    machine = type("Machine", (StoreMachine,), {"folder": tmp_path})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=30, deadline=None))


@given(
    data=st.data(), seed=st.integers(0, 999), n_lanes=st.integers(1, 2), delay=st.sampled_from([0, 0, 300]),
    reorder=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_what_is_fetched_ahead_changes_nothing_but_time(data, seed, n_lanes, delay, reorder, tmp_path_factory):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("store")
    options = {"n_slots": 6, "n_lanes": n_lanes, "max_unit": MAX_UNIT, "n_threads": data.draw(st.integers(1, 4))}
    with StoreBench(folder, **options) as bench:
        bench.store.inject(delay_us=delay, reorder=reorder, seed=seed)
        for _ in range(10):
            ends = data.draw(cuts())
            bench.put(ends[-1], rng, ends)

        def some(low, high):
            return [rng.permutation(len(bench.units))[: rng.integers(low, high)].tolist() for _ in range(n_lanes)]

        for _ in range(15):
            layer = int(rng.integers(N_LAYER))
            for other in range(N_LAYER):
                bench.store.prefetch(other, *some(0, 9))
            wanted = some(1, 5)
            bench.store.require(layer, *wanted)
            for lane, units in enumerate(wanted):
                for unit in units:
                    assert_attended(bench, layer, unit, lane)
        stats = bench.store.stats
        assert stats.required == stats.hits + stats.late + stats.missed
        assert stats.used <= stats.issued
        assert stats.written_bytes <= bench.store.n_bytes


@pytest.mark.parametrize("kind", ["READ", "SHORT", "CHECKSUM"])
@pytest.mark.parametrize("nth", range(1, 9))
def test_a_read_that_fails_once_is_tried_again(tmp_path, kind, nth):
    rng = np.random.default_rng(1)
    with StoreBench(tmp_path, n_slots=2, n_threads=1) as bench:
        for _ in range(4):
            bench.put(10, rng)
        bench.store.flush()
        bench.store.inject(read_at=nth, read_kind=getattr(native, f"REPKV_IO_{kind}"), error=errno.EIO)
        for block in (0, 1, 2, 3):
            for layer in range(N_LAYER):
                bench.store.require(layer, [block])
                for got, want in zip(bench.attended(layer, block), bench.blocks[block][layer], strict=True):
                    assert np.array_equal(got, want)
        assert bench.store.stats.retries == 1


@pytest.mark.parametrize(
    ("kind", "reason"), [("READ", "Input/output error"), ("SHORT", "ends"), ("CHECKSUM", "checksum")]
)
@pytest.mark.parametrize("ahead", [False, True])
def test_a_read_that_keeps_failing_is_one_clear_line(tmp_path, kind, reason, ahead):
    rng = np.random.default_rng(1)
    with StoreBench(tmp_path, n_slots=2) as bench:
        for _ in range(4):
            bench.put(10, rng)
        bench.store.flush()
        bench.store.inject(read_at=1, keep=1, read_kind=getattr(native, f"REPKV_IO_{kind}"), error=errno.EIO)
        if ahead:
            bench.store.prefetch(1, [3])
        with pytest.raises(StoreError, match=f"block 3 of layer 1 could not be read: .*{reason}") as raised:
            bench.store.require(1, [3])
        assert raised.value.lost
        assert "\n" not in str(raised.value)


def test_a_failed_prefetch_is_no_error(tmp_path):
    rng = np.random.default_rng(1)
    with StoreBench(tmp_path, n_slots=2, n_threads=1) as bench:
        for _ in range(2):
            bench.put(10, rng)
        bench.store.flush()
        bench.store.inject(read_at=1, keep=1, read_kind=native.REPKV_IO_READ, error=errno.EIO)
        bench.store.prefetch(0, [1])
        while bench.store.stats.retries < 2:
            pass
        bench.store.inject()
        bench.store.require(0, [1])
        assert np.array_equal(bench.attended(0, 1)[0], bench.blocks[1][0][0])


def put_many(bench, rng):
    for _ in range(40):
        bench.put(10, rng)


@pytest.mark.parametrize("nth", [1, 2, 5])
def test_a_failed_write_is_said_by_the_next_call_and_loses_nothing(tmp_path, nth):
    rng = np.random.default_rng(1)
    with StoreBench(tmp_path, n_slots=3) as bench:
        bench.store.inject(write_at=nth, keep=1, error=errno.ENOSPC)
        reason = f"block {nth - 1} could not be written: No space left"
        with pytest.raises(StoreError, match=reason) as raised:
            put_many(bench, rng)
        assert not raised.value.lost
        with pytest.raises(StoreError, match="could not be written"):
            bench.store.flush()
        # The blocks that could not be written are still in their staging buffers.
        for block in range(min(3, len(bench.blocks))):
            bench.store.require(0, [block])
            assert np.array_equal(bench.attended(0, block)[0], bench.blocks[block][0][0])


def test_a_short_write_goes_on(tmp_path):
    rng = np.random.default_rng(1)
    with StoreBench(tmp_path) as bench:
        bench.store.inject(write_at=1, keep=1, error=0)
        for _ in range(5):
            bench.put(20, rng)
        bench.store.flush()
        bench.store.inject()
        for block in range(5):
            assert np.array_equal(bench.store.read(1, block, 20)[1], bench.blocks[block][1][1])


@pytest.mark.parametrize("file_type", ["q8_0", "f32"])
def test_another_type_on_disk_rounds_once(tmp_path, file_type):
    """A block from a staging buffer has the same values as one from disk."""
    rng = np.random.default_rng(1)
    with StoreBench(tmp_path, file_types=(file_type, file_type)) as bench:
        bench.put(16, rng)
        early = [rows.copy() for rows in bench.store.read(0, 0, 16)]
        bench.store.flush()
        late = bench.store.read(0, 0, 16)
        for a, b, given_rows in zip(early, late, bench.blocks[0][0], strict=True):
            assert np.array_equal(a, b)
            got, want = (x.view(np.float16).astype(np.float32) for x in (a, given_rows))
            assert np.allclose(got, want, atol=0 if file_type == "f32" else np.abs(want).max() / 127)


def test_damage_in_the_file_is_noticed(tmp_path):
    rng = np.random.default_rng(1)
    with StoreBench(tmp_path, name="blocks.kv") as bench:
        for _ in range(3):
            bench.put(12, rng)
        bench.store.flush()
        offset = bench.store.offsets[1] + bench.layout.header_bytes + 100
        with open(tmp_path / "blocks.kv", "r+b", buffering=0) as file:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 4]))
        bench.file.sync()
        bench.store.read(0, 0, 12)
        bench.store.read(1, 1, 12)
        with pytest.raises(StoreError, match="block 1 of layer 0 could not be read: its checksum is wrong"):
            bench.store.read(0, 1, 12)


def test_a_truncated_file_is_noticed(tmp_path):
    rng = np.random.default_rng(1)
    with StoreBench(tmp_path, name="blocks.kv") as bench:
        for _ in range(3):
            bench.put(12, rng)
        bench.store.flush()
        os.truncate(tmp_path / "blocks.kv", bench.store.offsets[2])
        bench.store.read(0, 1, 12)
        with pytest.raises(StoreError, match="block 2 of layer 0 could not be read: the file ends"):
            bench.store.read(0, 2, 12)


@st.composite
def headers(draw):
    sizes = draw(st.lists(st.integers(1, 4096), min_size=1, max_size=8))
    shape = len(sizes), *draw(st.tuples(st.integers(1, 4), st.integers(1, 2)))
    sums = draw(st.lists(st.integers(0, 2**64 - 1), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    return BlockHeader(
        block=draw(st.integers(0, 2**31 - 1)),
        first_position=draw(st.integers(0, 2**40)),
        unit_ends=tuple(np.cumsum(sizes).tolist()),
        rotated=draw(st.booleans()),
        types=draw(st.tuples(st.integers(0, 40), st.integers(0, 40))),
        row_bytes=draw(st.tuples(st.integers(1, 2**20), st.integers(1, 2**20))),
        checksums=np.array(sums, np.uint64).reshape(shape),
        extra=draw(st.binary(max_size=500)),
    )


@given(header=headers(), at=st.integers(0, 4095), bit=st.integers(0, 7))
def test_a_header_comes_back_or_is_refused(header, at, bit):
    data = header.pack(4096)
    again = BlockHeader.unpack(data)
    assert again.pack(4096) == data
    assert (again.extra, again.first_position) == (header.extra, header.first_position)
    assert again.unit_ends == header.unit_ends
    assert np.array_equal(again.checksums, header.checksums)
    damaged = bytearray(data)
    damaged[at] ^= 1 << bit
    with pytest.raises(StoreError):
        BlockHeader.unpack(bytes(damaged))
    with pytest.raises(StoreError):
        BlockHeader.unpack(data[:-1])


def test_a_put_that_was_interrupted_leaves_nothing_to_wait_for(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)

    def interrupted(self, n_bytes):
        raise KeyboardInterrupt

    with StoreBench(tmp_path) as bench:
        bench.put(10, rng)
        with monkeypatch.context() as patch:
            patch.setattr(BlockHeader, "pack", interrupted)
            for _ in range(20):
                with pytest.raises(KeyboardInterrupt):
                    bench.put(10, rng)
        bench.store.flush()
        bench.position = 10
        bench.put(12, rng)
        bench.store.flush()
        assert np.array_equal(bench.store.read(0, 1, 12)[0], bench.blocks[1][0][0])


def test_a_failed_read_after_a_failed_write_is_said_too(tmp_path):
    rng = np.random.default_rng(1)
    with StoreBench(tmp_path, n_slots=2) as bench:
        for _ in range(3):
            bench.put(10, rng)
        bench.store.flush()
        bench.store.inject(write_at=4, read_at=1, keep=1, error=errno.EIO, read_kind=native.REPKV_IO_READ)
        bench.put(10, rng)
        with pytest.raises(StoreError, match="block 3 could not be written") as raised:
            bench.store.flush()
        assert not raised.value.lost
        with pytest.raises(StoreError, match="block 1 of layer 0 could not be read") as raised:
            bench.store.require(0, [1])
        assert raised.value.lost
