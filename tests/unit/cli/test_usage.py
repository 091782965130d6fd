import pytest

from pyggml_repkv.cli.main import main


def test_a_prompt_beyond_the_context_names_the_numbers_and_the_remedy(run, model):
    done = run("-q", "-c", "8", prompt="123456789")
    assert (done.code, done.out) == (2, "")
    assert "9 tokens and the context holds 8: give -c 9 or more" in done.error_line
    assert "--kv repkv reads on past it" in done.error_line
    assert "--kv" not in run("-q", "-c", "8", "--kv", "repkv", prompt="123456789").error_line
    assert model.prompt is None


def test_a_context_past_the_training_is_warned_about(run):
    assert "exceeds the 256 tokens that the model was trained on" in run("-c", "257").err
    assert "trained" not in run("-c", "256").err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-n", "-3"], "-n/--n-predict: must be a whole number from -2"),
        (["-n", "1.5"], "got '1.5'"),
        (["-n", "1e3"], "got '1e3'"),
        (["-n", "9" * 5000], "got '9999"),
        (["-c", "-1"], "-c/--ctx-size: must be a whole number from 0"),
        (["-c", "99999999999"], "-c/--ctx-size"),
        (["-t", "0"], "-t/--threads: must be a whole number from 1 to 512"),
        (["-b", "0"], "-b/--batch-size: must be"),
        (["--temp", "nan"], "--temp: must be a number from 0 to 100, got 'nan'"),
        (["--temp", "-inf"], "--temp: must be"),
        (["--temp", "-0.5"], "--temp: must be"),
        (["--top-k", "-1"], "--top-k: must be"),
        (["--top-p", "1.1"], "--top-p: must be a number from 0 to 1, got '1.1'"),
        (["--min-p", "x"], "--min-p: must be"),
        (["--repeat-penalty", "0"], "--repeat-penalty: must be"),
        (["--repeat-last-n", "-2"], "--repeat-last-n: must be"),
        (["--seed", "4294967296"], "-s/--seed: must be"),
        (["--seed", "1_000"], "-s/--seed: must be"),
        (["--stop", ""], "must not be empty"),
        (["--kv", "none"], "argument --kv: 'none' is none of full, window, repkv"),
        (["-ctk", "q4_0"], "argument -ctk/--cache-type-k: invalid choice"),
        (["--temperature", "1"], "unknown arguments: --temperature"),
        (["--te", "1"], "unknown arguments: --te"),
        (["extra"], "unknown arguments: extra"),
        (["-n"], "-n/--n-predict: expected one argument"),
        (["--json", "--display-prompt"], "--display-prompt cannot go with --json"),
        (["--system", "x"], "--system needs --chat"),
        (["-m", ""], "argument -m/--model: must not be empty"),
        (["-f", "/nowhere/at/all"], "-f /nowhere/at/all: No such file or directory"),
        (["-f", "/"], "-f /: Is a directory"),
        (["-f", ""], "argument -f/--file: must not be empty"),
        (["-f", "a\0b"], "null byte"),
        (["-p", "\udcff"], "-p/--prompt: is not valid UTF-8"),
        (["-p", ""], "the prompt is empty"),
        (["-p", "", "--chat"], "--chat needs a message"),
    ],
)
def test_a_bad_input_is_one_line_and_exit_code_2(run, argv, message):
    done = run(*argv, "-q") if argv[-1] != "-n" else run("-q", *argv)
    assert (done.code, done.out) == (2, "")
    assert message in done.error_line


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["graph", "trace", "-f", ""], "-f/--file"),
        (["graph", "tensors", "-f", ""], "-f/--file"),
        (["bench", "--text", ""], "--text"),
        (["eval", "passkey", "--text", ""], "--text"),
        (["eval", "niah", "--text", ""], "--text"),
    ],
)
def test_no_file_has_an_empty_name(capsys, argv, flag):
    assert main([*argv, "-m", "there-is-none"]) == 2
    assert f"error: argument {flag}: must not be empty (see " in capsys.readouterr().err


def test_no_prompt_at_all_is_bad_usage(run):
    done = run(prompt=None)
    assert done.code == 2
    assert "give -p TEXT, -f FILE" in done.error_line


def test_a_file_that_is_not_utf8_is_refused(run, tmp_path):
    file = tmp_path / "latin1.txt"
    file.write_bytes("naïve".encode("latin-1"))
    done = run("-f", str(file))
    assert done.code == 2
    assert f"-f {file}: not UTF-8 text (byte 0xef at 2)" in done.err


def test_chat_without_a_template_is_refused(run, model):
    model.chat_template = None
    done = run("--chat", "-q")
    assert done.code == 2
    assert "no chat template" in done.err
