"""The results of `make report`: the JSON in docs/results/."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from pyggml_repkv.errors import InputError

Record = dict[str, Any]

TASKS = ("passkey", "number", "kv", "niah")
POLICIES = ("full", "window", "repkv")


class Stored:
    """The results in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, name: str) -> Any:
        """Returns a result, or None if it is not measured yet. Raises InputError if the file is not JSON."""
        path = self._folder / f"{name}.json"
        return _parsed(path, path.read_text("utf-8", errors="replace")) if path.exists() else None

    def policies(self, task: str, length: int, n_depths: int) -> list[str]:
        """Returns the policies that have an answer."""
        asked = {
            e["result"]["kv"] for e in self.answers
            if (e["result"]["task"], e["result"]["length"], e["settings"]["asked"]["n_depths"])
            == (task, length, n_depths)
        }  # fmt: skip
        return [policy for policy in POLICIES if policy in asked]

    @property
    def has_llama(self) -> bool:
        return any(r["engine"] == "llama.cpp" for r in self.speed)

    @cached_property
    def speed(self) -> list[Record]:
        return [r for name in ("speed", "speed_deep") for r in self.get(name) or ()]

    @cached_property
    def peak_gbytes_per_second(self) -> float:
        """The best of all runs, because it varies on a shared machine; 0 if no run measured it."""
        machine = self.get("machine")
        found = [r["peak_gbytes_per_second"] for r in self.speed]
        if machine is not None:
            found += [machine["peak_gbytes_per_second"], *(t["gbytes_per_second"] for t in machine["types"])]
        return max(found, default=0.0)

    @cached_property
    def answers(self) -> list[Record]:
        """The last answer to each question by each policy. It omits answers whose model, seed, text or version differs
        from the file's last one, whose options differ from the policy's last ones, or whose depths differ from the last
        ones of their length.
        """
        found: dict[tuple[Any, ...], Record] = {}
        for task in TASKS:
            entries = self._entries(task)
            last: dict[Any, Any] = {}
            for entry in entries:
                last.update(_decisive(entry))
            for entry in entries:
                if all(last[name] == value for name, value in _decisive(entry).items()):
                    asked, kv = entry["settings"]["asked"], entry["result"]["kv"]
                    found[task, kv, asked["length"], asked["depth_index"]] = entry
        return list(found.values())

    def _entries(self, task: str) -> list[Record]:
        path = self._folder / f"{task}.jsonl"
        text = path.read_text("utf-8", errors="replace") if path.exists() else ""
        # The last part ends no line: it is empty or incomplete.
        return [_parsed(path, line) for line in text.split("\n")[:-1]]


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not JSON; move it away, and it is measured again") from None


def _decisive(entry: Record) -> dict[Any, Any]:
    """Returns the settings that must agree: within a file, for a policy, and for a length."""
    settings, kv = entry["settings"], entry["result"]["kv"]
    options = ("asked", "memory", "policy_file", "task")
    return {
        "file": {k: v for k, v in settings.items() if k not in options},
        kv: {k: v for k, v in settings["memory"].items() if k != "n_ctx"},
        (kv, settings["asked"]["length"]): settings["asked"]["n_depths"],
    }


def counts_of(stored: Stored) -> dict[tuple[str, str, int], tuple[int, int]]:
    found: dict[tuple[str, str, int], tuple[int, int]] = {}
    for entry in stored.answers:
        r = entry["result"]
        key = r["task"], r["kv"], r["length"]
        n_found, n = found.get(key, (0, 0))
        found[key] = n_found + r["found"], n + 1
    return found


def recalls_of(stored: Stored) -> dict[str, Record]:
    """What `eval recall` found, by kind of text."""
    found = {"prose": stored.get("recall"), "JSON": stored.get("recall_json")}
    return {text: recall for text, recall in found.items() if recall is not None}
