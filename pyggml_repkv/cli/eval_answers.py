"""The tasks of `eval` that ask questions: the answers with every policy, of which --out has some already."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pyggml_repkv.cli import output, progress
from pyggml_repkv.cli.memory_flags import kind_of, memory_config
from pyggml_repkv.errors import InputError
from pyggml_repkv.lab.eval import retrieval_tasks, ruler_tasks

if TYPE_CHECKING:
    from pyggml_repkv.engine.model import Model
    from pyggml_repkv.lab.eval.results_file import ResultsFile
    from pyggml_repkv.lab.eval.retrieval import RetrievalResult
    from pyggml_repkv.lab.eval.ruler import RulerResult
    from pyggml_repkv.memory.config import MemoryConfig

Result = dict[str, Any]
T = TypeVar("T")

# Tokens of context kept for the answer.
ROOM = 64


def memories(args: argparse.Namespace, policies: Sequence[str], n_ctx: int) -> Iterator[tuple[str, MemoryConfig]]:
    """Yields each policy and its memory. n_ctx: the context without -c."""
    for name in policies:
        args.kv = name
        yield name, memory_config(args, args.ctx_size or n_ctx)


def retrieval(args: argparse.Namespace, model: Model, policies: Sequence[str], text: str | None) -> Result:
    """Prints answers as they come; returns the object of --json. Raises InputError for what cannot be asked."""
    from pyggml_repkv.lab.eval.retrieval import RetrievalResult, questions, run_retrieval, summary

    results: list[RetrievalResult] = []
    with _results_file(args) as file:
        for length in args.lengths or [4096]:
            asked = questions([length], args.depths)
            # Each length has its own context, so that its results do not depend on the other lengths.
            for _, memory in memories(args, policies, length + ROOM):
                settings = _settings(args, model, memory, args.task, retrieval_tasks.VERSION, text)
                run = partial(run_retrieval, model, memory, args.task, seed=args.seed, text=text, progress=_told(args))
                for result, note in _answers(args, file, RetrievalResult, settings, asked, run):
                    results.append(result)
                    if not args.json:
                        output.write(_line(result, note))
    done = summary(results)
    if not args.json:
        for kv, by_length in done["found"].items():
            for n_tokens, (n_found, n) in by_length.items():
                output.write(f"{kv}  {n_tokens} tokens: {n_found} of {n} found\n")
    return done


def _line(result: RetrievalResult, note: str) -> str:
    found = "found" if result.found else "LOST "
    own_ms = result.prompt_ms - result.shared_ms / result.n_shared
    return (
        f"{result.kv}  {result.n_tokens:7d} tokens  depth {result.depth:.2f}  {found}  "
        f"{1e3 * result.n_tokens / max(result.shared_ms + own_ms, 1e-9):7.1f} tokens/s, read once for "
        f"{result.n_shared}  {result.decode_ms:6.2f} ms/token{note}\n"
    )


def ruler(args: argparse.Namespace, model: Model, policies: Sequence[str], text: str | None) -> Result:
    """Prints scores as they come, then the table; returns the object of --json. Raises as `retrieval` does."""
    from pyggml_repkv.lab.eval.ruler import RulerResult, Sample, run_ruler, summary, table

    results: list[RulerResult] = []
    with _results_file(args) as file:
        for task, length in ((task, length) for task in args.tasks for length in args.lengths or [4096]):
            source = text if ruler_tasks.TASKS[task].needs_text else None
            asked = [Sample(length, i) for i in range(args.samples)]
            for _, memory in memories(args, policies, length):
                settings = _settings(args, model, memory, task, ruler_tasks.VERSION, source)
                run = partial(run_ruler, model, memory, task, seed=args.seed, text=source, progress=_told(args))
                for result, note in _answers(args, file, RulerResult, settings, asked, run):
                    results.append(result)
                    if not args.json:
                        output.write(_score_line(result, note))
    done = summary(results)
    if not args.json:
        output.write(table(done))
    return done


def _score_line(result: RulerResult, note: str) -> str:
    return (
        f"{result.kv}  {result.n_tokens:7d} tokens  {result.task}  sample {result.sample}  "
        f"{100 * result.score:5.1f}{note}\n"
    )


def _results_file(args: argparse.Namespace) -> Any:
    from pyggml_repkv.lab.eval.results_file import ResultsFile

    return ResultsFile(args.out) if args.out else nullcontext()


def _told(args: argparse.Namespace) -> Callable[[int], Any]:
    return partial(progress.of_prompt, args)


def _answers(
    args: argparse.Namespace,
    file: ResultsFile | None,
    kind: type[T],
    settings: dict[str, Any],
    asked: Sequence[Any],
    run: Callable[[list[Any]], Iterator[T]],
) -> Iterator[tuple[T, str]]:
    """Yields each result, and a note where the file had it. run: yields the results of those that it has not."""
    from pyggml_repkv.lab.eval.results_file import restored

    keys = [{**settings, "asked": asdict(each)} for each in asked]
    found = [None if file is None else file.get(key) for key in keys]
    try:
        known = [None if result is None else restored(kind, result) for result in found]
    except (TypeError, ValueError):
        raise InputError(f"--out {args.out} holds results of another version: give another file") from None
    new = run([each for each, result in zip(asked, known, strict=True) if result is None])
    for key, result in zip(keys, known, strict=True):
        if result is not None:
            yield result, f"  (from {args.out})"
            continue
        answer = next(new)
        if file is not None:
            file.add(key, asdict(answer))  # type: ignore[call-overload]
        yield answer, ""


def _settings(
    args: argparse.Namespace, model: Model, memory: MemoryConfig, task: str, version: int, text: str | None
) -> dict[str, Any]:
    """Returns all that answers depend on, beside which question it is."""
    from pyggml_repkv.engine.session_store import ROPE_OF_FILE

    ignored = kind_of(memory.kv).ignores
    return {
        "task": task,
        "version": version,
        "model": model.fingerprint,
        "exact_graph": args.exact_graph,
        # Results from before there were such flags stay good.
        **({"rope": model.rope} if model.rope != ROPE_OF_FILE else {}),
        "memory": {k: v for k, v in asdict(memory).items() if k not in ignored},
        "policy_file": _policy_file(memory.kv),
        "seed": args.seed,
        "text": _digest(text.encode()) if text is not None else None,
    }


def _policy_file(kv: str) -> str | None:
    """Returns a digest of the file in `--kv FILE.py`, or None for a built-in policy."""
    if not kv.endswith(".py"):
        return None
    try:
        return _digest(Path(kv).read_bytes())
    except OSError as error:
        raise InputError(f"--kv {kv}: {error.strerror}") from None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
