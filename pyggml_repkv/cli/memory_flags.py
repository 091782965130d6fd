"""The KV memory that the flags of a command describe, and whether it has a use for each of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyggml_repkv.errors import InputError
from pyggml_repkv.memory.config import DISK_FIELDS, INDEX_FIELDS, MEMORY_FIELDS, PRESETS, MemoryConfig

if TYPE_CHECKING:
    from pyggml_repkv.memory.registry import PolicyKind

# Flags that are not called as their field is.
_FLAGS = {"type_evicted": "--cache-type-evicted"}


def kind_of(policy: str) -> PolicyKind:
    """Returns what a policy declares. Raises InputError if it is unknown. The import here loads ggml."""
    from pyggml_repkv.memory.registry import policy_kind

    return policy_kind(policy)


def memory_config(args: argparse.Namespace, n_ctx: int) -> MemoryConfig:
    """Returns the memory that the flags of `add_context_options` and `add_memory_options` describe.

    Of several policies, those that evict nothing have no use for what the flags say about a disk.
    """
    unused = () if kind_of(args.kv).evicts else DISK_FIELDS
    given = {name: value for name in MEMORY_FIELDS if name not in unused and (value := getattr(args, name)) is not None}
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
    """Raises InputError for flags of `add_memory_options` that were given and that none of the policies uses."""
    # The fields that presets set.
    fields = {**{field: (field,) for field in MEMORY_FIELDS}, "preset": tuple(PRESETS["accurate"])}
    given = [name for name in fields if getattr(args, name) is not None]
    kinds = [kind_of(kv) for kv in policies] if given else []
    unused = [name for name in given if not any(kind.uses(fields[name]) for kind in kinds)]
    if unused:
        are, where = "is" if len(unused) == 1 else "are", " or ".join(policies)
        raise InputError(f"{_flags(unused)} {are} of no use with --kv {where}; is --kv repkv meant?")
    if not any(kv.endswith(".py") for kv in policies):
        _check_index_flags(args, given)
    needs_disk = [name for name in given if name in ("kv_disk_max", "type_evicted", "prefetch")]
    places = {"kv_ram": "--kv-ram", "kv_dir": "--kv-dir", **({"session": "--session"} if "session" in args else {})}
    if needs_disk and not any(getattr(args, place) for place in places):
        are, where = "is" if len(needs_disk) == 1 else "are", " or ".join(places.values())
        raise InputError(f"{_flags(needs_disk)} {are} for blocks on disk: give {where}, too")


def _check_index_flags(args: argparse.Namespace, given: Sequence[str]) -> None:
    """A policy of the user's own may use what it likes; several indexes may be given, with commas between."""
    index = args.index or MemoryConfig().index
    used = {field for part in index.split(",") for field in INDEX_FIELDS.get(part.partition(":")[0], ())}
    for kind, fields in INDEX_FIELDS.items():
        unused = [name for name in given if name in fields and name not in used]
        if unused:
            are = "is" if len(unused) == 1 else "are"
            raise InputError(f"{_flags(unused)} {are} of no use with --index {index}, but with {kind}:N")


def _flags(fields: Sequence[str]) -> str:
    return ", ".join(_FLAGS.get(name, f"--{name.replace('_', '-')}") for name in fields)
