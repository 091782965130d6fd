"""Static graphs: build, allocate, fill, compute, read; each step shape is built once and used again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pyggml_repkv.ffi.context import GraphContext, Tensor, set_name
from pyggml_repkv.ffi.handles import Backend, GraphAllocator, tensor_array
from pyggml_repkv.ffi.library import g as ggml
from pyggml_repkv.graph.decode_ops import DecodeOps
from pyggml_repkv.graph.qwen2 import NameTensor, Qwen2Graph
from pyggml_repkv.graph.qwen2_decode import build_fused_decode
from pyggml_repkv.graph.rope import RopeTable, rope_params
from pyggml_repkv.memory.policy import Policy, StepAttention, StepShape
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.weights import Weights

Outputs = Literal["last", "all", "none"]

# Enough for decode, a full chunk, an odd last chunk and their neighbours in attended length.
_MAX_PLANS = 6


@dataclass(frozen=True, slots=True)
class PlanKey:
    shape: StepShape
    outputs: Outputs


class Plan:
    """One built graph: its inputs, its output, and the policy's part."""

    def __init__(self, model: GraphModel, policy: Policy, key: PlanKey, cb: NameTensor) -> None:
        n_tokens = key.shape.n_tokens
        self._model = model
        self.context = GraphContext(64 * model.config.n_layer + 256)
        g = self.context
        self._tokens = g.input(ggml.GGML_TYPE_I32, (n_tokens,), "inp_tokens")
        self._positions: Tensor = None
        self._rope_table: Tensor = None
        self._output_rows: Tensor = None
        self.attention: StepAttention = policy.build(g, key.shape)
        self.logits: Tensor | None
        if key.shape.fused:
            self._rope_table = g.input(ggml.GGML_TYPE_F32, (2, model.config.rope_dim // 2), "inp_rope")
            model.decode_ops.rope = self._rope_table
            self.logits = build_fused_decode(g, model.weights, model.decode_ops, self.attention, self._tokens, cb)
        else:
            self._positions = g.input(ggml.GGML_TYPE_I32, (n_tokens,), "inp_pos")
            if key.outputs == "last" and n_tokens > 1:
                self._output_rows = g.input(ggml.GGML_TYPE_I32, (1,), "inp_out_ids")
            graph = Qwen2Graph(g, model.config, model.weights, model.rope, self.attention, cb)
            self.logits = graph.build(
                self._tokens, self._positions, output_rows=self._output_rows, output=key.outputs != "none"
            )

    def fill(self, tokens: Sequence[int] | np.ndarray, n_past: int) -> None:
        """All inputs, every time: the allocator reuses their memory during compute."""
        tensor_array(self._tokens)[...] = tokens
        if self._positions is not None:
            tensor_array(self._positions)[...] = np.arange(n_past, n_past + len(tokens))
        if self._output_rows is not None:
            tensor_array(self._output_rows)[...] = len(tokens) - 1
        if self._rope_table is not None:
            tensor_array(self._rope_table)[...] = self._model.rope_table(n_past)
        self.attention.fill(n_past)

    def read(self) -> np.ndarray:
        """Logits float32 [n_outputs, n_vocab], a view that the next compute overwrites."""
        assert self.logits is not None
        return tensor_array(self.logits).reshape(-1, self.logits.contents.ne[0])


class GraphModel:
    """What every plan is built from."""

    def __init__(self, config: ModelConfig, weights: Weights, n_threads: int, *, exact: bool) -> None:
        self.config, self.weights = config, weights
        self.rope = rope_params(config)
        self.rope_table = RopeTable(self.rope)
        self.decode_ops = DecodeOps(config, n_threads)
        # Repacked matrices can only be read by ggml's own multiplication.
        self.fuses_decode = not exact and not weights.repacked


class PlanCache:
    """Built and allocated plans by key, least recently used out first, all in one compute buffer."""

    def __init__(self, model: GraphModel, policy: Policy, backend: Backend, cb: NameTensor = set_name) -> None:
        self._model, self._policy, self._backend, self._cb = model, policy, backend, cb
        self._allocator = GraphAllocator()
        self._plans: OrderedDict[PlanKey, Plan] = OrderedDict()

    @property
    def compute_bytes(self) -> int:
        return self._allocator.size

    def get(self, key: PlanKey) -> Plan:
        plan = self._plans.get(key)
        if plan is None:
            plan = Plan(self._model, self._policy, key, self._cb)
            if self._allocator.allocate(plan.context.graph):
                # The buffer grew, hence moved: what was placed in it before points nowhere.
                self._drop_all()
            self._plans[key] = plan
            while len(self._plans) > _MAX_PLANS:
                self._plans.popitem(last=False)[1].context.close()
        self._plans.move_to_end(key)
        return plan

    def run(self, key: PlanKey, tokens: Sequence[int] | np.ndarray, n_past: int) -> np.ndarray | None:
        """One step -> logits [n_outputs, n_vocab], or None where there are no outputs."""
        plan = self.get(key)
        plan.fill(tokens, n_past)
        self._backend.compute(plan.context.native_graph)
        return plan.read() if plan.logits is not None else None

    def _drop_all(self) -> None:
        for plan in self._plans.values():
            plan.context.close()
        self._plans.clear()

    def close(self) -> None:
        self._drop_all()
        self._allocator.close()
