"""Options, tables and one-line errors of the scripts."""

import pytest
from _common import integers, memory_of, run_tool, write_table

from pyggml_repkv.errors import InputError, RepkvError


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RepkvError("broken"), 1, "error: broken\n"),
        (InputError("bad flag"), 2, "error: bad flag\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_run_tool_turns_errors_into_one_line(error, code, line, capsys):
    def main(argv):
        raise error

    assert run_tool(main, []) == code
    assert capsys.readouterr().err == line


def test_lists_of_integers():
    assert integers(1)("7,512,7") == (7, 512)
    assert integers(0)("") == ()
    for bad in ("1,x", "1,,2", "0", "1.5"):
        with pytest.raises(Exception, match="must be a whole number from 1 to"):
            integers(1)(bad)


def test_table(capsys):
    write_table(("name", "kind", "n"), [("a", "long one", "1"), ("bcdef", "", "22")], n_left=2)
    assert capsys.readouterr().out == "name   kind       n\na      long one   1\nbcdef            22\n"


def test_memory_of_options():
    memory = memory_of("--kv repkv --budget 48")
    assert (memory.kv, memory.budget, memory.n_ctx) == ("repkv", 48, 0)
    for bad, message in (
        ("--kv nothing", r"^--ours '--kv nothing': argument --kv: 'nothing' is none of"),
        ("-c 4096", "the text decides the context; leave -c out"),
        ("--kv 'repkv", "No closing quotation"),
    ):
        with pytest.raises(InputError, match=message):
            memory_of(bad)
