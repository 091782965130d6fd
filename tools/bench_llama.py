"""Measure the speed against llama.cpp on the same machine, model and threads.

Every engine has a process of its own with the model loaded, and they take turns: in each round every measurement is
made of one engine after the other, while the others rest. A first round warms up and is not counted. Prompts are random
token ids; the depth of decoding is made by really reading a prompt. "speed" is ours over the better llama.cpp median,
so that above 1 is faster.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from _engines import (
    MAX_TOKENS,
    EngineProcess,
    add_common_options,
    check_same_vocabulary,
    context_size,
    integers,
    model_path,
    random_tokens,
    run_tool,
    say,
    start_llama,
    start_repkv,
    write_json,
    write_table,
)
from _memory import MEMORY_HEADER, MemoryRow, measure_memory

from pyggml_repkv.cli import output
from pyggml_repkv.cli.parser import HelpFormatter, Parser, integer
from pyggml_repkv.errors import InputError

LLAMA_NAMES = ("llama.cpp -fa on", "llama.cpp -fa off")
OUR_NAMES = ("ours", "ours --exact-graph")
HEADER = ("measurement", "engine", "unit", "median", "min", "max", "max/min", "speed")

# Worker threads that ggml or OpenMP left spinning are asleep after this.
REST_S = 0.1
MAX_BUSY_CORES = 0.2
MAX_SPREAD = 1.3


@dataclass(frozen=True, slots=True)
class Measurement:
    """Reading n_tokens: at once, or one by one after `depth` others."""

    n_tokens: int
    depth: int | None = None

    @property
    def name(self) -> str:
        return f"prefill {self.n_tokens}" if self.depth is None else f"decode {self.n_tokens} at {self.depth}"

    @property
    def unit(self) -> str:
        return "tokens/s" if self.depth is None else "ms/token"

    @property
    def n_context(self) -> int:
        return self.n_tokens + (self.depth or 0)

    def take(self, engine: EngineProcess, stream: list[int]) -> float:
        """One measurement on the first tokens of the stream, in `unit`."""
        tokens = stream[: self.n_context]
        if self.depth is None:
            return self.n_tokens / engine.ask("time_prefill", tokens=tokens)["seconds"]
        return 1e3 * engine.ask("time_decode", tokens=tokens, depth=self.depth)["seconds"] / self.n_tokens

    def speed(self, ours: float, theirs: float) -> float:
        """How many times as fast ours is."""
        return ours / theirs if self.depth is None else theirs / ours


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement of one engine; speed is None for llama.cpp itself."""

    measurement: str
    engine: str
    unit: str
    values: tuple[float, ...]
    median: float
    spread: float
    speed: float | None

    def cells(self) -> tuple[str, ...]:
        numbers = (f"{value:.2f}" for value in (self.median, min(self.values), max(self.values), self.spread))
        return self.measurement, self.engine, self.unit, *numbers, "" if self.speed is None else f"{self.speed:.2f}"


Values = dict[tuple[Measurement, str], list[float]]


def rows_of(measurements: Sequence[Measurement], values: Values) -> list[Row]:
    """A row for each measurement and engine."""
    return [row_of(measurement, name, values) for measurement in measurements for name in LLAMA_NAMES + OUR_NAMES]


def row_of(measurement: Measurement, engine: str, values: Values) -> Row:
    each = values[measurement, engine]
    speed = None
    if engine in OUR_NAMES:
        speed = min(measurement.speed(median(each), median(values[measurement, name])) for name in LLAMA_NAMES)
    spread = max(each) / min(each)
    return Row(measurement.name, engine, measurement.unit, tuple(each), median(each), spread, speed)


def measure(args: argparse.Namespace, measurements: Sequence[Measurement]) -> tuple[Values, list[str], str]:
    """All rounds -> the values, warnings and the versions of the engines."""
    busy = [busy_cores()]
    values: Values = {}
    n_context = max(measurement.n_context for measurement in measurements)
    with ExitStack() as stack:
        engines = start_engines(stack, args)
        stream = random_tokens(n_context, check_same_vocabulary(engines), args.seed)
        for engine in engines:
            flash_attn = engine.name != LLAMA_NAMES[1]
            engine.ask("open", n_ctx=context_size(n_context), flash_attn=flash_attn)
        for n_round in range(args.rounds + 1):
            say(f"round {n_round} of {args.rounds}" if n_round else "warm-up")
            for measurement, engine, value in one_round(engines, measurements, stream):
                if n_round:
                    values.setdefault((measurement, engine.name), []).append(value)
            busy.append(busy_cores())
        versions = f"{engines[1].version}, {engines[0].version}"
    return values, load_warnings(busy), versions


def start_engines(stack: ExitStack, args: argparse.Namespace) -> list[EngineProcess]:
    """In the order in which they take turns."""
    # Ours is started first: what it says about a bad file is more than llama.cpp does.
    ours = start_repkv(stack, OUR_NAMES[0], args, exact_graph=False)
    exact = start_repkv(stack, OUR_NAMES[1], args, exact_graph=True)
    llama_on, llama_off = (start_llama(stack, name, args) for name in LLAMA_NAMES)
    return [llama_on, ours, llama_off, exact]


def one_round(
    engines: Sequence[EngineProcess], measurements: Sequence[Measurement], stream: list[int]
) -> Iterator[tuple[Measurement, EngineProcess, float]]:
    for measurement in measurements:
        for engine in engines:
            time.sleep(REST_S)
            yield measurement, engine, measurement.take(engine, stream)


def busy_cores(seconds: float = 0.5) -> float:
    """How many of the cores that this process may use are busy while it sleeps; the engines rest too."""
    time.sleep(REST_S)
    start, before = time.perf_counter(), _busy_ticks()
    time.sleep(seconds)
    ticks = _busy_ticks() - before
    return ticks / os.sysconf("SC_CLK_TCK") / (time.perf_counter() - start)


def _busy_ticks() -> int:
    cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    total = 0
    for line in Path("/proc/stat").read_text("ascii").splitlines():
        name, *fields = line.split()
        if name in cores:
            # user, nice, system, (idle, iowait,) irq, softirq, steal; the rest is counted in user already
            ticks = list(map(int, fields[:8]))
            total += sum(ticks[:3]) + sum(ticks[5:])
    return total


def load_warnings(busy: Sequence[float]) -> list[str]:
    """Of a machine that does something else: `busy` was sampled between the rounds."""
    if max(busy) <= MAX_BUSY_CORES:
        return []
    return [f"other programs kept up to {max(busy):.1f} of the cores busy: measure again on an idle machine"]


def spread_warnings(rows: Sequence[Row]) -> list[str]:
    return [
        f"{row.measurement} of {row.engine} varies by a factor of {row.spread:.2f} (above {MAX_SPREAD})"
        for row in rows
        if row.spread > MAX_SPREAD
    ]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="bench_llama.py", usage="%(prog)s [-m FILE] [options]", description=__doc__, formatter_class=HelpFormatter
    )
    add_common_options(parser)
    parser.add_argument(
        "-p",
        "--prompts",
        metavar="N,N",
        type=integers(1),
        default=(512, 2048),
        help="prompt lengths to read, '' for none (default: 512,2048)",
    )
    parser.add_argument(
        "-n",
        "--n-decode",
        metavar="N",
        type=integer(1, MAX_TOKENS),
        default=64,
        help="tokens to decode one by one (default: %(default)s)",
    )
    parser.add_argument(
        "-d",
        "--depths",
        metavar="N,N",
        type=integers(0),
        default=(0, 2048),
        help="tokens in the context before those, '' for no decoding (default: 0,2048)",
    )
    parser.add_argument(
        "-r",
        "--rounds",
        metavar="N",
        type=integer(1, 1000),
        default=5,
        help="rounds after the warm-up (default: %(default)s)",
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="also measure the load time and the peak memory of ours, in fresh processes",
    )
    args = parser.parse_args(argv)
    if not (args.prompts or args.depths or args.memory):
        raise InputError("nothing to measure: give prompt lengths (-p), depths (-d) or --memory")
    args.model = model_path(args)
    return args


def write_report(
    args: argparse.Namespace, versions: str, rows: Sequence[Row], memory: Sequence[MemoryRow], warnings: Sequence[str]
) -> None:
    if args.json:
        options = {"model": str(args.model), "n_threads": args.threads, "n_rounds": args.rounds, "versions": versions}
        tables = {"rows": [asdict(row) for row in rows], "memory": [asdict(row) for row in memory]}
        write_json({**options, **tables, "warnings": warnings})
        return
    about = [args.model.name, f"-t {args.threads}", f"-r {args.rounds}", versions]
    output.write(", ".join(filter(None, about)) + "\n")
    if rows:
        write_table(HEADER, [row.cells() for row in rows], n_left=3)
    if memory:
        write_table(MEMORY_HEADER, [row.cells() for row in memory])


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    measurements = [Measurement(n) for n in args.prompts] + [Measurement(args.n_decode, n) for n in args.depths]
    values, warnings, versions = measure(args, measurements) if measurements else ({}, [], "")
    rows = rows_of(measurements, values)
    memory = measure_memory(args.model, args.threads, args.prompts, args.rounds) if args.memory else []
    warnings += spread_warnings(rows)
    write_report(args, versions, rows, memory, warnings)
    for warning in warnings:
        say(f"warning: {warning}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
