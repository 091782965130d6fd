"""The output norm and matrix alone: a chunk's logits in slices, of the rows that somebody wants."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pyggml_repkv.ffi.context import GraphContext, Rope, Tensor, set_name
from pyggml_repkv.ffi.handles import Backend, tensor_array
from pyggml_repkv.ffi.library import g as ggml
from pyggml_repkv.graph.forms.ggml import GgmlForm
from pyggml_repkv.graph.forms.packed import PackedForm
from pyggml_repkv.memory.policy import Form
from pyggml_repkv.model.weights import Weights
from pyggml_repkv.ops.kernels import PANEL, Kernels
from pyggml_repkv.ops.makers import Ops

# Rows of logits at a time: 39 MB with 151,936 tokens. Whole panels, and of ggml's groups of rows.
N_ROWS = 64


class HeadPlan:
    """Hidden states [n_rows, E] -> logits, by the nodes that a form has for a chunk."""

    def __init__(self, weights: Weights, kernels: Kernels, rope: Rope, form: Form, n_rows: int) -> None:
        self.context = GraphContext(64)
        self._packed, self._n_rows = form == "packed", n_rows
        g, config, ops = self.context, kernels.config, Ops(self.context, kernels)
        self._hidden = g.input(ggml.GGML_TYPE_F32, (n_rows, config.n_embd), "inp_hidden")
        if self._packed:
            logits = PackedForm(ops, weights, set_name, n_rows).logits(ops.pack(self._hidden))  # [P, V, PANEL]
        else:
            nodes = GgmlForm(g, config, weights, rope, None, set_name, last_row=None, by_halves=False)
            logits = nodes.logits(self._hidden)  # [n_rows, V]
        self._logits = g.output(logits)

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
    # Reshaping copies several panels, but not a single one.
    rows = panels.transpose(0, 2, 1).copy()
    return rows.reshape(-1, panels.shape[1])[:n_rows]


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
