"""The KV memory that the flags of a command describe, and whether it has a use for each of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyggml_repkv.errors import InputError
from pyggml_repkv.memory.config import MEMORY_FIELDS, PRESETS, MemoryConfig

if TYPE_CHECKING:
    from pyggml_repkv.memory.registry import PolicyKind

# Flags that are not called as their field is.
_FLAGS = {"type_evicted": "--cache-type-evicted"}


def kind_of(policy: str) -> PolicyKind:
    """Returns what a policy declares. Raises InputError if it is unknown. The import here loads ggml."""
    from pyggml_repkv.memory.registry import policy_kind

    return policy_kind(policy)


def memory_config(args: argparse.Namespace, n_ctx: int) -> MemoryConfig:
    """Returns the memory that the flags of `add_context_options` and `add_memory_options` describe."""
    given = {field: getattr(args, field) for field in MEMORY_FIELDS if getattr(args, field) is not None}
    return MemoryConfig(
        kv=args.kv,
        n_ctx=n_ctx,
        n_batch=args.batch_size,
        type_k=args.cache_type_k,
        type_v=args.cache_type_v,
        flash_attn=args.flash_attn == "on",
        **{**PRESETS[args.preset or "balanced"], **given},
    )


def check_memory_flags(args: argparse.Namespace, policies: Sequence[str]) -> None:
    """Raises InputError for a flag of `add_memory_options` that was given and that none of the policies uses."""
    # The fields that presets set.
    fields = {**{field: (field,) for field in MEMORY_FIELDS}, "preset": tuple(PRESETS["accurate"])}
    given = [name for name in fields if getattr(args, name) is not None]
    kinds = [kind_of(kv) for kv in policies] if given else []
    unused = [_FLAGS.get(f, f"--{f.replace('_', '-')}") for f in given if not any(k.uses(fields[f]) for k in kinds)]
    if unused:
        raise InputError(f"{', '.join(unused)}: --kv {','.join(policies)} has no use for that; is --kv repkv meant?")
    on_disk = args.kv_dir or args.kv_ram or getattr(args, "session", None)
    if args.prefetch is not None and not on_disk:
        raise InputError("--prefetch reads from disk: it needs --kv-ram, --kv-dir or --session")
