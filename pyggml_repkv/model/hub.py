"""GGUF files of the Hugging Face hub, through its library, which knows cache, token, endpoint and offline mode."""

import errno
import hashlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pyggml_repkv.errors import InputError, RepkvError
from pyggml_repkv.model.disk_space import need_space
from pyggml_repkv.model.fetch import Progress
from pyggml_repkv.model.gguf_file import printable

log = logging.getLogger(__name__)

DEFAULT_QUANT = "Q4_K_M"

_SPEC = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", re.ASCII)
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE | re.DOTALL)
_QUANT = re.compile(r"(?<![a-z0-9])((?:I?Q|TQ)\d[a-z0-9_]*|MXFP4[a-z0-9_]*|BF16|F16|F32)(?=[.\-/])", re.IGNORECASE)
# Projectors of images and statistics for quantising: GGUF files that are no language model.
_NO_MODEL = ("mmproj", "imatrix")


@dataclass(frozen=True, slots=True)
class _RemoteFile:
    """sha256 is None for files that the hub keeps in git itself."""

    n_bytes: int
    sha256: str | None


def fetch_from_hub(spec: str, *, file: str | None = None, progress: Progress | None = None) -> Path:
    """Returns the path of a model in the hub's cache; what is missing is downloaded. Of a split one, the first part.

    spec: USER/REPO[:QUANT]; without QUANT, Q4_K_M or else the first GGUF file. file: this file of the repository.
    Raises InputError where spec or file name nothing, RepkvError where the hub refuses, fails or is not reached.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise _no_repository(spec)
    repo, quant = match[1], match[2]
    with _quiet_library():
        try:
            files = _files(repo)
        except Exception as error:
            return _from_cache(repo, quant, file, error)
        wanted = _with_parts(repo, _chosen(repo, files, quant, file), files)
        try:
            return _download(repo, wanted, files, progress)
        except RepkvError:
            raise
        except Exception as error:
            _refuse(repo, error)


def _files(repo: str) -> dict[str, _RemoteFile]:
    from huggingface_hub import HfApi, constants

    info = HfApi(endpoint=constants.ENDPOINT).model_info(
        repo, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
    )
    return {
        entry.rfilename: _RemoteFile(entry.size or 0, entry.lfs.sha256 if entry.lfs else None)
        for entry in info.siblings or ()
    }


def _chosen(repo: str, files: Mapping[str, Any], quant: str | None, file: str | None) -> str:
    """Returns the file that is asked for, of a split model any part. Raises InputError."""
    if file is not None:
        if quant is not None:
            raise InputError(f"{repo}:{quant} and the file '{printable(file, 200)}' both name a model: leave one out")
        if file in files:
            return file
        raise InputError(f"{repo} has no file '{printable(file, 200)}'; it has {_some(_models(files))}")
    models = _models(files)
    if not models:
        raise InputError(f"{repo} has no GGUF model; look for a repository whose name ends in -GGUF")
    found = next((name for name in models if _has_quant(quant or DEFAULT_QUANT, name)), None)
    if found is not None:
        return found
    if quant is not None:
        quants = dict.fromkeys(match[1].upper() for match in map(_QUANT.search, models) if match)
        raise InputError(f"{repo} has no {quant}; it has {_some(list(quants) or models)}")
    if len(models) > 1:
        log.warning("%s has no %s; taking %s", repo, DEFAULT_QUANT, printable(models[0], 200))
    return models[0]


def _has_quant(quant: str, name: str) -> bool:
    return re.search(rf"(?<![a-z0-9]){re.escape(quant)}(?=[.\-/])", name, re.IGNORECASE) is not None


def _models(files: Mapping[str, Any]) -> list[str]:
    """Returns the GGUF models among the files; of each split one, the first part."""
    names = [name for name in files if name.lower().endswith(".gguf") and not any(x in name.lower() for x in _NO_MODEL)]
    return [name for name in names if not (part := _PART.fullmatch(name)) or int(part[2]) == 1]


def _with_parts(repo: str, name: str, files: Mapping[str, Any]) -> list[str]:
    """Returns the file's name, or those of all parts of a split model. Raises RepkvError where one is not there."""
    part = _PART.fullmatch(name)
    names = [name]
    if part and int(part[3]):
        names = [f"{part[1]}-{n:05}-of-{part[3]}{name[-5:]}" for n in range(1, int(part[3]) + 1)]
    missing = [other for other in names if other not in files]
    if missing:
        what = f"{printable(name, 200)} is one of {len(names)} parts, and {printable(missing[0], 200)} is not there"
        raise RepkvError(f"{repo}: {what}")
    return names


def _download(repo: str, wanted: Sequence[str], files: Mapping[str, _RemoteFile], progress: Progress | None) -> Path:
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    cache = Path(constants.HF_HUB_CACHE)
    missing = sum(files[name].n_bytes for name in wanted if not isinstance(try_to_load_from_cache(repo, name), str))
    need_space(next(folder for folder in (cache, *cache.parents) if folder.is_dir()), missing, "HF_HOME")
    if missing:
        log.info("downloading %s of %s (%.0f MB)", printable(wanted[0], 200), repo, missing / 1e6)
    api, n_all, n_before, paths = HfApi(endpoint=constants.ENDPOINT), sum(files[name].n_bytes for name in wanted), 0, []
    for name in wanted:
        bar = _bar(progress, n_before, n_all)
        try:
            paths.append(Path(api.hf_hub_download(repo, name, tqdm_class=bar)))
        except KeyboardInterrupt:
            log.info("%s will be downloaded from its beginning when this is run again", printable(name, 200))
            raise
        if bar.n_seen:
            _check(paths[-1], files[name].sha256)
        n_before += files[name].n_bytes
    if len({path.parent for path in paths}) > 1:
        raise RepkvError(f"{repo} was changed while its parts were downloaded; run the command again")
    return paths[0]


def _bar(progress: Progress | None, n_before: int, n_all: int) -> Any:
    """Returns a class of progress bars that draws nothing and tells `progress` the bytes."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        n_seen = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            Bar.n_seen += int(n or 0)
            if progress is not None:
                progress(n_before + Bar.n_seen, n_all)

        def update_transfer(self, n: float) -> None:
            """The library makes a second bar for bytes on the wire if this is not here."""

    return Bar


def _check(path: Path, sha256: str | None) -> None:
    """Removes a fresh file that is not what the hub lists, and raises RepkvError."""
    with open(path, "rb") as file:
        if sha256 is None or hashlib.file_digest(file, "sha256").hexdigest() == sha256:
            return
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    raise RepkvError(f"{path.name}: what was downloaded is damaged, and was removed; run the command again")


def _from_cache(repo: str, quant: str | None, file: str | None, error: Exception) -> Path:
    """Returns the file in the cache where the hub cannot be asked. Raises as `_refuse`."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError) and error.response.status_code < 500 and error.response.status_code != 429:
        _refuse(repo, error)
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    try:
        snapshot = folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
        files = {path.relative_to(snapshot).as_posix(): path for path in sorted(snapshot.rglob("*")) if path.is_file()}
        wanted = _with_parts(repo, _chosen(repo, files, quant, file), files)
    except (OSError, ValueError, RepkvError):
        _refuse(repo, error)
    if isinstance(error, OfflineModeIsEnabled):
        if quant is None and file is None and not _has_quant(DEFAULT_QUANT, wanted[0]):
            log.warning("HF_HUB_OFFLINE is set; of %s the cache has %s", repo, printable(wanted[0], 200))
    else:
        log.warning(
            "the hub cannot be reached (%s); using %s from its cache", _reason(error), printable(wanted[0], 200)
        )
    return files[wanted[0]]


def _refuse(repo: str, error: Exception) -> NoReturn:
    """Raises the one-line error that `error` of the library means."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if isinstance(error, HFValidationError):
        raise _no_repository(repo) from None
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    token = "give a token (HF_TOKEN, or `hf auth login`)"
    if isinstance(error, GatedRepoError):
        raise RepkvError(f"{repo} is gated: accept its terms at {constants.ENDPOINT}/{repo}, and {token}") from None
    # To who gives no token, the hub answers the same for a private repository and for none.
    if isinstance(error, RepositoryNotFoundError) or (status == 401 and get_token() is None):
        raise InputError(f"the hub has no repository {repo}, or it is private: check the name, or {token}") from None
    if status in (401, 403):
        raise RepkvError(f"the hub refuses access to {repo} ({status}): check the token in HF_TOKEN") from None
    if status == 404:
        raise InputError(f"the hub has no repository {repo}: check the name") from None
    if status:
        raise RepkvError(f"{repo} cannot be downloaded: the hub answers {status}; try again later") from None
    if isinstance(error, OfflineModeIsEnabled):
        raise RepkvError(f"HF_HUB_OFFLINE is set, and the cache has no such model of {repo}") from None
    if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
        raise RepkvError(f"{constants.HF_HUB_CACHE}: {error.strerror}; HF_HOME chooses another folder") from None
    raise RepkvError(
        f"{repo} cannot be downloaded from {constants.ENDPOINT} ({_reason(error)}); check the network, or give a file"
    ) from None


def _no_repository(spec: str) -> InputError:
    return InputError(f"'{printable(spec, 200)}' is no repository of the hub; give USER/REPO or USER/REPO:QUANT")


def _reason(error: BaseException) -> str:
    """Returns the innermost cause on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return printable(" ".join(str(error).split()) or type(error).__name__, 200)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:20]) or "no GGUF model"
    return shown + (f" and {len(names) - 20} more" if len(names) > 20 else "")


@contextmanager
def _quiet_library() -> Iterator[None]:
    """The library's retries and hints would stand between the lines of the caller."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
