"""Warnings of what a file has and nobody reads: it may be why the answer differs from another program's."""

import logging
from collections.abc import Collection, Sequence

from pyggml_repkv.model.gguf_file import GGUFFile, printable

log = logging.getLogger(__name__)

# Of the keys under an architecture's name, those that change no result of a dense decoder: repetitions of what the
# tensors say, notes of the converter, and settings of experts that there are none of.
_HARMLESS = frozenset(
    (
        *("vocab_size", "tensor_data_layout", "attention.layer_norm_epsilon"),
        *("expert_used_count", "expert_feed_forward_length", "expert_shared_count", "leading_dense_block_count"),
    )
)


def warn_of_unread_keys(file: GGUFFile, prefix: str, read: Collection[str]) -> None:
    """Names the keys `prefix`.* that are not among those `read`; those of RoPE's scaling are model/config.py's to
    judge.
    """
    known = {*read, *(f"{prefix}.{key}" for key in _HARMLESS)}
    judged = f"{prefix}.rope.scaling."
    unread = [key for key in file.metadata if key.startswith(f"{prefix}.") and not key.startswith(judged)]
    _warn(file, "keys", [key for key in unread if key not in known])


def warn_of_unused_tensors(file: GGUFFile, names: Sequence[str]) -> None:
    """Names tensors that take no part in the computation."""
    _warn(file, "tensors", names)


def _warn(file: GGUFFile, what: str, names: Sequence[str]) -> None:
    if not names:
        return
    shown = ", ".join(printable(name, 60) for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    log.warning("%s: %s that are not used here: %s%s", printable(file.path, 400), what, shown, more)
