"""`model`: lists, fetches and removes models, and shows what a file holds and the memory it needs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyggml_repkv.cli import model_cache, output
from pyggml_repkv.cli.memory_flags import check_memory_flags, kind_of, memory_config
from pyggml_repkv.cli.model_file import model_path, rope_options
from pyggml_repkv.cli.options import KV_POLICIES, add_context_options, add_memory_options, add_model_options
from pyggml_repkv.cli.parser import HelpFormatter, Parser, filled_text
from pyggml_repkv.engine.threads import default_threads
from pyggml_repkv.errors import InputError
from pyggml_repkv.memory.config import DISK_FIELDS

if TYPE_CHECKING:
    from pyggml_repkv.lab.inspect.model_info import MemoryPlan, ModelInfo, SpecialToken
    from pyggml_repkv.memory.config import MemoryConfig

EXAMPLES = """
examples:
  %(prog)s
  %(prog)s qwen2.5-coder-1.5b -c 131072
  %(prog)s -m model.gguf -c 1000000 --kv repkv --kv-ram 2G --json
"""

_INDENT = 14
_WIDTH = 80


def build_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds `model` and its tasks."""
    parser = subparsers.add_parser(
        "model",
        usage="%(prog)s TASK [options]",
        description="Lists, fetches and removes models that have a name; shows what a model file holds.",
        epilog="`%(prog)s TASK --help` lists the options of a task.",
        formatter_class=HelpFormatter,
    )
    tasks = parser.add_subparsers(
        title="tasks", dest="task", metavar="TASK", required=True, parser_class=Parser, prog=parser.prog
    )
    info = tasks.add_parser(
        "info",
        usage="%(prog)s [MODEL] [options]",
        help="sizes, tokenizer, types of the weights, and the memory that a context needs",
        description="Shows what a GGUF file holds, and how much RAM and disk `run` would need with the same options.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
    )
    info.add_argument("file", metavar="MODEL", nargs="?", type=filled_text, help="GGUF file or name, as -m MODEL")
    info.add_argument("--json", action="store_true", help="print one JSON object (docs/model_info.md has the keys)")
    add_model_options(info)
    add_context_options(info)
    add_memory_options(info)
    model_cache.add_tasks(tasks)
    for action in info._actions:
        if action.dest == "kv":
            action.default = None
            action.help = (
                f"only this memory policy: {', '.join(KV_POLICIES)}, or NAME.py (default: all that other options allow)"
            )
        elif action.dest == "ctx_size":
            action.help = "tokens to plan for; 0 means the trained context (default: 0)"


def main(args: argparse.Namespace) -> int:
    """Runs a task and returns its exit code. Raises RepkvError."""
    return _info(args) if args.task == "info" else model_cache.main(args)


def _info(args: argparse.Namespace) -> int:
    from pyggml_repkv.engine import budget
    from pyggml_repkv.lab.inspect.model_info import ModelInfo, PlanInputs
    from pyggml_repkv.model.gguf_file import GGUFFile

    memories = _memories(args)
    info = ModelInfo(GGUFFile.open(_path(args)), rope_options(args))
    free = budget.available_bytes()
    inputs = PlanInputs(
        memories=memories,
        n_tokens=args.ctx_size or info.config.n_ctx_train,
        n_threads=args.threads or default_threads(),
        repack=not args.no_repack,
        exact=args.exact_graph,
    )
    plans = info.plans(inputs, free)
    if args.json:
        output.write(json.dumps(info.as_json(plans, free)) + "\n")
    else:
        output.write("\n".join(_lines(info, plans, free)) + "\n")
    return 0


def _path(args: argparse.Namespace) -> Path:
    if args.file is not None:
        if args.model is not None or args.hf_repo is not None:
            raise InputError("a model was given as MODEL and with -m or -hf: leave one out")
        args.model = args.file
    args.quiet = True
    return model_path(args)


def _memories(args: argparse.Namespace) -> list[MemoryConfig]:
    """Returns a MemoryConfig for each policy to show."""
    check_memory_flags(args, KV_POLICIES if args.kv is None else [args.kv])
    if args.kv is not None:
        return [memory_config(args, args.ctx_size)]
    # Both options exclude the fused forms.
    kinds = {kv: kind_of(kv) for kv in KV_POLICIES}
    only_ggml = args.exact_graph or args.flash_attn == "off"
    shown = [kv for kv, kind in kinds.items() if "ggml" in kind.forms or not only_ggml]
    without_disk = {**vars(args), **dict.fromkeys(DISK_FIELDS)}
    namespaces = (
        argparse.Namespace(**{**(vars(args) if kinds[kv].evicts else without_disk), "kv": kv}) for kv in shown
    )
    return [memory_config(namespace, args.ctx_size) for namespace in namespaces]


def _lines(info: ModelInfo, plans: Sequence[MemoryPlan], free: int) -> Iterable[str]:
    yield from _facts(_file_facts(info))
    yield ""
    yield from _facts(_config_facts(info))
    yield ""
    yield from _facts(_tokenizer_facts(info))
    yield ""
    if not info.types:
        yield from _facts([("weights", ["none: this file is a vocabulary, which cannot be run"])])
        return
    yield from _weights_table(info)
    yield ""
    yield from _memory_table(plans, free)


def _facts(facts: Iterable[tuple[str, Sequence[str]]]) -> Iterable[str]:
    """Yields `label  text`, with further texts below the first."""
    for label, texts in facts:
        for i, text in enumerate(texts):
            yield f"{label if i == 0 else '':<{_INDENT}}{text}"


def _file_facts(info: ModelInfo) -> list[tuple[str, Sequence[str]]]:
    from pyggml_repkv.engine.budget import size
    from pyggml_repkv.model.gguf_file import printable

    file = info.file
    parts = f" in {len(file.parts)} files" if len(file.parts) > 1 else ""
    about = f"{size(file.n_bytes)}{parts}, GGUF version {file.version}, {len(file.tensors)} tensors"
    if info.unused:
        about += f", {len(info.unused)} of them unknown and ignored"
    return [("file", [printable(file.path, 400), about])]


def _config_facts(info: ModelInfo) -> list[tuple[str, Sequence[str]]]:
    from pyggml_repkv.model.gguf_file import printable

    config, scaling = info.config, info.config.rope_scaling
    stretch = str(scaling)
    if scaling.kind == "none" and "rope_freqs.weight" in info.file.tensors:
        stretch = "each frequency scaled by the file's rope_freqs"
    turned = f", {config.rope_dim} of {config.head_dim} values of a head" if config.rope_dim != config.head_dim else ""
    embeddings = info.file.tensors.get("token_embd.weight")
    n_rows = embeddings.shape[0] if embeddings else config.n_vocab
    rows = f" ({n_rows:,} rows)" if n_rows > config.n_vocab else ""
    output_is = "the token embedding (tied)" if config.tied_output else "a matrix of its own"
    return [
        ("model", [printable(config.name)]),
        ("architecture", [config.arch]),
        ("layers", [str(config.n_layer)]),
        ("embedding", [str(config.n_embd)]),
        ("heads", [f"{config.n_head} for queries, {config.n_head_kv} for keys and values, of {config.head_dim}"]),
        ("feed-forward", [str(config.n_ff)]),
        ("vocabulary", [f"{config.n_vocab:,} tokens{rows}"]),
        ("trained on", [f"{config.n_ctx_train:,} tokens"]),
        ("rope", [f"base {config.rope_base:.9g}{turned}, {stretch}"]),
        ("norm", [f"RMS, epsilon {config.norm_eps:.3g}"]),
        *([("output", [output_is])] if info.types else []),
    ]


def _tokenizer_facts(info: ModelInfo) -> list[tuple[str, Sequence[str]]]:
    import textwrap

    from pyggml_repkv.model.gguf_file import printable

    t = info.tokenizer
    refused = [] if t.supported else textwrap.wrap(f"`run` refuses it: {printable(t.problem, 200)}", _WIDTH - _INDENT)
    kind, pre = printable(t.kind or "not named"), printable(t.pre or "not named")
    specials = [_special(role, token) for role, token in (("bos", t.bos), ("eos", t.eos), ("eot", t.eot))]
    begins = "texts begin with bos" if t.add_bos and t.bos else "texts do not begin with bos"
    templates = ", ".join(printable(name, 40) for name in t.chat_templates[:5]) or "none"
    if len(t.chat_templates) > 5:
        templates += f" and {len(t.chat_templates) - 5} more"
    return [
        ("tokenizer", [f"{kind}, pre-tokenizer {pre}", f"{t.n_tokens:,} tokens, {t.n_merges:,} merges", *refused]),
        ("special", [*filter(None, specials), begins]),
        ("chat template", [templates]),
    ]


def _special(role: str, token: SpecialToken | None) -> str:
    from pyggml_repkv.model.gguf_file import printable

    return f"{role} {token.id} {printable(token.text)}" if token else ""


def _weights_table(info: ModelInfo) -> Iterable[str]:
    from pyggml_repkv.engine.budget import size
    from pyggml_repkv.lab.inspect.table import as_table

    yield from _facts([("weights", [
        f"{_count(info.n_parameters)} parameters, {size(info.weight_bytes)}, {info.bits_per_weight:.2f} bits per weight"
    ])])  # fmt: skip
    repacks = any(t.n_repacked for t in info.types)
    header = ("type", "tensors", "parameters", "size", "bits/weight", *(("repacked here",) if repacks else ()))
    rows = [
        (
            t.type, str(t.n_tensors), f"{t.n_parameters:,}", size(t.bytes), f"{t.bits_per_weight:.2f}",
            *((str(t.n_repacked or "-"),) if repacks else ()),
        )
        for t in info.types
    ]  # fmt: skip
    yield from _indented(as_table(header, rows, frozenset(("type",))))


def _memory_table(plans: Sequence[MemoryPlan], free: int) -> Iterable[str]:
    from pyggml_repkv.engine.budget import size
    from pyggml_repkv.lab.inspect.table import as_table
    from pyggml_repkv.model.gguf_file import printable

    yield from _facts([("memory", [f"for {plans[0].n_tokens:,} tokens; {size(free)} of RAM are free"])])
    last = "compute"
    parts = dict.fromkeys(part for plan in plans for part in plan.ram if part != last)
    parts |= dict.fromkeys(part for plan in plans for part in plan.ram if part == last)
    rows = [(part, *(size(plan.ram[part]) if plan.ram.get(part) else "-" for plan in plans)) for part in parts]
    rows.append(("RAM in all", *(size(plan.ram_bytes) for plan in plans)))
    if any(plan.disk for plan in plans):
        rows.append(("disk", *(size(plan.disk.total) if plan.disk else "-" for plan in plans)))
    rows.append(("fits", *("yes" if plan.fits else "no" for plan in plans)))
    names = [printable(Path(plan.policy).name, 30) for plan in plans]
    header = ("", *(f"--kv {name}" for name in names))
    yield from _indented(as_table(header, rows, frozenset(("",))))
    for name, plan in zip(names, plans, strict=True):
        if plan.note:
            yield from _wrapped(f"{name}: {printable(plan.note, 400)}")
    folders = dict.fromkeys(
        f"disk: {size(need.free)} are free in {printable(need.folder, 400)}" for plan in plans if (need := plan.disk)
    )
    for line in folders:
        yield from _wrapped(line)


def _indented(table: str) -> Iterable[str]:
    return (f"{'':<{_INDENT}}{line}" for line in table.splitlines())


def _wrapped(text: str) -> Iterable[str]:
    import textwrap

    indent = " " * _INDENT
    return textwrap.wrap(
        text, _WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _count(n: int) -> str:
    if n < 1e6:
        return f"{n:,}"
    return f"{n / 1e6:.1f} million" if n < 1e9 else f"{n / 1e9:.2f} billion"
