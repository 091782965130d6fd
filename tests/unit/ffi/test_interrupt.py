"""Ctrl-C stops a compute at once and leaves everything as before."""

import ctypes
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from pyggml_repkv.errors import ComputeError
from pyggml_repkv.ffi.callbacks import PythonOps
from pyggml_repkv.ffi.context import GraphContext
from pyggml_repkv.ffi.handles import Backend, GraphAllocator, tensor_array
from pyggml_repkv.ffi.library import g, native
from pyggml_repkv.ops.kernels import PANEL
from tests.stopping import endless_requests
from tests.subprocesses import ROOT, printed
from tests.tiny_models import TinySpec, write_tiny_model
from tests.unit.native.op_bench import Bench, config

libc = ctypes.CDLL(None)


def installed_handler():
    """The address of the C function that SIGINT calls."""
    action = ctypes.create_string_buffer(1024)
    assert libc.sigaction(signal.SIGINT, None, action) == 0
    return int.from_bytes(action.raw[:8], sys.byteorder)


@contextmanager
def python_handler(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Graph:
    """A row of Python ops on one backend; they act during compute."""

    def __init__(self, *functions):
        self.allocator, self.backend = GraphAllocator(), Backend(2)
        self.ops, self.context = PythonOps(self.backend), GraphContext(128)
        node = self.context.input(g.GGML_TYPE_F32, (1,), "x")
        for function in functions:
            node = self.ops.add(self.context, (1,), [node], lambda x, f=function: f() or x)
        self.context.output(node)
        self.allocator.allocate(self.context.graph)

    def compute(self):
        self.backend.compute(self.context.native_graph)


def test_an_interrupt_stops_after_the_node_that_runs():
    """The previous handler is called too; even if it does not raise, the result is not valid."""
    handled, ran = [], []
    graph = Graph(lambda: ran.append(1), lambda: signal.raise_signal(signal.SIGINT), lambda: ran.append(3))
    with python_handler(lambda *_: handled.append(True)), pytest.raises(KeyboardInterrupt):
        graph.compute()
    assert (handled, ran) == ([True], [1])


def test_the_next_compute_is_whole_again():
    ran = []
    graph = Graph(lambda: signal.raise_signal(signal.SIGINT), lambda: ran.append(2))
    with python_handler(lambda *_: None):
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                graph.compute()
        Graph(lambda: ran.append(1)).compute()
    assert ran == [1]


def test_the_handler_is_installed_only_during_compute():
    inside = []
    before = installed_handler()
    Graph(lambda: inside.append(installed_handler())).compute()
    assert inside != [before]
    assert installed_handler() == before
    with python_handler(lambda *_: None), pytest.raises(KeyboardInterrupt):
        Graph(lambda: signal.raise_signal(signal.SIGINT)).compute()
    assert installed_handler() == before


@pytest.mark.parametrize("action", [signal.SIG_IGN, signal.SIG_DFL])
def test_what_is_not_handled_is_left_alone(action):
    with python_handler(action):
        before = installed_handler()
        inside = []
        Graph(lambda: inside.append(installed_handler())).compute()
        assert inside == [before] == [installed_handler()]


def test_an_ignored_interrupt_does_not_stop():
    ran = []
    with python_handler(signal.SIG_IGN):
        Graph(lambda: signal.raise_signal(signal.SIGINT), lambda: ran.append(2)).compute()
    assert ran == [2]


def test_a_compute_inside_another_restores_the_handler_at_the_end():
    """Another thread computes at the same time: the last one restores the handler."""
    before, inside = installed_handler(), []

    def nested():
        thread = threading.Thread(target=Graph(lambda: None).compute)
        thread.start()
        thread.join()
        inside.append(installed_handler())

    Graph(nested).compute()
    assert inside != [before]
    assert installed_handler() == before


def test_a_request_stops_compute_and_is_no_interrupt():
    ran = []
    graph = Graph(lambda: graph.backend.stop(), lambda: ran.append(2))
    with pytest.raises(ComputeError, match="stopped"):
        graph.compute()
    assert ran == []


class Other:
    """A compute that runs in another thread all the time: its first node waits for `end`."""

    def __enter__(self):
        self.started, self.may_end, self.ran, self.raised = threading.Event(), threading.Event(), [], []
        self.graph = Graph(self.started.set, self.may_end.wait, lambda: self.ran.append(1))
        self.thread = threading.Thread(target=self.compute)
        self.thread.start()
        assert self.started.wait(10)
        return self

    def compute(self):
        try:
            self.graph.compute()
        except BaseException as error:
            self.raised.append(type(error))

    def __exit__(self, *_):
        self.may_end.set()
        self.thread.join()


def test_a_request_stops_one_compute_of_two():
    graph = Graph(lambda: graph.backend.stop())
    with Other() as other, pytest.raises(ComputeError, match="stopped"):
        graph.compute()
    assert (other.raised, other.ran) == ([], [1])


def test_an_interrupt_stops_every_compute():
    with python_handler(lambda *_: None), Other() as other, pytest.raises(KeyboardInterrupt):
        Graph(lambda: signal.raise_signal(signal.SIGINT)).compute()
    assert (other.raised, other.ran) == ([KeyboardInterrupt], [])


def test_an_interrupt_before_a_compute_does_not_stop_it():
    with python_handler(lambda *_: None), Other() as other:
        with pytest.raises(KeyboardInterrupt):
            Graph(lambda: signal.raise_signal(signal.SIGINT)).compute()
        ran = []
        Graph(lambda: ran.append(1)).compute()
    assert (other.raised, ran) == ([KeyboardInterrupt], [1])


def matmul(bench, x, cells):
    return bench.ops.matmul(x, [bench.tensor(np.ones((4096, 512), np.float32))])


def matmul_gate_up(bench, x, cells):
    weights = [bench.tensor(np.ones((4096, 512), np.float32)) for _ in range(2)]
    return bench.ops.matmul_gate_up(x, *weights)


def attend_chunk(bench, x, cells):
    arenas = [bench.tensor(np.ones((16384, 64), np.float32)) for _ in "kv"]
    return bench.ops.attend_chunk(x, *arenas, cells)


@pytest.mark.parametrize("op", [matmul, matmul_gate_up, attend_chunk], ids=lambda op: op.__name__)
def test_a_long_op_stops_in_its_middle(op):
    """The part that it did not reach is unchanged."""
    bench = Bench(config(n_head=16), 2)
    x = bench.tensor(np.ones((64, 512, PANEL), np.float32))
    node = op(bench, x, bench.tensor(np.array([14000, 2048], np.int32), g.GGML_TYPE_I32))
    bench.graph.output(node)
    allocator = GraphAllocator()
    allocator.allocate(bench.graph.graph)
    tensor_array(node)[...] = np.nan
    with endless_requests(bench.backend, 1e-3), pytest.raises(ComputeError, match="stopped"):
        bench.backend.compute(bench.graph.native_graph)
    assert np.isnan(tensor_array(node)).any()


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory):
    """Reads 16,000 tokens in some seconds."""
    path = tmp_path_factory.mktemp("interrupt") / "slow.gguf"
    write_tiny_model(path, TinySpec(n_layer=6, n_head=8, n_head_kv=2, head_dim=64, n_ff=1024, n_ctx=32768))
    return path


def seconds_to_end(process):
    """Returns the seconds until a process that got SIGINT ends."""
    start = time.perf_counter()
    process.send_signal(signal.SIGINT)
    process.wait(timeout=30)
    return time.perf_counter() - start


# The packed ops stop in their middle, so even one step may be long; ggml's nodes run to their end.
@pytest.mark.parametrize("options", ["-b 512 -t 1", "-b 16000 -t 1", "-b 16000 -t 2", "-b 512 -t 2 --exact-graph"])
def test_the_command_line_ends_at_once(slow_model, tmp_path, options):
    if "16000" in options and not native.repkv_has_fast_prefill():
        pytest.skip("this CPU reads prompts with ggml's nodes")
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("ab" * 8000)
    command = [sys.executable, "-m", "pyggml_repkv", "run", "-m", slow_model, "-f", prompt, *options.split()]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        # The last lines before the prompt is read.
        assert process.stderr.readline().startswith("pyggml_repkv: memory for")
        assert process.stderr.readline().startswith("pyggml_repkv: seed")
        time.sleep(0.4)
        assert process.poll() is None
        # A second is promised, but a busy machine may be slower. Exit code 130 says that the run did not end by itself.
        assert seconds_to_end(process) < 10
        assert process.returncode == 130
        assert process.stdout.read() == ""
        assert "Traceback" not in process.stderr.read()


def test_an_interrupted_step_did_not_happen(slow_model):
    """After a signal in the middle of a chunk, n_past is as before, and the session continues as if undisturbed."""
    source = """
import os, signal, sys, threading
import numpy as np
from pyggml_repkv.engine.model import Model
from pyggml_repkv.memory.config import MemoryConfig
model = Model.load(sys.argv[1], threads=1)
memory = MemoryConfig(n_ctx=20000, n_batch=16000)
fresh, session = model.session(memory), model.session(memory)
for s in (fresh, session):
    s.prefill(range(40))
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    session.prefill([7] * 15900)
except KeyboardInterrupt:
    print("interrupted", session.n_past)
for tokens in ([1, 2, 3], [4], range(50)):
    print(np.array_equal(fresh.prefill(tokens), session.prefill(tokens)), session.n_past == fresh.n_past)"""
    assert printed(source, str(slow_model)) == ["interrupted 40", *["True True"] * 3]


def test_a_signal_that_is_ignored_leaves_a_step_alone(slow_model):
    """Signals are ignored under nohup, or in the background of a script."""
    source = """
import os, signal, sys, threading
from pyggml_repkv.engine.model import Model
signal.signal(signal.SIGINT, signal.SIG_IGN)
session = Model.load(sys.argv[1], threads=1).session()
threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
session.prefill([7] * 3000)
print(session.n_past, signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"""
    assert printed(source, str(slow_model)) == ["3000 True"]
