"""Repeats the cells of llama.cpp's saved sequence: a deep context without reading its tokens.

The cost of a step depends on the number of cells, not on their contents.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct

import numpy as np

# llama_state_seq_get_data writes this number, the sequence, then the KV cache.
STATE_MAGIC = 0xAF143CD8


def repeat_cells(state: np.ndarray, n_cells: int) -> np.ndarray:
    """Returns a sequence's state (uint8) with n_cells cells at positions 0 to n_cells - 1: copies of the given ones.

    The layout is that of llama.cpp's llama_kv_cache::state_write, for one stream and one position per token: magic, id
    of the sequence, numbers of streams and cells; per cell its position, number of sequences and sequence; whether V is
    transposed, number of layers; K of each layer, then V of each. Raises ValueError for any other layout.
    """
    return np.concatenate(list(_repeated(_Reader(state), n_cells)))


class _Reader:
    """Reads a state from front to back."""

    def __init__(self, state: np.ndarray) -> None:
        self._rest = state

    def take(self, n_bytes: int) -> np.ndarray:
        if n_bytes > len(self._rest):
            raise ValueError("the state of llama.cpp ends too early")
        taken, self._rest = self._rest[:n_bytes], self._rest[n_bytes:]
        return taken

    def numbers(self, layout: Struct) -> tuple[int, ...]:
        return layout.unpack(self.take(layout.size).tobytes())

    def end(self) -> None:
        if len(self._rest):
            raise ValueError(f"the state of llama.cpp has {len(self._rest)} bytes more than expected")


_HEADER = Struct("<4I")  # magic, sequence, n_streams, n_cells
_CELL = np.dtype([("position", "<i4"), ("n_sequences", "<u4"), ("sequence", "<i4")])
_LAYERS = Struct("<2I")  # V is transposed, n_layers
_ROWS = Struct("<iQ")  # type, bytes of a cell's row; then [n_cells, row]
_COLUMNS = Struct("<i2I")  # type, bytes of an element, row length; then [row length, n_cells, element]


def _repeated(reader: _Reader, n_cells: int) -> Iterator[np.ndarray]:
    magic, sequence, n_streams, n_given = reader.numbers(_HEADER)
    if (magic, n_streams) != (STATE_MAGIC, 1) or not n_given:
        raise ValueError(
            f"the state of llama.cpp has an unknown layout: magic {magic:#x}, {n_streams} streams, {n_given} cells"
        )
    yield _packed(_HEADER, magic, sequence, n_streams, n_cells)
    source = np.arange(n_cells) % n_given
    cells = reader.take(n_given * _CELL.itemsize).view(_CELL)
    if (cells["n_sequences"] != 1).any() or (cells["position"] != np.arange(n_given)).any():
        raise ValueError("the state of llama.cpp has an unknown layout of cells")
    cells = cells[source]
    cells["position"] = np.arange(n_cells)
    yield cells.view(np.uint8)
    transposed, n_layers = reader.numbers(_LAYERS)
    yield _packed(_LAYERS, transposed, n_layers)
    for is_value in (False, True):
        for _ in range(n_layers):
            yield from _repeated_layer(reader, _COLUMNS if is_value and transposed else _ROWS, n_given, source)
    reader.end()


def _repeated_layer(reader: _Reader, layout: Struct, n_given: int, source: np.ndarray) -> Iterator[np.ndarray]:
    header = reader.numbers(layout)
    yield _packed(layout, *header)
    n_element, n_rows = (*header[1:], 1)[:2]
    data = reader.take(n_rows * n_given * n_element).reshape(n_rows, n_given, n_element)
    yield data[:, source].reshape(-1)


def _packed(layout: Struct, *numbers: int) -> np.ndarray:
    return np.frombuffer(layout.pack(*numbers), np.uint8)
