"""`run`: continues a prompt."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

from pyggml_repkv.cli import output, progress
from pyggml_repkv.cli.memory_flags import check_memory_flags, kind_of, memory_config
from pyggml_repkv.cli.model_file import load_model
from pyggml_repkv.cli.options import (
    MAX_INT,
    add_context_options,
    add_memory_options,
    add_model_options,
    add_sampling_options,
)
from pyggml_repkv.cli.parser import HelpFormatter, filled_text, integer, text
from pyggml_repkv.cli.prompt import check_chat_flags, read_prompt, tokenize
from pyggml_repkv.errors import ComputeError, InputError, RepkvError, StoreError
from pyggml_repkv.memory.config import UNBOUNDED_CONTEXT
from pyggml_repkv.model.limits import MAX_CONTEXT

if TYPE_CHECKING:
    from pyggml_repkv.engine.generate import Generation, GenerationConfig
    from pyggml_repkv.engine.model import Model
    from pyggml_repkv.engine.session import Session

EXAMPLES = r"""
examples:
  %(prog)s -p 'The capital of France is' -n 32 --greedy
  %(prog)s -m qwen2.5-coder-0.5b --chat -p 'Why is the sky blue?'
  %(prog)s -hf Qwen/Qwen2.5-7B-Instruct-GGUF:Q4_K_M --chat -p 'Why is the sky blue?'
  %(prog)s -m model.gguf --chat -c 16384 -f report.txt -p $'\n\nSum this up.'
  git diff | %(prog)s --chat --system 'You review code.' -p - --stop $'\n\n'
  %(prog)s -p 'Once upon a time' -n 64 --seed 7 --json | jq .predicted_per_second
"""


def build_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds `run` and its options."""
    parser = subparsers.add_parser(
        "run",
        usage="%(prog)s [-m MODEL] [-f FILE] [-p TEXT] [options]",
        description="Continues a prompt. The text goes to stdout as it comes, everything else to stderr.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
    )
    group = parser.add_argument_group("prompt")
    group.add_argument("-p", "--prompt", metavar="TEXT", type=text, help="the prompt, taken literally; - reads stdin")
    group.add_argument(
        "-f", "--file", metavar="FILE", type=filled_text, help="a prompt file (UTF-8); with -p, the file comes first"
    )
    group.add_argument(
        "--session",
        metavar="DIR",
        type=filled_text,
        help="save what is read and generated to DIR as it comes (with --kv repkv); the next run continues after the "
        "tokens that its prompt shares with DIR; it says what it drops; another prompt may drop at most 512",
    )
    group.add_argument(
        "--session-new", action="store_true", help="let the prompt drop whatever it does not share with --session DIR"
    )
    group.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    group.add_argument("--system", metavar="TEXT", type=text, help="the system message (with --chat)")
    group.add_argument(
        "--no-parse-special",
        action="store_true",
        help="read special tokens that the prompt spells out as plain text, as --chat always does",
    )
    group.add_argument(
        "--no-normalize",
        action="store_true",
        help="keep decomposed characters (NFD), as llama.cpp and --exact-graph do; Qwen's own tokenizer composes them "
        "(NFC), and so is the default for its models",
    )
    add_model_options(parser)
    add_context_options(parser)
    add_memory_options(parser)
    group = parser.add_argument_group("length")
    group.add_argument(
        "-n",
        "--n-predict",
        metavar="N",
        type=integer(-2, MAX_INT),
        default=-1,
        help="generate at most N tokens; -1: at most as many as the model was trained on, or 32768 if that is less; "
        "-2: until the context is full (default: -1)",
    )
    group.add_argument(
        "-r",
        "--stop",
        "--reverse-prompt",
        metavar="TEXT",
        dest="stop",
        action="append",
        type=filled_text,
        default=[],
        help="stop before this text; may be given several times",
    )
    group.add_argument("--ignore-eos", action="store_true", help="never draw the end-of-generation token")
    add_sampling_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    group.add_argument("--display-prompt", action="store_true", help="print the prompt before the text")
    group.add_argument(
        "--no-display-prompt", dest="display_prompt", action="store_false", help="print only the text (default)"
    )
    group.add_argument("--special", action="store_true", help="print special tokens too")
    group.add_argument("--verbose-prompt", action="store_true", help="list the prompt's tokens on stderr")
    group.add_argument("-q", "--quiet", action="store_true", help="print only warnings on stderr, no timings or notes")


def main(args: argparse.Namespace) -> int:
    """Runs the generation and returns the exit code. Raises RepkvError, and KeyboardInterrupt after the timings."""
    prompt = read_prompt(args)
    check_chat_flags(args, prompt)
    if args.json and args.display_prompt:
        raise InputError("--display-prompt cannot go with --json: the object holds the generated text only")
    if args.session_new and args.session is None:
        raise InputError("--session-new goes with --session DIR")

    check_memory_flags(args, [args.kv])
    with load_model(args) as model:
        prompt, tokens = tokenize(args, prompt, model)
        if args.verbose_prompt:
            _list_tokens(tokens, model)
        with _session(args, model, len(tokens)) as session:
            generation = _begin(args, model, session, tokens)
            _say_budget(args, session, len(tokens))
            _generate(args, model, session, prompt, generation)
    return 0


def _session(args: argparse.Namespace, model: Model, n_prompt: int) -> Session:
    n_ctx_train = model.config.n_ctx_train
    unbounded = kind_of(args.kv).bounded
    n_ctx = args.ctx_size or (0 if unbounded else n_ctx_train)
    if n_ctx and n_prompt > n_ctx:
        raise InputError(
            f"the prompt has {n_prompt} tokens and the context holds {n_ctx}: give -c {n_prompt} or more, "
            f"or a shorter prompt (the model was trained on {n_ctx_train}"
            + ("; --kv repkv reads on past it)" if not unbounded else ")")
        )
    if unbounded and args.positions == "exact" and n_prompt > n_ctx_train:
        output.say(f"warning: --positions exact with {n_prompt} tokens, but the model was trained on {n_ctx_train}")
    if n_ctx > n_ctx_train and not unbounded:
        output.say(f"warning: -c {n_ctx} exceeds the {n_ctx_train} tokens that the model was trained on")
    if unbounded and not n_ctx:
        limit = _config(args).limit(n_ctx_train)
        n_tokens = n_prompt + (UNBOUNDED_CONTEXT if limit is None else min(limit, UNBOUNDED_CONTEXT))
        if n_prompt > n_ctx_train:
            # This tells the memory from the start that the context will be long.
            n_ctx = min(max(UNBOUNDED_CONTEXT, n_tokens), MAX_CONTEXT)
        elif min(n_tokens, n_ctx_train) > UNBOUNDED_CONTEXT:
            n_ctx = min(n_tokens, n_ctx_train)
    return model.session(memory_config(args, n_ctx), directory=args.session)


def _say_budget(args: argparse.Namespace, session: Session, n_prompt: int) -> None:
    """Says what this run will need, before anything is computed. Raises ComputeError if there is less."""
    from pyggml_repkv.engine import budget

    limit = _config(args).limit(session.n_ctx_train)
    n_tokens = session.n_ctx if limit is None else min(n_prompt + limit, session.n_ctx)
    # A text that has no set length may end early: it is not refused for what it might need.
    parts = session.budget(n_prompt, max(args.n_predict, 0)) | session.policy.bytes_at(n_tokens)
    needed, free = budget.size(sum(parts.values())), budget.describe_available()
    up_to = "up to " if args.n_predict < 0 else ""
    _note(args, f"memory for {up_to}{n_tokens} tokens: {needed} ({budget.describe(parts)}); {free}")
    need = session.disk_need(n_tokens)
    if need is not None and need.total:
        _note(args, f"disk: {up_to}{budget.size(need.total)} in {need.folder}; {budget.size(need.free)} free")


def _begin(args: argparse.Namespace, model: Model, session: Session, tokens: list[int]) -> Generation:
    """Returns the generation; with --session, it continues after the tokens that the session and the prompt share."""
    from pyggml_repkv.engine.generate import Generation

    if args.session is None:
        return Generation(session, model.tokenizer, tokens, _config(args))
    generation = session.continue_text(tokens, _config(args), drop=args.session_new)
    if generation.begun.tokens:
        _note(args, f"session: continuing its text after {len(generation.begun.tokens)} tokens")
    elif generation.begun.n_read:
        _note(args, f"session: holds {generation.begun.n_read} of the prompt's {len(tokens)} tokens")
    return generation


def _generate(
    args: argparse.Namespace, model: Model, session: Session, prompt: str, generation: Generation
) -> None:  # fmt: skip
    if args.temp > 0:
        _note(args, f"seed: {generation.sampler.seed}")
    try:
        with progress.of_prompt(args, generation.n_unread) as move:
            generation.prefill(move)
        if args.json:
            for _ in generation:
                pass
        else:
            _stream(chain([prompt] if args.display_prompt else [], generation))
    except KeyboardInterrupt:
        if args.session is not None:
            _save_stopped(args, session)
        _say_timings(args, generation, model, session)
        raise
    except (ComputeError, StoreError):
        if args.json and generation.result().tokens:
            _print_json(generation, model, session)
        raise
    result = generation.result()
    if args.json:
        _print_json(generation, model, session)
    if args.session is not None:
        session.save()
    if result.finish_reason == "context":
        from pyggml_repkv.engine.checks import larger_context

        n = len(result.tokens)
        remedy = larger_context(kind_of(args.kv).bounded, session.n_ctx, session.n_ctx_train)
        output.say(f"warning: cut off after {n} tokens: the context of {session.n_ctx} is full; {remedy}")
    if result.finish_reason == "length" and args.n_predict == -1:
        n = len(result.tokens)
        output.say(f"warning: cut off after {n} tokens without an end; -n N allows more, -n -2 as many as the context")
    _say_timings(args, generation, model, session)


def _print_json(generation: Generation, model: Model, session: Session) -> None:
    from pyggml_repkv.cli import report

    seed = generation.sampler.seed
    output.write(report.as_json(generation.result(), model.load_ms, session.stats(), seed) + "\n")


def _save_stopped(args: argparse.Namespace, session: Session) -> None:
    try:
        session.save()
    except RepkvError as error:
        output.say(f"warning: session: {error}; the save before it is whole")
    else:
        _note(args, f"session: saved after {session.n_past} tokens")


def _stream(pieces: Iterable[str]) -> None:
    """Writes each piece at once, and ends the last line even if the text is interrupted."""
    last = "\n"
    try:
        for piece in pieces:
            output.write(piece)
            last = piece or last
    except (KeyboardInterrupt, ComputeError, StoreError):
        _end_line(last)
        raise
    _end_line(last)


def _end_line(last: str) -> None:
    if not last.endswith("\n"):
        output.write("\n")


def _config(args: argparse.Namespace) -> GenerationConfig:
    from pyggml_repkv.engine.generate import GenerationConfig
    from pyggml_repkv.engine.sampling import SamplingConfig

    sampling = SamplingConfig(
        temp=args.temp,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repeat_penalty=args.repeat_penalty,
        repeat_last_n=args.repeat_last_n,
        seed=args.seed,
    )
    return GenerationConfig(
        n_predict=args.n_predict,
        stop=tuple(args.stop),
        ignore_eos=args.ignore_eos,
        special=args.special,
        sampling=sampling,
    )


def _list_tokens(tokens: list[int], model: Model) -> None:
    lines = (f"{token:6d} -> {model.tokenizer.decode([token])!r}\n" for token in tokens)
    output.log(f"prompt: {len(tokens)} tokens\n{''.join(lines)}")


def _say_timings(args: argparse.Namespace, generation: Generation, model: Model, session: Session) -> None:
    from pyggml_repkv.cli import report

    if not args.quiet:
        if sys.stdout.isatty() and sys.stderr.isatty():
            output.log("\n")
        output.log(report.timings(generation.result(), model.load_ms) + report.memory(session.stats()))


def _note(args: argparse.Namespace, line: str) -> None:
    if not args.quiet:
        output.say(line)
