"""`graph`: shows and verifies the static graph of a step, and compares two."""

from __future__ import annotations

import argparse
import fnmatch
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyggml_repkv.cli import graph_run, output
from pyggml_repkv.cli.memory_flags import check_memory_flags, kind_of, memory_config
from pyggml_repkv.cli.model_file import model_path, rope_options
from pyggml_repkv.cli.options import add_context_options, add_memory_options, add_model_options
from pyggml_repkv.cli.parser import HelpFormatter, Parser, integer
from pyggml_repkv.engine.threads import default_threads
from pyggml_repkv.errors import InputError

if TYPE_CHECKING:
    from pyggml_repkv.lab.inspect.builder import BuiltGraph, Wanted
    from pyggml_repkv.lab.inspect.snapshot import Snapshot, TensorInfo

EXAMPLES = {
    "dump": """
examples:
  %(prog)s --phase decode --layer 0
  %(prog)s --kv repkv --phase prefill --name 'block_*' --json
  %(prog)s -m model.gguf --exact-graph --svg graph.svg
""",
    "verify": """
examples:
  %(prog)s --kv repkv --kv-ram 256M
  %(prog)s --phase decode --json

A broken rule gives exit code 1 and the nodes at fault; docs/graph.md lists the rules.
""",
    "diff": """
examples:
  %(prog)s 'full' 'repkv' --phase decode
  %(prog)s '--kv full' '--kv repkv --kv-ram 256M --late'
  %(prog)s before.json after.json
""",
    "html": """
examples:
  %(prog)s --kv repkv --phase decode -o graph.html
  %(prog)s --kv repkv --kv-ram 256M -o graph.html
""",
    "trace": """
examples:
  %(prog)s --kv repkv -d 16384
  %(prog)s --phase prefill -n 2 -o trace.json
  %(prog)s --kv repkv -d 16384 --html step.html
""",
    "tensors": """
examples:
  %(prog)s --exact-graph --name 'Qcur-3' -p 'The capital of France is'
  %(prog)s --exact-graph --save a.npz; %(prog)s --exact-graph -t 1 --compare a.npz
""",
}


def build_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds `graph` and its tasks."""
    parser = subparsers.add_parser(
        "graph",
        usage="%(prog)s TASK [options]",
        description="Shows what ggml computes in a step. Only trace and tensors compute; the other tasks read the "
        "file's shapes and no weights.",
        epilog="`%(prog)s TASK --help` lists the options of a task.",
        formatter_class=HelpFormatter,
    )
    tasks = parser.add_subparsers(
        title="tasks", dest="task", metavar="TASK", required=True, parser_class=Parser, prog=parser.prog
    )
    dump = _add_task(tasks, "dump", "prints the nodes as a table, JSON, Graphviz or SVG")
    group = dump.add_argument_group("output")
    group.add_argument("--layer", metavar="N", type=integer(0, 9999), help="only this layer's nodes")
    group.add_argument("--name", metavar="GLOB", help="only nodes whose name matches, as 'Qcur*'")
    group.add_argument("--op", metavar="GLOB", help="only nodes whose op matches, as 'repkv.*' or mul_mat")
    group.add_argument("--leaves", action="store_true", help="list inputs, weights and memories too")
    group.add_argument("--json", action="store_true", help="print one JSON object (docs/graph.md has the schema)")
    group.add_argument("--dot", action="store_true", help="print Graphviz's DOT language")
    group.add_argument("--svg", metavar="FILE", help="write a picture")
    verify = _add_task(
        tasks, "verify", "proves that effects happen in order and nothing is overwritten while it is needed"
    )
    verify.add_argument("--json", action="store_true", help="print one JSON object")
    diff = _add_task(tasks, "diff", "shows what differs between two graphs")
    diff.add_argument("a", metavar="A", help="a dump (FILE.json), a policy, or flags as '--kv repkv -b 256'")
    diff.add_argument("b", metavar="B", help="the same, for the other graph")
    diff.add_argument("--json", action="store_true", help="print one JSON object")
    html = _add_task(tasks, "html", "writes a page that shows nodes, memory plan and hook points in a browser")
    html.add_argument("-o", "--output", metavar="FILE", required=True, help="write the page to FILE")
    trace = _add_task(tasks, "trace", "shows where the time of a step goes, node by node", static=False)
    graph_run.add_trace_options(trace)
    tensors = _add_task(tasks, "tensors", "shows what nodes hold in the last step of a prompt", static=False)
    graph_run.add_tensor_options(tensors)


def _add_task(
    tasks: argparse._SubParsersAction[Any], name: str, summary: str, *, static: bool = True
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = tasks.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=EXAMPLES[name],
        formatter_class=HelpFormatter,
    )  # fmt: skip
    _add_graph_options(parser, static=static)
    return parser


def _add_graph_options(parser: argparse.ArgumentParser, *, static: bool = True) -> None:
    group = parser.add_argument_group("graph")
    group.add_argument(
        "--phase",
        choices=("prefill", "decode"),
        default="decode",
        help="prefill: a chunk of -b tokens; decode: one token (default: decode)",
    )
    group.add_argument(
        "-d", "--depth", metavar="N", type=integer(0, 2**30), default=0,
        help="tokens read before the step (default: 0); flops count attention at that depth",
    )  # fmt: skip
    if static:
        group.add_argument(
            "--repack", action="store_true", help="show repacked weights, as `run` has them with --kv full"
        )
    add_model_options(parser)
    add_context_options(parser)
    add_memory_options(parser)


def main(args: argparse.Namespace) -> int:
    """Runs a task and returns its exit code. Raises RepkvError."""
    tasks: dict[str, Callable[[argparse.Namespace], int]] = {
        "dump": _dump,
        "verify": _verify,
        "diff": _diff,
        "html": _html,
        "trace": graph_run.trace,
        "tensors": graph_run.tensors,
    }
    if args.task != "diff":
        check_memory_flags(args, [args.kv])
    return tasks[args.task](args)


def _built(args: argparse.Namespace) -> BuiltGraph:
    from pyggml_repkv.lab.inspect.builder import BuiltGraph

    args.quiet = True
    return BuiltGraph(model_path(args), _wanted(args))


def _wanted(args: argparse.Namespace) -> Wanted:
    from pyggml_repkv.lab.inspect.builder import Wanted

    n_ctx = args.ctx_size
    if not n_ctx and args.depth and not kind_of(args.kv).bounded:
        n_ctx = args.depth + args.batch_size
    return Wanted(
        args.phase, memory_config(args, n_ctx), args.depth, args.threads or default_threads(),
        exact=args.exact_graph, repack=args.repack and not args.no_repack, rope=rope_options(args),
    )  # fmt: skip


def _dump(args: argparse.Namespace) -> int:
    from pyggml_repkv.lab.inspect import table

    if args.json + args.dot + bool(args.svg) > 1:
        raise InputError("--json, --dot and --svg: give one of them")
    with _built(args) as built:
        snapshot = built.snapshot()
    if args.json:
        output.write(json.dumps(snapshot.as_json()) + "\n")
        return 0
    nodes = [t for t in snapshot.nodes if _is_shown(args, t)]
    if not nodes:
        raise InputError("no node matches; leave out --layer, --name or --op to see more")
    if args.dot:
        output.write(table.as_dot(snapshot, nodes))
    elif args.svg:
        output.write_file(args.svg, table.as_svg(snapshot, nodes))
    else:
        leaves = snapshot.leaves if args.leaves else ()
        output.write(table.as_table(table.HEADER, table.rows_of(snapshot, [*leaves, *nodes])))
        output.log(_summary(snapshot, len(nodes)))
    return 0


def _is_shown(args: argparse.Namespace, t: TensorInfo) -> bool:
    return (
        (args.layer is None or t.layer == args.layer)
        and (args.name is None or fnmatch.fnmatchcase(t.name, args.name))
        and (args.op is None or fnmatch.fnmatchcase(t.op, args.op))
    )


def _summary(snapshot: Snapshot, n_shown: int) -> str:
    n_nodes = len(snapshot.nodes)
    shown = f"{n_shown} of {n_nodes} nodes" if n_shown != n_nodes else f"{n_shown} nodes"
    flops = sum(t.flops for t in snapshot.nodes) / 1e6
    return (
        f"{shown}, {len(snapshot.leaves)} leaves, {len(snapshot.hooks)} hook points; "
        f"compute buffer {snapshot.compute_bytes / 1e6:.2f} MB, {flops:.0f} Mflop\n"
    )


def _html(args: argparse.Namespace) -> int:
    from pyggml_repkv.lab.inspect.page import as_page

    with _built(args) as built:
        snapshot = built.snapshot()
    output.write_file(args.output, as_page(snapshot))
    output.log(f"{args.output}: {_summary(snapshot, len(snapshot.nodes))}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from pyggml_repkv.lab.inspect.inputs import unfilled_inputs
    from pyggml_repkv.lab.inspect.verify import RULES, verify

    with _built(args) as built:
        snapshot = built.snapshot()
        findings = [*verify(snapshot), *unfilled_inputs(built)]
    if args.json:
        done = {
            **snapshot.about,
            "ok": not findings,
            "rules": [*RULES, "inputs"],
            "findings": [{"rule": f.rule, "message": f.message, "nodes": list(f.ids)} for f in findings],
        }
        output.write(json.dumps(done) + "\n")
    else:
        for finding in findings:
            output.write(f"{finding.rule}: {finding.message}\n")
        if not findings:
            n_effects = sum(bool(t.writes) for t in snapshot.nodes)
            output.write(
                f"ok: {len(snapshot.nodes)} nodes, {n_effects} with effects, {len(snapshot.hooks)} hook points; rules: "
                f"{', '.join([*RULES, 'inputs'])}\n"
            )
    return 1 if findings else 0


def _diff(args: argparse.Namespace) -> int:
    from pyggml_repkv.lab.inspect.diff import diff, summary

    a, b = (_side(args, text) for text in (args.a, args.b))
    changes, numbers = diff(a, b), summary(a, b)
    if args.json:
        listed = [
            {"kind": c.kind, "name": c.name, "layers": list(c.layers), "what": c.what} for c in changes
        ]  # fmt: skip
        output.write(json.dumps({"a": a.about, "b": b.about, "changes": listed, "numbers": numbers}) + "\n")
        return 0
    for change in changes:
        output.write(change.line())
    for name, (before, after) in numbers.items():
        if before != after:
            output.write(f"  {name}: {before} -> {after}\n")
    if not changes:
        output.write("no difference\n")
    return 0


def _side(args: argparse.Namespace, text: str) -> Snapshot:
    """Returns the graph that `text` names: a dump, a policy, or flags that are added to the common ones."""
    from pyggml_repkv.lab.inspect.snapshot import Snapshot

    if text.endswith(".json"):
        try:
            return Snapshot.from_json(json.loads(Path(text).read_text("utf-8")))
        except OSError as error:
            raise InputError(f"{text}: {error.strerror}; give a file that `graph dump --json` wrote") from None
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError):
            raise InputError(f"{text}: not a dump of a graph; give a file that `graph dump --json` wrote") from None
    parser = Parser(prog="graph diff", add_help=False)
    _add_graph_options(parser)
    flags = shlex.split(text) if text.startswith("-") else ["--kv", text]
    for name, value in vars(args).items():
        if name not in ("a", "b", "json", "task", "command", "version"):
            parser.set_defaults(**{name: value})
    with _built(parser.parse_args(flags)) as built:
        return built.snapshot()
