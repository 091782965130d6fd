"""A snapshot as one self-contained HTML page: page.html, with the snapshot embedded as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files

from pyggml_repkv.lab.inspect.snapshot import Snapshot
from pyggml_repkv.lab.inspect.table import kind_of

_PLACE = "@DATA@"


def as_page(snapshot: Snapshot, times: Mapping[str, float] | None = None) -> str:
    """Returns the text of an .html file. times: microseconds by node id; a node without one shows no time.

    Raises ValueError for a time that is not finite.
    """
    data = {
        "snapshot": snapshot.as_json(),
        "kinds": {t.id: kind_of(t) for t in snapshot.nodes},
        "times": dict(times) if times is not None else None,
    }
    template = files(__package__).joinpath("page.html").read_text("utf-8")
    return template.replace(_PLACE, _embedded(data), 1)


def _embedded(data: object) -> str:
    """Returns JSON that cannot end the <script> or open a comment in it, whatever the names are."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
