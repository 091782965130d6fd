"""A session that is saved, left, damaged and resumed continues like one that never stopped."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError
from pyggml_repkv.memory.config import MemoryConfig
from tests.tiny_models import TinySpec, write_tiny_model

N_LAYER, N_TRAINED, N_TOKENS = 2, 150, 420
TOKENS = np.random.default_rng(4).integers(0, 280, N_TOKENS).tolist()


class SessionMachine(RuleBasedStateMachine):
    """steps: with these, a session with the same memory in RAM has the same logits."""

    model: Model
    folder: Path

    @initialize(
        block=st.sampled_from(["fixed:16", "semantic:16-32"]),
        positions=st.sampled_from(["auto", "far", "exact", "ordered"]),
        n_dense=st.sampled_from([0, 100]),
        n_slots=st.integers(8, 20),
        prefetch=st.sampled_from(["on", "off"]),
        type_k=st.sampled_from(["f16", "q8_0"]),
        sticky=st.sampled_from([0.0, 0.7]),
        late=st.booleans(),
        per_head=st.booleans(),
        index=st.sampled_from(["representatives:3", "tokens:4", "tokens:2"]),
        unit=st.sampled_from(["8", "16", "semantic:5-9"]),
    )
    def start(
        self, block, positions, n_dense, n_slots, prefetch, type_k, sticky, late, per_head, index, unit
    ):  # fmt: skip
        block = block if index == "representatives:3" else "fixed:16"
        self.memory = MemoryConfig(
            kv="repkv", n_ctx=0 if positions == "auto" else 1024, n_batch=40, n_sink=5, n_local=48, n_score=20,
            block=block, budget=32, chunk_budget=32, index=index, unit=unit, positions=positions, n_dense=n_dense,
            type_k=type_k, sticky=sticky, late=late, per_head=per_head,
        )  # fmt: skip
        ram = N_LAYER * 32 * (128 + 128) * n_slots
        self.kept = replace(self.memory, kv_ram=ram, prefetch=prefetch, kv_debug=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.steps, self.saved, self.logits = [], [], None
        self.session = self.model.session(self.kept, directory=self.folder)

    def teardown(self):
        if hasattr(self, "session"):
            self.session.close()

    @precondition(lambda self: self.session.n_past < N_TOKENS - 90)
    @rule(n=st.integers(2, 90))
    def read(self, n):
        first = self.session.n_past
        self.session.read(TOKENS[first : first + n])
        self.steps += [min(40, n - at) for at in range(0, n, 40)]
        self.logits = None

    @precondition(lambda self: self.session.n_past < N_TOKENS - 20)
    @rule(n=st.integers(1, 12))
    def decode(self, n):
        self._decode(n)

    def _decode(self, n):
        for _ in range(n):
            self.logits = self.session.decode(TOKENS[self.session.n_past]).copy()
            self.steps.append(1)

    @precondition(lambda self: self.session.n_past > 0)
    @rule()
    def save(self):
        self.session.save()

    @precondition(lambda self: self.session.n_past > 0)
    @rule(save=st.booleans())
    def leave_and_come_back(self, save):
        """Leaves and resumes; without `save`, tokens after the last automatic save are lost."""
        if save:
            self.session.save()
        before = self.session.n_past
        self.session.close()
        try:
            self.session = self.model.resume(self.folder, self.kept)
        except InputError as error:
            if save or "nothing was saved yet" not in str(error):
                raise
            self.session = self.model.session(self.kept, directory=self.folder)
        assert self.session.n_past <= before
        assert not save or self.session.n_past == before
        self._cut_steps()

    @precondition(lambda self: self.session.n_past > 0)
    @rule(back=st.integers(0, 200))
    def another_prompt(self, back):
        """Goes back to the place where another prompt still agrees with the tokens that were read."""
        self.session.save()
        prefix = max(0, self.session.n_past - back)
        self.session.close()
        self.session = self.model.session(self.kept, directory=self.folder)
        resumed = self.session.go_back_to([*TOKENS[:prefix], (TOKENS[prefix] + 1) % 280], lambda _: False)
        assert resumed.n_past == self.session.n_past <= prefix
        assert self.session.tokens == TOKENS[: resumed.n_past]
        self._cut_steps()
        # Only a save drops the old tokens of the directory.
        self._decode(1)
        self.session.save()

    @precondition(lambda self: self.session.n_past > 60)
    @rule(
        which=st.sampled_from(["blocks.kv", "window-0.kv", "window-1.kv"]),
        at=st.floats(0, 0.999),
        bit=st.integers(0, 7),
    )
    def damage(self, which, at, bit):
        self.session.save()
        before = self.session.n_past
        self.session.close()
        path = self.folder / which
        if path.exists() and path.stat().st_size:
            data = bytearray(path.read_bytes())
            data[int(at * len(data))] ^= 1 << bit
            path.write_bytes(data)
        self.session = self.model.resume(self.folder, self.kept)
        assert self.session.n_past == before

    def _cut_steps(self):
        while sum(self.steps) > self.session.n_past:
            self.steps.pop()
        assert sum(self.steps) == self.session.n_past
        self.logits = None

    @invariant()
    def it_knows_what_it_has_read(self):
        if hasattr(self, "session"):
            assert self.session.tokens == TOKENS[: self.session.n_past]

    @precondition(lambda self: 0 < self.session.n_past < N_TOKENS - 3)
    @rule()
    def it_goes_on_as_one_that_never_stopped(self):
        with self.model.session(self.memory) as plain:
            for size in self.steps:
                plain._reader.step(np.array(TOKENS[plain.n_past : plain.n_past + size], np.int32), "none")
            for _ in range(3):
                token = TOKENS[plain.n_past]
                self.logits = self.session.decode(token).copy()
                self.steps.append(1)
                assert np.array_equal(plain.decode(token), self.logits)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("session") / "model.gguf"
    write_tiny_model(path, TinySpec(n_layer=N_LAYER, n_head=4, n_head_kv=2, head_dim=32, n_ctx=N_TRAINED, seed=1))
    with Model.load(path, threads=2, repack=False) as loaded:
        yield loaded


def test_sessions_survive_leaving_damage_and_other_prompts(model, tmp_path):
    machine = type("Machine", (SessionMachine,), {"model": model, "folder": tmp_path / "session"})
    options = {"suppress_health_check": list(HealthCheck), "deadline": None}
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=14, **options))
