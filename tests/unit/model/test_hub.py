"""Models of the hub, from a server on this machine."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from pyggml_repkv.cli.main import main
from pyggml_repkv.errors import InputError, RepkvError
from pyggml_repkv.model import hub as hub_module
from pyggml_repkv.model.hub import fetch_from_hub
from pyggml_repkv.model.names import find_model
from tests.hub_server import COMMIT, Hub, running_hub
from tests.subprocesses import ROOT
from tests.tiny_models import TinySpec, write_tiny_model

REPO = "user/tiny-GGUF"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with running_hub() as running:
        # The library reads its environment when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        running.repos[REPO] = dict.fromkeys(FILES, b"GGUF")
        yield running


FILES = (
    ".gitattributes",
    "README.md",
    "mmproj-Q4_K_M.gguf",
    "tiny-BF16.gguf",
    "tiny-F16.gguf",
    "tiny-Q4_K_M.gguf",
    "tiny-q8_0-00001-of-00002.gguf",
    "tiny-q8_0-00002-of-00002.gguf",
    "tiny.imatrix.gguf",
)


def tiny_bytes(tmp_path: Path, **fields: object) -> bytes:
    path = tmp_path / "source.gguf"
    write_tiny_model(path, TinySpec(**fields))
    return path.read_bytes()


class TestWhichFile:
    @pytest.mark.parametrize(
        ("spec", "name"),
        [
            (REPO, "tiny-Q4_K_M.gguf"),
            (f"{REPO}:q4_k_m", "tiny-Q4_K_M.gguf"),
            (f"{REPO}:F16", "tiny-F16.gguf"),
            (f"{REPO}:bf16", "tiny-BF16.gguf"),
            (f"{REPO}:Q8_0", "tiny-q8_0-00001-of-00002.gguf"),
        ],
    )
    def test_the_quant_chooses(self, hub: Hub, spec: str, name: str) -> None:
        path = fetch_from_hub(spec)
        assert path.name == name
        assert path.parent.name == COMMIT

    def test_a_split_model_is_fetched_whole(self, hub: Hub) -> None:
        path = fetch_from_hub(f"{REPO}:q8_0")
        assert sorted(p.name for p in path.parent.iterdir()) == [
            "tiny-q8_0-00001-of-00002.gguf", "tiny-q8_0-00002-of-00002.gguf",
        ]  # fmt: skip
        assert fetch_from_hub(REPO, file="tiny-q8_0-00002-of-00002.gguf") == path

    def test_a_missing_part_is_one_line(self, hub: Hub) -> None:
        del hub.repos[REPO]["tiny-q8_0-00002-of-00002.gguf"]
        with pytest.raises(RepkvError, match=r"one of 2 parts, and tiny-q8_0-00002-of-00002\.gguf is not there"):
            fetch_from_hub(f"{REPO}:q8_0")

    def test_without_the_default_the_first_is_taken_and_said(self, hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
        del hub.repos[REPO]["tiny-Q4_K_M.gguf"]
        assert fetch_from_hub(REPO).name == "tiny-BF16.gguf"
        assert caplog.messages == [f"{REPO} has no Q4_K_M; taking tiny-BF16.gguf"]

    def test_an_only_one_is_no_guess(self, hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
        hub.repos[REPO] = {"x.gguf": b"GGUF", "mmproj-F16.gguf": b"GGUF", "sub/y.txt": b""}
        assert fetch_from_hub(REPO).name == "x.gguf"
        assert caplog.messages == []

    def test_files_in_folders(self, hub: Hub) -> None:
        hub.repos[REPO] = {"Q8_0/m-Q8_0.gguf": b"1", "UD-Q4_K_M/m.gguf": b"2", "Q2_K/m.gguf": b"3"}
        assert fetch_from_hub(f"{REPO}:UD-Q4_K_M").read_bytes() == b"2"
        assert fetch_from_hub(f"{REPO}:q2_k").read_bytes() == b"3"

    @pytest.mark.parametrize(
        ("spec", "file", "message"),
        [
            ("user", None, "'user' is no repository of the hub; give USER/REPO"),
            ("a/b/c", None, "is no repository"),
            ("a/b:", None, "is no repository"),
            ("a/b:c:d", None, "is no repository"),
            ("../b", None, "is no repository"),
            ("a/b--c", None, "is no repository"),
            ("a/\x1b[2J", None, r"'a/\\x1b\[2J' is no repository"),
            (f"{REPO}:Q5_K_M", None, f"^{REPO} has no Q5_K_M; it has BF16, F16, Q4_K_M, Q8_0$"),
            (f"{REPO}:4_K_M", None, "has no 4_K_M"),
            (f"{REPO}:F16", "tiny-F16.gguf", "both name a model: leave one out"),
            (REPO, "nope.gguf", r"has no file 'nope\.gguf'; it has tiny-BF16\.gguf, tiny-F16"),
            (
                "user/none",
                None,
                "has no repository user/none, or it is private: check the name, or give a token",
            ),
        ],
    )
    def test_what_names_nothing_is_one_line(self, hub: Hub, spec: str, file: str | None, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            fetch_from_hub(spec, file=file)
        assert str(caught.value).isprintable()

    def test_a_repository_without_models(self, hub: Hub) -> None:
        hub.repos[REPO] = {"model.safetensors": b"", "mmproj.gguf": b""}
        with pytest.raises(InputError, match="has no GGUF model; look for a repository whose name ends in -GGUF"):
            fetch_from_hub(REPO)


class TestDownload:
    def test_it_is_downloaded_once_and_its_bytes_are_told(self, hub: Hub, tmp_path: Path) -> None:
        data = hub.repos[REPO]["tiny-Q4_K_M.gguf"] = tiny_bytes(tmp_path)
        moves: list[tuple[int, int]] = []
        path = fetch_from_hub(REPO, progress=lambda *move: moves.append(move))
        assert path.read_bytes() == data
        assert moves[-1] == (len(data), len(data))
        n_asked = len(hub.asked)
        assert fetch_from_hub(REPO) == path
        assert not any(line.startswith("GET /user") for line in hub.asked[n_asked:])

    def test_parts_share_one_count(self, hub: Hub) -> None:
        hub.repos[REPO]["tiny-q8_0-00002-of-00002.gguf"] = b"PART"
        moves: list[tuple[int, int]] = []
        fetch_from_hub(f"{REPO}:Q8_0", progress=lambda *move: moves.append(move))
        assert moves == [(4, 8), (8, 8)]

    def test_redirects_are_followed(self, hub: Hub, tmp_path: Path) -> None:
        hub.redirects = True
        data = hub.repos[REPO]["tiny-Q4_K_M.gguf"] = tiny_bytes(tmp_path)
        assert fetch_from_hub(REPO).read_bytes() == data
        assert any(line.startswith("GET /cdn/") for line in hub.asked)

    def test_a_broken_connection_is_resumed(
        self, hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        data = hub.repos[REPO]["tiny-Q4_K_M.gguf"] = tiny_bytes(tmp_path)
        hub.breaks_at = len(data) // 2
        # What is read of a chunk before the connection breaks is not kept.
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
        assert fetch_from_hub(REPO).read_bytes() == data
        assert any(f"bytes={len(data) // 2 // 1000 * 1000}-" in line for line in hub.asked)
        assert capfd.readouterr() == ("", "")

    def test_a_wrong_size_is_one_line(self, hub: Hub, tmp_path: Path) -> None:
        hub.size_off = 7
        with pytest.raises(RepkvError, match=r"cannot be downloaded from http.*should be of size 11 but has size 4"):
            fetch_from_hub(REPO)
        hub.size_off = 0
        assert fetch_from_hub(REPO).read_bytes() == b"GGUF"

    def test_wrong_bytes_are_removed(self, hub: Hub) -> None:
        hub.corrupts = True
        with pytest.raises(RepkvError, match=r"tiny-Q4_K_M\.gguf: what was downloaded is damaged, and was removed"):
            fetch_from_hub(REPO)
        hub.corrupts = False
        assert fetch_from_hub(REPO).read_bytes() == b"GGUF"

    def test_space_is_asked_for_first(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3))
        with pytest.raises(RepkvError, match="0 MB are needed and 0 MB are free; make room"):
            fetch_from_hub(REPO)
        assert not any(line.startswith("GET /user") for line in hub.asked)

    def test_a_cache_that_cannot_be_written_is_one_line(
        self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
        with pytest.raises(RepkvError, match=r"file/hub: Not a directory; HF_HOME chooses another folder"):
            fetch_from_hub(REPO)


class TestRefusals:
    @pytest.mark.parametrize(
        ("path", "code", "headers", "message", "exit_code"),
        [
            ("/api", 401, {}, "no repository user/tiny-GGUF, or it is private", 2),
            ("/user", 401, {"X-Error-Code": "GatedRepo"}, "is gated: accept its terms at http.*give a token", 1),
            ("/user", 403, {"X-Error-Code": "GatedRepo"}, "is gated", 1),
            ("/api", 403, {}, r"the hub refuses access to user/tiny-GGUF \(403\): check the token in HF_TOKEN", 1),
            (
                "/api", 401, {"X-Error-Message": "Invalid credentials in Authorization header"},
                r"refuses access to user/tiny-GGUF \(401\): check the token", 1,
            ),
            ("/api", 500, {}, "the hub answers 500; try again later", 1),
            ("/api", 404, {}, "the hub has no repository user/tiny-GGUF: check the name", 2),
            ("/api", 429, {}, "the hub answers 429; try again later", 1),
            ("/user", 418, {}, "the hub answers 418", 1),
            ("/api", 200, {}, r"cannot be downloaded from http.* \('?id'?\)", 1),
        ],
    )  # fmt: skip
    def test_they_are_one_line(
        self,
        hub: Hub,
        path: str,
        code: int,
        headers: dict[str, str],
        message: str,
        exit_code: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        hub.status[path] = (code, headers)
        if "X-Error-Message" in headers:
            monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        with pytest.raises(RepkvError, match=message) as caught:
            fetch_from_hub(REPO)
        assert caught.value.exit_code == exit_code
        assert str(caught.value).isprintable()

    def test_without_a_network_the_cache_serves(
        self, hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = fetch_from_hub(REPO)
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        assert fetch_from_hub(REPO) == path
        assert len(caplog.messages) == 1
        assert caplog.messages[0].startswith("the hub cannot be reached (")
        with pytest.raises(
            RepkvError, match=r"cannot be downloaded from http://127\.0\.0\.1:9 \(.*\); check the network"
        ):
            fetch_from_hub(f"{REPO}:F16")

    def test_offline_mode(self, hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        path = fetch_from_hub(f"{REPO}:Q8_0")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        n_asked = len(hub.asked)
        assert fetch_from_hub(f"{REPO}:Q8_0") == path
        assert caplog.messages == []
        assert fetch_from_hub(REPO) == path
        assert caplog.messages[0].endswith("of user/tiny-GGUF the cache has tiny-q8_0-00001-of-00002.gguf")
        caplog.clear()
        with pytest.raises(RepkvError, match="HF_HUB_OFFLINE is set, and the cache has no such model of user/"):
            fetch_from_hub(f"{REPO}:F16")
        path.with_name("tiny-q8_0-00002-of-00002.gguf").unlink()
        with pytest.raises(RepkvError, match="HF_HUB_OFFLINE is set"):
            fetch_from_hub(f"{REPO}:Q8_0")
        assert (caplog.messages, len(hub.asked)) == ([], n_asked)


class TestCommandLine:
    def test_run_takes_a_repository(self, hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        hub.repos[REPO]["tiny-Q4_K_M.gguf"] = tiny_bytes(tmp_path)
        flags = ["-p", "a", "-n", "2", "--greedy", "--ignore-eos", "-q"]
        assert main(["run", "-hf", REPO, *flags]) == 0
        out, err = capfd.readouterr()
        assert err == ""
        assert main(["run", "-hf", REPO, "-hff", "tiny-Q4_K_M.gguf", *flags]) == 0
        assert main(["run", "-m", f"hf:{REPO}", *flags]) == 0
        assert capfd.readouterr() == (2 * out, "")

    def test_info_takes_a_repository(self, hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        hub.repos[REPO]["tiny-Q4_K_M.gguf"] = tiny_bytes(tmp_path)
        assert main(["model", "info", "--hf-repo", REPO]) == 0
        assert "tiny-Q4_K_M.gguf" in capfd.readouterr().out

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["run", "-p", "x", "-m", "demo", "-hf", REPO], "-m and -hf both name a model: leave one out"),
            (["run", "-p", "x", "-hff", "x.gguf"], "-hff names a file of a repository: give that with -hf"),
            (["model", "info", "x.gguf", "-hf", REPO], "as MODEL and with -m or -hf: leave one out"),
            (["run", "-p", "x", "-hf", f"{REPO}:Q5_0"], "has no Q5_0; it has BF16, F16, Q4_K_M, Q8_0"),
        ],
    )
    def test_what_contradicts_is_one_line(
        self, hub: Hub, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert message in err

    def test_two_processes_at_once(self, hub: Hub, tmp_path: Path) -> None:
        data = hub.repos[REPO]["tiny-Q4_K_M.gguf"] = tiny_bytes(tmp_path)
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "both"), "HF_HUB_OFFLINE": "0"}
        source = f"from pyggml_repkv.model.names import find_model; print(find_model('hf:{REPO}').resolve())"
        running = [
            subprocess.Popen([sys.executable, "-c", source], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        paths = {process.communicate(timeout=60)[0].strip() for process in running}
        assert [process.returncode for process in running] == [0, 0]
        assert len(paths) == 1
        assert Path(paths.pop()).read_bytes() == data


def test_the_library_is_imported_only_where_the_hub_is_named() -> None:
    source = "import sys, pyggml_repkv.cli.run, pyggml_repkv.engine.model; print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_name_with_the_prefix_is_a_repository(hub: Hub) -> None:
    assert find_model(f"hf:{REPO}:F16").name == "tiny-F16.gguf"
    assert hub_module.DEFAULT_QUANT == "Q4_K_M"
