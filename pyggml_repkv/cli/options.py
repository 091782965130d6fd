"""Options that subcommands share: the model, its context and memory, and sampling."""

from __future__ import annotations

import argparse

from pyggml_repkv.cli.parser import byte_size, filled_text, integer, number
from pyggml_repkv.engine.threads import MAX_THREADS, default_threads
from pyggml_repkv.memory.config import (
    CACHE_TYPES,
    EVICTED_TYPES,
    POSITIONS,
    PREFETCH,
    PRESETS,
    RELEVANCES,
    SCORES,
    MemoryConfig,
)
from pyggml_repkv.model.limits import MAX_CONTEXT, MAX_SCALING
from pyggml_repkv.model.rope_options import MAX_BASE, MIN_BASE, ROPE_SCALINGS

KV_POLICIES = ("full", "window", "repkv")
MAX_INT = 2**31 - 1
MAX_SEED = 2**32 - 1


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds -m, -t and the flags that say how weights are held and computed."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m",
        "--model",
        metavar="MODEL",
        type=filled_text,
        help="GGUF file, or a name that `model list` shows (default: demo)",
    )
    group.add_argument(
        "-hf",
        "-hfr",
        "--hf-repo",
        metavar="USER/REPO[:QUANT]",
        type=filled_text,
        help="model of the Hugging Face hub, kept in its cache (default QUANT: Q4_K_M, else the first GGUF file)",
    )
    group.add_argument("-hff", "--hf-file", metavar="FILE", type=filled_text, help="this file of the repository of -hf")
    group.add_argument(
        "-t",
        "--threads",
        metavar="N",
        type=integer(1, MAX_THREADS),
        help=f"compute threads (default: {default_threads()}, the physical cores, or less by CPU quota)",
    )
    group.add_argument(
        "--no-repack",
        action="store_true",
        help="use weights as the file has them: less RAM; with types that ggml repacks (Q4_0, Q4_K, ...), long prompts "
        "are read faster and tokens generated more slowly",
    )
    group.add_argument(
        "--exact-graph", action="store_true", help="compute llama.cpp's graph, node by node; decodes more slowly"
    )
    add_rope_options(parser)


def add_rope_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of RopeOptions; None where one is not given."""
    group = parser.add_argument_group("RoPE (default: as the model file says)")
    group.add_argument(
        "--rope-scaling",
        choices=ROPE_SCALINGS,
        help="how positions are stretched; yarn for contexts past the trained one, as Qwen2.5's card says",
    )
    group.add_argument(
        "--rope-scale", metavar="N", type=number(1 / MAX_SCALING, MAX_SCALING), help="stretch the context by N"
    )
    group.add_argument("--rope-freq-base", metavar="X", type=number(MIN_BASE, MAX_BASE), help="base of the frequencies")
    group.add_argument(
        "--yarn-orig-ctx",
        metavar="N",
        type=integer(1, MAX_CONTEXT),
        help="tokens that the model was trained on before YaRN",
    )


def add_context_options(parser: argparse.ArgumentParser, *, several: bool = False, sized: bool = True) -> None:
    """Adds -c, -b and the flags of every memory. several: --kv takes a comma-separated list; sized: --help has -c."""
    group = parser.add_argument_group("context")
    group.add_argument(
        "-c",
        "--ctx-size",
        metavar="N",
        type=integer(0, MAX_CONTEXT),
        default=0,
        help="tokens of context; 0 means the trained context, or a million with window and repkv (default: 0)"
        if sized
        else argparse.SUPPRESS,
    )
    group.add_argument(
        "-b",
        "--batch-size",
        metavar="N",
        type=integer(1, 16384),
        default=512,
        help="prompt tokens read at a time (default: %(default)s)",
    )
    group.add_argument(
        "--kv",
        metavar="POLICY,..." if several else "POLICY",
        type=_policies if several else _policy,
        default="full",
        help=f"KV memory {'policies' if several else 'policy'}: {', '.join(KV_POLICIES)}, or NAME.py, a file with a "
        "policy of your own (default: %(default)s)",
    )
    group.add_argument(
        "-fa",
        "--flash-attn",
        choices=("on", "off"),
        default="on",
        help="off stores attention scores, as llama.cpp does without flash attention; slower (default: %(default)s)",
    )
    for flag, name, what in (("-ctk", "k", "keys"), ("-ctv", "v", "values")):
        group.add_argument(
            flag,
            f"--cache-type-{name}",
            metavar="TYPE",
            choices=CACHE_TYPES,
            default="f16",
            help=f"type of the cached {what}: {', '.join(CACHE_TYPES)} (default: %(default)s)",
        )


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `--kv window` and `--kv repkv`; --preset sets those that are not given."""
    defaults = MemoryConfig()
    group = parser.add_argument_group("bounded memory (--kv repkv; --kv window uses the first two and --positions)")
    counts = (
        ("--n-sink", "n_sink", 0, 2**20, "first tokens, always attended"),
        ("--n-local", "n_local", 32, 2**20, "recent tokens, always attended"),
        ("--n-dense", "n_dense", 0, 2**20, "attend every block up to this length (at most the trained context)"),
        ("--budget", "budget", 0, 2**20, "older tokens that a layer attends when it reads one token"),
        ("--chunk-budget", "chunk_budget", 0, 2**20, "the same for a group of tokens of a chunk of the prompt"),
        ("--group", "group", 0, 2**14, "tokens of a chunk that share a selection, a multiple of 32; 0: all of them"),
        ("--stride", "stride", 1, 2**14, "of the tokens of a chunk every N-th is asked"),
        ("--n-question", "n_question", 0, 2**14, "last tokens of a prompt that are read one by one"),
        ("--n-score", "n_score", 0, 2**20, "with representatives: later queries that score a token; 0: 256"),
    )
    for flag, name, low, high, what in counts:
        group.add_argument(
            flag, dest=name, metavar="N", type=integer(low, high), help=f"{what} (default: {getattr(defaults, name)})"
        )
    group.add_argument(
        "--block",
        metavar="SCHEME",
        help="how older tokens are cut into blocks: fixed:N, or with representatives semantic:N-M, which ends blocks "
        f"at boundaries of the text (default: {defaults.block})",
    )
    group.add_argument(
        "--index",
        metavar="INDEX",
        help="how older tokens are found again: tokens:4, :2 or :1, codes of all of them with so many bits, or "
        f"representatives:N of each block (default: {defaults.index})",
    )
    group.add_argument(
        "--unit",
        metavar="SCHEME",
        help="what is selected of a block, with codes: N tokens, or semantic:N-M, which ends where the text ends "
        f"something (default: {defaults.unit})",
    )
    choices_of = (
        ("--score", SCORES, "what makes a token a representative: dot products with later queries, or attention"),
        ("--relevance", RELEVANCES, "how a block's representatives are compared with a query"),
        (
            "--positions",
            POSITIONS,
            (
                "where the model sees older tokens: at their true positions, all from one distance, or in order just "
                "before the window; auto: exact within the trained context, then far (window: far)"
            ),
        ),
    )
    for flag, choices, what in choices_of:
        default = getattr(defaults, flag[2:])
        group.add_argument(flag, choices=choices, help=f"{what} (default: {default})")
    group.add_argument(
        "--per-head",
        action="store_true",
        default=None,
        help="with representatives: each key head selects its own blocks",
    )
    group.add_argument(
        "--sticky",
        metavar="NATS",
        type=number(0, 50),
        help="rank a block that the last token attended higher for the next one by NATS, so that fewer blocks are read "
        f"(default: {defaults.sticky:g})",
    )
    group.add_argument(
        "--late",
        action="store_true",
        default=None,
        help="attend the blocks that the previous token selected, so that reads have a whole token's time",
    )
    group.add_argument(
        "--kv-dir",
        metavar="DIR",
        type=filled_text,
        help="write evicted blocks to a file in DIR instead of keeping them all in RAM",
    )
    group.add_argument(
        "--kv-ram",
        metavar="SIZE",
        type=byte_size,
        help="RAM for evicted blocks, as 256M or 2G; the rest stays on disk (in --kv-dir, or in the cache directory)",
    )
    group.add_argument(
        "--kv-disk-max", metavar="SIZE", type=byte_size, help="limit on disk for evicted blocks (default: no limit)"
    )
    group.add_argument(
        "--cache-type-evicted",
        dest="type_evicted",
        metavar="TYPE",
        choices=EVICTED_TYPES,
        help=f"type of evicted keys and values on disk: {', '.join(EVICTED_TYPES)} (default: as in RAM)",
    )
    group.add_argument(
        "--prefetch",
        choices=PREFETCH,
        help="with --late, read blocks while the previous token computes; off: read each when its layer needs it "
        f"(default: {defaults.prefetch})",
    )
    group.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="values for the flags above, which override it (default: balanced)",
    )


def _policy(name: str) -> str:
    if name in KV_POLICIES or name.endswith(".py"):
        return name
    raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(KV_POLICIES)} and no file NAME.py")


def _policies(text: str) -> list[str]:
    names = [_policy(name) for name in text.split(",")]
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} names one twice")
    return names


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the sampling chain, in the order in which it runs."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--repeat-penalty",
        metavar="X",
        type=number(0.01, 100),
        default=1.0,
        help="divide the logits of recent tokens by X; 1 is off (default: %(default)s)",
    )
    group.add_argument(
        "--repeat-last-n",
        metavar="N",
        type=integer(-1, MAX_INT),
        default=64,
        help="how many tokens count as recent; -1 is all (default: %(default)s)",
    )
    group.add_argument(
        "--top-k",
        metavar="N",
        type=integer(0, MAX_INT),
        default=40,
        help="keep the N most likely tokens; 0 is off (default: %(default)s)",
    )
    group.add_argument(
        "--top-p",
        metavar="P",
        type=number(0, 1),
        default=0.95,
        help="keep the most likely tokens that together have probability P; 1 is off (default: %(default)s)",
    )
    group.add_argument(
        "--min-p",
        metavar="P",
        type=number(0, 1),
        default=0.05,
        help="keep tokens at least P times as likely as the best; 0 is off (default: %(default)s)",
    )
    group.add_argument(
        "--temp",
        metavar="T",
        type=number(0, 100),
        default=0.8,
        help="temperature; 0 always takes the most likely token (default: %(default)s)",
    )
    group.add_argument("--greedy", dest="temp", action="store_const", const=0.0, help="the same as --temp 0")
    group.add_argument(
        "-s",
        "--seed",
        metavar="N",
        type=integer(-1, MAX_SEED),
        default=-1,
        help="equal seeds give equal text; -1 draws one (default: %(default)s)",
    )
