"""Plans: built once per shape, used again, replaced when their memory moves, and right after any other plan."""

import numpy as np
import pytest

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import ComputeError, InputError
from pyggml_repkv.ffi.handles import GraphAllocator, tensor_array
from pyggml_repkv.ffi.library import g
from pyggml_repkv.graph import plan as plan_module
from pyggml_repkv.graph.plan import _MAX_PLANS, PlanCache, PlanKey
from pyggml_repkv.memory.config import MemoryConfig

FORMS = {"fused": {}, "exact": {"exact_graph": True}, "softmax": {"flash_attn": False}}


@pytest.fixture(params=FORMS.values(), ids=FORMS.keys())
def bench(request, tiny_model):
    options = dict(request.param)
    memory = MemoryConfig(flash_attn=options.pop("flash_attn", True))
    with Model.load(tiny_model(n_layer=2, n_ctx=512, seed=1), threads=2, **options) as model:
        yield Bench(model, memory)


class Bench:
    """Steps on one memory, through any cache of plans."""

    def __init__(self, model, memory):
        self.model = model
        self.policy = model.graph.make_policy(model.graph.policy_inputs(memory, model._boundaries))
        self.tokens = np.random.default_rng(2).integers(0, model.config.n_vocab, 512)

    def cache(self, **options):
        return PlanCache(self.model.graph, self.policy, self.model.backend, **options)

    def key(self, n_past, n_tokens, outputs="all"):
        form = self.model.graph.form(n_tokens)
        return PlanKey(self.policy.step_shape(n_past, n_tokens, form), outputs)

    def run(self, cache, n_past, n_tokens, outputs="all"):
        cache.check_open()
        tokens = self.tokens[n_past : n_past + n_tokens]
        self.policy.begin_step(tokens, n_past)
        plan = cache.of_step(n_past, n_tokens, outputs)
        plan.fill(tokens, n_past)
        plan.compute(self.model.backend)
        return plan.read()


@pytest.mark.parametrize(("n_tokens", "outputs"), [(1, "all"), (5, "last"), (40, "all"), (40, "none")])
def test_a_shape_is_built_once(bench, n_tokens, outputs):
    cache = bench.cache()
    plan = cache.get(bench.key(0, n_tokens, outputs))
    bench.run(cache, 0, n_tokens, outputs)
    assert cache.get(bench.key(n_tokens, n_tokens, outputs)) is plan
    assert cache.get(bench.key(0, n_tokens + 1, outputs)) is not plan


def test_a_session_builds_few_plans(bench, monkeypatch):
    built = []

    class CountedPlan(plan_module.Plan):
        def __init__(self, model, policy, key, cb, **options):
            built.append(key)
            super().__init__(model, policy, key, cb, **options)

    monkeypatch.setattr(plan_module, "Plan", CountedPlan)
    with bench.model.session(MemoryConfig(n_batch=40)) as session:
        session.prefill(bench.tokens[:127])
        for token in bench.tokens[127:140]:
            session.decode(token)
    # The larger plans were built first, so none had to make room.
    assert [(key.shape.n_tokens, key.outputs) for key in built] == [(40, "none"), (7, "last"), (1, "all")]


def test_the_least_recently_used_plan_goes(bench):
    cache = bench.cache()
    sizes = range(2 * _MAX_PLANS, _MAX_PLANS, -1)  # falling, so that the buffer never grows
    plans = {n: cache.get(bench.key(0, n)) for n in sizes}
    oldest, second, *_ = sizes
    assert cache.get(bench.key(0, oldest)) is plans[oldest]
    cache.get(bench.key(0, 2))
    assert plans[second].context.closed
    assert [n for n in sizes if plans[n].context.closed] == [second]
    assert cache.get(bench.key(0, oldest)) is plans[oldest]


def test_plans_in_a_buffer_that_moved_are_dropped(bench):
    cache = bench.cache()
    small = cache.get(bench.key(0, 3))
    size = cache.compute_bytes
    large = cache.get(bench.key(0, 100))
    assert cache.compute_bytes > size > 0
    assert small.context.closed
    assert not large.context.closed
    assert cache.get(bench.key(0, 3)) is not small
    assert cache.get(bench.key(0, 100)) is large


def test_no_step_depends_on_the_plans_before_it(bench):
    """Sizes go up, down and up again, with single tokens between: each step equals the same step in a new cache."""
    shared, n_past = bench.cache(), 0
    for n_tokens in (3, 1, 40, 3, 1, 1, 90, 1, 3, 64, 33, 100, 40, 1, 5):
        for outputs in ("last", "all"):
            got = bench.run(shared, n_past, n_tokens, outputs)
            assert np.array_equal(got, bench.run(bench.cache(), n_past, n_tokens, outputs))
        n_past += n_tokens
    assert len(shared._plans) == _MAX_PLANS


def inputs_of(graph):
    """Returns the tensors to fill before every compute, by name; those that no node reads have no memory."""
    found = {}
    for i in range(g.ggml_graph_n_nodes(graph)):
        for source in g.ggml_graph_node(graph, i).contents.src:
            if source and source.contents.flags & g.GGML_TENSOR_FLAG_INPUT and source.contents.data:
                found[source.contents.name.decode()] = source
    return found


@pytest.mark.parametrize("n_tokens", [1, 5, 40])
@pytest.mark.parametrize("outputs", ["all", "last", "none"])
def test_every_input_is_filled_for_every_step(bench, n_tokens, outputs):
    """Compute reuses their memory, so its old contents must not matter."""
    cache = bench.cache()
    for n_past in (0, n_tokens):
        want = bench.run(bench.cache(), n_past, n_tokens, outputs)
        inputs = inputs_of(cache.get(bench.key(n_past, n_tokens, outputs)).context.graph)
        assert len(inputs) >= 2
        for tensor in inputs.values():
            array = tensor_array(tensor)
            array[...] = np.nan if array.dtype.kind == "f" else 1
        got = bench.run(cache, n_past, n_tokens, outputs)
        assert (got is None) == (want is None) == (outputs == "none")
        assert want is None or np.array_equal(got, want)
    # The stored keys and values are right too: otherwise the next token would differ.
    after = bench.run(cache, 2 * n_tokens, 1)
    for n_past in (0, n_tokens):
        bench.run(bench.cache(), n_past, n_tokens, outputs)
    assert np.array_equal(after, bench.run(bench.cache(), 2 * n_tokens, 1))


def test_logits_are_the_callers_own(bench):
    cache = bench.cache()
    first = bench.run(cache, 0, 40)
    copy = first.copy()
    bench.run(cache, 40, 40)
    bench.run(cache, 80, 100)
    cache.close()
    assert np.array_equal(first, copy)


def test_a_buffer_that_cannot_grow_costs_only_that_step(bench, monkeypatch):
    cache = bench.cache()
    want = bench.run(cache, 0, 3)
    allocate = GraphAllocator.allocate

    def fail(self, graph):
        self.close()  # ggml gives the old buffer back before it asks for a larger one
        raise ComputeError("no memory")

    monkeypatch.setattr(GraphAllocator, "allocate", fail)
    with pytest.raises(ComputeError, match="no memory"):
        bench.run(cache, 3, 100)
    monkeypatch.setattr(GraphAllocator, "allocate", allocate)
    assert np.array_equal(bench.run(cache, 0, 3), want)
    assert bench.run(cache, 3, 100).shape == (100, bench.model.config.n_vocab)


def test_a_closed_cache_is_an_error(bench):
    cache = bench.cache()
    plan = cache.get(bench.key(0, 3))
    cache.close()
    assert plan.context.closed
    with pytest.raises(InputError, match="the session is closed"):
        bench.run(cache, 0, 3)
