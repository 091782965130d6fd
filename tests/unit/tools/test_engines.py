"""Worker processes: requests, how they fail, and what the context holds when time is taken."""

import os
import sys
from pathlib import Path

import _engines
import pytest
from _engines import EngineProcess, context_size, integers, run_tool, write_table
from _worker import Worker

from pyggml_repkv.errors import InputError, RepkvError

TOOLS = Path(_engines.__file__).parent


class RecordingEngine:
    version, n_vocab = "fake", 10

    def __init__(self):
        self.tokens, self.calls = [], []

    def open(self, n_ctx, flash_attn):
        self.tokens = []

    def prefill(self, tokens):
        self.calls.append(("prefill", list(tokens)))
        self.tokens += tokens

    def decode(self, token):
        self.calls.append(("decode", token))
        self.tokens.append(token)

    def rewind(self, n_past):
        assert n_past <= len(self.tokens)
        del self.tokens[n_past:]


@pytest.fixture
def worker():
    made = Worker(RecordingEngine)
    made.load()
    made.open(n_ctx=64, flash_attn=True)
    return made


def script(folder, body):
    path = folder / "worker.py"
    path.write_text(
        f"import os, sys\nsys.path[:0] = {[str(TOOLS), str(TOOLS.parent)]}\nfrom _worker import serve\n{body}\n"
    )
    return path


def test_decoding_is_timed_at_its_depth_after_one_untimed_step(worker):
    assert worker.time_decode([1, 2, 3, 4, 5], depth=3)["seconds"] > 0
    assert worker._engine.calls == [("prefill", [1, 2, 3]), ("decode", 4), ("decode", 4), ("decode", 5)]
    assert worker._engine.tokens == [1, 2, 3, 4, 5]


def test_only_the_missing_part_of_the_depth_is_read(worker):
    worker.time_prefill([1, 2, 3, 4])
    worker._engine.calls.clear()
    worker.time_decode([1, 2, 3, 4, 5, 6, 7], depth=6)
    assert worker._engine.calls[0] == ("prefill", [5, 6])
    worker._engine.calls.clear()
    worker.time_decode([1, 2, 9], depth=2)
    assert worker._engine.calls == [("decode", 9)] * 2
    assert worker._engine.tokens == [1, 2, 9]
    worker._engine.calls.clear()
    worker.time_decode([1, 5, 6, 7], depth=3)
    assert worker._engine.calls[0] == ("prefill", [5, 6])


def test_prefill_is_timed_from_an_empty_context(worker):
    worker.time_prefill([1, 2])
    worker.time_prefill([1, 2, 3])
    assert worker._engine.calls == [("prefill", [1, 2]), ("prefill", [1, 2, 3])]
    assert worker._engine.tokens == [1, 2, 3]


def test_what_native_code_prints_is_no_reply(tmp_path):
    body = "class E:\n def __init__(self): os.write(1, b'noise'); self.n_vocab = 3; self.version = 'v'\nserve(E)"
    with EngineProcess("noisy", script(tmp_path, body)) as engine:
        engine.load()
        assert (engine.n_vocab, engine.version) == (3, "v")


def test_an_error_keeps_its_kind(tmp_path):
    body = "from pyggml_repkv.errors import ModelFileError\ndef make(text): raise eval(text)\nserve(make)"
    with EngineProcess("mine", script(tmp_path, body)) as engine:
        for text, kind, message in (
            ("ModelFileError('bad file')", InputError, "mine: bad file"),
            ("RuntimeError('no room')", RepkvError, "mine: no room"),
            ("KeyError('x')", RepkvError, "mine: KeyError: 'x'"),
        ):
            with pytest.raises(RepkvError) as error:
                engine.load(text=text)
            assert (type(error.value), str(error.value)) == (kind, message)


def test_a_worker_that_dies_says_how(tmp_path):
    body = "def make(how): print('last words\\n', file=sys.stderr, flush=True); eval(how)\nserve(make)"
    for how, ending in (("os.abort()", "killed by SIGABRT"), ("os._exit(3)", "ended with exit code 3")):
        with EngineProcess("mine", script(tmp_path, body)) as engine:
            with pytest.raises(RepkvError, match=f"^mine: {ending} during 'load': last words$"):
                engine.load(how=how)
            with pytest.raises(RepkvError, match=f"{ending} during 'open'"):
                engine.ask("open")


def test_the_process_is_gone_afterwards(tmp_path):
    with EngineProcess("mine", script(tmp_path, "serve(None)")) as engine:
        pid = engine._process.pid
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_no_interpreter_is_one_line():
    with pytest.raises(InputError, match=r"^/no/python: No such file or directory; --llama-python takes"):
        EngineProcess("llama.cpp", _engines.LLAMA_WORKER, "/no/python")


def test_without_llama_cpp_the_remedy_is_named(tmp_path, monkeypatch):
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('No module named llama_cpp')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with EngineProcess("llama.cpp", _engines.LLAMA_WORKER) as engine, pytest.raises(RepkvError) as error:
        engine.load(model="x", n_threads=1)
    remedy = "run `make bench`, or pip install '.[bench]'"
    assert str(error.value) == f"llama.cpp: No module named llama_cpp: {remedy}"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RepkvError("broken"), 1, "error: broken\n"),
        (InputError("bad flag"), 2, "error: bad flag\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_run_tool_turns_errors_into_one_line(error, code, line, capsys):
    def main(argv):
        raise error

    assert run_tool(main, []) == code
    assert capsys.readouterr().err == line


def test_lists_of_integers():
    assert integers(1)("7,512,7") == (7, 512)
    assert integers(0)("") == ()
    for bad in ("1,x", "1,,2", "0", "1.5"):
        with pytest.raises(Exception, match="must be a whole number from 1 to"):
            integers(1)(bad)


def test_contexts_are_whole_steps_of_256():
    assert [context_size(n) for n in (1, 256, 257)] == [256, 256, 512]


def test_table(capsys):
    write_table(("name", "kind", "n"), [("a", "long one", "1"), ("bcdef", "", "22")], n_left=2)
    assert capsys.readouterr().out == "name   kind       n\na      long one   1\nbcdef            22\n"


def test_interpreter_of_ours_is_this_one(tmp_path):
    body = "class E:\n n_vocab = 1\n def __init__(self): self.version = sys.executable\nserve(E)"
    with EngineProcess("mine", script(tmp_path, body)) as engine:
        engine.load()
        assert engine.version == sys.executable
