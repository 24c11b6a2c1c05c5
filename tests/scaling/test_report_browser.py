"""The report page in a real browser: nothing is fetched, nothing sticks out, nothing is empty."""

import html
import json
import re
import shutil
import subprocess

import pytest
from analyses import FAMILY, analysis_of

from hf_familial.scaling.report import write_report


pytestmark = pytest.mark.slow

MEASURE = """
<script>
addEventListener("load", () => {
  const box = document.getElementById("page").contentDocument, root = box.documentElement;
  const pictures = [...box.querySelectorAll("figure svg, .formula svg")];
  const out = document.createElement("pre");
  out.id = "measured";
  out.textContent = JSON.stringify({
    client: root.clientWidth, scroll: root.scrollWidth,
    sizes: pictures.map(p => [p.getBoundingClientRect().width, p.getBoundingClientRect().height]),
    ink: pictures.map(p => p.getBBox().width),
    wide: [...box.querySelectorAll("figure")].filter(
      f => f.getBoundingClientRect().right > root.clientWidth + 0.5).length,
    ground: getComputedStyle(box.body).backgroundColor,
    requests: box.defaultView.performance.getEntriesByType("resource").map(e => e.name),
  });
  document.body.append(out);
});
</script>
"""


@pytest.fixture(scope="module")
def analysis():
    return analysis_of("familial", FAMILY, draws=60, profiles=True)


@pytest.fixture(scope="module")
def chromium():
    """Runs headless Chromium on a file and returns what the page has become."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium")

    def dump(path, *switches):
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        flags += [f"--user-data-dir={path.parent / 'profile'}", *switches]
        done = subprocess.run(
            [found, *flags, path.as_uri()], capture_output=True, text=True, timeout=240, check=False
        )
        if done.returncode:
            pytest.skip(f"Chromium does not run here: {done.stderr[-200:]}")
        return done.stdout

    return dump


@pytest.mark.parametrize("width", [320, 375, 1280])
def test_the_page_in_a_browser(analysis, chromium, tmp_path, width):
    write_report(tmp_path / "report.html", analysis)
    page = html.escape((tmp_path / "report.html").read_text(encoding="utf-8"), quote=True)
    frame = f'<iframe id="page" style="width:{width}px;height:900px;border:0" srcdoc="{page}">'
    path = tmp_path / "frame.html"
    path.write_text(f"<!doctype html><meta charset=utf-8><body>{frame}</iframe>{MEASURE}")
    measured = re.search(r'<pre id="measured">(.*?)</pre>', chromium(path), re.S)
    assert measured
    found = json.loads(html.unescape(measured[1]))
    assert found["client"] in (width, width - 15)  # less a scroll bar
    assert found["scroll"] <= found["client"]
    assert found["requests"] == []
    assert found["wide"] == 0
    assert len(found["sizes"]) > 15
    assert all(w > 0 and h > 0 for w, h in found["sizes"])
    assert all(ink > 0 for ink in found["ink"])
    # a picture is as wide as a phone, so its letters keep their size
    assert all(w >= min(320, width - 50) for w, _ in found["sizes"][1:])


def test_the_page_in_the_dark(analysis, chromium, tmp_path):
    write_report(tmp_path / "report.html", analysis)
    page = html.escape((tmp_path / "report.html").read_text(encoding="utf-8"), quote=True)
    path = tmp_path / "frame.html"
    frame = f'<iframe id="page" style="width:400px;height:900px" srcdoc="{page}">'
    path.write_text(f"<!doctype html><meta charset=utf-8><body>{frame}</iframe>{MEASURE}")
    grounds = []
    for switch in (
        "--blink-settings=preferredColorScheme=0",
        "--blink-settings=preferredColorScheme=1",
    ):
        measured = re.search(r'<pre id="measured">(.*?)</pre>', chromium(path, switch), re.S)
        assert measured
        grounds.append(json.loads(html.unescape(measured[1]))["ground"])
    assert sorted(grounds) == ["rgb(21, 22, 26)", "rgb(255, 255, 255)"]
