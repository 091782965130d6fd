"""From what a user calls a model to its file: a path, a name of the catalogue, or a repository of the hub."""

import difflib
import os
from pathlib import Path

from pyggml_repkv.errors import InputError
from pyggml_repkv.model.catalogue import CATALOGUE, KnownModel
from pyggml_repkv.model.fetch import Progress, fetch
from pyggml_repkv.model.gguf_file import printable

HUB_PREFIX = "hf:"


def find_model(name: str | os.PathLike[str], progress: Progress | None = None) -> Path:
    """Returns the path of a model; one that has a name, or is on the hub, is fetched first if it is not in the cache.

    name: a file, if it has a path separator or ends in .gguf; otherwise a name of `CATALOGUE` if there is such a one,
    else a file. "hf:USER/REPO[:QUANT]" is a repository of the hub. progress: told of what is downloaded.
    Raises InputError for what is neither, RepkvError where fetching fails.
    """
    text = os.fspath(name)
    if not isinstance(name, str) or not isinstance(text, str):
        return Path(os.fsdecode(text))
    if text.startswith(HUB_PREFIX):
        from pyggml_repkv.model.hub import fetch_from_hub

        return fetch_from_hub(text.removeprefix(HUB_PREFIX), progress=progress)
    path = Path(text)
    if text and text not in CATALOGUE and (path.name != text or text.lower().endswith(".gguf") or os.path.exists(text)):
        return path
    return fetch(known_model(text), progress)


def known_model(name: str) -> KnownModel:
    """Returns the model of the catalogue that has this name. Raises InputError."""
    if name in CATALOGUE:
        return CATALOGUE[name]
    near = difflib.get_close_matches(name.lower(), CATALOGUE, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"the names are {', '.join(CATALOGUE)}"
    raise InputError(f"there is no file and no model named '{printable(name, 400)}'; {remedy}")
