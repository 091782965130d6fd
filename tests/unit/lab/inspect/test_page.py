"""The page of a graph is self-contained, holds the snapshot unchanged, and works in a browser."""

import json
import re
import shutil
import subprocess
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pyggml_repkv.cli import main
from pyggml_repkv.lab.inspect.builder import BuiltGraph, Wanted
from pyggml_repkv.lab.inspect.page import as_page
from pyggml_repkv.lab.inspect.snapshot import Snapshot
from pyggml_repkv.lab.inspect.table import COLOURS, kind_of
from pyggml_repkv.memory.config import MemoryConfig

DISK = MemoryConfig(
    kv="repkv", n_ctx=2048, n_batch=48, n_local=64, block="fixed:16", index="representatives:4", kv_ram=2**24
)
HOSTILE = '</script><b id="harm">&lt;<!--<script>\'\\\u2028@DATA@\udce9'
VOID = {"meta", "link", "input"}
CHROMIUM = shutil.which("chromium")


class Page(HTMLParser):
    """Tags in order, and the text of <script> elements by type. An element that is not closed is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str | None, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            kind = self.tags[-1][1].get("type")
            self.scripts[kind] = self.scripts.get(kind, "") + data

    @property
    def data(self):
        return json.loads(self.scripts["application/json"])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    from tests.tiny_models import TinySpec, write_tiny_model

    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_model(path, TinySpec(n_layer=4, n_ctx=512, head_dim=32))
    return path


@pytest.fixture(scope="module")
def snapshot(path) -> Snapshot:
    with BuiltGraph(path, Wanted("decode", DISK, n_threads=2)) as graph:
        return graph.snapshot()


def renamed(snapshot: Snapshot, name: str) -> Snapshot:
    """With one name and op for all tensors."""
    nodes, leaves = (tuple(replace(t, name=name, op=name) for t in some) for some in (snapshot.nodes, snapshot.leaves))
    return replace(snapshot, about={**snapshot.about, "model": name}, nodes=nodes, leaves=leaves, by_id={})


def test_holds_the_snapshot(snapshot):
    page = Page(as_page(snapshot, {"n1": 2.5}))
    assert Snapshot.from_json(page.data["snapshot"]) == snapshot
    assert page.data["kinds"] == {t.id: kind_of(t) for t in snapshot.nodes}
    assert page.data["times"] == {"n1": 2.5}
    assert Page(as_page(snapshot)).data["times"] is None


def test_times_are_finite(snapshot):
    with pytest.raises(ValueError, match="JSON compliant"):
        as_page(snapshot, {"n1": float("nan")})


def test_names_are_no_markup(snapshot):
    hostile = renamed(snapshot, HOSTILE)
    text = as_page(hostile)
    text.encode("utf-8")
    page = Page(text)
    assert Snapshot.from_json(page.data["snapshot"]) == hostile
    assert page.tags == Page(as_page(snapshot)).tags
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write", page.scripts[None])


def test_loads_nothing(snapshot):
    text = as_page(snapshot)
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert "url(" not in text
    page = Page(text)
    loaded = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "srcset")]
    assert loaded == ["data:,"]
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none';")


def test_every_kind_has_colours(snapshot):
    style = as_page(snapshot).partition("</style>")[0]
    for kind in {*COLOURS, *(t.kind for t in snapshot.leaves)}:
        name = {"llama.cpp": "ggml"}.get(kind, kind)
        # light and dark
        assert len(re.findall(rf"--{name}: #", style)) == len(re.findall(rf"--{name}-tint: #", style)) == 2


def test_is_package_data():
    root = Path(__file__).parents[4]
    declared = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]
    assert "page.html" in declared["pyggml_repkv.lab.inspect"]


def graph_html(path, output) -> int:
    return main.main(["graph", "html", "-m", str(path), "--kv", "repkv", "-c", "2048", "-b", "48", "-o", str(output)])


def test_command_line(path, tmp_path, capsys):
    output = tmp_path / "graph.html"
    assert graph_html(path, output) == 0
    assert Page(output.read_text("utf-8")).data["snapshot"]["policy"] == "repkv"
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith(f"{output}: ")
    assert graph_html(path, "-") == 0
    assert capsys.readouterr().out == output.read_text("utf-8")
    assert graph_html(path, tmp_path / "missing" / "graph.html") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No such file or directory" in error


def rendered(text: str, folder, fragment: str = "") -> str:
    """The document after its scripts ran, as HTML."""
    page = folder / "page.html"
    page.write_text(text, "utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000", f"{page.as_uri()}{fragment}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=180, check=True)
    return done.stdout


def part(dom: str, start: str, end: str) -> str:
    return dom.partition(start)[2].partition(end)[0]


browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")


@browser
def test_a_browser_shows_what_a_link_selects(snapshot, tmp_path):
    node = next(t for t in snapshot.nodes if t.name == "kqv_partial-2")
    dom = rendered(as_page(snapshot, {node.id: 1234.0}), tmp_path, f"#select={node.id}")
    panel = part(dom, '<aside id="panel"', "</aside>")
    assert " hidden" not in panel.partition(">")[0]
    assert "<h2>kqv_partial-2</h2>" in panel
    assert "1.23 ms" in panel
    for id_ in {*node.sources, *node.writes}:
        assert f">{id_}</span>" in panel
    # Only open layers have rows: the first layer, and that of the node.
    shown = re.findall(r'<div class="row [^"]*" data-id="(\w+)"', dom)
    assert {snapshot.by_id[id_].layer for id_ in shown} == {0, 2}
    assert len(shown) == sum(t.layer in (0, 2) for t in snapshot.nodes)
    assert "between hook" in dom


USES = """<script>
const key = name => document.dispatchEvent(new KeyboardEvent("keydown", { key: name }));
const seen = [];
const focus = () => document.activeElement;
const see = () => seen.push([chosen?.id ?? "none", $("panel").hidden, focus().id, $("hits").textContent]);
see(); key("/"); see();
focus().value = "TOPK-"; focus().dispatchEvent(new Event("input")); see();
key("ArrowDown"); see(); key("Enter"); see(); key("ArrowUp"); see(); key("Escape"); see(); key("Escape"); see();
document.body.append(make("output", "", JSON.stringify(seen)));
</script></body>"""


@browser
def test_a_browser_searches_and_moves_by_keys(snapshot, tmp_path):
    dom = rendered(as_page(snapshot).replace("</body>", USES), tmp_path)
    found = [t.id for t in snapshot.nodes if "topk-" in t.name]
    hits = f"{len(found)} hits"
    assert len(found) > 1
    assert json.loads(part(dom, "<output>", "</output>")) == [
        ["none", True, "", ""],
        ["none", True, "search", ""],
        ["none", True, "search", hits],
        [found[0], False, "search", hits],
        [found[1], False, "search", hits],
        [found[0], False, "search", hits],
        ["none", True, "search", hits],
        ["none", True, "", ""],
    ]


@browser
def test_a_browser_takes_names_as_text(snapshot, tmp_path):
    name = HOSTILE.rstrip("\udce9")
    dom = rendered(as_page(renamed(snapshot, name)), tmp_path, "#select=n1")
    assert '<b id="harm">' not in dom.replace(part(dom, '<script type="application/json"', "</script>"), "")
    assert f"<h2>{name.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')}</h2>" in dom
