"""The report page and the file it is made from: whole, self-contained, safe, readable."""

import dataclasses
import html
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from analyses import FAMILY, NEIGHBOURS, SPARSE, analysis_of, rows_of
from markupsafe import Markup
from matplotlib.image import imread

from hf_familial._files import check_file_place, write_whole
from hf_familial._wording import estimate
from hf_familial.errors import AnalysisError
from hf_familial.scaling import LAWS, FitStatus, PublishedFit, RunTable, fit, get_law
from hf_familial.scaling.diagnostics import diagnose
from hf_familial.scaling.optima import best
from hf_familial.scaling.report import (
    Analysis,
    DataSource,
    analyse,
    optimal_runs,
    read_analysis,
    report_html,
    write_analysis,
    write_figures,
)
from hf_familial.scaling.report._figures import draw_formula
from hf_familial.scaling.report._style import symbol_html, symbol_text
from hf_familial.scaling.report.tables import Table, granularity_table, optimum_table


@pytest.fixture(scope="module")
def analysis():
    rivals = {"rivals": [get_law("hoffmann"), get_law("familial_e_inside")]}
    data = RunTable.read(rows_of("familial", settings=FAMILY), run_id="run_id")
    return analyse(
        fit("familial", data), DataSource("runs.jsonl"), draws=60, version="0.1", **rivals
    )


@pytest.fixture(scope="module")
def page(analysis):
    return report_html(analysis)


@pytest.fixture(scope="module")
def rule():
    """An analysis of two pictures, of a law that predicts no loss."""
    law = get_law("step_batch")
    tokens = np.geomspace(1e9, 1e11, 12)
    batch = law.predict(next(iter(law.published.values())).values, D=tokens)
    data = RunTable.read({"D": tokens, "b": batch * (1 + 0.01 * np.sin(tokens))}, loss="b")
    return analyse(fit(law, data), profiles=False)


@pytest.fixture
def undrawn(monkeypatch):
    """Pages have no pictures: only what is beside them is looked at."""
    monkeypatch.setattr("hf_familial.scaling.report.page.pictures", lambda analysis: [])


class Page(HTMLParser):
    """The elements of a page; fails where tags do not match."""

    VOID = {"meta", "link", "path", "use", "rect", "line", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


# the page


def test_the_page_needs_nothing_else(page):
    tags = Page(page).tags
    assert not {"script", "img", "iframe", "object"} & {tag for tag, _ in tags}
    for tag, attributes in tags:
        for name in ("src", "href", "xlink:href", "action"):
            if attributes.get(name) is not None:
                assert attributes[name].startswith(("#", "data:")), (tag, attributes)
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert 'name="viewport"' in page


def test_every_name_on_the_page_is_there_once(page):
    found = Page(page)
    assert len(set(found.ids)) == len(found.ids)
    referred = set(re.findall(r'(?:url\(|href=")#([^")]+)', page))
    assert referred <= set(found.ids)


def test_every_colour_has_a_light_and_a_dark_form(page):
    used = set(re.findall(r"var\((--\w+)\)", page))
    light, dark = page.split("prefers-color-scheme: dark")
    for sheet in (light, dark):
        assert used <= set(re.findall(r"(--\w+):", sheet))
    # colours of pictures are turned for a dark ground all at once
    assert "filter" not in light
    assert "svg { filter: invert(1) hue-rotate(180deg); }" in dark


def test_the_page_says_what_the_fit_says(analysis, page):
    words = " ".join(Page(page).words)
    for name, interval in analysis.intervals["delta"].items():
        value, span = estimate(analysis.fit.values[name], interval.low, interval.high)
        assert value in words
        assert span in words
    for expected in (
        "fitted to 84 runs",
        "10¹⁹ – 10²¹",
        "60 replicates (resampled runs, seed 0)",
        "Compute cost of exits",
        "Laws compared",
        "Error on larger budgets",
        "objective at the optimum",
        "No warnings" if not analysis.warnings else analysis.warnings[0].split("`")[0],
    ):
        assert expected in words
    assert page.count("<figure") == len(re.findall(r"<b>Figure \d+\.", page))
    assert page.count("<svg") == page.count("<figure") + 1


def test_the_same_analysis_gives_the_same_page(rule):
    assert report_html(rule) == report_html(rule)


def test_what_others_wrote_is_escaped(analysis, undrawn):
    bad = '<script>alert("1")</script> & `x`'
    data = dataclasses.replace(analysis.fit.data, run_names=(bad, *analysis.fit.data.run_names[1:]))
    source = DataSource(bad, {bad: bad}, 84, 84, 84, (bad,))
    tables = {bad: [{bad: bad}]}
    changed = dataclasses.replace(
        analysis,
        fit=dataclasses.replace(analysis.fit, data=data),
        source=source,
        warnings=(bad,),
        tables=tables,
        profiles={},
        replicates=None,
    )
    page = report_html(changed)
    assert "<script" not in page
    assert page.count(html.escape("<script>alert", quote=False)) >= 6
    Page(page)


@pytest.mark.parametrize(
    ("law", "settings", "there", "absent"),
    [
        ("hoffmann", ({},), ("Compute-optimal", "residuals_N"), ("penalty_", "What exits cost")),
        ("branch", NEIGHBOURS, ("penalty_U", "residuals_V"), ("Compute-optimal", "frontier_N")),
        ("abnar", SPARSE, ("isoflop_0", "S = 0.9", "residuals_S"), ("penalty_", "granularity")),
        ("kaplan_joint", ({},), ("isoflop", "frontier_loss"), ("penalty_",)),
    ],
)
def test_parts_that_make_no_sense_are_left_out(law, settings, there, absent, monkeypatch):
    def outline(figure, label, size=""):
        return Markup('<svg aria-label="{}"></svg>').format(label)

    monkeypatch.setattr("hf_familial.scaling.report.page.inline_svg", outline)
    exact = {"fixed": {"e": 0.94, "lambda_": -0.1666}} if law == "abnar" else {}
    page = report_html(analysis_of(law, settings, **exact))
    figures = page.split("<h2>What to know")[0]
    for part in there:
        assert part in figures
    for part in absent:
        assert part not in figures
    assert "clouds" not in page
    Page(page)


def test_a_law_that_predicts_no_loss(rule):
    page = report_html(rule)
    assert "Compute-optimal" not in page
    assert "predicted batch tokens (tokens)" not in page  # letters are drawn, not written
    assert 'id="residuals_D"' in page


def test_few_runs_are_no_error():
    rows = {n: v[:7] for n, v in rows_of("hoffmann").items()}
    rows |= {n: np.concatenate([rows[n], v[7:9]]) for n, v in rows_of("hoffmann").items()}
    analysis = analyse(fit("hoffmann", rows), draws=20, level=0.9)
    assert any("9 runs are few for 5 coefficients" in warning for warning in analysis.warnings)
    Page(report_html(analysis))


@pytest.mark.parametrize("law", LAWS.values(), ids=lambda law: law.name)
def test_the_formula_of_every_law_can_be_set(law):
    figure = draw_formula(law.formula)
    assert figure.get_size_inches()[0] > 0.5
    for part in (*law.parameters, *law.variables):
        assert "\\" not in symbol_html(part.symbol)
        assert "<" not in symbol_text(part.symbol)


def test_symbols():
    assert symbol_html(r"\gamma_U") == "γ<sub>U</sub>"
    assert symbol_html(r"R_{N}^{*}") == "R<sub>N</sub><sup>∗</sup>"
    assert symbol_html(r"E_{\mathrm{max}}") == "E<sub>max</sub>"
    assert symbol_html("a<b") == "a&lt;b"
    assert symbol_text(r"\gamma_U") == "γ_U"


# files


def test_an_analysis_comes_back_from_its_file(analysis, page, tmp_path):
    write_analysis(tmp_path / "fit.json", analysis)
    text = (tmp_path / "fit.json").read_text()
    assert not re.search(r"\b(NaN|Infinity)\b", text)
    back = read_analysis(tmp_path / "fit.json")
    assert back.to_dict() == analysis.to_dict()
    assert back.fit.predict(N=1e9, D=2e10, G=4) == analysis.fit.predict(N=1e9, D=2e10, G=4)
    assert report_html(back) == page
    assert list(tmp_path.iterdir()) == [tmp_path / "fit.json"]


def test_infinite_numbers_come_back(analysis, tmp_path, undrawn):
    open_end = dataclasses.replace(analysis.intervals["delta"]["E"], low=-np.inf)
    broken = dataclasses.replace(
        analysis,
        fit=dataclasses.replace(analysis.fit, condition=np.inf),
        intervals={"delta": {"E": open_end}},
    )
    write_analysis(tmp_path / "fit.json", broken)
    back = read_analysis(tmp_path / "fit.json")
    assert back.fit.condition == np.inf
    assert back.intervals["delta"]["E"] == open_end
    assert "∞" in report_html(back)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "other"}, "not a fit, because its `format` is not 'hf_familial.fit'"),
        ({"schema": 3}, r"`schema` is 3, but this version reads 1 to 2 only. Upgrade hf_familial"),
        ({"schema": "1"}, "`schema` is '1'"),
        ({"fit": None}, "part of the fit is missing or invalid"),
        ({"origin": {"notes": [], "sauce": 1}}, "part of the fit is missing or invalid.*sauce"),
    ],
)
def test_a_file_that_is_not_for_us(analysis, tmp_path, change, match):
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(json.loads(analysis.to_json()) | change))
    with pytest.raises(AnalysisError, match=match) as caught:
        read_analysis(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\x89PNG\r\n\0", b"[1]", b"{}", b"3"])
def test_a_file_that_is_no_fit(tmp_path, content):
    path = tmp_path / "fit.json"
    path.write_bytes(content)
    with pytest.raises(AnalysisError, match="fit.json.* not a fit"):
        read_analysis(path)


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("before")
    write_whole(path, "after")
    assert path.read_text() == "after"

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="cannot write .*a.txt: No space left on device"):
        write_whole(path, "half")
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("place", "match"),
    [
        ("absent/a.txt", "there is no folder"),
        ("file/a.txt", "there is no folder"),
        ("", "it is not a regular file"),
    ],
)
def test_a_place_that_cannot_be_written(tmp_path, place, match):
    (tmp_path / "file").write_text("")
    for write in (check_file_place, lambda path: write_whole(path, "text")):
        with pytest.raises(OSError, match=f"cannot write .*: {match}"):
            write(tmp_path / place)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_the_page_is_small(page):
    assert len(page.encode()) < 450_000


def test_optimal_runs_are_those_of_the_law(analysis):
    answer = analysis.fit
    runs = optimal_runs(answer, [1e20, 1e21], G=4)
    for run in runs:
        size, tokens = best(answer.law, answer.values, run.C, G=4)
        assert (run.N.value, run.D.value) == pytest.approx((size, tokens))
        assert run.loss.value == pytest.approx(float(answer.predict(N=size, D=tokens, G=4)))
        for number in (run.N, run.D, run.loss):
            assert number.interval.low < number.value < number.interval.high
    truth = PublishedFit.published(answer.law)
    assert all(run.N.interval is None for run in optimal_runs(truth, [1e20], G=4))


def test_the_table_of_optimal_runs_says_how_far_it_goes(analysis):
    table = optimum_table(analysis)
    assert [row[0] for row in table.rows][:4] == ["10¹⁹", "10²⁰", "10²¹", "10²² †"]
    assert table.head.count("95% interval") == 3
    assert "† is an extrapolation beyond the largest run" in table.note


def test_what_exits_cost(analysis):
    rows = granularity_table(analysis).rows
    assert [row[0] for row in rows] == ["1", "2", "4", "8"]
    values = analysis.fit.values
    power = values["gamma"] * (1 / values["alpha"] + 1 / values["beta"])
    expected = [g**power for g in (1, 2, 4, 8)]
    assert [float(row[3]) for row in rows] == pytest.approx(expected, abs=6e-3)


def test_pictures_as_files(rule, tmp_path):
    written = write_figures(tmp_path / "new" / "figures", rule)
    assert {path.suffix for path in written} == {".png", ".svg"}
    assert len({path.stem for path in written}) == len(written) / 2
    for path in written:
        if path.suffix == ".png":
            assert imread(path).shape[1] == 720
        else:
            assert path.read_text().rstrip().endswith("</svg>")


# doubts


def test_a_good_fit_raises_no_doubts(analysis):
    assert diagnose(analysis.fit, analysis.intervals["delta"]) == ()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"status": FitStatus.NOT_CONVERGED}, "ran out of steps"),
        ({"bounds_hit": ("E",)}, r"ended on their bounds: `E` = 1\.8"),
        ({"agreement": 0.25}, r"Only 25% of \d+ starts"),
        ({"condition": 3e6}, r"barely separate .* \(condition number 3.0e\+06\)"),
    ],
)
def test_what_speaks_against_a_fit(analysis, change, match):
    (sentence,) = diagnose(dataclasses.replace(analysis.fit, **change))
    assert re.search(match, sentence)


def test_outliers_and_idle_exponents_are_named():
    rows = rows_of("hoffmann")
    rows["loss"][4] *= 1.2
    rows |= {"G": np.tile([1.0, 2.0, 4.0], 7)}
    answer = fit("familial", RunTable.read(rows, run_id="run_id"))
    found = " ".join(analyse(answer, profiles=False).warnings)
    assert "are more than 6 robust standard deviations from the law: run-4" in found
    assert "interval of `gamma` contains 0" in found


def test_a_missing_interval_leaves_its_cell_empty_and_moves_no_other(analysis, undrawn):
    """A coefficient without a profile keeps its published value in the last columns."""
    held = {
        name: interval for name, interval in analysis.intervals["delta"].items() if name != "beta"
    }
    profiles = {k: v for k, v in analysis.intervals["profile"].items() if k != "alpha"}
    found = {**analysis.intervals, "delta": held, "profile": profiles}
    text = report_html(dataclasses.replace(analysis, intervals=found))
    part = text.split("<h2>Coefficients</h2>")[1].split("</section>")[0]
    lines = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in part.split("<tr>")[1:]]
    assert len({len(line) for line in lines}) == 1
    names = [p.name for p in analysis.fit.law.parameters]
    column = {html.unescape(re.sub("<[^>]+>", "", cell)): i for i, cell in enumerate(lines[0])}
    rows = dict(zip(names, lines[1:], strict=True))
    assert rows["alpha"][column["95%, profile"]] == "–"
    assert rows["beta"][column["95%, delta"]] == "–"
    assert rows["beta"][column["95%, profile"]].startswith("[")
    for name in names:
        published = analysis.fit.law.published["assumed"].values[name]
        assert float(rows[name][column["published: assumed"]]) == pytest.approx(published)


def test_a_row_of_a_table_with_a_cell_too_few_is_refused():
    with pytest.raises(ValueError, match="must have 2 cells"):
        Table("", ["a", "b"], [["1"]])


def test_a_file_of_schema_1_is_read_without_facts(analysis):
    record = json.loads(analysis.to_json())
    del record["origin"]["facts"]
    back = Analysis.from_dict(record | {"schema": 1}, get_law)
    assert back.source.facts.words == ""
    assert back.cost is None
