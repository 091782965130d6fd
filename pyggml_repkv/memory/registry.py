"""`--kv NAME` -> a policy. A new policy is one file, named here or given as `--kv FILE.py`."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import cast

from pyggml_repkv.errors import InputError, RepkvError
from pyggml_repkv.memory.full import FullMemory
from pyggml_repkv.memory.policy import Policy, PolicyInputs
from pyggml_repkv.memory.repkv import RepKVMemory
from pyggml_repkv.memory.window import WindowMemory

POLICIES: dict[str, Callable[[PolicyInputs], Policy]] = {
    "full": FullMemory,
    "window": WindowMemory,
    "repkv": RepKVMemory,
}


def make_policy(inputs: PolicyInputs) -> Policy:
    """Raises InputError for an unknown name and for a file without `make_policy(inputs)`."""
    name = inputs.memory.kv
    if name.endswith(".py"):
        return _from_file(Path(name), inputs)
    if name not in POLICIES:
        raise InputError(f"--kv is {name!r}; it must be one of {', '.join(POLICIES)}, or a file NAME.py")
    return POLICIES[name](inputs)


def _from_file(path: Path, inputs: PolicyInputs) -> Policy:
    """The file is the user's own program: it is run as such."""
    if not path.is_file():
        raise InputError(f"--kv {path}: there is no such file")
    try:
        made = runpy.run_path(str(path)).get("make_policy")
        policy = made(inputs) if callable(made) else None
    except RepkvError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"--kv {path}: {type(error).__name__}: {error}") from error
    if not hasattr(policy, "step_shape"):
        raise InputError(f"--kv {path}: it must define make_policy(inputs) -> Policy (memory/policy.py)")
    return cast("Policy", policy)
