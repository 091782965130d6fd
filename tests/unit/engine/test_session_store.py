"""Every fault of a session directory is one line, and loses nothing."""

import contextlib
import gc
import json
import os
import re
import sqlite3
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from pyggml_repkv.engine.model import Model
from pyggml_repkv.engine.session_store import _checksum, common_prefix
from pyggml_repkv.errors import InputError, StoreError
from pyggml_repkv.memory.config import MemoryConfig
from tests.subprocesses import ROOT

TOKENS = np.random.default_rng(5).integers(0, 280, 400).tolist()
MEMORY = MemoryConfig(
    kv="repkv", n_ctx=512, n_batch=48, n_sink=4, n_local=64, n_score=32, n_dense=0, block="fixed:16", budget=48,
    index="representatives:4", chunk_budget=48,
)  # fmt: skip


@pytest.fixture
def model(tiny_model):
    with Model.load(tiny_model(n_layer=2, n_ctx=512), threads=2, repack=False) as loaded:
        yield loaded


@pytest.fixture
def folder(model, tmp_path):
    """A session that has read 300 tokens."""
    path = tmp_path / "session"
    with model.session(MEMORY, directory=path) as session:
        session.prefill(TOKENS[:300])
    return path


def logits_after(model, n):
    with model.session(MEMORY) as session:
        session.prefill(TOKENS[:300])
        return np.array([session.decode(t) for t in TOKENS[300 : 300 + n]])


def goes_on(model, folder):
    with model.resume(folder, MEMORY) as session:
        assert session.n_past == 300
        return np.array([session.decode(t) for t in TOKENS[300:310]])


def test_it_goes_on_where_it_was(model, folder):
    assert np.array_equal(goes_on(model, folder), logits_after(model, 10))


def test_two_processes_cannot_use_it(model, folder):
    with model.resume(folder, MEMORY), pytest.raises(InputError, match="another process uses it"):
        model.resume(folder, MEMORY)
    goes_on(model, folder)


def test_the_lock_dies_with_its_process(model, folder):
    holder = (
        "import fcntl, os, sys, time\n"
        "fd = os.open(sys.argv[1] + '/lock', os.O_RDWR)\n"
        "fcntl.flock(fd, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", holder, str(folder)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another process"):
            model.resume(folder, MEMORY)
    finally:
        process.kill()
        process.wait()
    goes_on(model, folder)


def test_another_model_is_refused(folder, tiny_model):
    path = tiny_model(n_layer=2, n_ctx=512, seed=9)
    with Model.load(path, repack=False) as other, pytest.raises(InputError, match="made with another model"):
        other.resume(folder, MEMORY)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"n_local": 96}, "--n-local was 64 and is 96"),
        ({"type_k": "q8_0"}, "-ctk was f16 and is q8_0"),
        ({"block": "fixed:32"}, "--block was fixed:16 and is fixed:32"),
        ({"type_evicted": "q8_0"}, "--cache-type-evicted was as in RAM and is q8_0"),
    ],
)
def test_other_settings_are_refused_by_name(model, folder, changed, what):
    with pytest.raises(InputError, match=what):
        model.resume(folder, replace(MEMORY, **changed))
    goes_on(model, folder)


def test_what_only_costs_time_may_change(model, folder):
    with model.resume(folder, replace(MEMORY, kv_ram=10**7, n_ctx=400)) as session:
        assert session.n_past == 300


def change(folder, sql):
    with sqlite3.connect(folder / "session.db") as db:
        db.execute(sql)
    db.close()


@pytest.mark.parametrize("version", [2, 4])
def test_another_format_is_refused(model, folder, version):
    change(folder, f"UPDATE meta SET value = '{version}' WHERE key = 'format'")
    with pytest.raises(InputError, match=f"its format is version {version}, this program reads version 3"):
        model.resume(folder, MEMORY)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ("null", "no names and values"),
        ("[]", "no names and values"),
        ("{", "cannot be used"),
        ("{}", "-b is None"),
        ({"--block": 5}, "--block is 5"),
        ({"--block": "fixed:0"}, "fixed:0"),
        ({"--budget": 3.5}, "--budget is 3.5"),
        ({"--n-sink": True}, "--n-sink is True"),
        ({"--late": "x"}, "--late is 'x'"),
        ({"--sticky": "x"}, "--sticky is 'x'"),
        ({"--cache-type-evicted": "q4"}, "--cache-type-evicted is 'q4'"),
    ],
)
def test_settings_that_cannot_be_are_refused(model, folder, settings, why):
    with sqlite3.connect(folder / "session.db") as db:
        if isinstance(settings, dict):
            (value,) = db.execute("SELECT value FROM meta WHERE key = 'settings'").fetchone()
            settings = json.dumps({**json.loads(value), **settings})
        db.execute("UPDATE meta SET value = ? WHERE key = 'settings'", (settings,))
    db.close()
    with pytest.raises(InputError, match=re.escape(why)):
        model.resume(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: kept[:-1],  # another shape
        lambda kept: kept.tobytes()[:-3],
        lambda kept: np.where(np.arange(kept.size) == 0, 10**6, kept),  # too many
        lambda kept: np.where(np.arange(kept.size) == 0, -1, kept),
        lambda kept: np.where(np.arange(kept.size) == 0, kept - 1, kept),  # not as many in all layers
        lambda kept: np.where(np.arange(kept.size) == 1, -1, kept),  # no block
        lambda kept: np.where(np.arange(kept.size) == 1, 2**30, kept),
        lambda kept: np.where(np.arange(kept.size) == 2, 0, kept),
        lambda kept: np.concatenate((kept, kept)),
    ],
)
def test_an_impossible_selection_is_computed_again(model, tmp_path, caplog, damage):
    """Its checksum is right, so the C code would use it."""
    memory = replace(MEMORY, late=True)
    folder = tmp_path / "late"
    with model.session(memory, directory=folder) as session:
        session.prefill(TOKENS[:300])
        session.save()
        want = session.decode(TOKENS[300]).copy()
        session.stop_saving()
    with sqlite3.connect(folder / "session.db") as db:
        query = "SELECT n_past, scores, warm, kept, logits FROM checkpoints ORDER BY n_past DESC LIMIT 1"
        n_past, scores, warm, kept, logits = db.execute(query).fetchone()
        assert np.frombuffer(kept, np.int32)[0] == memory.budget // 16
        bad = damage(np.frombuffer(kept, np.int32))
        bad = bad if isinstance(bad, bytes) else bad.astype(np.int32).tobytes()
        values = bad, _checksum(scores, warm, bad, logits), n_past
        db.execute("UPDATE checkpoints SET kept = ?, checksum = ? WHERE n_past = ?", values)
    db.close()
    with model.resume(folder) as session:
        assert session.n_past == 300
        assert np.array_equal(session.decode(TOKENS[300]), want)
    assert "reading its 300 tokens again" in caplog.text


def test_a_damaged_database_is_refused(model, folder):
    (folder / "session.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(InputError, match=r"session.db cannot be used .* move the directory away"):
        model.resume(folder, MEMORY)


@pytest.mark.parametrize("what", ["missing", "empty", "cut", "header", "record"])
@pytest.mark.parametrize("name", ["blocks.kv", "window-0.kv"])
def test_what_is_lost_is_read_again(model, folder, caplog, name, what):
    path = folder / name
    data = bytearray(path.read_bytes())
    if what == "missing":
        path.unlink()
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        # Records follow the first header; in the window file every needed byte has a checksum.
        for at in range(20 if what == "header" else 9000, len(data), 5000):
            data[at] ^= 16
        path.write_bytes(data)
    assert np.array_equal(goes_on(model, folder), logits_after(model, 10))
    assert "reading its 300 tokens again" in caplog.text


FORGED = {
    "a token that is not there": ("tokens", "ids", np.array([10**6] * 48, np.int32).tobytes()),
    "a negative token": ("tokens", "ids", np.array([-1] * 48, np.int32).tobytes()),
    "a step of no token": ("tokens", "steps", np.array([0, 48], np.int32).tobytes()),
    "a step that is too long": ("tokens", "steps", np.array([10**6], np.int32).tobytes()),
    "steps of other tokens": ("tokens", "steps", np.array([47], np.int32).tobytes()),
    "half a token": ("tokens", "ids", b"abc"),
    "text for tokens": ("tokens", "ids", "abc"),
    "text for a position": ("checkpoints", "sealed_end", "abc"),
    "a position far away": ("checkpoints", "sealed_end", 2**40),
    "a negative position": ("checkpoints", "sealed_end", -5),
    "more blocks than there are": ("checkpoints", "n_blocks", 2**30),
    "fewer blocks than there are": ("checkpoints", "n_blocks", 1),
    "far positions from the future": ("checkpoints", "far_at", 2**30),
    "a window that is not there": ("checkpoints", "window", 5),
    "a number for a window that is none": ("checkpoints", "window", -1),
    "scores that are none": ("checkpoints", "scores", b"abcd"),
    "no scores": ("checkpoints", "scores", b""),
    "blocks worth reading that are none": ("checkpoints", "warm", np.array([2**30, -7] * 2, np.int32).tobytes()),
    "few logits": ("checkpoints", "logits", b"abcd"),
    "extra that is none": ("checkpoints", "extra", "[1]"),
    "extra that is no JSON": ("checkpoints", "extra", "{"),
    "a block before the file": ("blocks", "offset", -4096),
    "a block beyond every file": ("blocks", "offset", 2**63 - 1),
    "a block without tokens": ("blocks", "n_tokens", 0),
    "extra that is deep": ("checkpoints", "extra", "[" * 200000),
    "a model that is no JSON": ("meta", "model", "{"),
    "settings that are no JSON": ("meta", "settings", "{"),
    "settings that are none": ("meta", "settings", "[]"),
    "settings that are deep": ("meta", "settings", "[" * 200000),
    "a ring of nothing": ("meta", "n_ring", "0"),
    "a ring that is too large": ("meta", "n_ring", str(10**30)),
    "a ring that is text": ("meta", "n_ring", '"x"'),
}


@pytest.mark.parametrize(("table", "column", "value"), FORGED.values(), ids=FORGED.keys())
def test_a_forged_session_is_one_line_or_goes_on(model, folder, table, column, value):
    """Its checksums are right, as whoever can write a file can make them."""
    with contextlib.closing(sqlite3.connect(folder / "session.db")) as db:
        if table == "meta":
            db.execute("UPDATE meta SET value = ? WHERE key = ?", (value, column))
        else:
            db.execute(f"UPDATE {table} SET {column} = ?", (value,))
        sums = {"tokens": ("first", "ids, steps"), "checkpoints": ("n_past", "scores, warm, kept, logits")}
        key, blobs = sums.get(table, ("", ""))
        for row in db.execute(f"SELECT {key}, {blobs} FROM {table}").fetchall() if key else ():
            bits = [b.encode() if isinstance(b, str) else b for b in row[1:]]
            db.execute(f"UPDATE {table} SET checksum = ? WHERE {key} = ?", (_checksum(*bits), row[0]))
        db.commit()
    said = f"{folder}"
    try:
        logits = goes_on(model, folder)
    except InputError as error:
        said = str(error)
    else:
        assert np.array_equal(logits, logits_after(model, 10))
    assert str(folder) in said
    assert "\n" not in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_is_refused(model, folder):
    folder.chmod(0o500)
    with pytest.raises(InputError, match="must be a directory that can be written"):
        model.resume(folder, MEMORY)


def test_a_file_in_its_place_is_refused(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="must be a directory"):
        model.session(MEMORY, directory=tmp_path / "file")


@pytest.mark.parametrize(
    ("memory", "what"), [({"kv": "full"}, "--kv is full"), ({"kv_dir": "x"}, "leave out --kv-dir")]
)
def test_what_cannot_be_kept_is_refused(model, tmp_path, memory, what):
    with pytest.raises(InputError, match=what):
        model.session(replace(MEMORY, **memory), directory=tmp_path / "s")


def test_a_save_within_a_step_is_refused(model, folder):
    """Its tokens could not be read again in the same steps."""
    with contextlib.closing(sqlite3.connect(folder / "session.db")) as db:
        db.execute("DELETE FROM checkpoints WHERE n_past < 300")
        db.execute("UPDATE checkpoints SET n_past = 250")
        db.commit()
    with pytest.raises(InputError, match="no step ends at its token 250"):
        model.resume(folder, MEMORY)


def test_a_failed_save_is_said_and_the_one_before_stays(model, folder, monkeypatch):
    from pyggml_repkv.memory.store.window_file import WindowFile

    def full(self, positions, rows):
        raise StoreError("no space left", lost=False)

    with model.resume(folder, MEMORY) as session:
        monkeypatch.setattr(WindowFile, "write", full)
        session.read(TOKENS[300:340])
        with pytest.raises(StoreError, match="no space left"):
            session.save()
    monkeypatch.undo()
    assert np.array_equal(goes_on(model, folder), logits_after(model, 10))


def test_saving_needs_a_directory(model):
    with model.session(MEMORY) as session, pytest.raises(InputError, match="not kept anywhere"):
        session.save()


def test_a_full_disk_is_called_that_and_loses_no_earlier_save(model, tmp_path):
    path = tmp_path / "full"
    with model.session(MEMORY, directory=path) as session:
        session.prefill(TOKENS[:100])
        session.save()
        db = session._store._db
        n_pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {n_pages}")
        with pytest.raises(StoreError) as error:
            session.prefill(TOKENS[100:])
        assert str(error.value) == f"--session {path}: the disk is full; what was saved before is whole"
    with model.resume(path) as session:
        assert session.tokens[:100] == TOKENS[:100]


@pytest.mark.parametrize("n_prompt", [1, MEMORY.n_sink - 1, MEMORY.n_sink, MEMORY.n_sink + 1])
def test_a_session_within_its_sinks_is_whole(model, tmp_path, caplog, n_prompt):
    with model.session(MEMORY) as session:
        session.prefill(TOKENS[:n_prompt])
        wanted = session.prefill(TOKENS[n_prompt:300]).copy()
    with model.session(MEMORY, directory=tmp_path / "kept") as session:
        session.prefill(TOKENS[:n_prompt])
        session.save()
    with model.session(MEMORY, directory=tmp_path / "kept") as session:
        assert session.continue_text(TOKENS[:300]).begun.n_read == n_prompt
        assert np.array_equal(session.prefill(TOKENS[n_prompt:300]), wanted)
    assert caplog.messages == []


@pytest.mark.parametrize("made_before", [False, True])
def test_what_holds_the_user_s_text_is_the_user_s_alone(model, tmp_path, made_before):
    path, copy = tmp_path / "parent" / "session", tmp_path / "copy"
    before = os.umask(0o022)
    try:
        if made_before:
            path.mkdir(parents=True)
        with model.session(MEMORY, directory=path) as session:
            session.prefill(TOKENS[:300])
            session.save(copy)
            # SQLite's own files are there while it is open.
            modes = {file.name: file.stat().st_mode & 0o777 for folder in (path, copy) for file in folder.iterdir()}
    finally:
        os.umask(before)
    assert {"lock", "session.db", "session.db-wal", "blocks.kv", "window-0.kv"} <= modes.keys()
    assert set(modes.values()) == {0o600}
    assert path.stat().st_mode & 0o777 == (0o755 if made_before else 0o700)
    assert copy.stat().st_mode & 0o777 == 0o700


def test_a_checkpoint_stores_what_is_used(model, tmp_path):
    """Not a place for every slot of the largest context."""
    with model.session(replace(MEMORY, n_ctx=2**20), directory=tmp_path) as session:
        session.prefill(TOKENS[:5])
        session.save()
    with contextlib.closing(sqlite3.connect(tmp_path / "session.db")) as db:
        assert db.execute("SELECT length(warm) FROM checkpoints").fetchall() == [(0,)]


def test_blocks_that_were_in_ram_are_read_first(model, folder):
    with model.session(MEMORY, directory=folder) as session:
        state = session._keeper.store.load(300, 2).state
        assert 0 < state.warm.shape[1] <= state.n_blocks
        assert (state.warm >= 0).any()


@pytest.mark.parametrize(
    ("a", "b", "n"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 5, 3], 1), ([4], [5], 0)]
)
def test_common_prefix(a, b, n):
    assert common_prefix(a, b) == n


def test_a_session_that_is_opened_and_not_resumed_starts_again(model, folder):
    with model.session(MEMORY, directory=folder) as session:
        session.prefill(TOKENS[50:150])
    with model.resume(folder, MEMORY) as session:
        assert session.tokens == TOKENS[50:150]
        with pytest.raises(InputError, match="only before it reads"):
            session.go_back_to(None, lambda _: False)


def test_a_smaller_context_than_what_is_kept_is_refused(model, folder):
    with pytest.raises(InputError, match="has 300 tokens: give -c 300 or more"):
        model.resume(folder, replace(MEMORY, n_ctx=200))
    goes_on(model, folder)


def test_a_directory_without_a_session_is_not_made_into_one(model, tmp_path):
    with pytest.raises(InputError, match="there is no session"):
        model.resume(tmp_path / "nothing", MEMORY)
    assert not (tmp_path / "nothing").exists()


def test_an_empty_session_is_bound_to_nothing(model, tmp_path):
    with model.session(MEMORY, directory=tmp_path / "s"):
        pass
    with model.session(replace(MEMORY, n_local=96), directory=tmp_path / "s") as session:
        session.prefill(TOKENS[:100])


def test_a_memory_that_was_stopped_halfway_is_not_saved(model, folder, monkeypatch):
    from pyggml_repkv.errors import ComputeError
    from pyggml_repkv.memory.store.disk import DiskStore

    def interrupted(self, *args, **options):
        raise KeyboardInterrupt

    with model.resume(folder, MEMORY) as session:
        with monkeypatch.context() as patch:
            patch.setattr(DiskStore, "seal", interrupted)
            with pytest.raises(KeyboardInterrupt):
                session.read(TOKENS[300:400])
        with pytest.raises(ComputeError, match="not saved"):
            session.save()
        n_past = session.n_past
    with model.resume(folder, MEMORY) as session, model.session(MEMORY) as fresh:
        assert session.n_past == n_past
        fresh.prefill(TOKENS[:300])
        if n_past > 300:
            fresh.read(TOKENS[300:n_past])
        assert np.array_equal(session.decode(7), fresh.decode(7))


def test_after_a_failed_save_nothing_is_saved_any_more(model, folder, monkeypatch):
    from pyggml_repkv.memory.store.window_file import WindowFile

    write, calls = WindowFile.write, []

    def once_full(self, positions, rows):
        calls.append(1)
        if len(calls) == 1:
            raise StoreError("no space left", lost=False)
        write(self, positions, rows)

    monkeypatch.setattr(WindowFile, "write", once_full)
    with model.resume(folder, MEMORY) as session:
        session.read(TOKENS[300:340])
        for _ in range(3):
            with pytest.raises(StoreError, match="no space left"):
                session.save()
        assert len(calls) == 1
    assert np.array_equal(goes_on(model, folder), logits_after(model, 10))


def test_a_session_that_nobody_closes_gives_its_lock_back(model, folder):
    import gc

    for _ in range(20):
        # Its threads still read then, into memory that must outlive them.
        model.resume(folder, MEMORY).policy.disk.io.inject(delay_us=2000)
        gc.collect()
    goes_on(model, folder)


@pytest.mark.parametrize("page", range(1, 12))
def test_damage_inside_the_database_is_one_line_or_harmless(model, folder, page):
    path = folder / "session.db"
    data = bytearray(path.read_bytes())
    at = 4096 * page
    if at >= len(data):
        pytest.skip("the database is smaller")
    data[at : at + 4096] = bytes(b ^ 0x55 for b in data[at : at + 4096])
    path.write_bytes(data)
    try:
        got = goes_on(model, folder)
    except InputError as error:
        got = str(error)
    if isinstance(got, str):
        assert "session.db cannot be used" in got
        assert "\n" not in got
    else:
        assert np.array_equal(got, logits_after(model, 10))


def test_a_closed_session_gives_its_memory_back(model):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    gc.collect()
    gc.disable()
    try:
        before = resident()
        for _ in range(20):
            with model.session(replace(MEMORY, n_ctx=2**20, kv_ram=10**8)) as session:
                for arena in session.policy.store.k:
                    session.policy.arenas._memory[arena.contents.name.decode()].mapping.write(bytes(10**6))
        assert resident() - before < 20 * 10**6
    finally:
        gc.enable()


def test_the_disk_that_a_session_has_is_not_asked_for_again(model, folder):
    with model.resume(folder, MEMORY) as session:
        need = session.disk_need(300)
        assert need.total > 0
        assert need.more <= session.policy.disk.layout.block_bytes([16])


@pytest.mark.parametrize(
    "index",
    [
        {"index": "tokens:4"},
        {"index": "tokens:4", "type_evicted": "q8_0"},
        {"index": "tokens:2", "unit": "semantic:5-9"},
        {"index": "representatives:4"},
    ],
)
def test_an_index_is_made_anew_where_positions_became_far(tiny_model, tmp_path, index):
    """What blocks carry of it is from before their keys were turned back."""
    memory = replace(MEMORY, n_ctx=0, **index)
    with Model.load(tiny_model(n_layer=2, n_ctx=250, head_dim=32), threads=2, repack=False) as loaded:
        with loaded.session(memory, directory=tmp_path / "kept") as session:
            session.prefill(TOKENS[:200])
            for token in TOKENS[200:280]:
                session.decode(token)
            assert session.policy.rotation.far_at > 0
            session.save()
            with session.fork() as fork:
                want = [fork.decode(token).copy() for token in TOKENS[280:310]]
        with loaded.resume(tmp_path / "kept") as session:
            assert np.array_equal([session.decode(token).copy() for token in TOKENS[280:310]], want)
