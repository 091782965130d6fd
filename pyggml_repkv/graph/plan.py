"""Static graphs: build, allocate, fill, compute, read; each step shape is built once and used again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import ComputeError, InputError
from pyggml_repkv.ffi.context import GraphContext, Tensor, set_name
from pyggml_repkv.ffi.handles import Backend, GraphAllocator, tensor_array
from pyggml_repkv.ffi.library import g as ggml
from pyggml_repkv.ffi.library import native, native_ffi
from pyggml_repkv.ffi.scheduler import Scheduler
from pyggml_repkv.graph.decoder import Decoder, Outputs
from pyggml_repkv.graph.forms.base import DecoderForm, NameTensor
from pyggml_repkv.graph.forms.ggml import GgmlForm
from pyggml_repkv.graph.forms.one import OneForm
from pyggml_repkv.graph.forms.packed import PackedForm
from pyggml_repkv.graph.head import HeadPlan, rows_of
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.cut.boundaries import BoundaryScores
from pyggml_repkv.memory.policy import (
    Centring,
    EvalHook,
    Form,
    HookPoint,
    Policy,
    PolicyInputs,
    StepAttention,
    StepShape,
)
from pyggml_repkv.memory.registry import make_policy
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.rope import RopeTable, rope_params
from pyggml_repkv.model.weights import Weights
from pyggml_repkv.ops.kernels import PANEL, Kernels, n_panels
from pyggml_repkv.ops.makers import Ops

# Enough for decode, a full chunk, an odd last chunk and their neighbours in attended length.
_MAX_PLANS = 6

# Below this many tokens, converting the weights to F32 costs more than multiplying them.
MIN_PACKED_TOKENS = 32

# Rows of the gate and up matrices that one block of the packed op can hold.
MAX_PACKED_WIDTH = 65536


class Tracer(Protocol):
    """Who wants to know when nodes are computed, or what they hold (lab/inspect/node_trace.py, recorder.py)."""

    traces_ops: bool
    """Whether the project's own nodes note themselves when they are computed."""

    def hook_of(self, plan: Plan) -> EvalHook | None:
        """What runs between the nodes of a plan instead of its own hook, which it calls."""

    def native_trace_of(self, plan: Plan) -> Any:
        """Where ggml's nodes are noted while it computes (a struct repkv_node_trace), or NULL."""

    def computed(self, plan: Plan) -> None:
        """Called after each compute of a plan."""


@dataclass(frozen=True, slots=True)
class PlanKey:
    shape: StepShape
    outputs: Outputs


class Plan:
    """One built graph: its inputs, its output, and the policy's part."""

    def __init__(
        self, model: GraphModel, policy: Policy, key: PlanKey, cb: NameTensor, *, traced: bool = False
    ) -> None:
        n_tokens = key.shape.n_tokens
        self.key = key
        self._make_rope = model.precise_rope_table if policy.precise_rope else model.rope_table
        self.context = GraphContext(64 * model.config.n_layer + 256)
        g = self.context
        self._tokens = g.input(ggml.GGML_TYPE_I32, (n_tokens,), "inp_tokens")
        self._positions: Tensor = None
        self._output_rows: Tensor = None
        self._rope_table = self._rope_input(model.config.rope_dim)
        ops = Ops(g, model.kernels, self._rope_table, traced)
        self.attention: StepAttention = policy.build(ops, key.shape)
        form = self._form(model, ops, cb, by_halves=model.by_halves(policy))
        self.result = Decoder(g, model.weights, form, self.attention, cb).build(self._tokens, key.outputs)
        self.hook = self.attention.hook
        self.scheduler: Scheduler | None = None
        self._tracer: Tracer | None = None
        self._trace: Any = native_ffi.NULL

    @property
    def hook_points(self) -> Sequence[HookPoint]:
        """Where the policy's hook runs, in the order of the graph."""
        return () if self.attention.hook is None else self.attention.hook.points

    def watch(self, tracer: Tracer) -> None:
        """From its first compute on."""
        self.hook, self._tracer = tracer.hook_of(self), tracer
        self._trace = tracer.native_trace_of(self)

    def placed(self, backend: Backend) -> None:
        """Called when all tensors have their memory."""
        if self.hook is not None:
            hook = self.hook
            self.scheduler = Scheduler(backend, self.context, hook.callback, hook.userdata, keep=hook)

    def compute(self, backend: Backend) -> None:
        """Raises as Backend.compute does, and what the hook met."""
        self._compute(backend)
        if self._tracer is not None:
            self._tracer.computed(self)

    def _compute(self, backend: Backend) -> None:
        if self.hook is None or self.scheduler is None:
            backend.compute(self.context.native_graph, self._trace)
            return
        self.hook.begin()
        try:
            backend.compute_scheduled(self.scheduler.address, self.scheduler.graph, self._trace)
        except ComputeError:
            self.hook.check()
            raise
        self.hook.check_complete()

    def _form(self, model: GraphModel, ops: Ops, cb: NameTensor, *, by_halves: bool) -> DecoderForm:
        g, n_tokens = ops.g, self.key.shape.n_tokens
        if self.key.shape.form == "one":
            return OneForm(ops, model.weights, cb)
        if self.key.shape.form == "packed":
            return PackedForm(ops, model.weights, cb, n_tokens)
        self._positions = g.input(ggml.GGML_TYPE_I32, (n_tokens,), "inp_pos")
        if self.key.outputs == "last" and n_tokens > 1:
            self._output_rows = g.input(ggml.GGML_TYPE_I32, (1,), "inp_out_ids")
        return GgmlForm(
            g, model.config, model.weights, model.rope, self._positions, cb,
            last_row=self._output_rows, by_halves=by_halves,
        )  # fmt: skip

    def _rope_input(self, rope_dim: int) -> Tensor | None:
        """The table that fused nodes rotate by; ggml's make it themselves."""
        shape = self.key.shape
        if shape.form == "ggml":
            return None
        sizes = (2, rope_dim // 2) if shape.form == "one" else (n_panels(shape.n_tokens), rope_dim, PANEL)
        return self.context.input(ggml.GGML_TYPE_F32, sizes, "inp_rope")

    def fill(self, tokens: Sequence[int] | np.ndarray, n_past: int) -> None:
        """All inputs, every time: the allocator reuses their memory during compute."""
        tensor_array(self._tokens)[...] = tokens
        if self._positions is not None:
            tensor_array(self._positions)[...] = np.arange(n_past, n_past + len(tokens))
        if self._output_rows is not None:
            tensor_array(self._output_rows)[...] = len(tokens) - 1
        if self._rope_table is not None and self._rope_table.contents.data:
            table = tensor_array(self._rope_table)
            lanes = 1 if self.key.shape.form == "one" else PANEL * n_panels(len(tokens))
            angles = self._make_rope(np.arange(n_past, n_past + lanes))  # [rope_dim, lanes]
            table[...] = angles.reshape(table.shape) if lanes == 1 else _into_panels(angles)
        self.attention.fill(n_past)

    def read(self) -> np.ndarray | None:
        """A copy of the logits, float32 [n_outputs, n_vocab], or of the hidden states [n_tokens, E]; None where there
        are no outputs.
        """
        if self.result is None:
            return None
        packed = self.key.shape.form == "packed" and self.key.outputs != "last"
        return rows_of(self.result, self.key.shape.n_tokens, packed=packed)


def _into_panels(x: np.ndarray) -> np.ndarray:
    """[n, P * PANEL] -> [P, n, PANEL], less a leading dimension of one as tensor_array drops it."""
    return x.reshape(len(x), -1, PANEL).transpose(1, 0, 2).squeeze()


class GraphModel:
    """What every plan is built from."""

    def __init__(
        self, config: ModelConfig, weights: Weights, backend: Backend, *, exact: bool, fuses: bool = True
    ) -> None:
        """fuses: False for graphs of ggml's nodes alone, as repacked weights have; exact: those are llama.cpp's."""
        self.config, self.weights = config, weights
        self.exact, self._fuses = exact, fuses and not exact
        self.rope = rope_params(config)
        factors = None if weights.rope_freqs is None else tensor_array(weights.rope_freqs)
        self.rope_table = RopeTable(self.rope, factors=factors)
        self.precise_rope_table = RopeTable(self.rope, np.float64, factors)
        self.kernels = Kernels(config, backend)
        self._packs = bool(native.repkv_has_fast_prefill()) and config.n_embd <= MAX_PACKED_WIDTH

    def policy_inputs(
        self, memory: MemoryConfig, boundaries: Callable[[], BoundaryScores], *, long: bool | None = None
    ) -> PolicyInputs:
        """What a memory for this model is made from."""
        return PolicyInputs(self.config, memory, self.precise_rope_table, boundaries, self.key_biases, long=long)

    @cached_property
    def key_biases(self) -> list[NDArray[np.float32] | None]:
        """Of each layer, float32 [K * d], each head by halves; None where there is none. The exact graph has none:
        llama.cpp stores keys as they are.
        """
        biases = [None if self.exact else bias for bias in self.weights.key_biases]
        if self.config.family.rope == "halves":
            return biases
        pairs = self.config.n_head_kv, -1, 2
        return [None if b is None else b.reshape(pairs).swapaxes(1, 2).ravel() for b in biases]

    def by_halves(self, policy: Policy) -> bool:
        """Whether keys lie by halves in a memory, as the fused forms and what takes a bias from them know them."""
        return "one" in self.forms or (isinstance(policy, Centring) and policy.centres.in_use)

    @property
    def forms(self) -> frozenset[Form]:
        """Of what graphs of this model can be built."""
        # Repacked matrices can only be read by ggml's own multiplication.
        fuses = self._fuses and not self.weights.repacked
        return frozenset(("ggml", "one", "packed")) if fuses else frozenset(("ggml",))

    def make_policy(self, inputs: PolicyInputs) -> Policy:
        """Raises InputError for a policy, or settings, that this model's graphs cannot have."""
        policy = make_policy(inputs)
        if policy.forms & self.forms:
            return policy
        policy.close()
        if self.exact:
            raise InputError(f"--exact-graph is llama.cpp's graph, which has no --kv {policy.name}: leave one out")
        raise InputError(f"--kv {policy.name} needs the weights as in the file: load the model with --no-repack")

    def form(self, n_tokens: int) -> Form:
        """What a step is best built of."""
        if n_tokens == 1 and "one" in self.forms:
            return "one"
        if self._packs and n_tokens >= MIN_PACKED_TOKENS and "packed" in self.forms:
            return "packed"
        return "ggml"


class PlanCache:
    """Built and allocated plans by key, least recently used out first, all in one compute buffer."""

    def __init__(self, model: GraphModel, policy: Policy, backend: Backend, cb: NameTensor = set_name) -> None:
        self._model, self._policy, self._backend, self._cb = model, policy, backend, cb
        self._allocator = GraphAllocator(backend)
        self._tracer: Tracer | None = None
        self._plans: OrderedDict[PlanKey, Plan] = OrderedDict()
        self._heads: OrderedDict[tuple[Form, int], HeadPlan] = OrderedDict()

    @property
    def compute_bytes(self) -> int:
        return self._allocator.size

    def check_open(self) -> None:
        """Raises InputError once it is closed, as its session is."""
        if self._allocator.closed:
            raise InputError("the session is closed")

    def of_step(self, n_past: int, n_tokens: int, outputs: Outputs) -> Plan:
        """The plan of a step that reads n_tokens after n_past."""
        preferred = self._model.form(n_tokens)
        return self.get(PlanKey(self._policy.step_shape(n_past, n_tokens, preferred), outputs))

    def get(self, key: PlanKey) -> Plan:
        plan = self._plans.get(key)
        if plan is None:
            tracer = self._tracer
            traced = tracer is not None and tracer.traces_ops
            plan = Plan(self._model, self._policy, key, self._cb, traced=traced)
            if tracer is not None:
                plan.watch(tracer)
            self._place(plan)
        _keep(self._plans, key, plan)
        return plan

    def head(self, form: Form, n_rows: int) -> HeadPlan:
        """The plan that makes logits of n_rows hidden states of a step of this form."""
        key = form, n_rows
        plan = self._heads.get(key)
        if plan is None:
            model = self._model
            plan = HeadPlan(model.weights, model.kernels, model.rope, form, n_rows)
            self._place(plan)
        _keep(self._heads, key, plan)
        return plan

    @property
    def traced(self) -> bool:
        """Whether somebody watches the nodes."""
        return self._tracer is not None

    def trace(self, tracer: Tracer | None) -> None:
        """Plans from now on are watched by a tracer; None: by nobody any more."""
        self._tracer = tracer
        self._drop_all()

    def _place(self, plan: Plan | HeadPlan) -> None:
        """Where the buffer grew, hence moved, or could not grow and is gone, plans placed before point nowhere."""
        moved = True
        try:
            moved = self._allocator.allocate(plan.context.graph)
            plan.placed(self._backend)
        except BaseException:
            self._allocator.close()
            self._allocator = GraphAllocator(self._backend)
            plan.context.close()
            raise
        finally:
            if moved:
                self._drop_all()

    def _drop_all(self) -> None:
        plans: list[Plan | HeadPlan] = [*self._plans.values(), *self._heads.values()]
        for plan in plans:
            plan.context.close()
        self._plans.clear()
        self._heads.clear()

    def close(self) -> None:
        self._drop_all()
        self._allocator.close()


def _keep(plans: OrderedDict[Any, Any], key: Hashable, plan: Plan | HeadPlan) -> None:
    """As the one used last."""
    plans[key] = plan
    plans.move_to_end(key)
    while len(plans) > _MAX_PLANS:
        plans.popitem(last=False)[1].context.close()
