"""matplotlib, which is optional."""

from __future__ import annotations

from typing import Any

from pyggml_repkv.errors import InputError


def pyplot() -> Any:
    """Returns matplotlib.pyplot, set up without a display. Raises InputError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("matplotlib is not installed: pip install -e '.[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as module

    return module
