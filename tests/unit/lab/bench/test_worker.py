"""The tokens in a context when a test is timed, for engines that can rewind and those that cannot."""

import numpy as np
import pytest

from pyggml_repkv.lab.bench.workers import _worker
from pyggml_repkv.lab.bench.workers._worker import Worker


class RecordingEngine:
    version, n_vocab = "fake", 10

    def __init__(self, can_rewind=True):
        self.can_rewind = can_rewind
        self.tokens, self.calls = [], []

    def open(self, n_ctx, flash_attn):
        self.tokens = []
        self.calls.append(("open", n_ctx))

    def prefill(self, tokens):
        self.calls.append(("prefill", list(tokens)))
        self.tokens += tokens

    def decode(self, token):
        self.calls.append(("decode", token))
        self.tokens.append(token)

    def rewind(self, n_past):
        assert self.can_rewind
        assert n_past <= len(self.tokens)
        del self.tokens[n_past:]

    def place(self, tokens, n_past):
        self.calls.append(("place", n_past))
        assert self.tokens == []
        self.tokens = [-1] * n_past

    def memory(self):
        return {"resident_bytes": 7}


@pytest.fixture
def worker():
    def make(can_rewind):
        made = Worker(RecordingEngine)
        made.load(can_rewind=can_rewind)
        made.open(n_ctx=64, flash_attn=True)
        made._engine.calls.clear()
        return made

    return make


def reach(worker, tokens, slack=0, synthetic=False):
    worker._engine.calls.clear()
    return worker.reach(tokens, slack, synthetic)["n_past"], worker._engine.calls


def test_a_depth_is_reached_by_reading_what_is_missing(worker):
    w = worker(True)
    assert reach(w, [1, 2, 3]) == (3, [("prefill", [1, 2, 3])])
    w.time_chunk([7, 8])
    assert w._engine.tokens == [1, 2, 3, 7, 8]
    assert reach(w, [1, 2, 3]) == (3, [])
    assert w._engine.tokens == [1, 2, 3]
    assert reach(w, [1, 2, 4, 5]) == (4, [("prefill", [4, 5])])
    assert reach(w, []) == (0, [])
    assert w._engine.tokens == []


def test_the_first_of_tokens_one_by_one_is_read_twice(worker):
    w = worker(True)
    reach(w, [1])
    w._engine.calls.clear()
    w.time_tokens([2, 3])
    assert w._engine.calls == [("decode", 2), ("decode", 2), ("decode", 3)]
    assert w._engine.tokens == [1, 2, 3]


def test_what_cannot_rewind_goes_on_within_the_slack(worker):
    w = worker(False)
    reach(w, [1, 2])
    w.time_tokens([3, 4])
    assert w._engine.tokens == [1, 2, 3, 3, 4]
    assert reach(w, [1, 2], slack=3) == (5, [])
    assert reach(w, [1, 2], slack=2) == (2, [("open", 64), ("prefill", [1, 2])])
    assert reach(w, [1, 2, 3]) == (3, [("prefill", [3])])
    assert reach(w, [1, 9]) == (2, [("open", 64), ("prefill", [1, 9])])
    assert w._engine.tokens == [1, 9]


def test_an_empty_context_has_no_slack(worker):
    w = worker(False)
    assert reach(w, [], slack=100) == (0, [])
    w.time_chunk([1, 2])
    assert reach(w, [], slack=100) == (0, [("open", 64)])
    assert w._engine.tokens == []


def test_repeated_cells(worker):
    w = worker(True)
    assert reach(w, [1] * 8, synthetic=True) == (8, [("place", 8)])
    w.time_chunk([2, 2])
    assert reach(w, [1] * 8, synthetic=True) == (8, [])
    assert len(w._engine.tokens) == 8
    # First shorter than the context, then longer, then read without repeated cells.
    assert reach(w, [1] * 5, synthetic=True) == (5, [])
    assert reach(w, [1] * 9, synthetic=True) == (9, [("place", 9)])
    assert reach(w, [1, 2], synthetic=False) == (2, [("prefill", [1, 2])])
    assert w._engine.tokens == [1, 2]
    assert reach(w, [], synthetic=True) == (0, [])


def test_seconds_are_those_of_the_tokens_that_count(worker, monkeypatch):
    w = worker(True)
    reach(w, [1])
    now = [0.0]
    monkeypatch.setattr(_worker, "perf_counter", lambda: now[0])
    for name in ("prefill", "decode"):
        inner = getattr(w._engine, name)

        def slow(x, inner=inner):
            now[0] += 5.0
            return inner(x)

        monkeypatch.setattr(w._engine, name, slow)
    assert w.time_chunk([7, 8]) == {"seconds": 5.0}
    assert w.time_tokens([7, 8]) == {"seconds": 10.0}


def test_the_peak_begins_again_with_repeated_cells(worker, monkeypatch):
    written = []
    monkeypatch.setattr(_worker.Path, "write_text", lambda path, text, _: written.append((str(path), text)))
    w = worker(True)
    reach(w, [1] * 8)
    assert written == []
    reach(w, [1] * 9, synthetic=True)
    assert written == [("/proc/self/clear_refs", "5")]


def test_repeated_cells_are_made_again_after_logits(worker, tmp_path):
    w = worker(True)
    reach(w, [1] * 8, synthetic=True)
    w._engine.prefill = w._engine.decode = lambda _: np.zeros(10, np.float32)
    w.logits([5], [], 0, str(tmp_path / "x.npy"))
    assert reach(w, [1] * 8, synthetic=True) == (8, [("place", 8)])


def test_what_cannot_rewind_reads_even_then(worker):
    assert reach(worker(False), [1, 2], synthetic=True) == (2, [("prefill", [1, 2])])


def test_logits_begin_from_nothing(worker, tmp_path, monkeypatch):
    w = worker(True)
    reach(w, [1, 2])
    rows = iter(np.eye(10, dtype=np.float32))
    for name in ("prefill", "decode"):
        inner = getattr(w._engine, name)
        monkeypatch.setattr(w._engine, name, lambda x, inner=inner: (inner(x), next(rows, None))[1])
    assert w.logits([5], [6], 2, str(tmp_path / "x.npy")) == {"tokens": [6, 1]}
    assert w._engine.tokens == [5, 6, 1]
    assert np.array_equal(np.load(tmp_path / "x.npy"), np.eye(10)[:3])
    assert reach(w, [5])[1] == [("prefill", [5])]


def test_memory_has_the_peak_of_this_process(worker):
    found = worker(True).memory()
    assert found["resident_bytes"] == 7
    assert found["peak_rss_bytes"] > 10_000_000
