"""`bench`: measures speed by depth and memory policy, also against llama.cpp."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyggml_repkv.cli import output
from pyggml_repkv.cli.memory_flags import check_memory_flags, kind_of, memory_config
from pyggml_repkv.cli.model_file import model_path, repacks, rope_options
from pyggml_repkv.cli.options import MAX_SEED, add_context_options, add_memory_options, add_model_options
from pyggml_repkv.cli.parser import HelpFormatter, filled_text, integer
from pyggml_repkv.cli.prompt import read_text_file
from pyggml_repkv.engine.threads import default_threads
from pyggml_repkv.errors import InputError

if TYPE_CHECKING:
    from pyggml_repkv.lab.bench.measure import Contender, Plan, Result
    from pyggml_repkv.lab.bench.table import About, Record, Table
    from pyggml_repkv.lab.inspect.peak import Peak
    from pyggml_repkv.memory.config import MemoryConfig

MAX_TOKENS = 2**20
FORMATS = ("md", "csv", "json", "jsonl")
LLAMA = "llama.cpp"
# llama.cpp's default: the most tokens of one llama_decode.
LLAMA_N_BATCH = 2048

EXAMPLES = """
examples:
  %(prog)s -p 512,2048 -n 64
  %(prog)s -d 0,8192,32768 --kv window,repkv -r 3
  %(prog)s -d 0,8192 --kv full,repkv --vs llama.cpp -o json > speed.json
  %(prog)s -d 65536 --kv repkv --vs llama.cpp --synthetic-depth
  %(prog)s --machine
"""


def build_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds `bench` and its options."""
    parser = subparsers.add_parser(
        "bench",
        usage="%(prog)s [-m MODEL] [-p N,..] [-n N,..] [-d N,..] [options]",
        description="Measures speed as llama-bench does. Each policy and each llama.cpp runs in its own process, and "
        "the processes take turns.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
    )
    group = parser.add_argument_group("tests")
    for flag, name, low, default, what in (
        ("-p", "n-prompt", 0, [512], "tokens read at once"),
        ("-n", "n-gen", 0, [128], "tokens read one by one"),
        ("-d", "n-depth", 0, [0], "tokens read into the context before those"),
    ):
        group.add_argument(
            flag,
            f"--{name}",
            metavar="N,...",
            type=_integers(low, MAX_TOKENS),
            default=default,
            help=f"{what}; 0 is none (default: {default[0]})",
        )
    group.add_argument(
        "-r", "--repetitions", metavar="N", type=integer(1, 1000), default=5, help="rounds (default: %(default)s)"
    )
    group.add_argument("--no-warmup", action="store_true", help="skip the uncounted first round")
    group.add_argument(
        "--text",
        metavar="FILE",
        type=filled_text,
        help="the text to read (default: random tokens, as llama-bench has)",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=integer(0, MAX_SEED),
        default=1,
        help="seed of the random tokens (default: %(default)s)",
    )
    group.add_argument(
        "--synthetic-depth",
        action="store_true",
        help="with llama.cpp and --kv full, fill the depth with copies of the keys and values of 512 tokens, at which "
        "a step costs the same; window and repkv still read",
    )
    group = parser.add_argument_group("comparison")
    group.add_argument("--vs", choices=(LLAMA,), help="also measure llama.cpp (through llama-cpp-python)")
    group.add_argument(
        "--llama-fa",
        choices=("on", "off", "both"),
        help="llama.cpp's flash attention; ratios are to the faster one (default: both)",
    )
    group.add_argument(
        "--llama-python",
        metavar="FILE",
        help="interpreter that has llama-cpp-python and numpy (default: this one)",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o", "--output", metavar="FORMAT", choices=FORMATS, default="md", help="md, csv, json, jsonl (default: md)"
    )
    group.add_argument("--progress", action="store_true", help="say on stderr what runs")
    group.add_argument(
        "--machine",
        action="store_true",
        help="measure this machine, not a model: memory bandwidth, GFLOP/s by weight type",
    )
    add_model_options(parser)
    add_context_options(parser, several=True, sized=False)
    add_memory_options(parser)


def main(args: argparse.Namespace) -> int:
    """Prints the results of each depth as soon as they are there. Raises RepkvError."""
    args.threads = args.threads or default_threads()
    if args.machine:
        return _machine(args)
    if args.ctx_size:
        raise InputError("bench sets the context from -p, -n and -d: leave -c out")
    if not args.vs and (args.llama_fa or args.llama_python):
        raise InputError("--llama-fa and --llama-python need --vs llama.cpp")
    from pyggml_repkv.lab.bench.load import load_warning
    from pyggml_repkv.lab.bench.measure import measure, spread_warnings
    from pyggml_repkv.lab.bench.table import Table, record

    args.quiet = args.output != "md"
    memories = dict(_memories(args))
    args.model = str(model_path(args))
    plan = _plan(args, memories)
    about = _about(args, memories, plan)
    evicts = any(kind_of(name).evicts for name in memories)
    on_disk = any(memory.on_disk for memory in memories.values())
    printer = _Printer(args.output, Table(plan, evicts=evicts, on_disk=on_disk))
    say = output.say if args.progress or sys.stderr.isatty() else lambda _: None
    done: list[Result] = []
    try:
        for results in measure(plan, say):
            printer.add([record(about, r, results) for r in results])
            done += results
    finally:
        # Ctrl-C comes here too: rounds that were measured are not lost.
        printer.end(done)
        if done and len(done[-1].seconds) < args.repetitions:
            output.say(f"stopped: {done[-1].case.name} has {len(done[-1].seconds)} of {args.repetitions} rounds")
        for warning in (load_warning([r.busy for r in done]), *spread_warnings(done)):
            if warning:
                output.say(f"warning: {warning}")
    return 0


class _Printer:
    """Prints records as they come, except for `json`, which is one array at the end."""

    def __init__(self, kind: str, table: Table) -> None:
        self._kind, self._table = kind, table
        self._records: list[Record] = []

    def add(self, records: list[Record]) -> None:
        from pyggml_repkv.lab.bench import table

        first = not self._records
        self._records += records
        if self._kind == "md":
            output.write((self._table.header() if first else "") + "".join(map(self._table.row, records)))
        elif self._kind == "csv":
            output.write(table.csv_lines(records, with_header=first))
        elif self._kind == "jsonl":
            output.write(table.json_lines(records))

    def end(self, results: list[Result]) -> None:
        from pyggml_repkv.lab.bench import table

        if self._kind == "md":
            output.write(table.ratio_table(results))
        elif self._kind == "json" and self._records:
            output.write(json.dumps(self._records, indent=2, allow_nan=False) + "\n")


def _memories(args: argparse.Namespace) -> Iterator[tuple[str, MemoryConfig]]:
    policies: list[str] = args.kv
    check_memory_flags(args, policies)
    for name in policies:
        args.kv = name
        yield name, memory_config(args, 0)
    args.kv = policies


def _plan(args: argparse.Namespace, memories: dict[str, MemoryConfig]) -> Plan:
    from pyggml_repkv.lab.bench.measure import Plan
    from pyggml_repkv.lab.bench.table import all_cases

    prompts, gens = ([n for n in counts if n] for counts in (args.n_prompt, args.n_gen))
    cases = all_cases(prompts, gens, args.n_depth)
    if not cases:
        raise InputError("there is nothing to measure: give -p or -n a number of tokens")
    return Plan(
        cases, _contenders(args, memories), args.repetitions, _stream(args), not args.no_warmup, args.synthetic_depth
    )


def _contenders(args: argparse.Namespace, memories: dict[str, MemoryConfig]) -> list[Contender]:
    from pyggml_repkv.lab.bench.measure import Contender

    common = {"model": args.model, "n_threads": args.threads, "rope": asdict(rope_options(args))}
    found = []
    for name, memory in memories.items():
        own = {"exact_graph": args.exact_graph, "repack": repacks(args, name), "memory": asdict(memory)}
        found.append(Contender(name, True, common | own, memory.flash_attn, can_rewind=kind_of(name).rewinds))
    if args.vs:
        own = {"n_chunk": args.batch_size, "n_batch": max(LLAMA_N_BATCH, args.batch_size),
               "type_k": args.cache_type_k, "type_v": args.cache_type_v}  # fmt: skip
        for flash_attn in _llama_attentions(args):
            name = f"{LLAMA} -fa {flash_attn}"
            python = args.llama_python or sys.executable
            found.append(Contender(name, False, common | own, flash_attn == "on", True, python))
    return found


def _llama_attentions(args: argparse.Namespace) -> tuple[str, ...]:
    wanted = args.llama_fa or "both"
    if args.cache_type_v == "q8_0" and wanted != "on":
        if wanted == "off":
            raise InputError("--llama-fa off: llama.cpp needs flash attention for -ctv q8_0")
        output.say(f"{LLAMA} runs only with -fa on: -ctv q8_0 needs it")
        return ("on",)
    return ("on", "off") if wanted == "both" else (wanted,)


def _stream(args: argparse.Namespace) -> Callable[[int, int], list[int]]:
    from pyggml_repkv.lab.bench.engines import random_tokens

    if args.text is None:
        return lambda n_tokens, n_vocab: random_tokens(n_tokens, n_vocab, args.seed)
    from pyggml_repkv.model.gguf_file import GGUFFile
    from pyggml_repkv.model.tokenizer import Tokenizer

    tokens = Tokenizer.from_metadata(GGUFFile.open(Path(args.model)).metadata).encode(
        read_text_file(args.text, "--text")
    )

    def first(n_tokens: int, n_vocab: int) -> list[int]:
        if n_tokens > len(tokens):
            raise InputError(f"--text {args.text} has {len(tokens)} tokens and the tests need {n_tokens}")
        return tokens[:n_tokens]

    return first


def _about(args: argparse.Namespace, memories: dict[str, MemoryConfig], plan: Plan) -> About:
    from pyggml_repkv.lab.bench.load import cpu_name
    from pyggml_repkv.lab.bench.table import About
    from pyggml_repkv.lab.inspect.model_info import ModelInfo
    from pyggml_repkv.model.gguf_file import GGUFFile

    info = ModelInfo(GGUFFile.open(Path(args.model)), rope_options(args))
    if not info.types:
        raise InputError(f"{args.model} has a vocabulary and no weights: give a whole model")
    main_type = max(info.types, key=lambda t: t.bytes).type
    return About(
        cpu=cpu_name(),
        model_filename=args.model,
        model_type=f"{info.config.arch} {_short_count(info.n_parameters)} {main_type.upper()}",
        model_size=info.weight_bytes,
        model_n_params=info.n_parameters,
        n_threads=args.threads,
        n_batch=args.batch_size,
        type_k=args.cache_type_k,
        type_v=args.cache_type_v,
        test_time=datetime.now(UTC).isoformat(timespec="seconds"),
        peak=_peak(args),
        step_bytes=_step_bytes(args, memories, plan),
    )


def _short_count(n: int) -> str:
    return f"{n / 1e9:.2f}B" if n >= 1e9 else f"{n / 1e6:.0f}M"


def _peak(args: argparse.Namespace) -> Peak:
    from pyggml_repkv.ffi.handles import Backend
    from pyggml_repkv.lab.inspect.peak import measure_peak

    backend = Backend(args.threads)
    try:
        return measure_peak(backend)
    finally:
        backend.close()


def _step_bytes(args: argparse.Namespace, memories: dict[str, MemoryConfig], plan: Plan) -> dict[tuple[str, int], int]:
    """Returns the bytes that a step of one token moves, by (contender, depth). llama.cpp counts as `full`."""
    from dataclasses import replace

    from pyggml_repkv.lab.inspect.builder import BuiltGraph, Wanted
    from pyggml_repkv.memory.config import DISK_FIELDS, MemoryConfig

    found = {}
    in_ram = {name: getattr(MemoryConfig(), name) for name in DISK_FIELDS}
    for depth in {case.depth for case in plan.cases}:
        for c in plan.contenders:
            theirs = MemoryConfig(type_k=args.cache_type_k, type_v=args.cache_type_v)
            memory = replace(memories[c.name] if c.is_ours else theirs, n_ctx=plan.n_ctx(depth, c), **in_ram)
            exact = args.exact_graph and c.is_ours
            wanted = Wanted("decode", memory, depth, args.threads, exact=exact, rope=rope_options(args))
            with BuiltGraph(args.model, wanted) as graph:
                found[c.name, depth] = sum(node.bytes_moved for node in graph.snapshot().nodes)
    return found


def _machine(args: argparse.Namespace) -> int:
    from pyggml_repkv.ffi.handles import Backend
    from pyggml_repkv.lab.bench.load import busy_cores, cpu_name, load_warning
    from pyggml_repkv.lab.bench.machine import measure_types

    busy, peak = [busy_cores()], _peak(args)
    backend = Backend(args.threads)
    try:
        types = list(measure_types(backend))
    finally:
        backend.close()
    busy.append(busy_cores())
    if args.output == "md":
        output.write(
            f"{cpu_name()}, {args.threads} threads: {peak.gbytes_per_second:.1f} GB/s from memory, "
            f"{peak.gflops:.0f} GFLOP/s of F32 multiply-adds\n\n"
            "| weights | GFLOP/s, 512 tokens | GB/s, one token |\n| ------- | ------------------: | --------------: |\n"
        )
        output.write("".join(f"| {t.type:7} | {t.gflops:19.0f} | {t.gbytes_per_second:15.1f} |\n" for t in types))
    else:
        common = {"cpu_info": cpu_name(), "n_threads": args.threads, "peak_gflops": peak.gflops,
                  "peak_gbytes_per_second": peak.gbytes_per_second}  # fmt: skip
        rows = [common | asdict(t) for t in types]
        if args.output == "json":
            output.write(json.dumps({**common, "types": [asdict(t) for t in types]}, indent=2) + "\n")
        else:
            from pyggml_repkv.lab.bench import table

            output.write(table.json_lines(rows) if args.output == "jsonl" else table.csv_lines(rows, with_header=True))
    warning = load_warning(busy)
    if warning:
        output.say(f"warning: {warning}")
    return 0


def _integers(low: int, high: int) -> Callable[[str], list[int]]:
    parse = integer(low, high)
    return lambda text: list(dict.fromkeys(parse(part) for part in text.split(",")))
