"""`--kv NAME` -> a policy. A new policy is one file, named here or given as `--kv FILE.py`."""

from __future__ import annotations

import hashlib
import runpy
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pyggml_repkv.errors import InputError, RepkvError
from pyggml_repkv.memory.config import DISK_FIELDS
from pyggml_repkv.memory.full.memory import FullMemory
from pyggml_repkv.memory.policy import Form, Policy, PolicyInputs
from pyggml_repkv.memory.repkv.memory import RepKVMemory
from pyggml_repkv.memory.window import WindowMemory

POLICIES: dict[str, Callable[[PolicyInputs], Policy]] = {
    kind.name: kind for kind in (FullMemory, WindowMemory, RepKVMemory)
}

_MUST_DEFINE = "it must define make_policy(inputs) -> Policy (memory/policy.py)"
_MEMBERS = {*Policy.__annotations__, *(member for member in vars(Policy) if not member.startswith("_"))}

# What a function that declares nothing is taken for: it may make any bounded memory.
_UNDECLARED: dict[str, Any] = {
    "forms": frozenset(("one", "packed")), "bounded": True, "evicts": True, "rewinds": False, "ignores": frozenset(),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PolicyKind:
    """What is known of a policy before one is made; the fields are what Policy declares."""

    make: Callable[[PolicyInputs], Policy]
    forms: frozenset[Form]
    bounded: bool
    evicts: bool
    rewinds: bool
    ignores: frozenset[str]

    def uses(self, fields: Iterable[str]) -> bool:
        """Whether some of these fields of MemoryConfig make a difference, also where results do not depend on them."""
        return any(field not in self.ignores or (self.evicts and field in DISK_FIELDS) for field in fields)


def policy_kind(name: str) -> PolicyKind:
    """Raises InputError for an unknown name and for a file without `make_policy(inputs)`."""
    if name.endswith(".py"):
        make = _from_file(Path(name))
    elif name in POLICIES:
        make = POLICIES[name]
    else:
        raise InputError(f"--kv is {name!r}; it must be one of {', '.join(POLICIES)}, or a file NAME.py")
    declared = {member: getattr(make, member, value) for member, value in _UNDECLARED.items()}
    for member, value in declared.items():
        kind = type(_UNDECLARED[member])
        if not isinstance(value, Set if kind is frozenset else kind):
            raise InputError(f"--kv {name}: {member} is {value!r}; it must be a {kind.__name__}")
    return PolicyKind(make, **declared)


def policy_identity(name: str) -> str:
    """What says whether two memories are made by the same policy: its name, with a digest of the file if it is one."""
    if not name.endswith(".py"):
        return name
    return f"{Path(name).name} {hashlib.blake2b(_read(Path(name)), digest_size=8).hexdigest()}"


def make_policy(inputs: PolicyInputs) -> Policy:
    """Raises as `policy_kind` does, and InputError for settings that the policy does not take."""
    name = inputs.memory.kv
    kind = policy_kind(name)
    if not kind.evicts and (inputs.memory.on_disk or inputs.memory.kv_disk_max or inputs.memory.type_evicted):
        raise InputError(
            "--kv-dir, --kv-ram, --kv-disk-max and --cache-type-evicted are for memories that evict blocks, as --kv "
            f"repkv does; --kv is {name}"
        )
    try:
        policy = kind.make(inputs)
    except RepkvError:
        raise
    except (Exception, SystemExit) as error:
        if not name.endswith(".py"):
            raise
        raise _broken(name, error) from error
    lacking = sorted(member for member in _MEMBERS if not hasattr(policy, member))
    if lacking:
        raise InputError(f"--kv {name}: {_MUST_DEFINE}; what it made lacks {', '.join(lacking)}")
    return policy


def _from_file(path: Path) -> Callable[[PolicyInputs], Policy]:
    """The file is the user's own program: it is run as such."""
    made = _run(path, hashlib.blake2b(_read(path)).digest()).get("make_policy")
    if not callable(made):
        raise InputError(f"--kv {path}: {_MUST_DEFINE}")
    return made


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(f"--kv {path}: there is no such file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"--kv {path}: {error.strerror}") from None


@lru_cache(8)
def _run(path: Path, digest: bytes) -> dict[str, Any]:
    """digest: of what the file holds now."""
    try:
        return runpy.run_path(str(path))
    except RepkvError:
        raise
    except (Exception, SystemExit) as error:
        raise _broken(str(path), error) from error


def _broken(name: str, error: BaseException) -> InputError:
    return InputError(f"--kv {name}: {type(error).__name__}: {error}")
