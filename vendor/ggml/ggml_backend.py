"""The build backend of this project: builds the pinned ggml-python wheel, then calls setuptools.

pip cannot pass CMake flags to a dependency: a plain `ggml-python==0.0.45` would be compiled with other flags, or come
from pip's cache with other flags. So this backend builds that wheel first and names its file URL in the metadata of the
project's wheel, which is therefore as machine-specific as the file it names.
"""

from __future__ import annotations

import os
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist

from ggml_wheel import Pin, WheelError, ensure_wheel

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_sdist",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = Mapping[str, Any] | None

_wheel: Path | None = None


def requirements() -> list[str]:
    """Returns the runtime requirements for setup.py. An sdist names a version of ggml-python, a wheel a file."""
    table = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    pin = Pin.load()
    ggml = f"{pin.name}=={pin.version}" if _wheel is None else f"{pin.name} @ {_wheel.as_uri()}"
    return [ggml, *table["tool"]["pyggml-repkv"]["dependencies"]]


@contextmanager
def _pinned_ggml() -> Iterator[None]:
    """Provides the wheel, its headers for native/build.py, and a build folder outside the tree."""
    global _wheel
    try:
        _wheel = ensure_wheel()
    except WheelError as error:
        raise SystemExit(f"error: {error}") from None
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(_wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith("ggml/include/")])
        os.environ["GGML_INCLUDE_DIR"] = os.path.join(folder, "ggml", "include")
        # A permanent build folder would put deleted modules into the next wheel.
        config = Path(folder, "build.cfg")
        config.write_text(f"[build]\nbuild_base = {folder}/build\n", encoding="utf-8")
        os.environ["DIST_EXTRA_CONFIG"] = str(config)
        yield


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    with _pinned_ggml():
        return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Settings = None) -> str:
    with _pinned_ggml():
        return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    with _pinned_ggml():
        return build_meta.build_wheel(directory, config_settings, metadata_directory)


def build_editable(directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    with _pinned_ggml():
        return build_meta.build_editable(directory, config_settings, metadata_directory)
