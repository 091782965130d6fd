"""What a model file holds and the memory it needs, from its header and shapes, without reading its weights."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from pyggml_repkv.engine import budget
from pyggml_repkv.errors import ComputeError, InputError, ModelFileError
from pyggml_repkv.ffi.context import TensorContext
from pyggml_repkv.ffi.handles import Backend
from pyggml_repkv.ffi.library import g
from pyggml_repkv.graph.decoder import Outputs
from pyggml_repkv.graph.plan import GraphModel, PlanCache
from pyggml_repkv.memory.config import UNBOUNDED_CONTEXT, MemoryConfig
from pyggml_repkv.memory.cut.boundaries import BoundaryScores
from pyggml_repkv.memory.policy import DiskNeed, Policy
from pyggml_repkv.memory.registry import policy_kind
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.gguf_file import GGUFFile, TensorInfo, file_error
from pyggml_repkv.model.rope_options import AS_IN_FILE, RopeOptions
from pyggml_repkv.model.tensors import check_tensors, expected_tensors
from pyggml_repkv.model.tokenizer_keys import TokenizerKeys, special_ids
from pyggml_repkv.model.weights import Repacker, Weights

_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True, slots=True)
class SpecialToken:
    id: int
    text: str


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """The file's tokenizer keys. pre: the name in the file; supported: whether this program has such a tokenizer;
    problem: why not, or ""; bos, eos, eot: None if the file names none; chat_templates: their names.
    """

    kind: str
    pre: str
    supported: bool
    problem: str
    n_tokens: int
    n_merges: int
    add_bos: bool
    bos: SpecialToken | None
    eos: SpecialToken | None
    eot: SpecialToken | None
    chat_templates: tuple[str, ...]

    @classmethod
    def of(cls, file: GGUFFile) -> TokenizerInfo:
        """Reads the keys only: building the encoder takes longer than everything else here. Raises ModelFileError."""
        metadata = file.metadata
        kind, pre = (str(metadata.get(f"tokenizer.ggml.{key}", "")) for key in ("model", "pre"))
        tokens, merges = (_array(file, f"tokenizer.ggml.{key}") for key in ("tokens", "merges"))
        problem, add_bos = "", False
        try:
            add_bos = TokenizerKeys.read(metadata).add_bos
        except ModelFileError as error:
            problem = str(error)
        ids = special_ids(metadata, len(tokens))
        bos, eos, eot = (
            SpecialToken(ids[role], tokens[ids[role]]) if role in ids else None for role in ("bos", "eos", "eot")
        )
        return cls(
            kind=kind,
            pre=pre,
            supported=not problem,
            problem=problem,
            n_tokens=len(tokens),
            n_merges=len(merges),
            add_bos=add_bos,
            bos=bos,
            eos=eos,
            eot=eot,
            chat_templates=tuple(
                key.removeprefix(_TEMPLATE).removeprefix(".") or "default"
                for key in metadata
                if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")
            ),
        )


def _array(file: GGUFFile, key: str) -> list[Any]:
    values = file.metadata.get(key, [])
    if not isinstance(values, list):
        raise file_error(file.path, f"{key} is not an array of strings")
    return values


@dataclass(frozen=True, slots=True)
class TypeCount:
    """All tensors of one type. n_repacked: those for which ggml has a faster layout on this CPU."""

    type: str
    n_tensors: int
    n_parameters: int
    bytes: int
    n_repacked: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.n_parameters


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a policy needs after n_tokens tokens.

    ram: bytes by part, as `run` names them; `compute`, the buffer of the largest step, is missing if the graph cannot
    be built. fits: whether `run` takes the file, and RAM (weights included) and disk suffice; most_tokens: how many
    tokens would fit in RAM, at most n_tokens; note: what does not fit, or "".
    """

    policy: str
    n_tokens: int
    ram: Mapping[str, int]
    disk: DiskNeed | None
    fits: bool
    most_tokens: int
    note: str

    @property
    def ram_bytes(self) -> int:
        return sum(self.ram.values())


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """What to plan for. memories: one for each policy; repack, exact: as `Model.load` has them."""

    memories: Sequence[MemoryConfig]
    n_tokens: int
    n_threads: int = 1
    repack: bool = True
    exact: bool = False


class ModelInfo:
    """The facts of a model file; `types` is empty for a vocabulary without weights. Raises ModelFileError for a file
    that is not sound.
    """

    def __init__(self, file: GGUFFile, rope: RopeOptions = AS_IN_FILE) -> None:
        self.file = file
        self.config = rope.applied_to(ModelConfig.from_gguf(file))
        self.tokenizer = TokenizerInfo.of(file)
        self.unused = check_tensors(file, self.config) if file.tensors else ()
        self.repacked = _repacked_bytes(file, self.config) if file.tensors else {}
        self.types = _count_types(file.tensors, self.repacked)
        self.n_parameters = sum(t.n_parameters for t in self.types)
        self.weight_bytes = sum(t.bytes for t in self.types)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.weight_bytes / self.n_parameters if self.types else 0.0

    def as_json(self, plans: Sequence[MemoryPlan], free_bytes: int) -> dict[str, Any]:
        """Returns the JSON object; docs/model_info.md has its keys."""
        config = asdict(self.config)
        if not self.types:
            # Only the tensors say whether the output is tied, and there are none.
            config["tied_output"] = None
        return {
            "file": {
                "path": str(self.file.path),
                "bytes": self.file.n_bytes,
                "n_parts": len(self.file.parts),
                "gguf_version": self.file.version,
                "n_tensors": len(self.file.tensors),
                "n_unused_tensors": len(self.unused),
            },
            "config": config,
            "tokenizer": asdict(self.tokenizer),
            "weights": {
                "types": [{**asdict(t), "bits_per_weight": round(t.bits_per_weight, 4)} for t in self.types],
                "n_parameters": self.n_parameters,
                "bytes": self.weight_bytes,
                "bits_per_weight": round(self.bits_per_weight, 4),
            },
            "memory": {
                "n_tokens": plans[0].n_tokens,
                "free_bytes": free_bytes,
                "policies": [_plain(plan) for plan in plans],
            }
            if plans
            else None,
        }

    def plans(self, inputs: PlanInputs, free_bytes: int) -> list[MemoryPlan]:
        """Returns a plan for each of inputs.memories; none for a vocabulary. free_bytes: the RAM that each may use.

        Raises InputError for settings that no session accepts.
        """
        if not self.types:
            return []
        with _Planner(self, inputs, free_bytes) as planner:
            return [planner.plan(memory) for memory in inputs.memories]


def _plain(plan: MemoryPlan) -> dict[str, Any]:
    plain = asdict(plan)
    plain["ram_bytes"] = plan.ram_bytes
    del plain["n_tokens"]
    return plain


def _count_types(tensors: Mapping[str, TensorInfo], repacked: Mapping[str, int]) -> tuple[TypeCount, ...]:
    """Returns a count for each type, the type with most bytes first."""
    by_type: dict[str, list[TensorInfo]] = {}
    for info in tensors.values():
        by_type.setdefault(info.type.name, []).append(info)
    counts = [
        TypeCount(
            name, len(infos), sum(prod(i.shape) for i in infos), sum(i.n_bytes for i in infos),
            sum(i.name in repacked for i in infos),
        )
        for name, infos in by_type.items()
    ]  # fmt: skip
    return tuple(sorted(counts, key=lambda t: -t.bytes))


def _repacked_bytes(file: GGUFFile, config: ModelConfig) -> dict[str, int]:
    """Returns bytes by tensor name, in ggml's layout, of every matrix that `Weights` would repack."""
    repacker = Repacker()
    sizes: dict[tuple[int, tuple[int, ...]], int] = {}
    found: dict[str, int] = {}
    for name, spec in expected_tensors(config, file.tensors).items():
        info = file.tensors[name]
        key = int(info.type), spec.shape
        # Token embeddings are multiplied only if they are the output matrix too.
        if len(spec.shape) != 2 or (name == "token_embd.weight" and not config.tied_output):
            continue
        buffer_type = repacker.buffer_type(*key)
        if buffer_type is None:
            continue
        if key not in sizes:
            context = TensorContext(8)
            sizes[key] = g.ggml_backend_buft_get_alloc_size(buffer_type, context.new(*key))
            context.close()
        found[name] = sizes[key]
    return found


class _Planner(ExitStack):
    """Builds policies and the graphs of their steps over the mapped file, without reading weights."""

    def __init__(self, info: ModelInfo, inputs: PlanInputs, free_bytes: int) -> None:
        super().__init__()
        self._info, self._inputs, self._free = info, inputs, free_bytes
        file, config = info.file, info.config
        self._weights = Weights(file, config, repack=False, join=not inputs.exact)
        self.callback(self._weights.close)
        self._backend = Backend(inputs.n_threads)
        self.callback(self._backend.close)

    def plan(self, memory: MemoryConfig) -> MemoryPlan:
        """Returns the plan of one policy. Raises InputError for settings that no session accepts."""
        info, n_tokens = self._info, self._inputs.n_tokens
        # Only ggml's own nodes read repacked matrices.
        repacked = info.repacked if self._inputs.repack and "ggml" in policy_kind(memory.kv).forms else {}
        graph = GraphModel(info.config, self._weights, self._backend, exact=self._inputs.exact, fuses=not repacked)
        # Copied matrices are not read from the file again, except for embeddings.
        copied = sum(info.file.tensors[name].n_bytes for name in repacked if name != "token_embd.weight")
        weights = {"weights": info.file.n_bytes - copied + sum(repacked.values())}
        with ExitStack() as stack:
            policy, problem = self._policy(graph, memory)
            stack.callback(policy.close)
            compute = {}
            if not problem:
                try:
                    compute = {"compute": self._compute_bytes(graph, memory, policy)}
                except ComputeError as error:
                    problem = str(error)
            ram = {**weights, **policy.bytes_at(n_tokens), **compute}
            need = policy.disk_need(n_tokens)
            most = n_tokens
            if sum(ram.values()) > self._free:
                rest = self._free - sum(weights.values()) - sum(compute.values())
                most = _most_tokens(policy, n_tokens, rest)
                problem = (
                    f"{n_tokens} tokens need {budget.size(sum(ram.values()))} and {budget.size(self._free)} are free"
                )
                problem += f": about {most} would fit" if most else ": none would fit"
            elif not problem and info.tokenizer.problem:
                problem = "`run` refuses the file's tokenizer"
            elif not problem and need is not None:
                try:
                    budget.check_disk(need, n_tokens)
                except InputError as error:
                    problem = str(error)
        return MemoryPlan(memory.kv, n_tokens, ram, need, not problem, most, problem)

    def _policy(self, graph: GraphModel, memory: MemoryConfig) -> tuple[Policy, str]:
        """Returns a policy for n_tokens and "", or a smaller policy, only good for counting, and why no session could
        have it for n_tokens.
        """
        n_tokens, config = self._inputs.n_tokens, graph.config
        n_ctx = n_tokens if n_tokens > UNBOUNDED_CONTEXT else memory.n_ctx
        long = memory.positions == "auto" and n_ctx > config.n_ctx_train
        problem = ""
        for smaller in (n_ctx, UNBOUNDED_CONTEXT, 1):
            try:
                policy = graph.make_policy(
                    graph.policy_inputs(replace(memory, n_ctx=smaller), _no_boundaries, long=long)
                )
            except ComputeError as error:
                problem = problem or str(error)
                continue
            if problem:
                policy.n_ctx = n_tokens
            return policy, problem
        raise ComputeError(problem)

    def _compute_bytes(self, graph: GraphModel, memory: MemoryConfig, policy: Policy) -> int:
        """Returns the bytes of the larger of two steps: the last chunk of n_tokens tokens, and the last token alone."""
        n_tokens = self._inputs.n_tokens
        plans = PlanCache(graph, policy, self._backend)
        try:
            for size in {policy.split(n_tokens, memory.n_batch)[0], 1}:
                outputs: Outputs = "all" if size == 1 else "last"
                plans.of_step(n_tokens - size, size, outputs)
            return plans.compute_bytes
        finally:
            plans.close()


def _most_tokens(policy: Policy, n_tokens: int, n_bytes: int) -> int:
    return max(0, bisect_right(range(n_tokens), n_bytes, key=lambda n: sum(policy.bytes_at(n + 1).values())))


def _no_boundaries() -> BoundaryScores:
    """Returns scores that nobody uses: a memory that reads no tokens cuts no text."""
    return BoundaryScores(lambda _: b"", None)
