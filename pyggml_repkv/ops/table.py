"""What is known of each op of the extension: the rows of native/ops.def, where each source is described."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pyggml_repkv.ffi.library import native, native_ffi

Cost = Literal["none", "matrices_one", "matrices", "attention", "score", "relevance"]


@dataclass(frozen=True, slots=True)
class OpInfo:
    """sources: names in order, of which the last may stand for several (many) and those from n_required on may be
    missing; reads, writes: positions of the sources of which a node reads rows (not the whole) or writes rows; cost:
    what counts its operations; function: the C function.
    """

    name: str
    cost: Cost = "none"
    sources: tuple[str, ...] = ()
    n_required: int = 0
    many: bool = False
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    function: Any = None

    @property
    def address(self) -> int:
        return int(native_ffi.cast("uintptr_t", self.function))

    def check(self, given: Collection[str]) -> None:
        """Raises AssertionError unless these are the names of the sources, in order."""
        right = self.n_required <= len(given) and tuple(given) == self.sources[: len(given)]
        assert right, f"{self.name} takes {self.sources}, not {tuple(given)}"


def _info(row: Any) -> OpInfo:
    sources = [source for source in row.sources if source.name]

    def positions(use: int) -> tuple[int, ...]:
        return tuple(i for i, source in enumerate(sources) if source.use & use)

    cost: Any = _text(row.cost)
    assert cost in get_args(Cost), cost
    return OpInfo(
        name=_text(row.name),
        cost=cost,
        sources=tuple(_text(source.name) for source in sources),
        n_required=len(sources) - len(positions(native.REPKV_MAYBE)),
        many=bool(positions(native.REPKV_MANY)),
        reads=positions(native.REPKV_ROWS),
        writes=positions(native.REPKV_WRITES),
        function=row.function,
    )


def _text(c_string: Any) -> str:
    return native_ffi.string(c_string).decode()


OPS = {info.name: info for info in map(_info, native.repkv_ops)}

TRACED_OP = int(native_ffi.cast("uintptr_t", native_ffi.addressof(native, "repkv_traced_op")))
"""Address of the op that runs another and notes when (struct repkv_op_params)."""
