"""Draw where the time of a chunk and of a token goes: compute by layer, waits for blocks, and reads.

It resumes a session of bench_disk.py (or of `run --session`), reads on in the text without saving, and records the
store's events. A layer's bar reaches from the selection of its blocks to that of the next layer; layers whose blocks
are known before the step, and asked for together, share a bar.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from _common import model_path, run_tool, say
from bench_disk import memory_in_ram

from pyggml_repkv.cli.parser import HelpFormatter, Parser, byte_size, integer
from pyggml_repkv.cli.prompt import read_text_file
from pyggml_repkv.engine.model import Model
from pyggml_repkv.engine.session import Session
from pyggml_repkv.engine.threads import default_threads
from pyggml_repkv.errors import InputError
from pyggml_repkv.lab.eval import plotting
from pyggml_repkv.memory.config import PREFETCH
from pyggml_repkv.memory.repkv.memory import RepKVMemory
from pyggml_repkv.memory.store.block_store import Event

N_WARM_CHUNKS, N_WARM_TOKENS = 2, 16

# Every layer takes longer than this.
MAX_APART_MS = 0.05


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="plot_prefetch.py", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("-m", "--model", metavar="MODEL", default="demo", help="GGUF file or name (default: demo)")
    parser.add_argument("-t", "--threads", metavar="N", type=integer(1, 512), default=default_threads())
    parser.add_argument("--session", metavar="DIR", required=True, help="a session that has read some of the text")
    parser.add_argument("--ours", metavar="FLAGS", default="--kv repkv", help="the flags of `run` that made it")
    parser.add_argument("--text", metavar="FILE", required=True, help="the text")
    parser.add_argument(
        "--tokens", metavar="N", type=integer(4096, 2**20), default=65536, help="tokens that it has read"
    )
    parser.add_argument("--kv-ram", metavar="SIZE", type=byte_size, default=byte_size("144M"), help="(default: 144M)")
    parser.add_argument("--prefetch", choices=PREFETCH, default="on", help="(default: %(default)s)")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="a PNG or SVG file")
    return parser


def main(argv: Sequence[str]) -> int:
    args = build_parser().parse_args(argv)
    plotting.pyplot()  # Raises before the work if matplotlib is missing.
    memory = memory_in_ram(args.ours)
    with Model.load(model_path(args), threads=args.threads, repack=False) as model:
        text = read_text_file(args.text, "--text")[: 16 * (args.tokens + 4096)]
        tokens = model.tokenizer.encode(text)
        memory = replace(memory, n_ctx=args.tokens + 4096, kv_ram=args.kv_ram, prefetch=args.prefetch)
        with model.session(memory, directory=args.session) as session:
            session.stop_saving()
            if session.go_back_to(tokens[: args.tokens], lambda _: False).n_past != args.tokens:
                raise InputError(f"--session {args.session} has not read {args.tokens} tokens of {args.text}")
            chunk = _trace_chunk(session, tokens)
            token = _trace_token(session, tokens)
    _draw(args.output, {"a chunk of 512 tokens": chunk, "one token": token})
    say(f"wrote {args.output}")
    return 0


def _trace_chunk(session: Session, tokens: list[int]) -> list[Event]:
    for _ in range(N_WARM_CHUNKS):
        session.read(tokens[session.n_past : session.n_past + session.n_batch])
    return _traced(session, lambda: session.read(tokens[session.n_past : session.n_past + session.n_batch]))


def _trace_token(session: Session, tokens: list[int]) -> list[Event]:
    for _ in range(N_WARM_TOKENS):
        session.decode(tokens[session.n_past])
    return _traced(session, lambda: session.decode(tokens[session.n_past]))


def _traced(session: Session, step: Any) -> list[Event]:
    assert isinstance(session.policy, RepKVMemory)
    assert session.policy.disk is not None
    with session.policy.disk.io.trace() as events:
        step()
    done = 1e3 * time.monotonic()
    events.append(Event("end", -1, -1, ahead=False, begin_ms=done, end_ms=done))
    start = min(e.begin_ms for e in events)
    return [replace(e, begin_ms=e.begin_ms - start, end_ms=e.end_ms - start) for e in events]


def _asked_together(selected: list[Event]) -> list[list[Event]]:
    """Returns groups of layers. Nothing is computed between layers that are asked for within MAX_APART_MS."""
    groups: list[list[Event]] = []
    for event in selected:
        if groups and event.begin_ms - groups[-1][-1].begin_ms < MAX_APART_MS:
            groups[-1].append(event)
        else:
            groups.append([event])
    return groups


def _draw(path: str, traces: dict[str, list[Event]]) -> None:
    from matplotlib.patches import Patch

    pyplot = plotting.pyplot()
    figure, axes = pyplot.subplots(len(traces), 1, figsize=(14, 4 * len(traces)), layout="constrained")
    colours = [pyplot.get_cmap("tab10")(i) for i in (0, 1, 2, 4, 9)]
    for axis, (title, events) in zip(axes, traces.items(), strict=True):
        groups = _asked_together([e for e in events if e.kind == "selected"])
        ends = [group[0].begin_ms for group in groups[1:]] + [e.end_ms for e in events if e.kind == "end"]
        for group, end in zip(groups, ends, strict=True):
            left, first, last = group[0].begin_ms, group[0].layer, group[-1].layer
            axis.barh(0, end - left, left=left, color=colours[first % 5], height=0.9, linewidth=0)
            if len(group) > 1:
                axis.text((left + end) / 2, 0, f"layers {first} to {last}", ha="center", va="center", color="white")
        for wait in (e for e in events if e.kind == "wait"):
            axis.barh(0, wait.end_ms - wait.begin_ms, left=wait.begin_ms, color="black", height=0.4, linewidth=0)
        lanes: list[float] = []
        for read in sorted((e for e in events if e.kind in ("read", "staged")), key=lambda e: e.begin_ms):
            lane = next((i for i, end in enumerate(lanes) if end <= read.begin_ms), len(lanes))
            lanes[lane : lane + 1] = [read.end_ms]
            axis.barh(
                -1 - lane, read.end_ms - read.begin_ms, left=read.begin_ms, height=0.8, color=colours[read.layer % 5],
                edgecolor="none" if read.ahead else "black", linewidth=0 if read.ahead else 0.6,
            )  # fmt: skip
        n_ahead = sum(e.ahead for e in events if e.kind == "read")
        n_read = sum(e.kind == "read" for e in events)
        waited = sum(e.end_ms - e.begin_ms for e in events if e.kind == "wait")
        axis.set_title(f"{title}: {n_read} reads, {n_ahead} of them ahead; compute waited {waited:.1f} ms", loc="left")
        names = ["layers", *(f"reads {i + 1}" for i in range(len(lanes)))]
        axis.set_yticks([0, *range(-1, -1 - len(lanes), -1)], names)
        axis.set_xlabel("ms")
        axis.margins(x=0.005)
    handles = [Patch(color=c, label=f"layers {i}, {i + 5}, ...") for i, c in enumerate(colours)]
    handles += [
        Patch(color="black", label="compute waits"),
        Patch(facecolor="white", edgecolor="black", label="read when needed"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(run_tool(main))
