"""Measure everything in docs/RESULTS.md and write that page: `make report TEXT=FILE`.

It takes hours. It stores each result as JSON in docs/results/ and never measures a stored one again: an interrupted
report continues where it stopped, and removing a file measures that result again. Speed comes last, when the machine
should be idle.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _common import run_tool, say
from _report_page import page
from _report_pictures import draw
from _report_stored import TASKS, Stored

from pyggml_repkv.cli.parser import HelpFormatter, Parser
from pyggml_repkv.errors import InputError, RepkvError

DOCS = Path(__file__).resolve().parents[1] / "docs"
PROGRAM = ("-m", "pyggml_repkv")

# Task, length, depths and policies. The cost of `full` grows with the square of the length, and the demo model was
# trained on 8,192 tokens.
RETRIEVAL = (
    *((task, 8000, 3, "full,window,repkv") for task in TASKS),
    *((task, 16000, 2, "full,window,repkv") for task in TASKS),
    *((task, 32000, 2, "window,repkv") for task in TASKS),
    *((task, 32000, 1, "full") for task in TASKS),
    ("passkey", 64000, 1, "full"),
    *((task, length, 1, "window,repkv") for length in (64000, 128000) for task in TASKS),
)
# In blocks of 128 tokens.
BUDGETS = (4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Step:
    """A command of the program. file: the name of its JSON; flag: the option that makes the program write that file:
    "--out" appends to it, "-o" replaces it, "" leaves the JSON on stdout.
    """

    file: str
    command: tuple[str, ...]
    flag: str = ""
    # A retrieval task: its name, length and number of depths.
    asked: tuple[str, int, int] | None = None

    def line(self) -> str:
        """Returns the command as a user would type it."""
        return f"python -m pyggml_repkv {shlex.join(self.command)}"

    def of_what_is_stored(self, stored: Stored) -> Step | None:
        """Returns this step with only the policies whose answers are stored; None if nothing is."""
        if self.asked is None:
            return None if stored.get(self.file.removesuffix(".json")) is None else self
        policies = stored.policies(*self.asked)
        # --kv is the last of a task's options.
        return replace(self, command=(*self.command[:-1], ",".join(policies))) if policies else None


def steps(text: str, *, llama: bool) -> list[Step]:
    found = [
        Step(
            f"{task}.jsonl",
            ("eval", task, *(("--text", text) if task == "niah" else ()), "--lengths", str(length), "--depths",
             str(n_depths), "--kv", kv),
            flag="--out",
            asked=(task, length, n_depths),
        )
        for task, length, n_depths, kv in RETRIEVAL
    ]  # fmt: skip
    prose = ("--text", text)
    found += [
        Step("perplexity.json", ("eval", "perplexity", *prose, "--lengths", "32768", "--kv", "window,repkv", "--json")),
        Step("perplexity_full.json", ("eval", "perplexity", *prose, "--lengths", "12288", "--kv", "full", "--json")),
        Step("fidelity_window.json", ("eval", "fidelity", *prose, "--lengths", "8192", "--kv", "window", "--json")),
    ]
    for n in BUDGETS:
        options = ("--kv", "repkv", "--n-dense", "0", "--positions", "far", "--chunk-budget", str(128 * n))
        found.append(
            Step(f"fidelity_{n}.json", ("eval", "fidelity", *prose, "--lengths", "8192", *options, "--json"))
        )  # fmt: skip
    # Read densely, so that no index is judged by what another one left out.
    recall = ("eval", "recall", "--lengths", "8000", "--n-dense", "8192", "--kv", "repkv", "--index",
              "tokens:4,tokens:2,tokens:1,representatives:4", "--json")  # fmt: skip
    found += [Step("recall.json", (*recall, *prose)), Step("recall_json.json", recall)]
    # A tenth of the keys and values of 32,768 tokens, by default and with a whole token's time to read.
    disk = ("--kv", "repkv", "--kv-ram", "75M")
    late = ("--sticky", "1.4", "--late")
    trace = ("graph", "trace", "-f", text, *disk, "-c", "1000000", "-d", "32768", "-n", "2")
    found += [Step("trace.json", trace, flag="-o"), Step("trace_late.json", (*trace, *late), flag="-o")]
    versus = ("--vs", "llama.cpp") if llama else ()
    speed = ("bench", *prose, "-p", "512", *versus, "-o", "json", "--kv", "full,window,repkv")
    deep = ("-n", "16", "-r", "2", "-d", "16384,32768,65536", "--synthetic-depth")
    found += [
        Step("machine.json", ("bench", "--machine", "-o", "json")),
        Step("speed.json", (*speed, "-n", "32", "-r", "5", "-d", "0,8192")),
        Step("speed_deep.json", (*speed, *deep)),
    ]
    tokens = ("bench", *prose, "-p", "0", "-n", "64", "-r", "3", "-d", "32768", "-o", "json")
    found += [
        Step("ram.json", (*tokens, "--kv", "repkv")),
        Step("ram_late.json", (*tokens, "--kv", "repkv", *late)),
        Step("disk.json", (*tokens, *disk)),
        Step("disk_late.json", (*tokens, *disk, *late)),
    ]
    return found


def measure(todo: Sequence[Step], results: Path, extra: Sequence[str]) -> None:
    """Runs the steps that are not stored yet. extra: options for every `bench --vs`. Raises RepkvError."""
    results.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(todo, 1):
        path = results / step.file
        if path.exists() and step.flag != "--out":
            continue
        say(f"{number} of {len(todo)}: {step.line()}")
        command = [sys.executable, *PROGRAM, *step.command, *(extra if "--vs" in step.command else ())]
        if step.flag == "--out":
            _run([*command, step.flag, str(path)])
            continue
        part = path.with_suffix(".part")
        output = _run([*command, step.flag, str(part)] if step.flag else command)
        report = json.loads(part.read_text("utf-8") if step.flag else output)
        part.write_text(json.dumps(without_folders(report), indent=1) + "\n", encoding="utf-8")
        part.replace(path)


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RepkvError(f"it ended with exit code {done.returncode}; what was measured is kept")
    return done.stdout


def without_folders(value: Any) -> Any:
    """Returns the value with bare file names: folders of one machine mean nothing elsewhere."""
    if isinstance(value, dict):
        return {
            k: Path(v).name if k in ("text", "model_filename") and isinstance(v, str) else without_folders(v)
            for k, v in value.items()
        }
    return [without_folders(v) for v in value] if isinstance(value, list) else value


def about_text(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"--text {path}: {error.strerror}") from None
    return {"name": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def check_same_text(text: dict[str, Any], results: Path) -> None:
    """Raises InputError if the stored results are of another text."""
    path = results / "text.json"
    if path.exists():
        stored = Stored(results).get("text")
        if not isinstance(stored, dict) or not text.keys() <= stored.keys():
            raise InputError(f"{path} does not say which text it was; move the results away")
        if stored["sha256"] != text["sha256"]:
            raise InputError(f"the results in {results} are of another text ({stored['name']}): move them away first")
        return
    results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="report.py", usage="%(prog)s --text FILE [options]", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--text", metavar="FILE", type=Path, help="prose of 140,000 tokens or more (half a megabyte)")
    parser.add_argument("--llama-python", metavar="FILE", help="interpreter that has llama-cpp-python")
    parser.add_argument("--no-llama", action="store_true", help="leave llama.cpp out")
    parser.add_argument("--page-only", action="store_true", help="write the page from what is stored, measure nothing")
    parser.add_argument("--docs", metavar="DIR", type=Path, default=DOCS, help="(default: docs)")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    if not args.docs.is_dir():
        raise InputError(f"--docs {args.docs}: no such folder")
    results = args.docs / "results"
    if not args.page_only:
        if args.text is None:
            raise InputError("give a text: --text FILE (`make report TEXT=FILE`)")
        check_same_text(about_text(args.text), results)
        extra = ("--llama-python", args.llama_python) if args.llama_python else ()
        measure(steps(str(args.text), llama=not args.no_llama), results, extra)
    say(f"wrote {', '.join(write_report(results, args.docs))}")
    return 0


def write_report(results: Path, docs: Path) -> list[str]:
    """Writes RESULTS.md and its pictures from the stored results; returns their names."""
    stored, path = Stored(results), docs / "RESULTS.md"
    try:
        drawn = draw(stored, docs)
        text = (stored.get("text") or {"name": "TEXT"})["name"]
        known = (step.of_what_is_stored(stored) for step in steps(text, llama=stored.has_llama))
        # Steps that became equal are one command.
        commands = dict.fromkeys(step.line() for step in known if step is not None)
        path.write_text(page(stored, list(commands)), encoding="utf-8")
    except OSError as error:
        raise RepkvError(f"{error.filename or path}: {error.strerror}") from None
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"{results}: a result is not what this version writes ({type(error).__name__}: {error}); move it away"
        ) from error
    return [str(path), *drawn]


if __name__ == "__main__":
    sys.exit(run_tool(main))
