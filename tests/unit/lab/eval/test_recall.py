"""Recall against sums computed the slow way and against what the engine selects, and its command line."""

import json
from dataclasses import replace

import numpy as np
import pytest

from pyggml_repkv.cli import progress
from pyggml_repkv.cli.main import main
from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError, RepkvError
from pyggml_repkv.lab.eval import observed, recall
from pyggml_repkv.lab.eval.recall import Recall, attention, json_tokens, run_recall, summary
from pyggml_repkv.lab.eval.selections import best_units
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.cut.blocks import parse_scheme
from pyggml_repkv.memory.index.tokens import code_keys

TOKENS = np.random.default_rng(5).integers(0, 280, 400).tolist()
MEMORY = MemoryConfig(
    kv="repkv", n_ctx=512, n_batch=48, n_sink=4, n_local=64, n_score=32, n_dense=0, block="fixed:16", unit="4",
    index="tokens:4", budget=48, chunk_budget=64,
)  # fmt: skip
INDEXES = ["tokens:4", "representatives:4", "tokens:1", "representatives:2"]


@pytest.fixture
def model(tiny_model):
    with Model.load(tiny_model(n_layer=4, n_ctx=512), threads=2, repack=False) as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Attention of a random model is almost even: a case of ten times the mean is sharp."""
    for module in (observed, recall):
        monkeypatch.setattr(module, "N_DECODE", 5)
    monkeypatch.setattr(recall, "SHARP", 0.025)


def test_attention_is_the_softmax_over_everything():
    rng = np.random.default_rng(0)
    near, far = rng.normal(size=(2, 5, 8)).astype(np.float32)
    stored, local = rng.normal(size=(20, 8)).astype(np.float32), rng.normal(size=(14, 8)).astype(np.float32)
    positions, starts = np.array([20, 22, 24, 26, 28]), np.array([15, 17, 17, 20, 20])
    got = attention(near, far, positions, starts, stored, local, 15)
    for j, (position, start) in enumerate(zip(positions, starts, strict=True)):
        scores = [far[j] @ key for key in stored[:start]] + [
            near[j] @ local[t - 15] for t in range(start, position + 1)
        ]
        p = np.exp(np.array(scores, float))
        assert np.allclose(got[j, :start], p[:start] / p.sum(), atol=1e-6)
        assert not got[j, start:].any()


def fitting(worth, bounds, budget):
    """Of the best units those that fit, as tokens [n]."""
    chosen = np.zeros(bounds[-1] - bounds[0], bool)
    for unit in sorted(range(len(worth)), key=lambda u: (-worth[u], u)):
        first, end = bounds[unit] - bounds[0], bounds[unit + 1] - bounds[0]
        if end - first <= budget:
            chosen[first:end] = True
            budget -= end - first
    return chosen


class Slow:
    """The definitions, query by query, in float64; `add` after each judged step."""

    def __init__(self, session, memory):
        self.policy, self.memory = session.policy, memory
        self.sums = {}

    def add(self, kind):
        policy, m, c = self.policy, self.memory, self.policy.config
        r, step, group = policy.regions, policy.last_step, c.n_head // c.n_head_kv
        end = policy.blocks.sealed_end
        blocks, units = np.arange(4, end + 1, 16), np.arange(4, end + 1, 4)
        judged = range(0, r.n_tokens, observed.EVERY)
        for layer in (2, 3):
            near, far = (q.astype(float) for q in step.observed_queries(layer))
            stored = policy.stored_keys(layer, np.arange(r.local)).astype(float)
            local = policy.local_keys(layer, r.local, r.first + r.n_tokens).astype(float)
            evicted = stored[4:end]
            coded = {b: code_keys(evicted.astype(np.float32), b, 16).astype(float) for b in (4, 1)}
            scores = policy.index.scores[layer]
            for j in judged:
                # All queries that share its selection.
                size = m.group if r.n_tokens > 1 and m.group else r.n_tokens
                peers = range(j // size * size, min(j // size * size + size, r.n_tokens))
                asked = [t for t in peers if (peers[-1] - t) % m.stride == 0]
                budget = m.budget if r.n_tokens == 1 else m.chunk_budget
                heads = range(c.n_head)

                def masses(h, t, keys, bounds, far=far):
                    p = np.exp(keys[:, h // group] @ far[t, h])
                    p = np.add.reduceat(p, bounds[:-1] - 4)
                    return p / p.sum()

                def of_blocks(h, n, far=far, scores=scores, evicted=evicted):
                    mass, kv = [], h // group
                    for b in blocks[:-1]:
                        best = sorted(range(b, b + 16), key=lambda t: (-scores[t, kv], t))[:n]
                        s = [far.mean(0)[h] @ evicted[t - 4, kv] for t in best]
                        mass.append({"lse": np.exp(s).sum(), "mean": np.mean(s), "max": max(s)}[m.relevance])
                    return np.array(mass) / (sum(mass) if m.relevance == "lse" else 1)

                for kv in range(c.n_head_kv):
                    mine = range(kv * group, kv * group + group)
                    chosen = {
                        name: fitting(sum(masses(h, t, keys, units) for h in mine for t in asked), units, budget)
                        for name, keys in (("exact", evicted), ("tokens:4", coded[4]), ("tokens:1", coded[1]))
                    }
                    which, all_queries = mine if m.per_head else heads, range(r.n_tokens)
                    worth = sum(masses(h, t, evicted, blocks) for h in which for t in all_queries)
                    chosen["exact:blocks"] = fitting(worth, blocks, budget)
                    for n in (4, 2):
                        worth = sum(of_blocks(h, n) for h in which)
                        chosen[f"representatives:{n}"] = fitting(worth, blocks, budget)
                    for h in mine:
                        window = near[j, h] @ local[: r.first - r.local + j + 1, kv].T
                        p = np.exp(np.concatenate([stored[:, kv] @ far[j, h], window]))
                        p = (p / p.sum())[4:end]
                        self.count(kind, None, layer, kv, (p > recall.SHARP).sum(), p.sum())
                        for name, mask in chosen.items():
                            self.count(kind, name, layer, kv, (p[mask] > recall.SHARP).sum(), p[mask].sum())

    def count(self, kind, name, layer, kv, n, mass):
        sums = self.sums.setdefault((kind, name), np.zeros((2, 2, 2)))
        sums[:, layer - 2, kv] += n, mass


@pytest.mark.parametrize(
    "options",
    [{}, {"group": 32, "stride": 3, "positions": "far"}, {"per_head": True, "relevance": "mean"}, {"n_dense": 512}],
)
def test_shares_are_those_of_the_definitions(model, options):
    memory = replace(MEMORY, **options)
    found = run_recall(model, memory, INDEXES, TOKENS)
    with model.session(replace(memory, index="representatives:4")) as session:
        session.policy.observed = True
        slow = Slow(session, memory)
        for first, end in ((0, 11), *((n, n + 48) for n in range(11, 395, 48)), *((n, n + 1) for n in range(395, 400))):
            session.read(TOKENS[first:end])
            if first >= 347:
                slow.add("chunk" if first == 347 else "decode")
    for kind, n_queries in (("decode", 5), ("chunk", 6)):
        got = found[kind]
        assert got.n_queries == n_queries
        n_sharp, mass = slow.sums[kind, None]
        assert 0 < n_sharp.sum() == got.n_sharp.sum()
        assert got.n_sharp.tolist() == n_sharp.tolist()
        assert np.allclose(got.mass, mass, rtol=1e-4)
        assert list(got.hits) == ["exact", "tokens:4", "tokens:1", "exact:blocks", *INDEXES[1::2]]
        for name in got.hits:
            hits, held = slow.sums[kind, name]
            # Units of equal worth but for rounding may be exchanged.
            assert np.allclose(got.held[name], held, rtol=0.01), name
            assert np.abs(got.hits[name] - hits).max() <= 2, name
            assert (got.held[name] < got.mass).all()
        assert got.held["exact"].sum() > got.held["tokens:1"].sum()


def test_room_for_all_holds_all(model):
    memory = replace(MEMORY, budget=400, chunk_budget=400)
    for got in run_recall(model, memory, INDEXES, TOKENS).values():
        for name in got.hits:
            assert np.array_equal(got.hits[name], got.n_sharp)
            assert np.allclose(got.held[name], got.mass, rtol=1e-12)


SPARSE = [
    {"index": "tokens:4"}, {"index": "tokens:4", "positions": "far", "group": 32, "stride": 3},
    {"index": "tokens:2", "unit": "semantic:2-8"}, {"index": "representatives:4"},
    {"index": "representatives:4", "per_head": True, "block": "semantic:16-24"},
]  # fmt: skip


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("options", SPARSE)
def test_a_selection_is_the_engines(model, monkeypatch, alone, options):
    memory = replace(MEMORY, **options)
    kinds = {memory.index: memory.index_kind}
    schemes = {whole: parse_scheme(memory.block, None if whole else memory.unit)
               for whole in (memory.index_kind[0] == "representatives",)}  # fmt: skip
    with model.session(memory) as session:
        policy = session.policy
        _, finder = recall._finders(policy, schemes, kinds)
        seen, engines = observed._observed, []

        def see(*args, **kwargs):
            engines.append([policy.last_step.observed_selection(layer).tolist() for layer in (2, 3)])
            engines[-1].append(policy.blocks.unit_bounds[: policy.blocks.n_units + 1])
            return seen(*args, **kwargs)

        monkeypatch.setattr(observed, "_observed", see)
        step = observed.read_observed(session, policy, [finder.blocks], TOKENS)[alone]
        assert len(engines) == 6
        assert step.ends[-1] == engines[-1 if alone else 0][2][-1]
        assert finder.blocks.bounds == policy.blocks.bounds
        assert finder.blocks.n_units == policy.blocks.n_units
        rows, bounds = engines[-1 if alone else 0][:2], np.array(engines[-1 if alone else 0][2])
        size = 1 if alone else finder.size or 48
        for i, layer in enumerate((2, 3)):
            scores = getattr(policy.index, "scores", {layer: None})[layer]
            finder.enter(policy.stored_keys(layer, np.arange(4, policy.regions.local)), scores)
            one_of_each = np.arange(0, len(step.far[i]), size)
            mine = finder.select(step.far[i], one_of_each, int(step.ends[-1]), alone=alone)
            mine = (mine[-1] if alone else mine).reshape(-1, mine.shape[2])
            for (n, *row), tokens in zip(rows[i], mine, strict=True):
                theirs = np.zeros(bounds[-1] - 4, bool)
                for unit in row[:n]:
                    theirs[bounds[unit] - 4 : bounds[unit + 1] - 4] = True
                assert 0 < tokens.sum() < len(tokens)
                if memory.index_kind[0] == "representatives":
                    assert np.array_equal(theirs, tokens)
                # The engine rounds queries to 8 bits, so the last few of nearly equal worth may be others.
                assert (theirs & tokens).sum() >= 0.9 * theirs.sum()


@pytest.mark.parametrize("bits", [4, 1])
def test_keys_of_codes_are_those_of_the_engine(model, bits):
    with model.session(replace(MEMORY, index=f"tokens:{bits}")) as session:
        session.prefill(TOKENS)
        policy = session.policy
        end = policy.blocks.sealed_end
        for layer in range(4):
            keys = policy.stored_keys(layer, np.arange(4, end))
            assert np.array_equal(code_keys(keys, bits, 16), policy.index.decoded(layer, 4, end))


def test_the_best_units_that_fit():
    bounds = np.array([10, 14, 15, 20, 22])
    worth = np.array([3.0, 1.0, 4.0, 3.0], np.float32)
    assert best_units(worth, bounds, 8, 4).tolist() == [False, True, True, True]
    assert best_units(worth, bounds, 8, 3).tolist() == [False, False, True, True]
    assert best_units(worth, bounds, 9, 4).tolist() == [True, False, True, False]
    assert best_units(worth, bounds, 0, 4).tolist() == [False] * 4


def test_a_summary_is_in_all_by_layer_and_by_head():
    n_sharp, mass = np.array([[0, 0], [4, 0], [3, 1]]), np.array([[1.0, 1], [2, 2], [1, 3]])
    hits, held = np.array([[0, 0], [1, 0], [3, 0]]), np.array([[0.5, 1], [1, 2], [0, 0.5]])
    found = summary(Recall(7, n_sharp, mass, {"x": hits}, {"x": held}))
    assert (found["n_queries"], found["n_sharp"], found["first_layer"]) == (7, 8, 2)
    assert found["indexes"]["x"] == {
        "hits": 0.5, "mass": 0.5, "worst": {"hits": 0.25, "layer": 3}, "hits_by_layer": [None, 0.25, 0.75],
        "mass_by_layer": [0.75, 0.75, 0.125], "hits_by_head": [[None, None], [0.25, None], [1.0, 0.0]],
        "mass_by_head": [[0.5, 1.0], [0.5, 1.0], [0.0, 1 / 6]],
    }  # fmt: skip
    nothing = summary(Recall(1, n_sharp * 0, mass * 0, {"x": hits * 0}, {"x": held * 0}))["indexes"]["x"]
    assert (nothing["hits"], nothing["mass"], nothing["worst"]) == (None, None, None)


@pytest.mark.parametrize(
    ("options", "indexes", "n", "message"),
    [
        ({}, ["tokens:4"], 150, "150 tokens are too few for recall with these blocks: it needs 153"),
        ({"kv": "window"}, ["tokens:4"], 400, "recall judges the indexes of --kv repkv; --kv is window"),
        ({}, ["tokens:4", "other"], 400, "--index is 'other'; it must be tokens:4, :2 or :1, or representatives:N"),
        ({}, ["tokens:4", ""], 400, "--index is ''"),
        ({"sticky": 1.0}, ["tokens:4"], 400, "leave out --sticky and --late"),
        ({"late": True}, ["tokens:4"], 400, "leave out --sticky and --late"),
        ({"kv_ram": 2**20}, ["tokens:4"], 400, "leave out --kv-ram and --kv-dir"),
        ({"block": "semantic:16-24"}, INDEXES, 400, "--block semantic:16-24 "),
        ({"n_ctx": 300}, ["tokens:4"], 400, "400 tokens do not fit: 0 of 300 are used"),
    ],
)
def test_what_cannot_be_judged_is_an_error(model, options, indexes, n, message):
    with pytest.raises(RepkvError, match=message):
        run_recall(model, replace(MEMORY, **options), indexes, TOKENS[:n])


def test_a_model_of_few_layers_is_an_error(tiny_model):
    with (
        Model.load(tiny_model(n_layer=2, n_ctx=512), threads=1, repack=False) as model,
        pytest.raises(InputError, match="recall judges layers from 2 on; the model has 2 layers"),
    ):
        run_recall(model, MEMORY, ["tokens:4"], TOKENS)


def test_the_json_text_ends_with_a_question_and_its_answer(model):
    tokens = json_tokens(model, 1500, 1)
    text = model.tokenizer.decode(tokens)
    assert 1300 < len(tokens) <= 1500
    key, value = text.split('Key: "')[1].split('"\nThe value of this key is: "')
    assert f'"{key}": "{value[:36]}", ' in text
    assert tokens == json_tokens(model, 1500, 1) != json_tokens(model, 1500, 2)
    with pytest.raises(InputError, match="--lengths is too short"):
        json_tokens(model, 256, 1)


FLAGS = ["--kv", "repkv", "--n-sink", "4", "--n-local", "64", "-b", "128", "--n-dense", "0", "--budget", "256"]


@pytest.fixture
def recalled(tiny_model):
    path = tiny_model(n_layer=3, n_ctx=2048)
    return ["eval", "recall", "-m", str(path), "-t", "1", *FLAGS, "--lengths", "1500"]


def test_the_command_line(recalled, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", -1.0)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"Item {i} is on shelf {i * 7 % 31}." for i in range(200)), encoding="utf-8")
    recalled += ["--index", "representatives:2,tokens:4,tokens:4"]
    assert main([*recalled, "--text", str(text), "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["task"], found["text"], found["n_tokens"], err) == ("recall", str(text), 1500, "")
    assert list(found["decode"]["indexes"]) == ["exact", "tokens:4", "exact:blocks", "representatives:2"]
    shares = {name: each["mass"] for name, each in found["decode"]["indexes"].items()}
    assert 0 < shares["representatives:2"] < shares["tokens:4"] <= 1
    assert main([*recalled, "--text", str(text)]) == 0
    out, err = capsys.readouterr()
    head, _, columns, *rows = out.splitlines()
    assert head.startswith("1500 tokens read; judged: 5 single tokens (")
    assert columns.split() == ["index", "hits", "mass", "worst", "layer", "hits", "mass"]
    assert [row.split()[0] for row in rows] == list(shares)
    assert rows[1].split()[2] == f"{shares['tokens:4']:.3f}"
    assert "pyggml_repkv: read 87 of 1500 tokens" in err


def test_without_a_text_the_json_of_kv_is_read(recalled, capsys):
    found = []
    for seed in ("1", "1", "2"):
        assert main([*recalled, "--seed", seed, "--json"]) == 0
        done = json.loads(capsys.readouterr().out)
        found.append(done["decode"])
        assert done["text"] is None
        assert list(done["decode"]["indexes"]) == ["exact", "tokens:4"]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lengths", "1500,1600"], "recall reads the text once: give one of --lengths 1500,1600"),
        (["--text", "{text}"], "text has only 3 tokens"),
        (["--index", "tokens:3"], "--index is 'tokens:3'"),
        (["--index", "tokens:4,,"], "--index is ''"),
        (["--kv", "full"], "recall judges the indexes of --kv repkv; --kv is full"),
        (["--kv-ram", "1G"], "leave out --kv-ram and --kv-dir"),
    ],
)
def test_wrong_flags_are_one_line(recalled, capsys, tmp_path, flags, message):
    (tmp_path / "text").write_text("abc")
    flags = [flag.format(text=tmp_path / "text") for flag in flags]
    assert main([*recalled[: 6 if "--kv" in flags else None], *flags]) == 2
    err = capsys.readouterr().err
    assert (message in err, err.count("\n")) == (True, 1)
