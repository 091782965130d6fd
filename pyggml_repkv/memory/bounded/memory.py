"""What bounded memories share: a window and a store, the regions of a step, and when older tokens become far."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.errors import ComputeError, InputError
from pyggml_repkv.ffi.context import Tensor
from pyggml_repkv.memory.bounded.attention import BoundedChunk, BoundedOne, BoundedStep
from pyggml_repkv.memory.bounded.local import LocalWindow
from pyggml_repkv.memory.bounded.rotation import Rotation
from pyggml_repkv.memory.cache_types import check_cache_types
from pyggml_repkv.memory.centres import KeyCentres
from pyggml_repkv.memory.checkpoints import Checkpoints
from pyggml_repkv.memory.config import context_length
from pyggml_repkv.memory.index.base import Queries, Selection
from pyggml_repkv.memory.policy import DiskNeed, Form, PolicyInputs, StepAttention, StepShape, even_split
from pyggml_repkv.memory.regions import Regions
from pyggml_repkv.memory.store.arenas import Arenas
from pyggml_repkv.memory.store.base import Store
from pyggml_repkv.ops.makers import Ops

log = logging.getLogger(__name__)


class BoundedMemory(ABC):
    """A policy is made of its parts. It says what leaves the window (`evict`) and what of that is attended (`select`);
    it is made from PolicyInputs alone.
    """

    name: ClassVar[str]
    forms: ClassVar[frozenset[Form]] = frozenset(("one", "packed"))
    bounded: ClassVar[bool] = True
    rewinds: ClassVar[bool] = False
    evicts: ClassVar[bool] = False
    ignores: ClassVar[frozenset[str]] = frozenset()
    precise_rope: ClassVar[bool] = True

    def __init__(
        self, inputs: PolicyInputs, arenas: Arenas, rotation: Rotation, local: LocalWindow, store: Store
    ) -> None:
        self.config, self.memory = inputs.config, inputs.memory
        self.n_ctx = context_of(inputs)
        self.arenas, self.rotation, self.local, self.store = arenas, rotation, local, store
        self.centres = KeyCentres(inputs.config, inputs.memory, inputs.rope, inputs.key_biases, self.n_ctx + 1)
        self.regions = Regions()
        self._inputs = inputs
        self._torn = False
        # Set before the first step: queries and selections stay readable after each (`last_step`).
        self.observed = False
        self.last_step: BoundedStep | None = None

    @abstractmethod
    def evict(self, tokens: NDArray[np.int32], n_past: int, start: int) -> tuple[int, int]:
        """What lies before `start` has left the window -> (end of what is in blocks, units in them)."""

    @abstractmethod
    def select(self, ops: Ops, q: Queries, regions: Tensor, layer: int) -> Selection:
        """What of that a layer's queries attend."""

    def budget(self, n_past: int, n_tokens: int) -> int:
        """How many tokens of blocks a step attends, if there are as many."""
        return 0

    @property
    def knows_selection(self) -> bool:
        """Whether the step that was begun, of one token, attends what the last one selected."""
        return False

    def split(self, n_tokens: int, n_batch: int) -> list[int]:
        return even_split(n_tokens, n_batch)

    def step_shape(self, n_past: int, n_tokens: int, preferred: Form) -> StepShape:
        if n_tokens == 1:
            return StepShape(n_tokens, "one", (self.rotation.far, self.knows_selection))
        return StepShape(n_tokens, "packed", (self.rotation.far, False))

    def build(self, ops: Ops, shape: StepShape) -> StepAttention:
        if shape.form == "one":
            return BoundedOne(self, ops, known=self.knows_selection)
        return BoundedChunk(self, ops, shape.n_tokens)

    def begin_step(self, tokens: NDArray[np.int32], n_past: int) -> None:
        """Raises ComputeError once an earlier call was stopped halfway, as by Ctrl-C."""
        if self._torn:
            raise ComputeError("the memory was stopped while it was being rearranged: start a new session")
        self._torn = True
        self._rearrange(tokens, n_past)
        self._torn = False

    def _rearrange(self, tokens: NDArray[np.int32], n_past: int) -> None:
        n_tokens = len(tokens)
        if self.rotation.outgrown(n_past + n_tokens):
            self._go_far(n_past)
        start = self.local.start(n_past)
        remainder, n_units = self.evict(tokens, n_past, start)
        self.store.make_room(n_past, n_tokens)
        self.local.make_room(n_past, n_tokens)
        self.regions = Regions(
            first=n_past, n_tokens=n_tokens, sink_end=min(self.memory.n_sink, start), remainder=min(remainder, start),
            local=start, local_base=self.local.base, n_units=n_units, far=self.rotation.far,
            budget=self.budget(n_past, n_tokens), store_base=self.store.base,
        )  # fmt: skip
        r = self.regions
        n_selected = min(r.budget, max(r.remainder - r.sink_end, 0))
        self.rotation.order_from(r.local, r.sink_end + n_selected + r.local - r.remainder)

    def _go_far(self, n_past: int) -> None:
        """Takes the rotation out of what is stored."""
        self.rotation.far, self.rotation.far_at = True, n_past
        if n_past > 0:
            n_ctx = self.config.n_ctx_train
            log.info("past the %d tokens the model was trained on: older tokens are seen from one distance now", n_ctx)
            self.store.turn_back(self.rotation, n_past)
            self.went_far()

    def went_far(self) -> None:  # noqa: B027 - most have nothing to do
        """Called when stored keys have lost their rotation."""

    @property
    def torn(self) -> bool:
        """Whether it was stopped halfway and is no longer of use."""
        return self._torn

    def undo_step(self, n_past: int) -> None:  # noqa: B027 - most have nothing to do
        """Rows beyond n_past are written again before they are read."""

    def disk_need(self, n_tokens: int) -> DiskNeed | None:
        return None

    def checkpoint(self) -> Checkpoints | None:
        return None

    def fork(self, n_past: int) -> Self:
        if self._torn:
            raise ComputeError("the memory was stopped while it was being rearranged: it cannot be forked")
        inputs = replace(self._inputs, arenas=self.arenas.fork(n_past), long=self.rotation.long)
        other = self._make(replace(inputs, block_file=self.store.share_file()))
        try:
            other.copy_from(self)
        except BaseException:
            other.close()
            raise
        return other

    def rewind(self, n_past: int) -> None:
        raise AssertionError(f"--kv {self.name} cannot go back to an earlier token")

    def fresh(self) -> Self:
        inputs = replace(self._inputs, arenas=None, long=self.rotation.long)
        return self._make(replace(inputs, block_file=self.store.new_file()))

    def _make(self, inputs: PolicyInputs) -> Self:
        make: Callable[[PolicyInputs], Self] = type(self)
        try:
            return make(inputs)
        except BaseException:
            if inputs.block_file is not None:
                inputs.block_file.close()
            raise

    def copy_from(self, other: Self) -> None:
        """Takes over what another memory holds beside its arenas, which are shared already."""
        self.rotation.far, self.rotation.far_at = other.rotation.far, other.rotation.far_at
        self.local.base, self.regions = other.local.base, replace(other.regions)
        self.store.copy_from(other.store)

    def close(self) -> None:
        self.store.close()
        self.arenas.close()


def check_settings(inputs: PolicyInputs, name: str) -> None:
    """Raises InputError for what no bounded memory can be made of."""
    if not inputs.memory.flash_attn:
        raise InputError(f"-fa off stores attention scores, which --kv {name} never does: leave one out")
    check_cache_types(inputs.config, inputs.memory)


def context_of(inputs: PolicyInputs) -> int:
    """Tokens that the context may hold."""
    return context_length(inputs.memory, inputs.config.n_ctx_train, bounded=True)
