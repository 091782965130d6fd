"""compare_names.py: which nodes count as the same, and a list with one more node."""

import compare_names
import pytest
from _common import run_tool
from compare_names import aligned, same

OURS = [("norm-0", "rms_norm"), ("Qcur-0", "mul_mat"), ("attn_out-0", "mul_mat"), ("l_out-0", "add")]


@pytest.mark.parametrize(
    ("theirs", "ours", "alike"),
    [
        (("Qcur-0", "mul_mat"), ("Qcur-0", "mul_mat"), True),
        (("Qcur-0", "mul_mat"), ("Kcur-0", "mul_mat"), False),
        (("Qcur-0", "mul_mat"), ("Qcur-0", "add"), False),
        (("node_12", "mul_mat"), ("attn_out-0", "mul_mat"), True),
        (("node_12", "add"), ("attn_out-0", "mul_mat"), False),
        (("attn_out-0", "mul_mat"), ("node_12", "mul_mat"), False),
        (("node_12", "get_rows"), ("", ""), False),
    ],
)
def test_the_same_node(theirs, ours, alike):
    assert same(theirs, ours) == alike


def test_one_more_node_differs_alone():
    theirs = [*OURS[:3], ("node_9", "get_rows"), OURS[3]]
    rows = list(aligned(theirs, OURS))
    assert [row[:2] for row in rows] == theirs
    assert [row[4] for row in rows] == ["", "", "", "differs", ""]
    assert all(not row[4] for row in aligned(OURS, OURS))


@pytest.mark.parametrize(("extra", "code"), [([], 0), ([("node_99", "get_rows")], 1)])
def test_the_exit_code_says_it(demo_model, monkeypatch, capsys, extra, code):
    args = compare_names.parse(["-m", str(demo_model), "-t", "1"])
    theirs = compare_names.our_nodes(args)
    monkeypatch.setattr(compare_names, "llama_nodes", lambda _: [*theirs, *extra])
    assert run_tool(compare_names.main, ["-m", str(demo_model), "-t", "1", "--layer", "1"]) == code
    out, err = capsys.readouterr()
    assert f"{len(theirs)} of --exact-graph; {len(extra)} differ" in out
    assert "Qcur-1 " in out
    assert "Qcur-2 " not in out
    assert bool(err) == bool(code)
