"""The output norm and matrix alone: a chunk's logits in slices, of the rows that somebody wants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.ffi.context import GraphContext, Tensor, set_name
from pyggml_repkv.ffi.handles import Backend, tensor_array
from pyggml_repkv.ffi.library import g as ggml
from pyggml_repkv.graph.forms.base import DecoderForm
from pyggml_repkv.graph.forms.ggml import GgmlForm
from pyggml_repkv.graph.forms.packed import PackedForm
from pyggml_repkv.memory.policy import Form
from pyggml_repkv.ops.kernels import PANEL
from pyggml_repkv.ops.makers import Ops

if TYPE_CHECKING:
    from pyggml_repkv.graph.plan import GraphModel

# Rows of logits at a time: 39 MB with 151,936 tokens. Whole panels, and of ggml's groups of rows.
N_ROWS = 64


class HeadPlan:
    """Hidden states [n_rows, E] -> logits, by the nodes that a form has for a chunk."""

    def __init__(self, model: GraphModel, form: Form, n_rows: int) -> None:
        self.context = GraphContext(64)
        self._packed, self._n_rows = form == "packed", n_rows
        g = self.context
        self._hidden = g.input(ggml.GGML_TYPE_F32, (n_rows, model.config.n_embd), "inp_hidden")
        x, nodes = self._hidden, self._form(model, n_rows)
        if self._packed:
            x = Ops(g, model.kernels).pack(x)  # [P, E, PANEL]
        self._logits = g.output(nodes.logits(x))

    def _form(self, model: GraphModel, n_rows: int) -> DecoderForm:
        g = self.context
        if self._packed:
            return PackedForm(Ops(g, model.kernels), model.weights, set_name, n_rows)
        return GgmlForm(
            g, model.config, model.weights, model.rope, None, set_name, last_row=None, by_halves=False
        )  # fmt: skip

    def placed(self, backend: Backend) -> None:
        """Nothing to do: no hook runs between these nodes."""

    def compute(self, backend: Backend, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """hidden [n_rows, E] -> logits float32 [n_rows, n_vocab], the caller's own. Raises as Backend.compute does."""
        tensor_array(self._hidden)[...] = hidden
        backend.compute(self.context.native_graph)
        return rows_of(self._logits, self._n_rows, packed=self._packed)


def rows_of(tensor: Tensor, n_rows: int, *, packed: bool) -> NDArray[np.float32]:
    """A copy of what a chunk's graph made: float32 [n_rows, n]."""
    if not packed:
        return tensor_array(tensor).reshape(-1, tensor.contents.ne[0]).copy()
    panels = tensor_array(tensor).reshape(-1, tensor.contents.ne[1], PANEL)  # [P, n, PANEL]
    return panels.transpose(0, 2, 1).reshape(-1, panels.shape[1])[:n_rows]


def slices(n_rows: int, first: int) -> Iterator[tuple[int, int]]:
    """Yields (begin, end) of slices that cover rows [first, n_rows), of which there is one. They begin where N_ROWS
    divides and the last is never a short rest: ggml multiplies groups of rows and single ones by different kernels, and
    a row's logits are to be those that a graph of all rows gives.
    """
    begin, shortest = first - first % N_ROWS, N_ROWS // 2
    if n_rows - begin < shortest:
        begin = max(0, begin - N_ROWS)
    while begin < n_rows:
        end = n_rows if n_rows - begin < N_ROWS + shortest else begin + N_ROWS
        yield begin, end
        begin = end
