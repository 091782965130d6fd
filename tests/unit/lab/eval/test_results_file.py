"""Files of results: one writer, nothing lost, nothing of another kind touched."""

import errno
import os

import pytest

from pyggml_repkv.errors import InputError, RepkvError
from pyggml_repkv.lab.eval.results_file import ResultsFile


def test_one_process_writes_to_a_file(tmp_path):
    path = str(tmp_path / "x")
    with ResultsFile(path) as file:
        file.add({"a": 1}, {"b": 2})
        with pytest.raises(InputError, match="another process writes to it"):
            ResultsFile(path)
    with ResultsFile(path) as file:
        assert file.get({"a": 1}) == {"b": 2}


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with ResultsFile(str(tmp_path / "x")) as file, pytest.raises(RepkvError, match="x: No space left on device"):
        file.add({"a": 1}, {"b": 2})


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/full", "/tmp"])
def test_what_is_no_file_is_refused(name):
    with pytest.raises(InputError, match=f"--out {name}: not a regular file"):
        ResultsFile(name)


def test_a_file_of_another_kind_is_refused(tmp_path):
    for text in ("hello\n", '{"settings": {}}\n', "[1, 2]\n", "[" * 100_000 + "\n"):
        (tmp_path / "x").write_text(text)
        with pytest.raises(InputError, match="line 1 is no result"):
            ResultsFile(str(tmp_path / "x"))
    (tmp_path / "x").write_text("a note without an end")
    with pytest.raises(InputError, match="last line is no result"):
        ResultsFile(str(tmp_path / "x"))
    assert (tmp_path / "x").read_text() == "a note without an end"
    (tmp_path / "x").write_text('{"sett')
    with ResultsFile(str(tmp_path / "x")):
        pass
    assert (tmp_path / "x").read_text() == ""
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not a text"):
        ResultsFile(str(tmp_path / "x"))
