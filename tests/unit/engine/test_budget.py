"""How much memory is free on every kind of machine, and which sessions are refused."""

import pytest

from pyggml_repkv.engine import budget, cgroups
from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import ComputeError
from pyggml_repkv.memory.config import MemoryConfig

MEMINFO = "MemTotal:       2000 kB\nMemAvailable:   1000 kB\n"
V1 = "/sys/fs/cgroup/memory"


def files(**extra):
    return {"/proc/meminfo": MEMINFO, **extra}


@pytest.mark.parametrize(
    ("tree", "free"),
    [
        ({}, 1_024_000),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "max\n"}, 1_024_000),
        (
            {
                "/proc/self/cgroup": "0::/\n",
                "/sys/fs/cgroup/memory.max": "500\n",
                "/sys/fs/cgroup/memory.current": "200",
            },
            300,
        ),
        (
            {
                "/proc/self/cgroup": "0::/a/b\n",
                "/sys/fs/cgroup/a/memory.max": "500",
                "/sys/fs/cgroup/a/memory.current": "450",
                "/sys/fs/cgroup/a/memory.stat": "anon 100\ninactive_file 30\nactive_file 20\n",
                "/sys/fs/cgroup/a/b/memory.max": "max",
                "/sys/fs/cgroup/a/b/memory.current": "10",
            },
            100,
        ),
        ({"/proc/self/cgroup": "0::/x", "/sys/fs/cgroup/memory.max": "500", "/sys/fs/cgroup/memory.current": "600"}, 0),
        (
            {
                "/proc/self/cgroup": "9:cpu:/z\n4:memory:/y\n",
                f"{V1}/y/memory.limit_in_bytes": "700",
                f"{V1}/y/memory.usage_in_bytes": "100",
                f"{V1}/memory.limit_in_bytes": "9223372036854771712",
                f"{V1}/memory.usage_in_bytes": "100",
            },
            600,
        ),
    ],
)
def test_the_least_of_machine_and_groups_is_free(monkeypatch, tree, free):
    monkeypatch.setattr(cgroups, "read", lambda path: files(**tree).get(path, ""))
    assert budget.available_bytes() == free


def test_a_control_group_is_named_where_it_binds(monkeypatch):
    tree = {
        "/proc/self/cgroup": "0::/\n",
        "/sys/fs/cgroup/memory.max": "500000",
        "/sys/fs/cgroup/memory.current": "200000",
    }
    monkeypatch.setattr(cgroups, "read", lambda path: files(**tree).get(path, ""))
    assert budget.describe_available() == "300 kB free of the 500 kB that the control group allows"
    tree["/sys/fs/cgroup/memory.max"] = "5000000"
    assert budget.describe_available() == "1 MB free"


def test_without_proc_the_whole_machine_is_taken_for_free(monkeypatch):
    monkeypatch.setattr(cgroups, "read", lambda path: "")
    assert budget.available_bytes() > 2**20


def test_a_session_says_its_parts_and_refuses_what_does_not_fit(tiny_model, monkeypatch):
    memory = MemoryConfig(kv="repkv", n_ctx=4096, n_local=64)
    with (
        Model.load(tiny_model(n_layer=2, n_ctx=128), threads=1, repack=False) as model,
        model.session(memory) as session,
    ):
        parts = session.budget(1000, 200)
        assert set(parts) == {"weights", "window", "tokens", "index", "compute"}
        assert parts["tokens"] == 1200 * session.policy.local.row_bytes
        assert parts["compute"] > 0
        monkeypatch.setattr(budget, "available_bytes", lambda: 1000)
        with pytest.raises(ComputeError, match=r"1000 tokens need .* of memory \(window .*\) and 1 kB are free"):
            session.budget(1000)
        with pytest.raises(ComputeError, match="tokens need"):
            session.read([1, 2, 3])
        assert session.n_past == 0
        monkeypatch.undo()
        session.read([1, 2, 3])
        assert session.n_past == 3


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(0, "0 kB"), (12_345, "12 kB"), (999_600, "1000 kB"), (93e6, "93 MB"), (1.44e9, "1.4 GB")]
)
def test_sizes_are_for_people(n_bytes, text):
    assert budget.size(n_bytes) == text
