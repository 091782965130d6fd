"""Fixtures that many tests share, and how Hypothesis runs: the same examples every time in CI."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.tiny_models import TinySpec, write_tiny_model

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"

settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci" if os.environ.get("CI") else "dev")


# A shell starts background jobs with Ctrl-C ignored, and children inherit that; tests of interrupts need the signal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    if not GOLDEN.is_dir():
        pytest.skip("no ../shared/golden beside the repository")
    return GOLDEN


@pytest.fixture(scope="session")
def golden_model(golden_dir: Path) -> dict[str, Any]:
    """llama.cpp's answers for the demo model."""
    return json.loads((golden_dir / "demo_model.json").read_text())


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The converted demo model; fetched once into the user's cache."""
    from pyggml_repkv.model.names import find_model

    return find_model("demo")


@pytest.fixture
def tiny_model(tmp_path: Path) -> Callable[..., Path]:
    """tiny_model(n_layer=1, ...) -> path of a random model with that TinySpec."""

    def write(**fields: Any) -> Path:
        path = tmp_path / f"tiny-{len(list(tmp_path.iterdir()))}.gguf"
        write_tiny_model(path, TinySpec(**fields))
        return path

    return write
