"""Recall against a softmax computed the slow way, and its command line."""

import json
from dataclasses import replace

import numpy as np
import pytest

from pyggml_repkv.cli.main import main
from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import InputError
from pyggml_repkv.lab.eval.recall import RecallResult, block_mass, layer_shares, run_recall, stability, summary
from pyggml_repkv.memory.config import MemoryConfig

TOKENS = np.random.default_rng(5).integers(0, 280, 400).tolist()
MEMORY = MemoryConfig(
    kv="repkv",
    n_ctx=512,
    n_batch=48,
    n_sink=4,
    n_local=64,
    n_score=32,
    n_dense=0,
    block="fixed:16",
    index="representatives:4",
    budget=48,
    chunk_budget=48,
)


def test_block_mass_is_the_softmax_over_everything():
    rng = np.random.default_rng(0)
    near, far = rng.normal(size=(2, 5, 4, 8)).astype(np.float32)
    stored, local = rng.normal(size=(20, 2, 8)).astype(np.float32), rng.normal(size=(9, 2, 8)).astype(np.float32)
    bounds, positions = np.array([2, 7, 16]), np.array([20, 22, 24, 26, 28])
    got = block_mass(near, far, positions, stored, local, bounds)
    want = np.zeros((4, 2))
    for h in range(4):
        for j, position in enumerate(positions):
            s = [far[j, h] @ stored[t, h // 2] for t in range(20)]
            s += [near[j, h] @ local[t, h // 2] for t in range(position - 20 + 1)]
            p = np.exp(s) / np.exp(s).sum()
            want[h] += p[2:7].sum(), p[7:16].sum()
    assert np.allclose(got, want, atol=1e-5)


@pytest.fixture
def model(tiny_model):
    with Model.load(tiny_model(n_layer=4, n_ctx=512), threads=2, repack=False) as loaded:
        yield loaded


@pytest.mark.parametrize("options", [{}, {"per_head": True}, {"relevance": "max"}, {"positions": "far"}])
def test_shares_are_shares_and_all_blocks_hold_everything(model, options):
    memory = MemoryConfig(**{field: getattr(MEMORY, field) for field in MEMORY.__slots__} | options)
    results = list(run_recall(model, memory, TOKENS, [1, 4, 64], 2, 5))
    assert [r.step for r in results] == ["chunk"] * 2 + ["decode"] * 5
    for by_k in summary(results).values():
        for share in by_k.values():
            assert 0 < share["of_all"] <= share["of_best"] + 1e-6 <= 1 + 2e-6
        assert by_k["64"]["of_all"] == pytest.approx(1)
        assert by_k["1"]["of_all"] < by_k["4"]["of_all"]


def test_what_the_engine_selects_is_the_rankings_head(model):
    with model.session(MEMORY) as session:
        session.policy.observed = True
        session.read(TOKENS[:336])
        step = session.policy.last_step
        relevance = step.observed_relevance(2)
        weight = np.exp(relevance - relevance.max(1, keepdims=True))
        weight = (weight / weight.sum(1, keepdims=True)).sum(0)
        assert step.observed_selection(2).tolist() == [[3, *sorted(np.argsort(-weight, kind="stable")[:3])]]


def test_a_text_without_blocks_is_an_error(model):
    with pytest.raises(InputError, match="150 tokens are too few for recall"):
        list(run_recall(model, MEMORY, TOKENS[:150], [4], 2, 5))


def test_the_command_line(demo_model, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"Item {i} is on shelf {i * 7 % 31}." for i in range(200)), encoding="utf-8")
    argv = [
        "eval",
        "recall",
        "-m",
        str(demo_model),
        "--kv",
        "repkv",
        "--n-local",
        "128",
        "--n-score",
        "64",
        "-b",
        "128",
    ]
    argv += ["--lengths", "1100", "--text", str(text), "--blocks", "2,4"]
    assert main([*argv, "--json"]) == 0
    shares = json.loads(capsys.readouterr().out)["lengths"]["1100"]
    assert set(shares) == {"chunk", "decode"}
    assert shares["chunk"]["2"]["of_best"] > 0.8
    assert main(argv) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("1100 tokens   blocks  of the best")


def test_a_recall_without_text_is_one_line(capsys):
    assert main(["eval", "recall", "--kv", "repkv"]) == 2
    assert "recall needs a text: --text FILE" in capsys.readouterr().err


def step_of(ranked, mass=(1.0, 2.0, 4.0), **counts):
    ranked = np.array(ranked, np.int32)[:, None]
    return RecallResult("decode", 0, 9, (1, 2), np.tile(np.float32(mass), (2, len(ranked), 1)), ranked, **counts)


def test_overlaps_with_the_step_and_the_layer_before():
    steps = [step_of([[1, 2, 3, 4], [1, 5, 2, 6]]), step_of([[2, 1, 7, 8], [6, 9, 5, 1]])]
    by_k = stability(steps)["decode"]
    # First layer: {2} was second, not first; {2, 1} are the same two. Second layer: 6 was fourth; of {6, 9} only 6 was.
    assert by_k["1"] == {"step": 0.0, "step_2k": 0.5, "layer": 0.5}
    assert by_k["2"] == {"step": 0.5, "step_2k": 0.75, "layer": 0.25}
    assert stability(steps[:1])["decode"]["1"]["step"] == 0.0


def test_what_was_there_when_asked_for():
    steps = [step_of([[1, 2]], hits=3, required=4), step_of([[1, 2]], hits=0, required=4)]
    assert stability(steps)["decode"]["1"]["there"] == 3 / 8


def test_shares_of_each_layer():
    steps = [step_of([[1, 2], [1, 2]], mass=(1.0, 2.0, 4.0)), step_of([[1, 2], [1, 2]], mass=(3.0, 3.0, 4.0))]
    shares = layer_shares(steps)["decode"]
    assert shares["1"] == shares["2"] == pytest.approx([0.8, 0.8])


def test_shares_are_sums_over_steps_and_layers():
    """Masses [steps, ks, layers, (first k, best k, all)] give the shares that numpy computes from the definitions."""
    mass = np.random.default_rng(3).uniform(0.1, 1, (3, 2, 4, 3)).astype(np.float32)
    steps = [replace(step_of([[1, 2]]), mass=m) for m in mass]
    found = summary(steps)["decode"]
    for i, k in enumerate(("1", "2")):
        first, best, everything = np.moveaxis(mass[:, i].astype(float), -1, 0)
        assert found[k] == pytest.approx({
            "of_best": first.sum() / best.sum(), "of_all": first.sum() / everything.sum(),
            "of_best_by_layer": (first / best).mean(),
        })  # fmt: skip


def test_rankings_are_those_of_the_engine(model):
    """The ranking is that of the relevance which the engine's one-token step computes."""
    with model.session(MEMORY) as session:
        session.policy.observed = True
        session.read(TOKENS[:384])
        session.decode(TOKENS[384])
        step = session.policy.last_step
        relevance = [step.observed_relevance(layer) for layer in range(4)]
    *_, first = run_recall(model, MEMORY, TOKENS[:385], [3], 1, 1)
    assert first.ranked.shape == (2, 1, 6)
    for layer, ranked in zip((2, 3), first.ranked[:, 0], strict=True):
        p = np.exp(relevance[layer] - relevance[layer].max(1, keepdims=True))
        assert ranked.tolist() == np.argsort(-(p / p.sum(1, keepdims=True)).sum(0), kind="stable")[:6].tolist()


@pytest.mark.parametrize("kv_ram", [0, 2**20])
def test_blocks_on_disk_say_how_many_were_there(model, kv_ram, tmp_path):
    memory = replace(MEMORY, kv_ram=kv_ram, kv_dir=str(tmp_path) if kv_ram else "")
    results = list(run_recall(model, memory, TOKENS, [3], 1, 4))
    assert any(r.required for r in results) == bool(kv_ram)
    assert all(0 <= r.hits <= r.required for r in results)
