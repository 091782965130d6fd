"""Builds and places the graph that `run` would compute, from a file's shapes, without reading its weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from pyggml_repkv.errors import InputError
from pyggml_repkv.ffi.context import Tensor, set_name
from pyggml_repkv.ffi.handles import Backend
from pyggml_repkv.graph.decoder import Outputs
from pyggml_repkv.graph.plan import GraphModel, PlanCache
from pyggml_repkv.lab.inspect.cost import Step
from pyggml_repkv.lab.inspect.graph_reader import read_graph
from pyggml_repkv.lab.inspect.snapshot import Snapshot, take_snapshot
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.cut.boundaries import BoundaryScores
from pyggml_repkv.memory.policy import Policy, Selective
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.gguf_file import GGUFFile
from pyggml_repkv.model.rope_options import AS_IN_FILE, RopeOptions
from pyggml_repkv.model.tensors import check_tensors
from pyggml_repkv.model.weights import Weights

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which graph to build. n_past: tokens read before the step."""

    phase: Phase
    memory: MemoryConfig
    n_past: int = 0
    n_threads: int = 1
    exact: bool = False
    repack: bool = False
    rope: RopeOptions = AS_IN_FILE

    @property
    def n_tokens(self) -> int:
        return 1 if self.phase == "decode" else self.memory.n_batch


class BuiltGraph:
    """A graph that is built and not computed; use it with `with`. Raises ModelFileError for a bad file, InputError for
    settings that no session accepts.
    """

    def __init__(self, path: str | os.PathLike[str], wanted: Wanted) -> None:
        self.wanted = wanted
        self.file = GGUFFile.open(Path(path))
        self.config = wanted.rope.applied_to(ModelConfig.from_gguf(self.file))
        check_tensors(self.file, self.config)
        self._weights = Weights(self.file, self.config, repack=wanted.repack, join=not wanted.exact)
        self._backend = Backend(wanted.n_threads)
        self.model = GraphModel(self.config, self._weights, self._backend, exact=wanted.exact)
        self.policy: Policy | None = None
        try:
            self.policy = self.model.make_policy(self.model.policy_inputs(wanted.memory, _no_boundaries))
            self._check_length()
            self._plans = PlanCache(self.model, self.policy, self._backend, _name)
            outputs: Outputs = "all" if wanted.n_tokens == 1 else "last"
            if isinstance(self.policy, Selective):
                self.policy.assume_selected(wanted.n_past)
            self.plan = self._plans.of_step(wanted.n_past, wanted.n_tokens, outputs)
        except BaseException:
            self.close()
            raise

    def _check_length(self) -> None:
        assert self.policy is not None
        n_past, n_tokens = self.wanted.n_past, self.wanted.n_tokens
        if n_past + n_tokens > self.policy.n_ctx:
            raise InputError(f"{n_tokens} tokens after {n_past} exceed the context of {self.policy.n_ctx}: raise -c")

    def snapshot(self) -> Snapshot:
        w, raw = self.wanted, read_graph(self.plan.context)
        assert self.policy is not None
        about = {
            "model": self.file.path.name,
            "phase": w.phase,
            "policy": w.memory.kv,
            "form": self.plan.key.shape.form,
            "n_tokens": w.n_tokens,
            "n_past": w.n_past,
            "n_threads": w.n_threads,
            "n_layer": self.config.n_layer,
            "writes": sorted(self.policy.writes),
        }
        step = Step(self.config, w.n_tokens, self.policy.cost(w.n_past, w.n_tokens))
        return take_snapshot(raw, about, step, self.plan.hook_points, self._plans.compute_bytes)

    def close(self) -> None:
        if hasattr(self, "_plans"):
            self._plans.close()
        if self.policy is not None:
            self.policy.close()
        self._weights.close()
        self._backend.close()

    def __enter__(self) -> BuiltGraph:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _name(tensor: Tensor, name: str, layer: int) -> None:
    set_name(tensor, name, layer)


def _no_boundaries() -> BoundaryScores:
    """Returns scores that nobody uses: a graph that is not computed cuts no text."""
    return BoundaryScores(lambda _: b"", None)
