"""Worker processes: requests, and their failures."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyggml_repkv.errors import InputError, RepkvError
from pyggml_repkv.lab.bench.engines import LLAMA_WORKER, EngineProcess, check_same_vocabulary, context_size


def script(folder, body):
    path = folder / "worker.py"
    path.write_text(f"import os, sys\nfrom pyggml_repkv.lab.bench.workers._worker import serve\n{body}\n")
    return (str(path),)


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


def test_a_signal_without_a_name_is_told_by_number(tmp_path):
    with (
        EngineProcess("mine", script(tmp_path, "serve(lambda: os.kill(os.getpid(), 35))")) as engine,
        pytest.raises(RepkvError, match=r"^mine: killed by signal 35 during 'load'"),
    ):
        engine.load()


@pytest.mark.parametrize("answer", [r"\xff\xfe", '{"version": 1}', "[]", '{"n_vocab": 3}'])
def test_an_answer_that_no_worker_gives_is_one_line(tmp_path, answer):
    body = f"sys.stdin.readline(); os.write(1, b'{answer}\\n')"
    with (
        EngineProcess("mine", script(tmp_path, body)) as engine,
        pytest.raises(RepkvError, match=r"^mine: the process is not a worker: it answered '"),
    ):
        engine.load()


def test_a_worker_ends_with_its_parent_though_it_computes(tmp_path):
    started = tmp_path / "started"
    body = f"def make(): open({str(started)!r}, 'w').close(); __import__('time').sleep(60)\nserve(make)"
    parent = (
        "from pyggml_repkv.lab.bench.engines import EngineProcess\n"
        f"engine = EngineProcess('mine', {script(tmp_path, body)!r}); print(engine._process.pid, flush=True)\n"
        "engine.load()"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        wait_until(started.exists)
        process.kill()
    wait_until(lambda: has_ended(pid))


def wait_until(true):
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def has_ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_the_process_is_gone_afterwards(tmp_path):
    with EngineProcess("mine", script(tmp_path, "serve(None)")) as engine:
        pid = engine._process.pid
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_no_interpreter_is_one_line():
    with pytest.raises(InputError, match=r"^/no/python: No such file or directory; --llama-python takes"):
        EngineProcess("llama.cpp", LLAMA_WORKER, "/no/python")


@pytest.mark.parametrize("interpreter", ["cat", "echo"])
def test_what_is_no_worker_is_one_line(interpreter, tmp_path):
    with (
        EngineProcess("llama.cpp", script(tmp_path, ""), interpreter) as engine,
        pytest.raises(RepkvError, match=r"^llama\.cpp: the process is not a worker: it answered '"),
    ):
        engine.load()


def test_without_llama_cpp_the_remedy_is_named(tmp_path, monkeypatch):
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('No module named llama_cpp')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with EngineProcess("llama.cpp", LLAMA_WORKER) as engine, pytest.raises(RepkvError) as error:
        engine.load(model="x", n_threads=1)
    remedy = "run `make bench`, pip install '.[bench]', or name an interpreter that has it with --llama-python"
    assert str(error.value) == f"llama.cpp: No module named llama_cpp: {remedy}"


def test_contexts_are_whole_steps_of_256():
    assert [context_size(n) for n in (1, 256, 257)] == [256, 256, 512]


def test_the_engines_interpreter_is_this_one(tmp_path):
    body = "class E:\n n_vocab = 1\n def __init__(self): self.version = sys.executable\nserve(E)"
    with EngineProcess("mine", script(tmp_path, body)) as engine:
        engine.load()
        assert engine.version == sys.executable


class Sized:
    def __init__(self, name, n_vocab):
        self.name, self.n_vocab = name, n_vocab


def test_engines_must_have_one_vocabulary():
    assert check_same_vocabulary([Sized("a", 5), Sized("b", 5)]) == 5
    with pytest.raises(RepkvError, match=r"disagree on the number of tokens: \{'a': 5, 'b': 6\}"):
        check_same_vocabulary([Sized("a", 5), Sized("b", 6)])
