"""The model that the flags of a command name (a file, a name, or a repository of the hub), and how it is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pyggml_repkv.cli import output, progress
from pyggml_repkv.cli.memory_flags import kind_of
from pyggml_repkv.engine.threads import default_threads
from pyggml_repkv.errors import InputError
from pyggml_repkv.model.rope_options import RopeOptions

if TYPE_CHECKING:
    from pyggml_repkv.engine.model import Model

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


def load_model(args: argparse.Namespace) -> Model:
    """Returns the model that the flags of `add_model_options` and `add_context_options` describe."""
    from pyggml_repkv.engine.model import Model

    return Model.load(
        model_path(args),
        threads=args.threads or default_threads(),
        repack=repacks(args, args.kv),
        exact_graph=args.exact_graph,
        normalize=False if getattr(args, "no_normalize", False) else None,
        rope=rope_options(args),
    )


def rope_options(args: argparse.Namespace) -> RopeOptions:
    """Returns what the flags of `add_rope_options` say."""
    return RopeOptions(args.rope_scaling, args.rope_scale, args.rope_freq_base, args.yarn_orig_ctx)


def repacks(args: argparse.Namespace, policy: str) -> bool:
    """Returns whether ggml repacks weights. Only ggml's own nodes can read repacked ones."""
    return not args.no_repack and "ggml" in kind_of(policy).forms
