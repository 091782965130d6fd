"""`eval recall`: what selections of several indexes hold, as a table or as JSON."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from pyggml_repkv.cli import output, progress
from pyggml_repkv.cli.memory_flags import memory_config
from pyggml_repkv.errors import InputError
from pyggml_repkv.memory.config import MemoryConfig

if TYPE_CHECKING:
    from pyggml_repkv.engine.model import Model


def recall(args: argparse.Namespace, model: Model, policies: list[str], text: str | None) -> dict[str, Any]:
    """Prints the table; returns the object of --json. Raises InputError for what cannot be judged."""
    from pyggml_repkv.lab.eval.recall import json_tokens, run_recall, summary

    (length,) = args.lengths or [4096]
    indexes = list(dict.fromkeys((args.index or MemoryConfig().index).split(",")))
    args.index = indexes[0]
    memory = memory_config(args, args.ctx_size or length)
    if text is None:
        tokens = json_tokens(model, length, args.seed)
    else:
        tokens = model.tokenizer.encode(text)[:length]
        if len(tokens) < length:
            raise InputError(f"--lengths {length}: {args.text} has only {len(tokens)} tokens")
    with progress.lines("judged {} of {} layers") as tell, ExitStack() as reading:
        on_read = reading.enter_context(progress.of_prompt(args, len(tokens)))

        def on_layer(n_done: int, n_total: int) -> None:
            reading.close()
            if not args.quiet:
                tell(n_done, n_total)

        found = run_recall(model, memory, indexes, tokens, on_read, on_layer)
    shares = {kind: summary(each) for kind, each in found.items()}
    if not args.json:
        output.write(_table(len(tokens), shares))
    return {"task": "recall", "text": args.text, "n_tokens": len(tokens), **shares}


def _table(n_tokens: int, shares: dict[str, Any]) -> str:
    decode, chunk = shares["decode"], shares["chunk"]
    lines = [
        f"{n_tokens} tokens read; judged: {_judged(decode, 'single tokens')}, {_judged(chunk, 'of a chunk')}",
        f"{'':18s}  {'single tokens':25s}  chunk",
        f"{'index':18s}  {'hits':>5s}  {'mass':>5s}  {'worst layer':>11s}  {'hits':>5s}  {'mass':>5s}",
    ]
    for name, one in decode["indexes"].items():
        many, worst = chunk["indexes"][name], one["worst"]
        layer = "" if worst is None else f"{worst['hits']:.3f} ({worst['layer']})"
        lines.append(
            f"{name:18s}  {_share(one['hits'])}  {_share(one['mass'])}  {layer:>11s}  "
            f"{_share(many['hits'])}  {_share(many['mass'])}"
        )
    return "\n".join(lines) + "\n"


def _judged(steps: dict[str, Any], what: str) -> str:
    return f"{steps['n_queries']} {what} ({steps['n_sharp']} sharp cases)"


def _share(value: float | None) -> str:
    return "    -" if value is None else f"{value:.3f}"
