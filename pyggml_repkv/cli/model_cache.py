"""`model list`, `model fetch` and `model rm`: the models that have a name, and those of them that are here."""

from __future__ import annotations

import argparse
import json
from typing import Any

from pyggml_repkv.cli import output, progress
from pyggml_repkv.cli.parser import HelpFormatter
from pyggml_repkv.errors import InputError


def add_tasks(tasks: argparse._SubParsersAction[Any]) -> None:
    """Adds the three tasks to `model`."""
    about = "the models that can be had by name, and which of them are here"
    parser = tasks.add_parser(
        "list", usage="%(prog)s [--json]", help=about, description=f"Shows {about}.", formatter_class=HelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object (docs/model_info.md has the keys)")
    for task, about in (
        ("fetch", "download a model, or go on where that was interrupted; prints its path"),
        ("rm", "remove a model, and what an interrupted download has left"),
    ):
        parser = tasks.add_parser(
            task, usage="%(prog)s NAME", help=about, description=f"{about.capitalize()}.", formatter_class=HelpFormatter
        )
        parser.add_argument("name", metavar="NAME", help="a name that `model list` shows")


def main(args: argparse.Namespace) -> int:
    """Runs one of the tasks and returns its exit code. Raises RepkvError."""
    return {"list": _list, "fetch": _fetch, "rm": _remove}[args.task](args)


def _list(args: argparse.Namespace) -> int:
    from pyggml_repkv.lab.inspect.table import as_table
    from pyggml_repkv.model.catalogue import CATALOGUE
    from pyggml_repkv.model.fetch import cache_folder, cached, n_parts_kept
    from pyggml_repkv.model.gguf_header import printable

    found: list[dict[str, Any]] = [
        {
            "name": model.name,
            "about": model.about,
            "bytes": model.n_bytes,
            "download_bytes": model.download_bytes,
            "path": None if (path := cached(model)) is None else str(path),
            "parts": len(model.parts),
            "parts_kept": n_parts_kept(model),
        }
        for model in CATALOGUE.values()
    ]
    if args.json:
        output.write(json.dumps({"folder": str(cache_folder()), "models": found}) + "\n")
        return 0
    rows = [(one["name"], f"{one['bytes'] / 1e6:,.0f} MB", _state(one), one["about"]) for one in found]
    output.write(as_table(("name", "size", "here", "what"), rows, frozenset(("name", "here", "what"))))
    output.write(f"in {printable(cache_folder(), 400)}\n")
    return 0


def _state(model: dict[str, Any]) -> str:
    if model["path"] is not None:
        return "yes"
    return f"{model['parts_kept']} of {model['parts']} parts" if model["parts_kept"] else "no"


def _fetch(args: argparse.Namespace) -> int:
    from pyggml_repkv.model.fetch import fetch
    from pyggml_repkv.model.names import known_model

    model = known_model(args.name)
    with progress.downloads(quiet=False) as move:
        path = fetch(model, move)
    output.write(f"{path}\n")
    return 0


def _remove(args: argparse.Namespace) -> int:
    from pyggml_repkv.model.fetch import remove
    from pyggml_repkv.model.names import known_model

    model = known_model(args.name)
    with progress.downloads(quiet=False):
        if not remove(model):
            raise InputError(f"{model.name} is not here: there is nothing to remove")
    return 0
