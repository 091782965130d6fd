"""Asks for disk space before a large file is written."""

import shutil
from pathlib import Path

from pyggml_repkv.errors import RepkvError
from pyggml_repkv.model.gguf_header import printable


def need_space(folder: Path, n_bytes: int, chosen_by: str = "") -> None:
    """Raises RepkvError where the folder's file system has less than `n_bytes` free.

    chosen_by: the variable that sets the folder.
    """
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        other = f", or choose another folder by {chosen_by}" if chosen_by else ""
        raise RepkvError(
            f"{printable(folder, 400)}: {n_bytes / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free; "
            f"make room{other}"
        )
