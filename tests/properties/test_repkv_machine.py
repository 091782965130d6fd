"""RepKV under any order of chunks, single tokens, failed steps and set scores: window, store, blocks and index always
describe the same tokens.
"""

from itertools import pairwise

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
from pyggml_repkv.ffi.handles import Backend
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.store.arenas import as_array

N_CTX, N_TRAINED, N_LAYER = 400, 150, 2
TOKENS = np.random.default_rng(3).integers(0, 280, N_CTX).tolist()


class RepKVMachine(RuleBasedStateMachine):
    model: Model

    @initialize(
        block=st.sampled_from(["fixed:16", "fixed:24", "semantic:16-32"]),
        score=st.sampled_from(["dot", "attention"]),
        positions=st.sampled_from(["auto", "far", "exact", "ordered"]),
        type_k=st.sampled_from(["f16", "q8_0"]),
        n_dense=st.sampled_from([0, 100]),
    )
    def start(self, block, score, positions, type_k, n_dense):
        memory = MemoryConfig(
            kv="repkv", n_ctx=0 if positions == "auto" else N_CTX, n_batch=40,
            type_k=type_k, n_sink=5, n_local=48, n_score=20, block=block,
            budget=32, chunk_budget=32, index="representatives:3", score=score, positions=positions, n_dense=n_dense,
        )  # fmt: skip
        self.session = self.model.session(memory)
        self.policy = self.session.policy

    def teardown(self):
        if hasattr(self, "session"):
            self.session.close()

    def next(self, n):
        return TOKENS[self.session.n_past : self.session.n_past + n]

    @precondition(lambda self: self.session.n_past < N_CTX - 90)
    @rule(n=st.integers(1, 90))
    def read(self, n):
        self.session.read(self.next(n))

    @precondition(lambda self: self.session.n_past < N_CTX)
    @rule()
    def decode(self):
        assert np.isfinite(self.session.decode(*self.next(1))).all()

    @precondition(lambda self: self.session.n_past < N_CTX - 40)
    @rule(n=st.integers(1, 40))
    def fail(self, n):
        """Computes a step and fails it: scores are as before, and the tokens can be read again."""
        n_past, scores = self.session.n_past, [s.copy() for s in self.policy.index.scores]
        whole_compute = Backend.compute

        def compute_and_stop(backend, graph, trace):
            whole_compute(backend, graph, trace)
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Backend, "compute", compute_and_stop)
            with pytest.raises(KeyboardInterrupt):
                self.session.read(self.next(n))
        assert self.session.n_past == n_past
        for before, after in zip(scores, self.policy.index.scores, strict=True):
            assert np.array_equal(before, after)

    @precondition(lambda self: self.session.n_past > 0)
    @rule(data=st.data(), value=st.floats(-1e3, 1e3))
    def set_score(self, data, value):
        position = data.draw(st.integers(0, self.session.n_past - 1))
        self.policy.index.set_score(1, position, np.full(2, value, np.float32))
        assert (self.policy.index.get_score(1, position) == np.float32(value)).all()

    @invariant()
    def every_token_has_its_place(self):
        if not hasattr(self, "session"):
            return
        blocks, n_past = self.policy.blocks, self.session.n_past
        start = self.policy.local.start(n_past)
        assert blocks.bounds == sorted(set(blocks.bounds))
        assert blocks.bounds[0] == 5
        assert blocks.n_blocks == 0 or blocks.sealed_end <= start
        places = as_array(self.policy.store.places(0), np.int32).reshape(-1, 3)[: blocks.n_blocks]
        assert places.tolist() == [[begin, end - begin, begin] for begin, end in pairwise(blocks.bounds)]

    @invariant()
    def the_index_holds_the_keys_of_the_representatives(self):
        if not hasattr(self, "session"):
            return
        for layer in range(N_LAYER):
            for block in range(self.policy.blocks.n_blocks):
                begin, end = self.policy.blocks.bounds[block : block + 2]
                chosen = self.policy.index.chosen[block][layer]
                assert ((begin <= chosen) & (chosen < end)).all()
                for kv in range(2):
                    want = self.policy.stored_keys(layer, chosen[kv])[:, kv]
                    assert np.allclose(self.policy.index.entries(layer, block)[kv], want, rtol=1e-3, atol=1e-3)

    @invariant()
    def window_and_store_hold_the_same_keys(self):
        if not hasattr(self, "session") or self.session.n_past == 0:
            return
        n_past = self.session.n_past
        start = max(self.policy.local.start(n_past), self.policy.local.base)
        positions = np.arange(start, n_past)
        stored, local = self.policy.stored_keys(1, positions), self.policy.local_keys(1, start, n_past)
        if self.policy.rotation.far:
            table = self.model.graph.precise_rope_table(positions)[:, :, None].transpose(1, 2, 0)  # [n, 1, rope_dim]
            half = table.shape[-1] // 2
            cosine, sine = table[..., :half], table[..., half:]
            a, b = stored[..., :half], stored[..., half : 2 * half]
            stored = np.concatenate((a * cosine - b * sine, a * sine + b * cosine, stored[..., 2 * half :]), -1)
        assert np.allclose(stored, local, atol=0.02 * max(1.0, np.abs(local).max()))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    from tests.tiny_models import TinySpec, write_tiny_model

    path = tmp_path_factory.mktemp("repkv") / "model.gguf"
    write_tiny_model(path, TinySpec(n_layer=N_LAYER, n_head=4, n_head_kv=2, head_dim=32, n_ctx=N_TRAINED, seed=1))
    return path


def test_window_store_blocks_and_index_agree_whatever_happens(model_path):
    with Model.load(model_path, threads=2, repack=False) as model:
        machine = type("Machine", (RepKVMachine,), {"model": model})
        options = {"suppress_health_check": list(HealthCheck), "deadline": None}
        run_state_machine_as_test(machine, settings=settings(max_examples=25, stateful_step_count=12, **options))
