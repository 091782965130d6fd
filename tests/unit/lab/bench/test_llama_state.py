"""llama.cpp's state with repeated cells, and the engine that writes and restores it."""

import numpy as np
import pytest
from _llama_state import STATE_MAGIC, repeat_cells
from llama_worker import LlamaEngine


def state_of(k, v, *, transposed=False):
    """A state as llama.cpp writes it. k, v: float16 [n_layers, n_cells, row]; cells at positions 0, 1, ..."""
    n_layers, n_cells, row = k.shape
    words = [STATE_MAGIC, 0, 1, n_cells]
    for position in range(n_cells):
        words += [position, 1, 0]
    state = np.array([*words, transposed, n_layers], "<u4").tobytes()
    for layer in k:
        state += np.array([1, 2 * row, 0], "<u4").tobytes() + layer.tobytes()
    for layer in v:
        header = [1, 2, row] if transposed else [1, 2 * row, 0]
        state += np.array(header, "<u4").tobytes() + (layer.T if transposed else layer).tobytes()
    return np.frombuffer(state, np.uint8)


@pytest.fixture
def cells():
    return np.random.default_rng(1).standard_normal((2, 3, 5, 4)).astype(np.float16)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("n_cells", [1, 5, 12])
def test_cells_are_repeated_in_every_layer(cells, transposed, n_cells):
    source = np.arange(n_cells) % 5
    expected = state_of(*cells[:, :, source], transposed=transposed)
    repeated = repeat_cells(state_of(*cells, transposed=transposed), n_cells)
    assert repeated.dtype == np.uint8
    assert repeated.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        (0, 7, "unknown layout: magic 0x7, 1 streams, 5 cells"),
        (2, 2, "unknown layout: .* 2 streams"),
        (3, 0, "unknown layout: .* 0 cells"),
        (5, 2, "unknown layout of cells"),
        (7, 9, "unknown layout of cells"),
        (20, 2, "has 104 bytes more than expected"),
        (20, 4, "ends too early"),
        (22, 2**31, "ends too early"),
    ],
)
def test_a_state_of_another_layout_is_an_error(cells, word, value, message):
    state = state_of(*cells).copy()
    state.view("<u4")[word] = value
    with pytest.raises(ValueError, match=message):
        repeat_cells(state, 8)


def test_a_state_that_is_cut_off_is_an_error(cells):
    state = state_of(*cells)
    for n_bytes in (0, 15, 30, 77, len(state) - 1):
        with pytest.raises(ValueError, match="ends too early"):
            repeat_cells(state[:n_bytes], 8)


class FakeLlama:
    """The functions that states need. A state of n bytes stands for n tokens, of which `lost` get lost."""

    def __init__(self, n_tokens, lost=0, fails=False):
        self.n_tokens, self.lost, self.fails = n_tokens, lost, fails

    def llama_state_seq_get_size(self, context, sequence):
        return self.n_tokens

    def llama_state_seq_get_data(self, context, target, size, sequence):
        for i in range(size):
            target[i] = 7
        return size - self.fails

    def llama_state_seq_set_data(self, context, source, size, sequence):
        assert [source[i] for i in range(size)] == [7] * size
        self.n_tokens = size - self.lost
        return 0 if self.fails else size

    def llama_get_memory(self, context):
        return self

    def llama_memory_seq_pos_min(self, memory, sequence):
        return 0

    def llama_memory_seq_pos_max(self, memory, sequence):
        return self.n_tokens - 1


def engine_of(llama):
    engine = object.__new__(LlamaEngine)
    engine._llama, engine._context = llama, None
    return engine


def test_states_are_written_and_restored():
    engine = engine_of(FakeLlama(4))
    assert engine._state().tolist() == [7] * 4
    engine._restore(np.full(9, 7, np.uint8), 9)
    assert engine._llama.n_tokens == 9


def test_a_state_that_is_not_restored_is_an_error():
    state = np.full(9, 7, np.uint8)
    with pytest.raises(RuntimeError, match="could not restore a state of 9 tokens"):
        engine_of(FakeLlama(4, fails=True))._restore(state, 9)
    with pytest.raises(RuntimeError, match="restored positions 0 to 6 instead of 0 to 8"):
        engine_of(FakeLlama(4, lost=2))._restore(state, 9)
    with pytest.raises(RuntimeError, match="could not write its state"):
        engine_of(FakeLlama(4, fails=True))._state()
