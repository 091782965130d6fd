import logging

import pytest

from pyggml_repkv.cli import progress


def test_a_long_prompt_moves_the_bar_only_on_a_terminal(run, monkeypatch):
    moves = []

    class Bar:
        def __init__(self, n_tokens):
            moves.append(n_tokens)

        def __enter__(self):
            return lambda n_done, n_total: moves.append((n_done, n_total))

        def __exit__(self, *_):
            moves.append("gone")

    monkeypatch.setattr(progress, "prompt_bar", Bar)
    run("-b", "2", prompt="12345")
    assert moves == []
    monkeypatch.setattr(progress, "wanted", lambda: True)
    run("-b", "2", prompt="12")
    assert moves == []
    run("-b", "2", prompt="12345")
    assert moves == [5, (0, 5), (2, 5), (4, 5), (5, 5), "gone"]


def test_the_bar_draws_tokens_and_speed_and_leaves_the_cursor(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")

    def interrupted():
        with progress.prompt_bar(1000) as move:
            move(500, 1000)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    drawn = capsys.readouterr().err
    assert "500/1000 tokens" in drawn
    assert "tokens/s" in drawn
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l")


def test_without_a_terminal_a_long_prompt_says_a_line_now_and_then(capsys, monkeypatch):
    clock = iter([0.0, 5.0, 11.0, 12.0, 30.0])
    monkeypatch.setattr(progress, "perf_counter", lambda: next(clock))
    with progress.prompt_lines() as tell:
        for n_done in (100, 200, 300, 400):
            tell(n_done, 400)
    assert capsys.readouterr().err == "pyggml_repkv: read 200 of 400 tokens, 18 tokens/s\n"


@pytest.mark.parametrize(("quiet", "lines"), [(False, "pyggml_repkv: far now\n"), (True, "")])
def test_what_the_library_says_is_shown_unless_quiet(capsys, quiet, lines):
    with progress.notices(quiet=quiet):
        logging.getLogger("pyggml_repkv.memory.bounded").info("far %s", "now")
    logging.getLogger("pyggml_repkv.memory.bounded").info("unheard")
    assert capsys.readouterr().err == lines


def test_a_warning_is_marked_as_one_and_shown_always(capsys):
    with progress.notices(quiet=True):
        logging.getLogger("pyggml_repkv.model").warning("guessed %s", "qwen2")
    assert capsys.readouterr().err == "pyggml_repkv: warning: guessed qwen2\n"


def test_a_notice_stands_above_the_bar(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with progress.notices(quiet=False), progress.prompt_bar(10):
        logging.getLogger("pyggml_repkv").info("[far]")
    assert "pyggml_repkv: [far]\n" in capsys.readouterr().err


def test_a_download_draws_bytes_from_the_first_on(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(progress, "wanted", lambda: True)
    with progress.notices(quiet=True), progress.downloads(quiet=False) as move:
        logging.getLogger("pyggml_repkv.model.fetch").info("downloading")
        assert capsys.readouterr().err == "pyggml_repkv: downloading\n"
        move(0, 477_000_000)
        move(96_000_000, 477_000_000)
        logging.getLogger("pyggml_repkv").info("waiting")
    logging.getLogger("pyggml_repkv").info("unheard")
    drawn = capsys.readouterr().err
    assert "96.0/477.0 MB" in drawn
    assert "pyggml_repkv: waiting\n" in drawn
    assert "unheard" not in drawn
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l")


def test_without_a_terminal_a_download_says_a_line_now_and_then(capsys, monkeypatch):
    clock = iter([0.0, 5.0, 11.0, 12.0, 30.0])
    monkeypatch.setattr(progress, "perf_counter", lambda: next(clock))
    with progress.downloads(quiet=False) as tell:
        for n_done in (100, 200, 300, 400):
            tell(n_done * 10**6, 400 * 10**6)
    assert capsys.readouterr().err == "pyggml_repkv: downloaded 200 of 400 MB\n"


def test_a_quiet_download_shows_nothing():
    with progress.downloads(quiet=True) as move:
        assert move is None
