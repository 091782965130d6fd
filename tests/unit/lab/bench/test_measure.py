"""Turns, rounds, ratios, records, tables and warnings of `bench`."""

import json

import pytest

from pyggml_repkv.errors import RepkvError
from pyggml_repkv.lab.bench import load
from pyggml_repkv.lab.bench import measure as measuring
from pyggml_repkv.lab.bench.engines import context_size
from pyggml_repkv.lab.bench.load import busy_ticks, load_warning
from pyggml_repkv.lab.bench.measure import Case, Contender, Plan, Result, best_of, measure, spread_warnings
from pyggml_repkv.lab.bench.table import About, Table, all_cases, csv_lines, json_lines, ratio_table, record
from pyggml_repkv.lab.inspect.peak import Peak

ABOUT = About(
    cpu="A CPU", model_filename="m.gguf", model_type="qwen2 1M F32", model_size=2**20, model_n_params=10**6,
    n_threads=2, n_batch=512, type_k="f16", type_v="f16", test_time="2026-01-01T00:00:00+00:00",
    peak=Peak(100.0, 10.0), step_bytes={("repkv", 0): 10**8, ("repkv", 64): 10**8},
)  # fmt: skip


class FakeEngine:
    """Takes as many seconds as its clock says; reaches every depth but drifts if it cannot rewind."""

    version, n_vocab = "fake 1", 50

    def __init__(self, name, log, can_rewind):
        self.name, self.log, self.can_rewind, self.drift = name, log, can_rewind, 0
        self.n_timed = 0

    def ask(self, op, **fields):
        if op == "open":
            self.log.append((self.name, "open", fields["n_ctx"], fields["flash_attn"]))
            self.drift = 0
        elif op == "reach":
            depth = len(fields["tokens"])
            if self.drift > fields["slack"]:
                self.drift = 0
            return {"n_past": depth + self.drift, "seconds": 0.0}
        elif op == "memory":
            n = self.n_timed
            return {"resident_bytes": 1000 * n, "prefetch": {"hits": 3 * n, "required": 4 * n}, "peak_rss_bytes": 5}
        elif op.startswith("time"):
            self.log.append((self.name, op, fields["tokens"]))
            self.n_timed += 1
            if not self.can_rewind:
                self.drift += len(fields["tokens"])
            return {"seconds": float(self.n_timed)}
        return {}


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(measuring, "REST_S", 0)
    monkeypatch.setattr(measuring, "busy_cores", lambda: 0.25)

    def call(cases, contenders, rounds=2, **fields):
        log, said = [], []
        monkeypatch.setattr(Contender, "start", lambda c, stack: FakeEngine(c.name, log, c.can_rewind))
        plan = Plan(cases, contenders, rounds, lambda n, n_vocab: list(range(n)), **fields)
        return [r for group in measure(plan, said.append) for r in group], log, said

    return call


def ours(name="repkv", can_rewind=False):
    return Contender(name, True, {}, True, can_rewind)


def llama(flash_attn="on"):
    return Contender(f"llama.cpp -fa {flash_attn}", False, {}, flash_attn == "on", True, "python")


def timed(log):
    return [entry for entry in log if entry[1] != "open"]


def test_engines_take_turns_and_the_warm_up_is_not_counted(run):
    results, log, said = run([Case(4, 0), Case(0, 2)], [llama(), ours()], rounds=1)
    turn = [
        ("repkv", "time_chunk", [0, 1, 2, 3]),
        ("llama.cpp -fa on", "time_chunk", [0, 1, 2, 3]),
        ("repkv", "time_tokens", [0, 1]),
        ("llama.cpp -fa on", "time_tokens", [0, 1]),
    ]
    assert timed(log) == turn * 2
    assert [r.seconds for r in results] == [[3.0], [3.0], [4.0], [4.0]]
    assert said[0] == "pp4, warm-up: repkv"
    assert said[-1] == "tg2, round 1 of 1: llama.cpp -fa on"


def test_without_a_warm_up_the_first_round_counts(run):
    results, log, _ = run([Case(4, 0)], [ours()], rounds=2, warm_up=False)
    assert [r.seconds for r in results] == [[1.0, 2.0]]
    assert len(timed(log)) == 2


def test_depths_come_in_order_with_their_own_contexts(run):
    results, log, _ = run([Case(4, 0, 760), Case(4, 0)], [ours(), ours("full", can_rewind=True)], rounds=1)
    assert [r.case.depth for r in results] == [0, 0, 760, 760]
    opened = [entry[:3] for entry in log if entry[1] == "open"]
    # Each depth has room for one test, and for a tenth of the depth if the engine cannot rewind.
    assert opened == [
        ("repkv", "open", 256), ("full", "open", 256), ("repkv", "open", 1024), ("full", "open", 768),
    ]  # fmt: skip


def test_where_it_cannot_rewind_each_depth_is_told_and_stays_within_a_tenth(run):
    results, log, _ = run([Case(4, 0, 64)], [ours(), llama()], rounds=3)
    repkv, other = results
    assert repkv.depths == [68, 64, 68]
    assert other.depths == [64, 64, 64]
    assert [entry[2][0] for entry in timed(log) if entry[0] == "repkv"] == [64, 68, 64, 68]


@pytest.mark.parametrize("rounds", [1, 100])
def test_a_context_does_not_grow_with_the_rounds(rounds):
    plan = Plan([Case(512, 0), Case(0, 64), Case(512, 0, 8192)], [], rounds, lambda n, n_vocab: [])
    assert plan.n_ctx(0, ours()) == plan.n_ctx(0, llama()) == 768
    assert plan.n_ctx(8192, llama()) == 8960
    assert plan.n_ctx(8192, ours()) == context_size(8192 + 819 + 513)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RepkvError("killed")])
def test_whole_rounds_are_kept_when_it_is_stopped(run, monkeypatch, error):
    plan_cases = [Case(4, 0), Case(0, 2)]
    ask = FakeEngine.ask

    def stops(engine, op, **fields):
        if op.startswith("time") and engine.n_timed == 7:
            raise error
        return ask(engine, op, **fields)

    monkeypatch.setattr(FakeEngine, "ask", stops)
    monkeypatch.setattr(Contender, "start", lambda c, stack: FakeEngine(c.name, [], c.can_rewind))
    plan = Plan(plan_cases, [ours(), llama()], 9, lambda n, n_vocab: list(range(n)))
    found = measure(plan, lambda _: None)
    # Seven were timed: those of the warm-up and of two rounds, and the first of another round.
    results = next(found)
    for r in results:
        assert [len(x) for x in (r.seconds, r.depths, r.memories, r.hits, r.required)] == [2] * 5
    assert record(ABOUT, results[0], results)["samples_ns"] == [3 * 10**9, 5 * 10**9]
    with pytest.raises(error if isinstance(error, type) else type(error)):
        next(found)


def test_nothing_is_said_of_a_depth_without_a_whole_round(run, monkeypatch):
    monkeypatch.setattr(Contender, "start", lambda c, stack: FakeEngine(c.name, [], c.can_rewind))
    plan = Plan([Case(4, 0)], [ours()], 9, lambda n, n_vocab: list(range(n)))

    def interrupts(line):
        if "round 1" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(measure(plan, interrupts))


def test_prefetch_counts_what_was_measured_alone(run):
    (result,), _, _ = run([Case(4, 0)], [ours()], rounds=2)
    assert (result.hits, result.required, result.prefetch_hit) == ([3, 3], [4, 4], 0.75)
    assert result.memory["resident_bytes"] == 3000


TEN = Case(0, 10)


def result_of(name, seconds, case=TEN, **fields):
    contender = llama(name) if name in ("on", "off") else ours(name)
    return Result(case, contender, synthetic=False, seconds=list(seconds), depths=[0] * len(seconds), **fields)


def test_rates():
    result = result_of("repkv", (1.0, 2.0, 4.0))
    assert result.rates == [10.0, 5.0, 2.5]
    assert result.median_rate == 5.0
    assert result.mean_rate == pytest.approx(17.5 / 3)
    assert result.stddev_rate == pytest.approx(3.8188, rel=1e-4)
    assert result.spread == 4.0
    assert result_of("repkv", (1.0,)).stddev_rate == 0.0


def test_ratios_are_of_rounds_and_to_the_faster():
    results = [
        result_of("repkv", (1.0, 2.0, 1.0)), result_of("on", (4.0, 4.0, 5.0)), result_of("off", (3.0, 3.0, 20.0)),
        result_of("on", (0.1, 0.1, 0.1), Case(512, 0)),
    ]  # fmt: skip
    assert best_of(results, Case(0, 10)).contender.name == "llama.cpp -fa off"
    assert best_of(results, Case(1, 0)) is None
    assert results[0].speedups(results[2]) == [3.0, 1.5, 20.0]
    table = ratio_table(results)
    (line,) = table.splitlines()[3:]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "tg10", "repkv", "llama.cpp -fa off", "3.00", "1.50", "20.00",
    ]  # fmt: skip
    assert ratio_table(results[:1]) == ""


def test_a_record_has_llama_benchs_fields_and_more():
    memory = {"resident_bytes": 8, "peak_rss_bytes": 9}
    result = result_of("repkv", (1.0, 2.0), hits=[0, 3], required=[1, 3], memories=[{}, memory])
    r = record(ABOUT, result, [result, result_of("on", (2.0, 6.0))])
    assert (r["n_prompt"], r["n_gen"], r["n_depth"], r["test"]) == (0, 10, 0, "tg10")
    assert (r["samples_ns"], r["avg_ns"], r["samples_ts"]) == ([10**9, 2 * 10**9], 1_500_000_000, [10.0, 5.0])
    assert r["vs"] == {"llama.cpp -fa on": {"median": 2.5, "min": 2.0, "max": 3.0}}
    assert (r["prefetch_hit"], r["resident_kv_bytes"], r["disk_bytes"]) == (0.75, 8, None)
    # 100 MB at 7.5 tokens/s, of 10 GB/s
    assert r["of_memory_bandwidth"] == pytest.approx(0.075)
    assert record(ABOUT, result_of("repkv", (1.0,), Case(512, 0)), [])["of_memory_bandwidth"] is None
    assert record(ABOUT, result_of("on", (1.0,)), [])["vs"] == {}
    deep = Result(Case(1, 0, 64), ours("full", can_rewind=True), True, seconds=[1.0])
    assert record(ABOUT, deep, [])["depth_is"] == "repeated"
    assert json.loads(json_lines([r])) == r


def test_rows_are_as_wide_as_the_header():
    results = [
        result_of("repkv", (0.01, 0.012), memories=[{"resident_bytes": 50 * 10**6, "peak_rss_bytes": 10**9}]),
        result_of("on", (0.01, 0.01), Case(512, 0, 65536)),
    ]
    plan = Plan([r.case for r in results], [r.contender for r in results], 2, lambda n, n_vocab: [])
    table = Table(plan, evicts=True, on_disk=True)
    lines = (table.header() + "".join(table.row(record(ABOUT, r, [])) for r in results)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len({line.count("|") for line in lines}) == 1
    assert "916.67 ± 117.85" in lines[2]


def test_columns_with_nothing_in_them_are_left_out():
    def names(cases, contenders, **fields):
        header = Table(Plan(cases, contenders, 1, lambda n, n_vocab: []), **fields).header().splitlines()[0]
        return {name.strip() for name in header.split("|")} & {"of memory", "RAM store", "on disk", "prefetch hit"}

    assert names([Case(512, 0)], [ours("full")], evicts=False, on_disk=False) == set()
    assert names([Case(0, 1)], [ours("window")], evicts=False, on_disk=False) == {"of memory"}
    assert names([Case(512, 0)], [ours()], evicts=True, on_disk=True) == {"RAM store", "on disk", "prefetch hit"}


def test_csv_has_one_header_and_json_in_cells():
    r = record(ABOUT, result_of("repkv", (1.0,)), [])
    first, second = csv_lines([r], with_header=True), csv_lines([r], with_header=False)
    assert first.splitlines()[0].startswith("build,cpu_info,backends,model_filename")
    assert first.splitlines()[1:] == second.splitlines()
    assert ",[1000000000]," in second


def test_cases_are_llama_benchs():
    names = [case.name for case in all_cases([512], [64, 1], [0, 8192])]
    assert names == ["pp512", "tg64", "tg1", "pp512 @ d8192", "tg64 @ d8192", "tg1 @ d8192"]


def test_warnings():
    assert spread_warnings([result_of("repkv", (10, 14)), result_of("on", (10, 13))]) == [
        "tg10 of repkv varies by a factor of 1.40 (above 1.3)"
    ]
    assert load_warning([0.0, 0.1]) is None
    assert load_warning([0.0, 1.25]).startswith("other programs kept up to 1.2 of the cores busy")


def test_busy_ticks_count_what_computes():
    start, end = busy_ticks(), load.time.process_time() + 0.3
    while load.time.process_time() < end:
        pass
    assert busy_ticks() - start >= 0.2 * load.os.sysconf("SC_CLK_TCK")


def test_busy_ticks_are_those_of_the_cores_at_work(monkeypatch):
    stat = "cpu  1 1 1 1 1 1 1 1 0 0\ncpu0 1 20 300 4000 50000 600000 7000000 80000000 9 9\ncpu1 5 5 5 5 5 5 5 5 0 0\n"
    monkeypatch.setattr(load.os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(load.Path, "read_text", lambda *_: stat)
    # Without idle and iowait, and without guests, which `user` includes.
    assert busy_ticks() == 87_600_321
