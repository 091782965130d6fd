"""How many threads compute by default: the cores, or less where a control group has a quota."""

import pytest

from pyggml_repkv.engine import cgroups, threads
from pyggml_repkv.engine.model import Model

V2, V1 = "/sys/fs/cgroup", "/sys/fs/cgroup/cpu"


def v1(folder, quota, period=100000):
    return {f"{V1}{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{V1}{folder}/cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    ("groups", "tree", "n_threads"),
    [
        ("", {}, 8),
        ("0::/\n", {f"{V2}/cpu.max": "max 100000\n"}, 8),
        ("0::/a\n", {f"{V2}/a/cpu.max": "150000 100000\n"}, 1),
        ("0::/a\n", {f"{V2}/a/cpu.max": "765000 100000\n"}, 7),
        ("0::/a\n", {f"{V2}/a/cpu.max": "30000 100000\n"}, 1),
        ("0::/a\n", {f"{V2}/a/cpu.max": "1600000 100000\n"}, 8),
        ("0::/a/b/c\n", {f"{V2}/a/b/c/cpu.max": "max 100000", f"{V2}/a/cpu.max": "200000 50000"}, 4),
        ("0::/a/b\n", {f"{V2}/a/b/cpu.max": "300000 100000", f"{V2}/a/cpu.max": "500000 100000"}, 3),
        ("0::/docker/of/the/host\n", {f"{V2}/cpu.max": "200000 100000"}, 2),
        ("0::/../x\n", {f"{V2}/cpu.max": "200000 100000"}, 2),
        ("4:memory:/m\n3:cpu:/a\n0::/\n", v1("/a", 250000), 2),
        ("3:cpu:/a/b\n", {**v1("/a/b", -1), **v1("/a", 300000), **v1("", -1)}, 3),
        ("3:cpu:/host\n", v1("", 100000), 1),
        ("3:cpu,cpuacct:/a\n", {k.replace("/cpu/", "/cpu,cpuacct/"): v for k, v in v1("/a", 200000).items()}, 2),
        ("3:cpuset:/a\n", v1("/a", 100000), 8),
        ("3:cpu:/a\n", v1("/a", 100000, 0), 8),
        ("0::/\n", {f"{V2}/cpu.max": "what is this"}, 8),
    ],
)  # fmt: skip
def test_the_least_quota_of_all_groups_counts_in_whole_processors(monkeypatch, groups, tree, n_threads):
    monkeypatch.setattr(cgroups, "read", lambda path: {"/proc/self/cgroup": groups, **tree}.get(path, ""))
    monkeypatch.setattr(threads, "_n_cores", lambda: 8)
    assert threads.default_threads() == n_threads


def test_a_model_takes_the_default(tiny_model, monkeypatch):
    monkeypatch.setattr(cgroups, "cpu_quota", lambda: 1.5)
    with Model.load(tiny_model()) as model:
        assert model.backend.n_threads == 1
