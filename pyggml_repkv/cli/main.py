"""Entry of the command line: runs the subcommand, and turns every failure into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from pyggml_repkv.cli import output, progress, signals
from pyggml_repkv.cli.parser import HelpFormatter, Parser
from pyggml_repkv.errors import InputError, RepkvError
from pyggml_repkv.ffi.lost_files import exit_on_lost_files

PROG = "python -m pyggml_repkv"
COMMANDS = {
    "run": "continue a prompt, or answer one with --chat",
    "bench": "measure speed, and compare it with llama.cpp",
    "eval": "measure what a KV memory retrieves",
    "graph": "show, verify and compare the graphs that ggml computes",
    "model": "list and fetch models, show what a file holds and the memory it needs",
}
EPILOG = f"""\
`{PROG} COMMAND --help` lists the options of a command.

exit codes: 0 ok, 1 runtime failure, 2 bad usage or bad input, 130 interrupted, 143 terminated
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: that of the process) and returns its exit code."""
    output.prepare()
    exit_on_lost_files("pyggml_repkv: error: ")
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        output.flush()
        return code
    except SystemExit as done:
        if done.code is None or isinstance(done.code, int):
            return done.code or 0
        output.say(f"error: {done.code}")
        return 1
    except KeyboardInterrupt:
        return signals.exit_code()
    except BrokenPipeError:
        output.discard(sys.stdout, sys.stderr)
        return signals.exit_code() if signals.taken() else 1
    except Exception as error:
        return _fail(error)


def _dispatch(argv: list[str]) -> int:
    parser = Parser(
        prog=PROG,
        description="Local inference for Qwen and Llama GGUF models whose context is not bounded by memory.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the versions that a bug report needs")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", prog=PROG)
    command = argv[0] if argv else ""
    if command in COMMANDS:
        # Importing only the chosen command keeps --help instant.
        module = importlib.import_module(f"pyggml_repkv.cli.{command}")
        module.build_parser(subparsers)
        args, rest = parser.parse_known_args(argv)
        if rest:
            unknown = " ".join(rest)
            raise InputError(f"unknown arguments: {unknown} (see {PROG} {command} --help)")
        with progress.notices(quiet=getattr(args, "quiet", True)):
            return int(module.main(args))

    if command and not command.startswith("-"):
        raise InputError(f"there is no command {command!r}; the commands are {', '.join(COMMANDS)}")
    for name, summary in COMMANDS.items():
        subparsers.add_parser(name, help=summary)
    args, rest = parser.parse_known_args(argv[:1])
    if args.version and argv == ["--version"]:
        from pyggml_repkv.cli import versions

        return versions.main()
    if not argv:
        raise InputError(f"give a command: {', '.join(COMMANDS)} (--help explains them)")
    unexpected = (rest or argv[1:])[0]
    raise InputError(f"{unexpected!r} is not expected here: the command comes first, as in `{PROG} run -p TEXT`")


def _fail(error: Exception) -> int:
    if os.environ.get("PYGGML_REPKV_DEBUG") == "1":
        traceback.print_exception(error)
    if signals.taken():
        # Libraries make other exceptions of it: NumPy's import an ImportError.
        return signals.exit_code()
    code = 1
    message = " ".join(str(error).split())
    if isinstance(error, RepkvError):
        code = error.exit_code
    elif isinstance(error, MemoryError):
        message = "out of memory: use a smaller -c or -b, or a smaller model"
    elif isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        message = f"internal error, {type(error).__name__}: {message} (PYGGML_REPKV_DEBUG=1 shows where)"
    output.say(f"error: {message}")
    return code
