"""The model that the flags of a command name: a file, a name, or a repository of the hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from pyggml_repkv.cli import output, progress
from pyggml_repkv.errors import InputError

DEFAULT_MODEL = "demo"


def model_path(args: argparse.Namespace) -> Path:
    """Returns the file that the flags of `add_model_options` name; what is missing is fetched. Raises RepkvError."""
    if args.model is not None and args.hf_repo is not None:
        raise InputError("-m and -hf both name a model: leave one out")
    if args.hf_file is not None and args.hf_repo is None:
        raise InputError("-hff names a file of a repository: give that with -hf")
    # Only `run` has -q; elsewhere `quiet` says that results are read by programs, which read stdout.
    with progress.downloads(quiet=getattr(args, "command", None) == "run" and args.quiet) as move:
        if args.hf_repo is not None:
            from pyggml_repkv.model.hub import fetch_from_hub

            return fetch_from_hub(args.hf_repo, file=args.hf_file, progress=move)
        from pyggml_repkv.model.names import find_model

        path = find_model(DEFAULT_MODEL if args.model is None else args.model, move)
    if args.model is None and not args.quiet:
        output.say(f"no -m given, using the demo model {path}")
    return path
