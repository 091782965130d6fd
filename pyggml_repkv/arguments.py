"""Checks of what a caller passes: a wrong type is one clear message that names the argument."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

from pyggml_repkv.errors import InputError


def check_type(name: str, value: object, kind: type | tuple[type, ...], right: str) -> None:
    """Raises InputError, which says what would be right, unless `value` is of a kind."""
    if not isinstance(value, kind):
        raise InputError(f"{name} must be {right}, got {value!r:.80}")


def check_int(name: str, value: Any) -> int:
    """`value` as an int. Raises InputError unless it is one, of Python or NumPy; a bool is not."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{name} must be an integer, got {value!r:.80}")
    return int(value)


def check_number(name: str, value: Any) -> float:
    """`value` as a float. Raises InputError unless it is a real number, of Python or NumPy; a bool is not."""
    try:
        if not isinstance(value, bool) and isinstance(value, Real):
            return float(value)
    except OverflowError:
        pass
    raise InputError(f"{name} must be a number, got {value!r:.80}")


def check_bool(name: str, value: object) -> None:
    """Raises InputError unless `value` is True or False."""
    check_type(name, value, bool, "True or False")


def check_path(name: str, value: object) -> None:
    """Raises InputError unless `value` is a path that names something."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else value
    check_text(name, text, "a path")
    if not text:
        raise InputError(f"{name} must not be empty")


def check_text(name: str, value: object, right: str = "a text") -> None:
    """Raises InputError unless `value` is a string without NUL, which no name of anything may have."""
    check_type(name, value, str, right)
    if "\0" in str(value):
        raise InputError(f"{name} must not hold a NUL, got {value!r:.80}")


def check_count(name: str, value: Any) -> int:
    """As check_int, of what cannot be negative."""
    if (count := check_int(name, value)) < 0:
        raise InputError(f"{name} must be 0 or more, got {value}")
    return count


def check_callable(name: str, value: object, *, needed: bool = False) -> None:
    """Raises InputError unless `value` can be called, or is None and not needed."""
    check_type(name, value, (Callable, *(() if needed else (type(None),))), "a function")  # type: ignore[arg-type]


def check_fields(config: Any) -> None:
    """Raises InputError unless every number, text and bool of a frozen dataclass is of the type of its default.

    Numbers become Python's own.
    """
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        if isinstance(field.default, bool):
            check_bool(name, value)
        elif isinstance(field.default, str):
            check_text(name, value)
        elif isinstance(field.default, int | float):
            check = check_int if isinstance(field.default, int) else check_number
            object.__setattr__(config, name, check(name, value))
