"""Provides this machine's pinned ggml-python wheel: from the user's cache, or built there once.

`python vendor/ggml/ggml_wheel.py` prints the path of the wheel; progress and errors go to stderr.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

PIN_FILE = Path(__file__).with_name("pin.toml")
FLAG_VARIABLES = ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS")
# The CPU that ggml and the extension are compiled for, as -march names it; unset: this CPU.
MARCH_VARIABLE = "REPKV_MARCH"
# ggml's switches for x86 are on if GGML_NATIVE is off; -march decides instead of them.
X86_SWITCHES = ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C")
# The last two would make a pip inside the build load this project's backend instead of ggml-python's.
OUTER_BUILD = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PEP517_", "_PYPROJECT_HOOKS_")
LOG_TAIL_LINES = 25


class WheelError(Exception):
    """The wheel cannot be built here. The message is one line: what is wrong and what to do."""


@dataclass(frozen=True)
class Pin:
    """The content of pin.toml, without the reasons."""

    name: str
    version: str
    sha256: str
    ggml: str
    constraints: tuple[str, ...]
    cmake: Mapping[str, str]

    @classmethod
    def load(cls, path: Path = PIN_FILE) -> Pin:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        cmake = {flag: entry["value"] for flag, entry in table["cmake"].items()}
        return cls(**table["package"], constraints=tuple(table["build"]["constraints"]), cmake=cmake)

    @property
    def cmake_args(self) -> str:
        flags = dict(self.cmake)
        if march() != "native":
            flags.update({"GGML_NATIVE": "OFF", **{f"GGML_{switch}": "OFF" for switch in X86_SWITCHES}})
        return shlex.join(f"-D{flag}={value}" for flag, value in flags.items())


def march() -> str:
    return os.environ.get(MARCH_VARIABLE) or "native"


Builder = Callable[[Pin, Path, Path], None]


def compiler_macros(variable: str, default: str, language: str) -> str:
    """Returns the compiler's predefined macros under -march: its version and the CPU features it will use."""
    command = shlex.split(os.environ.get(variable, "")) or [default]
    if shutil.which(command[0]) is None:
        raise WheelError(
            f"no {language} compiler: {command[0]} is not on PATH; install one"
            f" (Debian: apt-get install build-essential) or name it in {variable}"
        )
    probe = [*command, f"-march={march()}", "-dM", "-E", "-x", language.lower(), os.devnull]
    result = subprocess.run(probe, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise WheelError(f"the {language} compiler does not work: {shlex.join(probe)}: {reason}")
    return result.stdout


def machine() -> dict[str, str]:
    """Returns everything besides the pin that decides what the compiled code is and where it runs."""
    return {
        "platform": sysconfig.get_platform(),
        # One home directory may serve containers with different C libraries.
        "libc": " ".join(platform.libc_ver()),
        "cc": compiler_macros("CC", "cc", "C"),
        "cxx": compiler_macros("CXX", "c++", "C++"),
        **{name: os.environ.get(name, "") for name in FLAG_VARIABLES},
    }


def wheel_key(pin: Pin, machine: Mapping[str, str]) -> str:
    """Returns the name of the wheel's cache folder: 16 hex digits."""
    inputs = json.dumps([asdict(pin), dict(machine)], sort_keys=True)
    return hashlib.sha256(inputs.encode()).hexdigest()[:16]


def cache_root() -> Path:
    """Returns the folder that holds one folder per key."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    return base / "pyggml_repkv" / "wheels"


def sound_wheel(folder: Path) -> Path | None:
    """Returns the one wheel in `folder`, or None if it is missing or damaged."""
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1 or not zipfile.is_zipfile(wheels[0]):
        return None
    with zipfile.ZipFile(wheels[0]) as archive:
        return wheels[0] if archive.testzip() is None else None


def build_environment(pin: Pin, constraints: Path) -> dict[str, str]:
    """Returns the environment of the pip that builds: the pin's CMake flags, and nothing of an outer make or pip."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(OUTER_BUILD)}
    env["CMAKE_ARGS"] = pin.cmake_args
    if march() != "native":
        for name in ("CFLAGS", "CXXFLAGS"):
            env[name] = f"{env.get(name, '')} -march={march()}".strip()
    # Without ninja, scikit-build-core uses make, which compiles one file at a time by default.
    env.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(len(os.sched_getaffinity(0))))
    # pip up to 25.2 reads build constraints from the first of these, pip since 25.3 from the second.
    # It would split a path with spaces; a URL is one word.
    env["PIP_CONSTRAINT"] = env["PIP_BUILD_CONSTRAINT"] = constraints.as_uri()
    return env


def build_with_pip(pin: Pin, folder: Path, log: Path) -> None:
    """Compiles the sdist, checked against the pinned hash, into one wheel in `folder`. Raises WheelError."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{pin.name}=={pin.version} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(pin.constraints) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-binary", pin.name]
    # pip's own cache does not know CMake flags: it may hold a wheel that was built with others.
    command += ["--no-cache-dir", "--require-hashes", "-r", str(requirement), "-w", str(folder)]
    with log.open("w", encoding="utf-8") as output:
        env = build_environment(pin, constraints)
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env, check=False
        )
    if result.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
        print(*tail, sep="\n", file=sys.stderr)
        raise WheelError(f"{pin.name} {pin.version} could not be built; the whole log is {log}")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock, which the kernel frees if this process dies."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another process that is building ggml", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def ensure_wheel(pin: Pin | None = None, root: Path | None = None, build: Builder = build_with_pip) -> Path:
    """Returns the cached wheel for this pin and machine, and builds it if there is none.

    Several processes may call it at once; an interrupted build leaves nothing that counts as a wheel.
    Raises WheelError if a compiler is missing, the build fails or the cache cannot be written.
    """
    pin = pin or Pin.load()
    root = root or cache_root()
    key = wheel_key(pin, machine())
    folder, work = root / key, root / f"{key}.building"
    if wheel := sound_wheel(folder):
        return wheel
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / f"{key}.lock"):
            if wheel := sound_wheel(folder):
                return wheel
            cpus = "this machine" if march() == "native" else march()
            print(
                f"building ggml {pin.ggml} for {cpus} (a minute or two, once)",
                file=sys.stderr,
                flush=True,
            )
            for stale in (work, folder):
                shutil.rmtree(stale, ignore_errors=True)
            work.mkdir()
            build(pin, work, root / f"{key}.log")
            if sound_wheel(work) is None:
                raise WheelError(f"building {pin.name} {pin.version} left no usable wheel in {work}")
            work.rename(folder)
    except OSError as error:
        raise WheelError(
            f"cannot write the wheel cache {root}: {error}; set XDG_CACHE_HOME to another folder"
        ) from error
    wheel = sound_wheel(folder)
    assert wheel is not None
    return wheel


def main() -> int:
    try:
        print(ensure_wheel())
    except WheelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
