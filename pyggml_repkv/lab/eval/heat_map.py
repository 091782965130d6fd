"""A picture of retrieval by length and depth, with a panel for each policy."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from pyggml_repkv.errors import InputError, RepkvError
from pyggml_repkv.lab.eval import plotting
from pyggml_repkv.lab.eval.retrieval import RetrievalResult


def check_can_draw(path: str) -> None:
    """Raises InputError if matplotlib is missing or does not know the format, or if the path cannot be written."""
    figure = plotting.pyplot().figure()
    known = figure.canvas.get_supported_filetypes()
    plotting.pyplot().close(figure)
    suffix = Path(path).suffix.removeprefix(".")
    if suffix.lower() not in known:
        kinds = ", ".join(sorted(known))
        raise InputError(
            f"--png {path}: " + (f"a picture can be {kinds}, not {suffix}" if suffix else "name it NAME.png")
        )
    folder = Path(path).parent
    for fails, reason in (
        (not folder.is_dir(), errno.ENOENT),
        (Path(path).is_dir(), errno.EISDIR),
        (not os.access(path if Path(path).exists() else folder, os.W_OK), errno.EACCES),
    ):
        if fails:
            raise InputError(f"--png {path}: {os.strerror(reason)}")


def draw_heat_map(path: str, results: Sequence[RetrievalResult]) -> None:
    """Writes the picture. Raises InputError for what `check_can_draw` refuses, RepkvError if writing fails."""
    pyplot = plotting.pyplot()

    policies = list(dict.fromkeys(r.kv for r in results))
    lengths, depths = sorted({r.length for r in results}), sorted({r.depth for r in results})
    size = 2.2 + 0.9 * len(lengths), 1.6 + 0.32 * len(depths)
    figure, axes = pyplot.subplots(
        1, len(policies), figsize=(size[0] * len(policies), size[1]), squeeze=False, sharey=True, layout="constrained"
    )
    image = None
    for axis, policy in zip(axes[0], policies, strict=True):
        share = {(r.length, r.depth): r.share for r in results if r.kv == policy}
        # Cells without a question stay empty.
        grid = [[share.get((n, d), float("nan")) for n in lengths] for d in depths]
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        n_found = sum(r.found for r in results if r.kv == policy)
        axis.set_title(f"{policy}: {n_found} of {sum(r.kv == policy for r in results)}")
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], rotation=30, ha="right")
        axis.set_yticks(range(len(depths)), [f"{100 * d:.0f} %" for d in depths])
        axis.set_xlabel("tokens")
    axes[0][0].set_ylabel("depth")
    figure.suptitle(results[0].task)
    if image is not None:
        figure.colorbar(image, ax=axes, label="share of the answer")
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise RepkvError(f"--png {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"--png {path}: {error}") from None
    finally:
        pyplot.close(figure)
