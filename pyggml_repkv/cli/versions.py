"""`--version`: prints the versions that a bug report needs."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from pyggml_repkv import __version__
from pyggml_repkv.cli import output


def main() -> int:
    """Prints one line per component. Raises RepkvError after the other lines if ggml-python is not usable."""
    rows = {"pyggml_repkv": __version__, "python": platform.python_version(), "platform": platform.platform()}
    rows |= {name: _installed(name) for name in ("ggml-python", "numpy", "gguf", "tokenizers")}
    _print(rows)

    from pyggml_repkv.ffi import library

    _print({name: text for name, text in library.describe().items() if name not in rows})
    return 0


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _print(rows: dict[str, str]) -> None:
    output.write("".join(f"{name:<16} {text}\n" for name, text in rows.items()))
