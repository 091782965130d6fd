"""A directory in which a session is kept as it goes: state in SQLite, blocks and open tokens in files beside it.

    lock          held by the process that uses the session
    session.db    tokens, blocks, checkpoints (docs/block_file.md)
    blocks.kv     evicted blocks
    window-N.kv   the tokens that no block holds; N changes when they are rewritten

A checkpoint names only bytes that are on disk already, so whatever kills the process, the newest one is whole.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import sqlite3
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import InputError, StoreError
from pyggml_repkv.memory.checkpoints import State
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.store.block_file import BlockFile, BlockHeader, checksum
from pyggml_repkv.memory.store.window_file import WindowFile

FORMAT = 3

ROPE_OF_FILE = "as in the file"
"""RoPE of a session whose keys are rotated as the model file says, as in all directories that do not say."""

_DAMAGED = (sqlite3.Error, ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""What reading a database that holds anything at all raises."""

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE tokens (
    first INTEGER PRIMARY KEY, ids BLOB NOT NULL, steps BLOB NOT NULL, checksum INTEGER NOT NULL);
CREATE TABLE blocks (
    block INTEGER PRIMARY KEY, first INTEGER NOT NULL, n_tokens INTEGER NOT NULL, offset INTEGER NOT NULL);
CREATE TABLE checkpoints (
    n_past INTEGER PRIMARY KEY, sealed_end INTEGER NOT NULL, n_blocks INTEGER NOT NULL, far_at INTEGER NOT NULL,
    window INTEGER NOT NULL, scores BLOB NOT NULL, warm BLOB NOT NULL, kept BLOB NOT NULL, logits BLOB,
    extra TEXT NOT NULL, checksum INTEGER NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A point from which a session can go on. logits: float32 [n_vocab] of the last token, if it was asked for them;
    window: number of the file with its open tokens; extra: what the caller wants to find again.
    """

    state: State
    window: int
    logits: NDArray[np.float32] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Commit:
    """What is new since the commit before: a checkpoint, the rows of tokens at rising `positions` for the window file,
    all tokens from first_token on with the sizes of the steps that read them, and (block, first, n_tokens, offset) of
    all blocks from first_block on. What the directory has from there on is forgotten.
    """

    checkpoint: Checkpoint
    positions: NDArray[np.int64]
    rows: NDArray[np.uint8]
    first_token: int
    tokens: NDArray[np.int32]
    steps: NDArray[np.int32]
    first_block: int
    blocks: list[tuple[int, int, int, int]]


def kept_settings(folder: Path) -> MemoryConfig:
    """What the session in a directory was made with, for any length. Raises InputError where none can be taken up."""
    try:
        with contextlib.closing(sqlite3.connect(folder / "session.db")) as db:
            meta = dict(db.execute("SELECT key, value FROM meta"))
            n_saves = db.execute("SELECT count(*) FROM checkpoints").fetchone()[0]
    except _DAMAGED as error:
        raise _unusable(f"{folder}", error) from None
    _check_format(meta, str(folder))
    if not n_saves:
        raise InputError(f"{folder}: there is no session: nothing was saved yet")
    try:
        settings = json.loads(meta.get("settings", "null"))
        return MemoryConfig.from_identity(settings)
    except (InputError, *_DAMAGED) as error:
        raise _unusable(f"{folder}", error) from None


def _unusable(where: str, error: Exception) -> InputError:
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return InputError(f"{where}: the disk is full; what was saved before is whole")
    return InputError(
        f"{where}: session.db cannot be used ({error}); check permissions and the disk, or move the directory away to "
        "start a new one"
    )


def _check_format(meta: dict[str, Any], where: str) -> None:
    found = meta.get("format")
    if found != str(FORMAT):
        raise InputError(f"{where}: its format is version {found}, this program reads version {FORMAT}")


class SessionStore:
    """Opens the directory or makes it.

    identity: what must be equal for the session to be of any use, by name: {"model": ..., "settings": {...}}.
    Raises InputError: in use, of another model, with other settings, of a newer format, or not usable at all.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        # Also where nobody closes it: the lock must not outlive the object.
        self._unlock = weakref.finalize(self, os.close, _take_lock(folder))
        self._db: sqlite3.Connection | None = None
        self._synced_window = -1
        try:
            self._db = self._open_db()
            self._check_identity(identity)
            self.blocks = BlockFile(folder, "blocks.kv")
        except BaseException:
            self.close()
            raise

    def _open_db(self) -> sqlite3.Connection:
        path = self.folder / "session.db"
        # It holds the user's text; SQLite makes the files beside it as open to others as this one.
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        try:
            # One thread at a time uses it: the one that opens, then the one that saves.
            db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
                db.executescript(f"BEGIN; {_SCHEMA} INSERT INTO meta VALUES ('format', '{FORMAT}'); COMMIT;")
        except sqlite3.Error as error:
            raise _unusable(f"--session {self.folder}", error) from None
        return db

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """The database; what is wrong with it becomes one line."""
        if self._db is None:
            raise InputError("the session is closed")
        try:
            yield self._db
        except _DAMAGED as error:
            raise _unusable(f"--session {self.folder}", error) from None

    def _check_identity(self, identity: dict[str, Any]) -> None:
        where = f"--session {self.folder}"
        with self._reading() as db:
            meta = dict(db.execute("SELECT key, value FROM meta"))
            _check_format(meta, where)
            if not db.execute("SELECT 1 FROM checkpoints LIMIT 1").fetchone():
                # Nothing depends on what was said before.
                values = [("format", str(FORMAT)), *((key, json.dumps(value)) for key, value in identity.items())]
                with _transaction(db):
                    db.execute("DELETE FROM meta")
                    db.executemany("INSERT INTO meta VALUES (?, ?)", values)
                return
            model, before = json.loads(meta["model"]), dict(json.loads(meta["settings"]))
        if model != identity["model"]:
            raise InputError(f"{where}: it was made with another model; give that one with -m, or another directory")
        now = json.loads(json.dumps(identity["settings"]))
        before.setdefault("--kv", "repkv")
        before.setdefault("RoPE", ROPE_OF_FILE)
        before.setdefault("stored keys", "with their bias")
        # A session stays what it was begun as.
        now.pop("far from the start", None)
        other = [f"{key} was {before.get(key)} and is {now[key]}" for key in now if before.get(key) != now[key]]
        if other:
            raise InputError(
                f"{where}: made with other settings ({', '.join(other)}); give those, or another directory"
            )

    def meta(self, key: str) -> Any:
        with self._reading() as db:
            row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
            return None if row is None else json.loads(row[0])

    def n_ring(self, needed: int) -> int:
        """How many open tokens the window file holds, as an earlier process found or this one finds that it needs."""
        with self._reading() as db:
            db.execute("INSERT OR IGNORE INTO meta VALUES ('n_ring', ?)", (json.dumps(needed),))
            found = self.meta("n_ring")
            if not _in_range(found, needed, 2**31):
                raise ValueError(f"its n_ring is {found!r}")
        return int(found)

    def tokens(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """All tokens, and the sizes of the steps that read them: int32."""
        ids, steps = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
        with self._reading() as db:
            for new_ids, new_steps, found in db.execute("SELECT ids, steps, checksum FROM tokens ORDER BY first"):
                if _checksum(new_ids, new_steps) != found:
                    raise ValueError("its tokens are damaged")
                ids.append(np.frombuffer(new_ids, np.int32))
                steps.append(np.frombuffer(new_steps, np.int32))
                if (steps[-1] < 1).any() or steps[-1].sum(dtype=np.int64) != len(ids[-1]):
                    raise ValueError("its steps are damaged")
        return np.concatenate(ids), np.concatenate(steps)

    def checkpoints(self) -> list[tuple[int, bool, dict[str, Any]]]:
        """(n_past, whether it has logits, extra), the newest first."""
        query = "SELECT n_past, logits IS NOT NULL, extra FROM checkpoints ORDER BY n_past DESC"
        with self._reading() as db:
            rows = [(n_past, bool(logits), json.loads(extra)) for n_past, logits, extra in db.execute(query)]
            if not all(_in_range(n_past, 1, 2**31) and isinstance(extra, dict) for n_past, _, extra in rows):
                raise ValueError("its checkpoints are damaged")
            return rows

    def load(self, n_past: int, n_layer: int) -> Checkpoint:
        """Raises StoreError where the checkpoint is damaged."""
        columns = "sealed_end, n_blocks, far_at, window, scores, warm, kept, logits, extra, checksum"
        with self._reading() as db:
            row = db.execute(f"SELECT {columns} FROM checkpoints WHERE n_past = ?", (n_past,)).fetchone()
            sealed_end, n_blocks, far_at, window, scores, warm, kept, logits, extra, found = row
            whole = _checksum(scores, warm, kept, logits) == found
            numbers = (sealed_end, 0, 2**31), (n_blocks, 0, 2**31), (far_at, -1, n_past), (window, 0, 2**31)
        if not whole or not all(_in_range(*number) for number in numbers):
            raise StoreError(f"{self.folder}: the checkpoint after token {n_past} is damaged")
        try:
            values = np.frombuffer(scores, np.float32).reshape(n_layer, -1)
            warm_blocks, selection = (np.frombuffer(blob, np.int32) for blob in (warm, kept))
            state = State(
                n_past, sealed_end, n_blocks, far_at, values, warm_blocks.reshape(n_layer, -1), selection
            )  # fmt: skip
            last = None if logits is None else np.frombuffer(logits, np.float32)
            return Checkpoint(state, window, last, json.loads(extra))
        except _DAMAGED as error:
            raise StoreError(f"{self.folder}: the checkpoint after token {n_past} is damaged ({error})") from None

    def headers(self, n_blocks: int, header_bytes: int) -> list[tuple[int, BlockHeader]]:
        """Offset and header of the first blocks. Raises StoreError where one is missing or damaged."""
        query = "SELECT block, first, n_tokens, offset FROM blocks WHERE block < ? ORDER BY block"
        with self._reading() as db:
            rows = db.execute(query, (n_blocks,)).fetchall()
        found = []
        for block, first, n_tokens, offset in rows:
            if not _in_range(offset, 0, 2**62):
                raise StoreError(f"{self.folder}: where block {block} lies is damaged")
            try:
                header = BlockHeader.unpack(self.blocks.read(offset, header_bytes))
            except StoreError as error:
                raise StoreError(f"{self.blocks.path}: block {block}: {error}") from None
            if (header.block, header.first_position, header.n_tokens) != (block, first, n_tokens):
                raise StoreError(f"{self.blocks.path}: block {block} is not where it should be")
            found.append((offset, header))
        if len(found) != n_blocks:
            raise StoreError(f"{self.folder}: only {len(found)} of {n_blocks} blocks are known")
        return found

    def window(self, number: int, entry_bytes: int, n_sink: int, n_ring: int) -> WindowFile:
        try:
            return WindowFile(
                self.folder / f"window-{number}.kv", entry_bytes=entry_bytes, n_sink=n_sink, n_ring=n_ring
            )
        except OSError as error:
            raise InputError(f"--session {self.folder}: window-{number}.kv: {error.strerror}") from None

    def open_blocks(self) -> BlockFile:
        """The file of blocks, for a memory that is still empty and will close it."""
        return BlockFile(self.folder, "blocks.kv")

    def commit(self, commit: Commit, window: WindowFile, spacing: int) -> None:
        """Once all blocks are written: makes everything durable, then names it. Raises StoreError.

        Checkpoints nearer than `spacing` to the one after them are dropped, but for those at the end of a prompt.
        """
        state, logits, number = commit.checkpoint.state, commit.checkpoint.logits, commit.checkpoint.window
        window.write(commit.positions, commit.rows)
        window.sync()
        self.blocks.sync()
        if number != self._synced_window:
            _sync_folder(self.folder)
            self._synced_window = number
        blobs = [a if a is None else a.tobytes() for a in (state.scores, state.warm, state.kept, logits)]
        tokens = commit.tokens.tobytes(), commit.steps.tobytes()
        point = state.n_past, state.sealed_end, state.n_blocks, state.far_at, number
        try:
            with self._reading() as db, _transaction(db):
                db.execute("DELETE FROM tokens WHERE first >= ?", (commit.first_token,))
                db.execute("DELETE FROM blocks WHERE block >= ?", (commit.first_block,))
                db.execute("DELETE FROM checkpoints WHERE n_past > ?", (commit.first_token,))
                if len(commit.tokens):
                    values = commit.first_token, *tokens, _checksum(*tokens)
                    db.execute("INSERT INTO tokens VALUES (?, ?, ?, ?)", values)
                db.executemany("INSERT INTO blocks VALUES (?, ?, ?, ?)", commit.blocks)
                extra = json.dumps(commit.checkpoint.extra)
                db.execute(
                    "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (*point, *blobs, extra, _checksum(*blobs)),
                )
                self._prune(db, commit.checkpoint, window, spacing)
        except InputError as error:
            raise StoreError(str(error), lost=False) from None
        for path in self.folder.glob("window-*.kv"):
            if path != window.path:
                path.unlink(missing_ok=True)

    def _prune(self, db: sqlite3.Connection, newest: Checkpoint, window: WindowFile, spacing: int) -> None:
        """Also drops checkpoints whose tokens the window no longer has."""
        first_kept = newest.state.n_past - window.n_ring
        db.execute("DELETE FROM checkpoints WHERE window <> ? OR sealed_end < ?", (newest.window, first_kept))
        following = newest.state.n_past
        for n_past, _, extra in self.checkpoints()[1:]:
            if following - n_past < spacing and n_past != extra.get("n_prompt"):
                db.execute("DELETE FROM checkpoints WHERE n_past = ?", (n_past,))
            else:
                following = n_past

    def close(self) -> None:
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._db = None
        if hasattr(self, "blocks"):
            self.blocks.close()
        self._unlock()


def _in_range(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise


def _checksum(*blobs: bytes | None) -> int:
    """Of bytes one after another, as SQLite's signed integer."""
    return int(np.uint64(checksum(b"".join(blob or b"" for blob in blobs))).astype(np.int64))


def _sync_folder(folder: Path) -> None:
    """The names of new files survive a power cut, too."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _take_lock(folder: Path) -> int:
    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InputError(f"--session {folder}: {error.strerror}; it must be a directory that can be written") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise InputError(f"--session {folder}: its file system has no locks ({error.strerror})") from None
        raise InputError(
            f"--session {folder}: another process uses it; wait for it, or give another directory"
        ) from None
    return lock


def common_prefix(a: Sequence[int] | NDArray[np.int32], b: Sequence[int] | NDArray[np.int32]) -> int:
    """How many of the first tokens are equal."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(differs[0]) if len(differs) else n
