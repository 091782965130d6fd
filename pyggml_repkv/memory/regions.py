"""The parts of a sequence that a step of a bounded memory sees (struct repkv_regions of native/regions.h)."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

from pyggml_repkv.ffi.context import GraphContext, Tensor
from pyggml_repkv.ffi.handles import tensor_array
from pyggml_repkv.ffi.library import g, native_ffi


@dataclass(slots=True)
class Regions:
    """Positions, but for what is said. Sinks are [0, sink_end), the remainder (evicted tokens that fill no block) is
    [remainder, local), the window [local, first), and the step has n_tokens from first on.

    local_base, store_base: position less row in either arena; n_units: units that can be selected; far: whether
    positions are far; budget: tokens to select, if there are as many; kept: the half of kept-l with the last token's
    selection, -1 for none.
    """

    first: int = 0
    n_tokens: int = 0
    sink_end: int = 0
    remainder: int = 0
    local: int = 0
    local_base: int = 0
    n_units: int = 0
    far: bool = False
    budget: int = 0
    store_base: int = 0
    kept: int = -1

    @staticmethod
    def input(context: GraphContext) -> Tensor:
        """A graph's input for them, I32 [number of fields]."""
        return context.input(g.GGML_TYPE_I32, (len(fields(Regions)),), "kv_regions")

    def fill(self, tensor: Tensor) -> None:
        tensor_array(tensor)[...] = astuple(self)


assert [f.name for f in fields(Regions)] == [name for name, _ in native_ffi.typeof("struct repkv_regions").fields]
