"""Imports run one way: a room may use those below it, and no two files use each other."""

import ast
from pathlib import Path

import pytest

from pyggml_repkv.cli.main import COMMANDS

PACKAGE = Path(__file__).parents[2] / "pyggml_repkv"

# From the top down. `native` is compiled: only its build script is Python.
ROOMS = ("cli", "lab", "engine", "graph", "memory", "ops", "model", "arch", "ffi", "arguments", "errors")


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.stem != "__main__"}


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in it, also for types only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pyggml_repkv"):
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in whole}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & FILES.keys()


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


GRAPH = {module: imported(path) for module, path in FILES.items()}


def test_imports_name_the_whole_path():
    relative = [
        module
        for module, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


def test_every_room_is_known():
    # The package's own face names what is public, the build script is run by itself.
    assert {room(module) for module in FILES} - {"", "native"} <= set(ROOMS)


@pytest.mark.parametrize("upper", ROOMS)
def test_a_room_uses_only_what_is_below_it(upper):
    allowed = {*ROOMS[ROOMS.index(upper) :], "native", ""}
    wrong = [
        f"{module} imports {used}"
        for module, uses in GRAPH.items()
        if room(module) == upper
        for used in uses
        if room(used) not in allowed
    ]
    assert wrong == []


def test_no_files_use_each_other():
    """Circles of any length are found."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module in done:
            return
        for used in GRAPH[module]:
            visit(used, (*path, module))
        done.add(module)

    for module in GRAPH.keys() - {"pyggml_repkv"}:
        visit(module, ())


def test_no_command_imports_another():
    commands = {f"pyggml_repkv.cli.{name}" for name in COMMANDS}
    assert [module for module in FILES if room(module) == "cli" and GRAPH[module] & commands] == []
