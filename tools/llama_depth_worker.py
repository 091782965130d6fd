"""llama.cpp as a worker of bench_depth.py: a deep context without reading its tokens.

The cells of a few tokens really read are repeated, through llama.cpp's own state of a sequence. What a step costs
depends on how many cells there are, not on what is in them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from struct import Struct
from time import perf_counter
from typing import Any

import _worker
import llama_worker
import numpy as np

# Of llama_state_seq_get_data: this number, the sequence, then what the KV cache writes.
STATE_MAGIC = 0xAF143CD8
CHUNK = llama_worker.N_UBATCH


class LlamaDepthEngine(llama_worker.LlamaEngine):
    """An Engine whose context can be filled without computing."""

    def state(self) -> np.ndarray:
        """Of sequence 0, uint8 [n_bytes]."""
        state = np.empty(self._llama.llama_state_seq_get_size(self._context, 0), np.uint8)
        if self._llama.llama_state_seq_get_data(self._context, _bytes(state), len(state), 0) != len(state):
            raise RuntimeError("llama.cpp could not write its state")
        return state

    def restore(self, state: np.ndarray, n_tokens: int) -> None:
        """Makes sequence 0 what the state says, which must be n_tokens."""
        if self._llama.llama_state_seq_set_data(self._context, _bytes(state), len(state), 0) != len(state):
            raise RuntimeError(f"llama.cpp could not restore a state of {n_tokens} tokens")
        memory = self._llama.llama_get_memory(self._context)
        first = self._llama.llama_memory_seq_pos_min(memory, 0)
        last = self._llama.llama_memory_seq_pos_max(memory, 0)
        if (first, last) != (0, n_tokens - 1):
            raise RuntimeError(f"llama.cpp restored positions {first} to {last} instead of 0 to {n_tokens - 1}")


class LlamaDepthWorker(_worker.Worker):
    """What bench_depth.py can ask of llama.cpp. Steps at a depth are forgotten again, so that it stays."""

    _engine: LlamaDepthEngine

    def read(self, tokens: list[int]) -> dict[str, Any]:
        """Seconds of each chunk of a prompt, read into an empty context."""
        self._engine.rewind(0)
        starts = range(0, len(tokens), CHUNK)
        return {"seconds": [self._seconds(tokens[start : start + CHUNK]) for start in starts]}

    def place(self, tokens: list[int], depth: int) -> dict[str, Any]:
        """A context of `depth` tokens, made of the cells of these tokens."""
        self._engine.rewind(0)
        self._engine.prefill(tokens)
        self._engine.restore(repeat_cells(self._engine.state(), depth), depth)
        return {}

    def time_chunk(self, tokens: list[int], depth: int) -> dict[str, Any]:
        """Seconds to read the tokens at once after the first `depth` of what the context holds."""
        self._engine.rewind(depth)
        seconds = self._seconds(tokens)
        self._engine.rewind(depth)
        return {"seconds": seconds}

    def time_tokens(self, tokens: list[int], depth: int) -> dict[str, Any]:
        """Seconds of each token, read alone after the first `depth` of what the context holds."""
        # The first step has a graph to build.
        self.time_chunk(tokens[:1], depth)
        return {"seconds": [self.time_chunk([token], depth)["seconds"] for token in tokens]}

    def _seconds(self, tokens: list[int]) -> float:
        start = perf_counter()
        self._engine.prefill(tokens)
        return perf_counter() - start


def repeat_cells(state: np.ndarray, n_cells: int) -> np.ndarray:
    """A sequence's state (uint8) with its cells over and over, n_cells of them at positions 0 to n_cells - 1.

    The layout is that of llama.cpp's llama_kv_cache::state_write, for one stream and one position per token: magic, id
    of the sequence, number of streams and of cells; per cell its position, number of sequences and sequence; whether V
    is transposed, number of layers; K of each layer, then V of each. Raises ValueError for any other.
    """
    return np.concatenate(list(_repeated(_Reader(state), n_cells)))


class _Reader:
    """Takes a state apart from front to back."""

    def __init__(self, state: np.ndarray) -> None:
        self._rest = state

    def take(self, n_bytes: int) -> np.ndarray:
        if n_bytes > len(self._rest):
            raise ValueError("the state of llama.cpp ends too early")
        taken, self._rest = self._rest[:n_bytes], self._rest[n_bytes:]
        return taken

    def numbers(self, layout: Struct) -> tuple[int, ...]:
        return layout.unpack(self.take(layout.size))

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


def _bytes(array: np.ndarray) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def make_engine(model: str, n_threads: int) -> LlamaDepthEngine:
    try:
        import llama_cpp
    except ImportError as error:
        raise RuntimeError(f"{error}: give an interpreter that has llama-cpp-python with --llama-python") from None
    return LlamaDepthEngine(llama_cpp, model, n_threads)


if __name__ == "__main__":
    # What serve() makes.
    _worker.Worker = LlamaDepthWorker
    _worker.serve(make_engine)
