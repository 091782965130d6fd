"""`eval`: measures what a KV memory retrieves, and how well it predicts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pyggml_repkv.cli import output, report
from pyggml_repkv.cli.eval_answers import Result, memories, retrieval, ruler
from pyggml_repkv.cli.eval_recall import recall
from pyggml_repkv.cli.memory_flags import check_memory_flags, kind_of
from pyggml_repkv.cli.model_file import load_model
from pyggml_repkv.cli.options import MAX_SEED, add_context_options, add_memory_options, add_model_options
from pyggml_repkv.cli.parser import HelpFormatter, filled_text, integer
from pyggml_repkv.cli.prompt import read_text_file
from pyggml_repkv.errors import InputError
from pyggml_repkv.lab.eval.retrieval_tasks import MAX_DEPTHS
from pyggml_repkv.lab.eval.retrieval_tasks import TASKS as RETRIEVAL
from pyggml_repkv.lab.eval.ruler_tasks import TASKS as RULER

if TYPE_CHECKING:
    from pyggml_repkv.engine.model import Model

MAX_LENGTH = 2**20

TASKS = {
    **{name: task.what for name, task in RETRIEVAL.items()},
    "ruler": "RULER's synthetic tasks, scored in percent",
    "recall": "how much of the attention to older tokens each --index finds, on your text or the JSON of kv",
    "perplexity": "how well your text is predicted: llama-perplexity's number, or by position with --lengths",
    "fidelity": "how far the next-token distribution is from that of --kv full, by position, on your text",
}

# Tasks that ask questions.
ASKING = (*RETRIEVAL, "ruler")

# Flags that some tasks have: their values if they are not given, and the tasks.
_TASK_FLAGS: dict[str, tuple[Any, Collection[str]]] = {
    "depths": (5, RETRIEVAL),
    "seed": (1, (*ASKING, "recall")),
    "out": (None, ASKING),
    "png": (None, RETRIEVAL),
    "tasks": ([*RULER], ("ruler",)),
    "samples": (10, ("ruler",)),
    "stretch": (2048, ("perplexity", "fidelity")),
}
NEED_TEXT = ("perplexity", "fidelity", *(name for name, task in RETRIEVAL.items() if task.needs_text))
EXAMPLES = """
examples:
  %(prog)s passkey --lengths 4096,16384 --depths 10 --kv full,window,repkv --png keys.png
  %(prog)s niah --lengths 6000 --depths 5 --text book.txt --kv repkv --out niah.jsonl
  %(prog)s ruler --lengths 8192,16384 --samples 10 --text book.txt --kv full,repkv --out ruler.jsonl
  %(prog)s perplexity --text book.txt -c 2048
  %(prog)s perplexity --text book.txt --lengths 32768 --kv window,repkv
  %(prog)s fidelity --text book.txt --lengths 8192 --kv repkv --n-dense 0
  %(prog)s recall --text book.txt --lengths 8000 --kv repkv --index tokens:4,tokens:2,representatives:4
"""


def build_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds `eval` and its options."""
    parser = subparsers.add_parser(
        "eval",
        usage="%(prog)s TASK [options]",
        description="Measures what a KV memory retrieves and predicts.\n\ntasks:\n"
        + "\n".join(f"  {name:11s}{what}" for name, what in TASKS.items()),
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("task", choices=tuple(TASKS), metavar="TASK", help=", ".join(TASKS))
    group = parser.add_argument_group("task")
    group.add_argument(
        "--lengths",
        metavar="N,...",
        type=_integers(256, MAX_LENGTH),
        help="prompt lengths in tokens (default: 4096); recall, perplexity, fidelity: tokens of the text to read",
    )
    group.add_argument(
        "--depths",
        metavar="N",
        type=integer(1, MAX_DEPTHS),
        help="retrieval: number of evenly spaced depths, all in one text (default: 5)",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=integer(0, MAX_SEED),
        help="retrieval, ruler, recall without --text: seed of the keys (default: 1)",
    )
    group.add_argument(
        "--text",
        metavar="FILE",
        type=filled_text,
        help=f"the haystack (default: the usual filler), or the text; {', '.join(NEED_TEXT)} need it",
    )
    group.add_argument(
        "--tasks",
        metavar="NAME,...",
        type=_ruler_tasks,
        help=f"ruler: {', '.join(RULER)} (default: all)",
    )
    group.add_argument(
        "--samples", metavar="N", type=integer(1, 1000), help="ruler: questions of each task (default: 10)"
    )
    group.add_argument(
        "--stretch",
        metavar="N",
        type=integer(64, MAX_LENGTH),
        help="perplexity, fidelity: average over N tokens, in whole chunks of -b (default: 2048)",
    )
    group.add_argument(
        "--out", metavar="FILE", type=filled_text, help="retrieval, ruler: append results to FILE as JSON lines"
    )
    group.add_argument("--png", metavar="FILE", type=filled_text, help="retrieval: write a picture, length by depth")
    group.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    add_model_options(parser)
    add_context_options(parser, several=True)
    add_memory_options(parser)


def main(args: argparse.Namespace) -> int:
    """Prints results as they come, then a summary; returns the exit code. Raises RepkvError."""
    text = read_text_file(args.text, "--text") if args.text is not None else None
    if args.task in NEED_TEXT and text is None:
        raise InputError(f"{args.task} needs a text: --text FILE")
    if text is not None and not text.strip():
        raise InputError(f"--text {args.text} is empty")
    _set_task_flags(args)
    if args.task == "ruler" and text is None:
        _check_needs_no_text(args.tasks)
    policies: list[str] = args.kv
    if args.task not in ASKING and len(args.lengths or ()) > 1:
        lengths = ",".join(map(str, args.lengths))
        raise InputError(f"{args.task} reads the text once: give one of --lengths {lengths}")
    if args.task == "recall" and policies != ["repkv"]:
        raise InputError(f"recall judges the indexes of --kv repkv; --kv is {','.join(policies)}")
    if args.task == "fidelity" and "full" in policies:
        raise InputError("fidelity compares with --kv full: leave it out of --kv, and name others")
    check_memory_flags(args, policies)
    args.quiet = args.json
    if args.png:
        from pyggml_repkv.lab.eval.heat_map import check_can_draw

        check_can_draw(args.png)
    # Weights stay as in the file if a policy needs them so. Questions always have them so: the answers of `full` must
    # not depend on the other policies of --kv.
    args.no_repack = args.no_repack or args.task in ASKING
    args.kv = next((kv for kv in policies if "ggml" not in kind_of(kv).forms), policies[0])
    tasks = {"recall": recall, "perplexity": _perplexity, "fidelity": _fidelity, "ruler": ruler}
    with load_model(args) as model:
        done = tasks.get(args.task, retrieval)(args, model, policies, text)
    if args.json:
        output.write(json.dumps({**done, "peak_rss_bytes": report.peak_rss_bytes()}) + "\n")
    if args.png:
        from pyggml_repkv.lab.eval.heat_map import draw_heat_map
        from pyggml_repkv.lab.eval.retrieval import RetrievalResult

        draw_heat_map(args.png, [RetrievalResult(**result) for result in done["results"]])
    return 0


def _check_needs_no_text(tasks: list[str]) -> None:
    needing = [task for task in tasks if RULER[task].needs_text]
    if needing:
        rest = ",".join(task for task in tasks if task not in needing) or "vt"
        raise InputError(f"{', '.join(needing)} of ruler need a text: --text FILE, or leave them out: --tasks {rest}")


def _set_task_flags(args: argparse.Namespace) -> None:
    """Sets those that were not given. Raises InputError for one that the task has no use for."""
    for name, (default, tasks) in _TASK_FLAGS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.task not in tasks:
            raise InputError(f"--{name} is for {', '.join(tasks)}; {args.task} has no use for it")


def _perplexity(args: argparse.Namespace, model: Model, policies: list[str], text: str | None) -> Result:
    from pyggml_repkv.lab.eval.likelihood import chunk_perplexity

    if args.lengths:
        return _by_position(args, model, policies, text or "")
    tokens = model.tokenizer.encode(text or "")
    n_chunk = args.ctx_size or min(512, model.config.n_ctx_train)
    done: Result = {"task": "perplexity", "text": args.text, "chunk_tokens": n_chunk, "perplexity": {}}
    for name, memory in memories(args, policies, n_chunk):
        for i, (n_judged, perplexity) in enumerate(chunk_perplexity(model, memory, tokens, n_chunk), 1):
            if not args.json:
                output.write(f"{name}  chunk {i:4d} of {len(tokens) // n_chunk}  perplexity {perplexity:.4f}\n")
            done["perplexity"][name] = {"tokens": n_judged, "value": perplexity}
    return done


def _fidelity(args: argparse.Namespace, model: Model, policies: list[str], text: str | None) -> Result:
    return _by_position(args, model, policies, text or "")


def _by_position(args: argparse.Namespace, model: Model, policies: list[str], text: str) -> Result:
    from pyggml_repkv.lab.eval.likelihood import stretches

    compares = args.task == "fidelity"
    (length,) = args.lengths or [model.config.n_ctx_train]
    tokens = model.tokenizer.encode(text)
    if length > len(tokens):
        raise InputError(f"--lengths {length}: {args.text} has only {len(tokens)} tokens")
    full = next(memory for _, memory in memories(args, ["full"], length)) if compares else None
    done: Result = {"task": args.task, "text": args.text, "stretches": {}}
    for name, memory in memories(args, policies, length):
        found = []
        for s in stretches(model, memory, tokens[:length], args.stretch, full):
            found.append(asdict(s))
            if not args.json:
                more = f"  KL {s.kl:.5f}  same top-1 {100 * (s.top1 or 0):5.1f} %" if s.kl is not None else ""
                output.write(f"{name}  tokens {s.begin:7d} to {s.end:7d}  NLL {s.nll:.4f}{more}\n")
        done["stretches"][name] = found
    return done


def _ruler_tasks(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in RULER:
            raise argparse.ArgumentTypeError(f"{name[:40]!r} is none of {', '.join(RULER)}")
    return names


def _integers(low: int, high: int) -> Callable[[str], list[int]]:
    parse = integer(low, high)

    def parse_all(text: str) -> list[int]:
        return list(dict.fromkeys(parse(part) for part in text.split(",")))

    return parse_all
