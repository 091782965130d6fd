"""argparse with one-line errors, exact option names and checked numbers."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from pyggml_repkv.cli import output
from pyggml_repkv.errors import InputError


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Prints `-m, --model FILE  text`: the value is named once."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _format_action(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._SubParsersAction):
            return "".join(map(super()._format_action, action._get_subactions()))
        return super()._format_action(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {self._format_args(action, str(action.metavar))}"


class Parser(argparse.ArgumentParser):
    """Raises InputError for bad usage. The argument after an option is its value, even if it begins with '-'."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        return super().parse_known_args(self._bind(args or ()), namespace)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # argparse drops "--" even if it is the value of an option.
        if arg_strings == ["--"] and action.option_strings and action.nargs is None:
            return self._get_value(action, "--")
        return super()._get_values(action, arg_strings)

    def _print_message(self, message: str, file: Any = None) -> None:
        # Only help comes here, and argparse would hide a failure to write it.
        output.write(message)

    def _bind(self, args: Iterable[str]) -> list[str]:
        bound = []
        rest = iter(args)
        for arg in rest:
            action = self._option_string_actions.get(arg)
            value = next(rest, None) if action is not None and action.nargs is None else None
            bound.append(arg if value is None else f"{arg}={value}")
        return bound


def integer(low: int, high: int) -> Callable[[str], int]:
    """Returns an argparse type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text) if "_" not in text else None
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {_short(text)}")
        return value

    return parse


def number(low: float, high: float) -> Callable[[str], float]:
    """Returns an argparse type: a number from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text) if "_" not in text else math.nan
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a number from {low:g} to {high:g}, got {_short(text)}")
        return value

    return parse


def text(value: str) -> str:
    """An argparse type: the argument's bytes as UTF-8, in any locale."""
    try:
        return os.fsencode(value).decode("utf-8")
    except UnicodeError as error:
        raise argparse.ArgumentTypeError(f"is not valid UTF-8: {error}") from None


def filled_text(value: str) -> str:
    """An argparse type: text that is not empty."""
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    return text(value)


def _short(value: str) -> str:
    return repr(value if len(value) <= 40 else f"{value[:37]}...")


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def byte_size(text: str) -> int:
    """An argparse type: a number of bytes, as 1048576, 512K, 256M or 1.5G (powers of 1024)."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)([KMGT]?)(?:I?B)?", text.strip().upper())
    n_bytes = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not 0 < n_bytes < 2**50:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 256M or 2G")
    return n_bytes
