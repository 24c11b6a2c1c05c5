"""The book as a reader gets it: built without a warning, no dead link, nothing from the network."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest


pytest.importorskip("mkdocs")

ROOT = Path(__file__).resolve().parents[2]
# where the pages' own files may lead: papers, projects, licences
ELSEWHERE = ("https://", "http://127.0.0.1", "http://localhost", "mailto:")
MEASURE = """<!doctype html><meta charset=utf-8><body><script>
const pages = %s, width = %d, found = {}, out = document.createElement("pre");
out.id = "measured";
let left = pages.length;
for (const page of pages) {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:900px;border:0`;
  frame.onload = () => {
    const root = frame.contentDocument.documentElement, inside = frame.contentWindow;
    const seen = [...frame.contentDocument.querySelectorAll("article img")].filter(
      i => inside.getComputedStyle(i).display != "none");
    found[page] = {
      client: root.clientWidth, scroll: root.scrollWidth, text: root.innerText.length,
      broken: seen.filter(i => i.complete && !i.naturalWidth).map(i => i.src),
      cut: [...frame.contentDocument.querySelectorAll("article pre > code")].filter(
        c => c.scrollWidth > c.clientWidth + 1 && (
          inside.getComputedStyle(c).overflowX != "auto" || c.closest(".words"))).length,
      folded: [...frame.contentDocument.querySelectorAll("article pre > code")].filter(
        c => inside.getComputedStyle(c).whiteSpace != "pre" && !c.closest(
          width < 960 ? ".words" : ".words, .columns")).length,
      pairs: seen.filter(i => /#only-/.test(i.src)).length,
      ground: inside.getComputedStyle(frame.contentDocument.body).backgroundColor,
      outside: inside.performance.getEntriesByType("resource").map(e => e.name).filter(
        n => !/^(file|data|blob):/.test(n)),
    };
    if (!--left) { out.textContent = JSON.stringify(found); document.body.append(out); }
  };
  frame.src = page;
  document.body.append(frame);
}
</script>"""


@dataclass
class Found(HTMLParser):
    """What a page refers to, and the anchors it has."""

    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    words: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()
        self._code = 0

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.loaded.append(given["href"])
        elif given.get("src"):
            self.loaded.append(given["src"])
        self._code += tag in ("code", "pre", "script", "style", "annotation")

    def handle_endtag(self, tag):
        self._code -= tag in ("code", "pre", "script", "style", "annotation")

    def handle_data(self, data):
        if not self._code:
            self.words.append(data)


def read(path):
    found = Found()
    found.feed(path.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built book."""
    out = tmp_path_factory.mktemp("book") / "site"
    # not `--quiet`, with which no warning is an error
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]  # a warning is an error
    return out


@pytest.fixture(scope="module")
def pages(site):
    """Every page by its path, but the one for what is not found, whose links are absolute."""
    return {path: read(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


@pytest.mark.slow
def test_no_link_is_dead(site, pages):
    dead = []
    for path, page in pages.items():
        for link in {*page.links, *page.loaded}:
            if link.startswith((*ELSEWHERE, "data:")):
                continue
            target, anchor = urldefrag(link)
            place = (path.parent / unquote(urlsplit(target).path)).resolve() if target else path
            place = place / "index.html" if place.is_dir() else place
            # the anchors of a picture say in which theme it is shown
            known = pages[place].anchors if place in pages else {"only-light", "only-dark"}
            if not place.exists() or (anchor and unquote(anchor) not in known):
                dead.append(f"{path.relative_to(site)}: {link}")
    assert sum(len(page.links) for page in pages.values()) > 1000
    assert dead == []


@pytest.mark.slow
def test_nothing_is_loaded_from_the_network(site, pages):
    loaded = {link for page in pages.values() for link in page.loaded}
    assert {link for link in loaded if re.match(r"(\w+:)?//", link)} == set()
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"url\([\"']?(https?:)?//|@import", text), sheet


@pytest.mark.slow
def test_no_markup_is_left_in_the_text(site, pages):
    """A docstring or formula that was not understood would show its marks."""
    marks = re.compile(r"\[`|`\]\[|\\\(|\\\[|^>>> |\*optional\*|::: ", re.M)
    left = {
        path.relative_to(site).as_posix(): found[0]
        for path, page in pages.items()
        if (found := marks.findall("".join(page.words)))
    }
    assert left == {}
    names = re.compile(r"\[<code>~?[A-Za-z_][\w.]*</code>\]")
    assert [path for path in pages if names.search(path.read_text(encoding="utf-8"))] == []
    assert sum(len("".join(page.words)) for page in pages.values()) > 100_000


@pytest.mark.slow
def test_every_page_is_named_and_found_by_the_search(site, pages):
    titles = [re.search(r"<title>(.*?)</title>", p.read_text("utf-8"), re.S)[1] for p in pages]
    assert len(set(titles)) > 0.9 * len(titles)
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    places = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert {"", "relay/", "reference/models/", "cli/", "laws/"} <= places
    assert not [place for place in places if place.startswith("source/")]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "theme"), [(320, "light"), (390, "dark"), (1280, "light")])
def test_the_pages_in_a_browser(site, pages, tmp_path, width, theme):
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("no Chromium")
    # pages that have moved only lead to others
    here = [p for p in pages if 'http-equiv="refresh"' not in p.read_text(encoding="utf-8")]
    wanted = [p.relative_to(site).as_posix() for p in here if "source" not in p.parts]
    frame = site / f"frame-{theme}-{width}.htm"
    frame.write_text(MEASURE % (json.dumps(wanted), width), encoding="utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=60000"]
    flags += ["--dump-dom"] + (["--force-dark-mode"] if theme == "dark" else [])
    done = subprocess.run(
        [chromium, *flags, frame.as_uri()], capture_output=True, text=True, timeout=600, check=False
    )
    frame.unlink()
    if done.returncode:
        pytest.skip(f"Chromium does not run here: {done.stderr[-200:]}")
    measured = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.S)
    assert measured, done.stderr[-2000:]
    found = json.loads(measured[1].replace("&amp;", "&").replace("&gt;", ">").replace("&lt;", "<"))
    assert set(found) == set(wanted)
    assert {
        n: (f["scroll"], f["client"]) for n, f in found.items() if f["scroll"] > f["client"]
    } == {}
    assert [n for n, f in found.items() if f["text"] < 200] == []
    # code and columns scroll, prose wraps
    assert {n: f["cut"] for n, f in found.items() if f["cut"]} == {}
    assert {n: f["folded"] for n, f in found.items() if f["folded"]} == {}
    assert [f["broken"] for f in found.values() if f["broken"]] == []
    assert [f["outside"] for f in found.values() if f["outside"]] == []
    grounds = {max(map(int, re.findall(r"\d+", f["ground"])[:3])) for f in found.values()}
    assert all((ground > 128) == (theme == "light") for ground in grounds)
    assert found["index.html"]["pairs"] == 1  # one picture of the two, for one theme is shown
