"""After kill -9 at any moment, a session resumes, and its text is that of a run that nobody killed.

A server process forks a writer for each kill point, so that no writer imports anything again.
"""

import json
import subprocess
import sys

import pytest

from tests.subprocesses import ROOT
from tests.tiny_models import TinySpec, write_tiny_model

N_KILLS = 200

SERVER = r"""
import json, mmap, os, random, shutil, signal, sys, time, traceback

sys.path.insert(0, os.getcwd())
from pyggml_repkv.engine.generate import GenerationConfig
from pyggml_repkv.engine.model import Model
from pyggml_repkv.engine.sampling import SamplingConfig
from pyggml_repkv.memory.config import MemoryConfig

model_path, folder, n_kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
RAM = 2 * 16 * 256 * 10
MEMORY = MemoryConfig(
    kv="repkv", n_ctx=1024, n_batch=32, n_sink=5, n_local=48, n_score=20, n_dense=0, block="fixed:16", budget=48,
    index="representatives:4", chunk_budget=32, sticky=0.4, kv_ram=RAM,
)
PROMPT = [random.Random(1).randrange(280) for _ in range(400)]
CONFIG = GenerationConfig(n_predict=70, ignore_eos=True, sampling=SamplingConfig(temp=0.9, seed=7))


def write(directory):
    # One run: takes up what is there, reads on, generates, saves. -> tokens, how many were read before
    loaded = Model.load(model_path, threads=1, repack=False)
    with loaded as model, model.session(MEMORY, directory=directory) as session:
        generation = session.continue_text(PROMPT, CONFIG)
        n_before = session.n_past
        generation.prefill(lambda n_done, _: tell(n_done))
        for _ in generation:
            tell(session.n_past)
        session.save()
        return generation.result().tokens, n_before


# How many tokens the writer has read, for whoever kills it.
progress = mmap.mmap(-1, 8)


def tell(n_read):
    progress[:8] = n_read.to_bytes(8, "little")


def child(directory, result):
    pid = os.fork()
    if pid:
        return pid
    try:
        tokens, n_before = write(directory)
        with open(result, "w") as file:
            json.dump([list(tokens), n_before], file)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def whole(directory):
    result = folder + "/result"
    _, status = os.waitpid(child(directory, result), 0)
    assert status == 0, status
    with open(result) as file:
        return json.load(file)


want, _ = whole(folder + "/plain")
rng = random.Random(3)
killed = finished = 0
furthest = []
for n in range(n_kills):
    directory = f"{folder}/session"
    tell(0)
    pid = child(directory, folder + "/ignored")
    target = rng.randrange(-20, 468)
    while int.from_bytes(progress[:8], "little") < target and os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(0.0002)
    time.sleep(rng.uniform(0, 0.004))
    try:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        status = 0  # it was faster
    killed += status == signal.SIGKILL
    if rng.random() < 0.5 and n + 1 < n_kills and status != 0:
        continue  # killed again where it left off
    got, n_before = whole(directory)
    furthest.append(n_before)
    assert got == want, (n, n_before, got, want)
    shutil.rmtree(directory)
taken_up = sum(n > 0 for n in furthest)
print(json.dumps({"killed": killed, "taken_up": taken_up, "checked": len(furthest), "max": max(furthest)}))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    model = tmp_path / "model.gguf"
    write_tiny_model(model, TinySpec(n_layer=2, n_head=4, n_head_kv=2, head_dim=32, n_ctx=512, seed=1))
    command = [sys.executable, "-c", SERVER, str(model), str(tmp_path), str(N_KILLS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["killed"] > 0.9 * N_KILLS
    # Kills came before, during and after saves.
    assert 0 < result["taken_up"] <= result["checked"]
    assert result["max"] > 400
