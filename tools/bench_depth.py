"""Measure prefill and decode deep in a context against llama.cpp, on the same machine, model, threads and tokens.

Every engine has a process of its own, and they take turns. Ours really reads each prompt: its chunk is the last whole
one. llama.cpp's context is filled by repeating the stored keys and values of 512 tokens (`repeated`), because what a
step costs depends on how many there are, not on what they are; its whole prompt is `estimated` by a line through the
times of chunks at five depths. Up to --full-up-to it also really reads the prompt (`read`). "speed" is ours over the
better llama.cpp median, so that above 1 is faster; a prompt really read goes before an estimate.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import linear_regression, mean, median
from typing import Any

import bench_llama
from _engines import (
    MAX_TOKENS,
    EngineProcess,
    check_same_vocabulary,
    context_size,
    integers,
    model_path,
    run_tool,
    say,
    write_table,
)
from bench_llama import REST_S, load_warnings
from repkv_depth_worker import CHUNK, memory_of

from pyggml_repkv.cli import output
from pyggml_repkv.cli.parser import HelpFormatter, Parser, integer
from pyggml_repkv.engine.threads import MAX_THREADS, default_threads
from pyggml_repkv.errors import InputError, RepkvError
from pyggml_repkv.model.gguf_file import GGUFFile
from pyggml_repkv.model.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
LLAMA_WORKER = Path(__file__).with_name("llama_depth_worker.py")
REPKV_WORKER = Path(__file__).with_name("repkv_depth_worker.py")
LLAMA_NAMES = {"on": "llama.cpp -fa on", "off": "llama.cpp -fa off"}
HEADER = ("measurement", "engine", "context", "unit", "median", "min", "max", "speed")

# Room after the prompt, for what is measured there.
N_SPARE = 1024
N_DECODE = 8
N_DECODE_OURS = 32
N_PARTS = 4
MAX_OFF_LINE = 0.1

READ, REPEATED, ESTIMATED = "read", "repeated", "estimated"


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds of a chunk of CHUNK tokens, by the number of tokens before it."""

    at_zero: float
    per_token: float

    @classmethod
    def fit(cls, depths: Sequence[int], seconds: Sequence[float]) -> Line:
        """By least squares."""
        slope, intercept = linear_regression(depths, seconds)
        return cls(intercept, slope)

    def at(self, depth: int) -> float:
        return self.at_zero + self.per_token * depth

    def prompt(self, n_tokens: int) -> float:
        """Seconds of a whole prompt, read chunk by chunk; a shorter last one costs its share."""
        return sum(self.at(start) * min(CHUNK, n_tokens - start) / CHUNK for start in range(0, n_tokens, CHUNK))


@dataclass(frozen=True, slots=True)
class Curve:
    """How long chunks take a llama.cpp by depth: seconds[round][i] at depths[i]."""

    engine: str
    depths: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    @property
    def medians(self) -> list[float]:
        return [median(column) for column in zip(*self.seconds, strict=True)]

    @property
    def line(self) -> Line:
        return Line.fit(self.depths, self.medians)

    @property
    def off_line(self) -> float:
        """How far a median is from the line at most, as a share of the mean chunk's time."""
        line, medians = self.line, self.medians
        off = max(abs(time - line.at(depth)) for depth, time in zip(self.depths, medians, strict=True))
        return off / mean(medians)

    def estimates(self, n_tokens: int) -> Iterator[float]:
        """Tokens/s of a whole prompt, for each round."""
        for seconds in self.seconds:
            yield n_tokens / Line.fit(self.depths, seconds).prompt(n_tokens)

    def text(self) -> str:
        points = ", ".join(f"{1e3 * time:.0f} at {n}" for n, time in zip(self.depths, self.medians, strict=True))
        line = f"{1e3 * self.line.at_zero:.0f} + {1e6 * self.line.per_token:.1f} per 1000 tokens of depth"
        return f"{self.engine}: ms of a chunk {points}; line {line}, off by {100 * self.off_line:.0f} % of the mean"


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement of one engine at one depth; speed is None for llama.cpp itself."""

    measurement: str
    depth: int
    engine: str
    context: str
    unit: str
    values: tuple[float, ...]
    speed: float | None = None

    @property
    def median(self) -> float:
        return median(self.values)

    def cells(self) -> tuple[str, ...]:
        numbers = (f"{value:.2f}" for value in (self.median, min(self.values), max(self.values)))
        speed = "" if self.speed is None else f"{self.speed:.2f}"
        return self.measurement, self.engine, self.context, self.unit, *numbers, speed

    def against(self, others: Sequence[Row]) -> Row:
        """With the speed over the best llama.cpp of the same measurement, if there is one."""
        theirs = [row for row in others if row.measurement == self.measurement]
        theirs = [row for row in theirs if row.context != ESTIMATED] or theirs
        higher_is_faster = self.unit == "tokens/s"
        speeds = [self.median / row.median if higher_is_faster else row.median / self.median for row in theirs]
        return replace(self, speed=min(speeds, default=None))


# (measurement, context, unit), value
Sample = tuple[tuple[str, str, str], float]


class Engines:
    """The processes, with the model loaded in each."""

    def __init__(self, stack: ExitStack, args: argparse.Namespace) -> None:
        options = {"model": str(args.model), "n_threads": args.threads}
        self.ours: EngineProcess | None = None
        self.llamas: list[EngineProcess] = []
        # Ours is started first: what it says about a bad file is more than llama.cpp does.
        if args.only != "llama":
            self.ours = stack.enter_context(EngineProcess("ours", REPKV_WORKER))
            self.ours.load(**options, memory=args.ours)
        if args.only != "ours":
            for flash_attn in ("on", "off") if args.flash_attn == "both" else (args.flash_attn,):
                engine = stack.enter_context(EngineProcess(LLAMA_NAMES[flash_attn], LLAMA_WORKER, args.llama_python))
                engine.load(**options)
                self.llamas.append(engine)
        check_same_vocabulary(self.all)

    @property
    def all(self) -> list[EngineProcess]:
        return self.llamas + ([self.ours] if self.ours else [])

    @property
    def versions(self) -> str:
        return ", ".join(dict.fromkeys(engine.version for engine in self.all))


def measure(
    args: argparse.Namespace, engines: Engines, depth: int, tokens: list[int]
) -> tuple[list[Row], list[Curve], list[float]]:
    """All rounds at one depth -> rows, llama.cpp's curves, and how many cores others kept busy in between."""
    values: dict[str, dict[tuple[str, str, str], list[float]]] = {engine.name: {} for engine in engines.all}
    seconds: dict[str, list[tuple[float, ...]]] = {engine.name: [] for engine in engines.llamas}
    points = tuple(depth * part // N_PARTS for part in range(N_PARTS + 1))
    busy = [bench_llama.busy_cores()]
    for engine in engines.llamas:
        engine.ask("open", n_ctx=context_size(depth + N_SPARE), flash_attn=engine.name == LLAMA_NAMES["on"])
    for n_round in range(1, args.rounds + 1):
        for engine in engines.all:
            say(f"depth {depth}, round {n_round} of {args.rounds}: {engine.name}")
            time.sleep(REST_S)
            if engine is engines.ours:
                samples = list(our_round(engine, depth, tokens, args.memory.flash_attn))
            else:
                samples = list(llama_round(engine, depth, tokens, really=depth <= args.full_up_to))
                seconds[engine.name].append(chunk_seconds(engine, points, tokens))
                samples.append((chunk_at(depth, REPEATED), 1e3 * seconds[engine.name][-1][-1]))
            for key, value in samples:
                values[engine.name].setdefault(key, []).append(value)
        busy.append(bench_llama.busy_cores())
    curves = [Curve(name, points, tuple(rounds)) for name, rounds in seconds.items()]
    for curve in curves:
        values[curve.engine][prompt_of(depth, ESTIMATED)] = list(curve.estimates(depth))
    return rows_of(depth, values), curves, busy


def rows_of(depth: int, values: dict[str, dict[tuple[str, str, str], list[float]]]) -> list[Row]:
    """By measurement, then engine, then context."""
    rows = [
        Row(measurement, depth, engine, context, unit, tuple(each))
        for engine, of_engine in values.items()
        for (measurement, context, unit), each in of_engine.items()
    ]
    names = [key(depth, READ)[0] for key in (prompt_of, chunk_at, decode_at)]
    rows.sort(key=lambda row: names.index(row.measurement))
    llamas = [row for row in rows if row.engine in LLAMA_NAMES.values()]
    return [row if row in llamas else row.against(llamas) for row in rows]


def prompt_of(depth: int, context: str) -> tuple[str, str, str]:
    return f"prefill whole prompt of {depth}", context, "tokens/s"


def chunk_at(depth: int, context: str) -> tuple[str, str, str]:
    return f"chunk of {CHUNK} at {depth}", context, "ms"


def decode_at(depth: int, context: str) -> tuple[str, str, str]:
    return f"decode at {depth}", context, "ms/token"


def llama_round(engine: EngineProcess, depth: int, tokens: list[int], *, really: bool) -> Iterator[Sample]:
    """Leaves a repeated context of that depth."""
    chunk, steps = tokens[depth : depth + CHUNK], tokens[depth : depth + N_DECODE]
    if really:
        yield prompt_of(depth, READ), depth / sum(engine.ask("read", tokens=tokens[:depth])["seconds"])
        yield chunk_at(depth, READ), 1e3 * engine.ask("time_chunk", tokens=chunk, depth=depth)["seconds"]
        yield decode_at(depth, READ), 1e3 * median(engine.ask("time_tokens", tokens=steps, depth=depth)["seconds"])
    engine.ask("place", tokens=tokens[:CHUNK], depth=depth)
    yield decode_at(depth, REPEATED), 1e3 * median(engine.ask("time_tokens", tokens=steps, depth=depth)["seconds"])


def chunk_seconds(engine: EngineProcess, depths: Sequence[int], tokens: list[int]) -> tuple[float, ...]:
    """Of a chunk at each depth; the context must be the deepest, and is cut back to the others one by one."""
    seconds = {n: engine.ask("time_chunk", tokens=tokens[n : n + CHUNK], depth=n)["seconds"] for n in reversed(depths)}
    return tuple(seconds[n] for n in depths)


def our_round(engine: EngineProcess, depth: int, tokens: list[int], flash_attn: bool) -> Iterator[Sample]:
    engine.ask("open", n_ctx=context_size(depth + N_SPARE), flash_attn=flash_attn)
    reply = engine.ask("read", tokens=tokens[:depth])
    yield prompt_of(depth, READ), depth / sum(reply["seconds"])
    yield chunk_at(depth, READ), 1e3 * last_whole_chunk(reply["ends"], reply["seconds"])
    steps = engine.ask("decode", tokens=tokens[depth : depth + N_DECODE_OURS])["seconds"]
    yield decode_at(depth, READ), 1e3 * median(steps)


def last_whole_chunk(ends: Sequence[int], seconds: Sequence[float]) -> float:
    """Its seconds. Raises RepkvError if the memory of ours reads other chunks."""
    for start, end, time_s in reversed(list(zip((0, *ends), ends, seconds, strict=False))):
        if end - start == CHUNK:
            return time_s
    raise RepkvError(f"ours read no chunk of {CHUNK} tokens, which is what is compared")


def prompt_tokens(paths: Sequence[Path], model: Path, n_tokens: int) -> list[int]:
    """The tokens of the files one after the other, over and over if short."""
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text("utf-8"))
        except (OSError, UnicodeError) as error:
            raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    tokens = Tokenizer.from_metadata(GGUFFile.open(model).metadata).encode("\n".join(texts))
    if not tokens:
        raise InputError(f"{', '.join(map(str, paths))}: no tokens in it; give a text")
    return (tokens * -(-n_tokens // len(tokens)))[:n_tokens]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="bench_depth.py", usage="%(prog)s [-m FILE] [options]", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("-m", "--model", metavar="FILE", type=Path, help="GGUF file (default: the demo model)")
    parser.add_argument(
        "-t",
        "--threads",
        metavar="N",
        type=integer(1, MAX_THREADS),
        default=default_threads(),
        help="compute threads of each engine (default: %(default)s, the physical cores at hand)",
    )
    parser.add_argument(
        "-d",
        "--depths",
        metavar="N,N",
        type=integers(2 * CHUNK, MAX_TOKENS - N_SPARE),
        default=(16384, 65536),
        help="tokens in the context (default: 16384,65536)",
    )
    parser.add_argument(
        "-r",
        "--rounds",
        metavar="N",
        type=integer(1, 1000),
        default=3,
        help="times that each measurement is made (default: %(default)s)",
    )
    parser.add_argument(
        "--full-up-to",
        metavar="N",
        type=integer(0, MAX_TOKENS),
        default=0,
        help="the deepest context that llama.cpp also really reads (default: %(default)s)",
    )
    parser.add_argument(
        "--ours",
        metavar="OPTIONS",
        default="--kv repkv",
        help="the memory of ours, with the options of `run` (default: '%(default)s')",
    )
    parser.add_argument(
        "-fa",
        "--flash-attn",
        metavar="KIND",
        choices=("on", "off", "both"),
        default="on",
        help="llama.cpp's attention: on, off or both (default: %(default)s)",
    )
    parser.add_argument("--only", metavar="ENGINE", choices=("llama", "ours"), help="measure llama or ours alone")
    parser.add_argument(
        "--text",
        metavar="FILE",
        type=Path,
        help="the prompt (UTF-8), over and over if short (default: README.md and docs)",
    )
    parser.add_argument(
        "--llama-python",
        metavar="FILE",
        default=sys.executable,
        help="interpreter that has llama-cpp-python and numpy (default: the one that runs this)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write all values to this file")
    args = parser.parse_args(argv)
    if not args.depths:
        raise InputError("--depths is empty; it must hold at least one depth")
    args.memory = memory_of(args.ours)
    if args.json:
        # Not after an hour of measuring.
        write_json_file(args.json, {})
    args.model = model_path(args)
    return args


def write_json_file(path: Path, report: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(report, allow_nan=False) + "\n")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; --json takes a file that can be written") from None


def report_of(args: argparse.Namespace, versions: str, rows: Sequence[Row], curves: Sequence[Curve]) -> dict[str, Any]:
    options = {"model": str(args.model), "n_threads": args.threads, "n_rounds": args.rounds, "ours": args.ours}
    return {
        **options,
        "versions": versions,
        "rows": [{**asdict(row), "median": row.median} for row in rows],
        "curves": [{**asdict(curve), "line": asdict(curve.line), "off_line": curve.off_line} for curve in curves],
    }


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    paths = [args.text] if args.text else [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    tokens = prompt_tokens(paths, args.model, max(args.depths) + N_SPARE)
    rows: list[Row] = []
    curves: list[Curve] = []
    busy: list[float] = []
    with ExitStack() as stack:
        engines = Engines(stack, args)
        for depth in args.depths:
            measured = measure(args, engines, depth, tokens)
            for found, new in zip((rows, curves, busy), measured, strict=True):
                found.extend(new)
            # Also for whoever interrupts the next, longer one.
            if args.json:
                write_json_file(args.json, report_of(args, engines.versions, rows, curves))
        about = [args.model.name, f"-t {args.threads}", f"-r {args.rounds}", f"ours {args.ours}", engines.versions]
    warnings = load_warnings(busy) + [
        f"{curve.engine} is off its line by {100 * curve.off_line:.0f} %: its estimate for {curve.depths[-1]} is rough"
        for curve in curves
        if curve.off_line > MAX_OFF_LINE
    ]
    output.write(", ".join(about) + "\n")
    write_table(HEADER, [row.cells() for row in rows], n_left=4)
    output.write("".join(f"{curve.text()}\n" for curve in curves))
    if args.json:
        write_json_file(args.json, {**report_of(args, engines.versions, rows, curves), "warnings": warnings})
    for warning in warnings:
        say(f"warning: {warning}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
