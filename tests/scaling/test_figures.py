"""Pictures: what they show, that nothing in them overlaps, and that they change nothing else."""

import math

import hypothesis.strategies as st
import matplotlib as mpl
import numpy as np
import pytest
from analyses import FAMILY, NEIGHBOURS, analysis_of
from hypothesis import given
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from hf_familial._wording import count, estimate, scientific, significant
from hf_familial.scaling.report import pictures
from hf_familial.scaling.report._curves import Group
from hf_familial.scaling.report._figures import draw_agreement, draw_frontier, draw_residuals
from hf_familial.scaling.report._style import (
    ACCENT,
    CONTRAST,
    HUES,
    INK,
    MAX_POINTS,
    shades,
    spread,
    thin,
    to_png,
    to_svg,
)


@pytest.fixture(scope="module")
def family():
    return pictures(analysis_of("familial", FAMILY, draws=60, profiles=True))


@pytest.fixture(scope="module")
def branches():
    return pictures(analysis_of("branch", NEIGHBOURS))


def words_of(figure):
    """Every visible text of a picture with its box in pixels."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    found = []
    for axes in figure.axes:
        for which in (axes.xaxis, axes.yaxis):
            ends = sorted(which.get_view_interval())
            ticks = [
                tick.label1
                for tick in which.get_major_ticks()
                if ends[0] <= tick.get_loc() <= ends[1]
            ]
            found += [*ticks, which.label]
        legend = axes.get_legend()
        found += [*axes.texts, *(legend.get_texts() if legend else ())]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in found if t.get_text()]
    assert boxes
    return boxes


@pytest.mark.parametrize("kind", ["family", "branches"])
def test_no_words_overlap_or_leave_the_picture(kind, request):
    for picture in request.getfixturevalue(kind):
        boxes = words_of(picture.figure)
        width, height = picture.figure.get_size_inches() * picture.figure.dpi
        for i, (word, box) in enumerate(boxes):
            where = f"{picture.name}: {word}"
            assert box.x0 >= -1, where
            assert box.y0 >= -1, where
            assert box.x1 <= width + 1, where
            assert box.y1 <= height + 1, where
            for other, second in boxes[i + 1 :]:
                assert not box.shrunk(0.98, 0.9).overlaps(second), f"{where} on {other}"


def test_pictures_of_a_family(family):
    names = [picture.name for picture in family]
    assert len(set(names)) == len(names)
    for name in ("isoflop_3", "frontier_N", "penalty_G", "agreement", "residuals_G", "residuals_C"):
        assert name in names
    assert {f"profile_{n}" for n in ("E", "A", "B", "alpha", "beta", "gamma")} <= set(names)
    clouds = [set(name.split("_")[1:]) for name in names if name.startswith("cloud")]
    assert {"A", "alpha"} in clouds
    assert {"B", "beta"} in clouds
    assert any("gamma" in cloud for cloud in clouds)


def test_one_exit_has_neighbours_but_no_budget_of_its_own(branches):
    names = {picture.name for picture in branches}
    assert {"penalty_U", "penalty_V"} <= names
    assert not {"penalty_G", "frontier_N"} & names
    assert not any(name.startswith(("cloud", "profile")) for name in names)


def test_a_picture_of_the_penalty_shows_the_law(family):
    (picture,) = (picture for picture in family if picture.name == "penalty_G")
    (axes,) = picture.figure.axes
    (law,) = (line for line in axes.lines if line.get_label() == "law")
    (median,) = (line for line in axes.lines if line.get_label() == "median")
    assert list(median.get_xdata()) == [1, 2, 4, 8]
    assert law.get_ydata()[0] == 0
    # 100 (8 ^ 0.033 - 1), and the noise of 21 runs
    assert law.get_ydata()[-1] == pytest.approx(7.1, abs=0.8)
    assert median.get_ydata() == pytest.approx([0, 2.3, 4.7, 7.1], abs=0.8)


def test_curves_of_equal_compute_pass_through_their_runs(family):
    (picture,) = (picture for picture in family if picture.name == "isoflop_0")
    (axes,) = picture.figure.axes
    runs = [line for line in axes.lines if line.get_marker() == "o"]
    curves = [line for line in axes.lines if len(line.get_xdata()) > 9]
    minima = [line for line in axes.lines if line.get_marker() == "D"]
    assert len(runs) == len(curves) == len(minima) == 3
    for points, curve, least in zip(runs, curves, minima, strict=True):
        x, y = curve.get_data()
        fitted = np.interp(np.log(points.get_xdata()), np.log(x), y)
        assert points.get_ydata() == pytest.approx(fitted, rel=0.01)
        assert least.get_ydata()[0] == y.min()


def test_files_are_whole_and_the_same_each_time(family, tmp_path):
    figure = family[0].figure
    path = tmp_path / "a.png"
    path.write_bytes(to_png(figure))
    image = imread(path)
    assert image.shape[:2] == (660, 720)
    assert image.std() > 0.05
    svg = to_svg(figure)
    assert svg == to_svg(figure)
    assert svg.startswith("<?xml")
    assert "http" not in svg.replace("http://www.w3.org/", "").split("<defs")[1]


def test_nobody_else_is_touched():
    before = dict(mpl.rcParams)
    draw_agreement([Group("", np.array([2.0, 3.0]), np.array([2.0, 3.1]))])
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []


def test_a_cloud_of_many_points_is_thinned_evenly():
    assert thin(5).tolist() == [0, 1, 2, 3, 4]
    many = thin(100_000)
    assert len(many) == MAX_POINTS
    assert many[0] == 0
    assert many[-1] == 99_999
    x = np.geomspace(1e7, 1e10, 100_000)
    figure = draw_residuals([Group("", x, 0.01 * np.sin(x))], "N")
    assert max(len(line.get_xdata()) for line in figure.axes[0].lines) <= MAX_POINTS
    assert len(to_svg(figure)) < 600_000


def test_what_has_no_band_still_has_a_curve():
    flops, none = np.geomspace(1e18, 1e20, 5), np.full(5, np.nan)
    figure = draw_frontier(flops, flops**0.5, none, none, "N*", (1e18, 1e19))
    dashed, solid = figure.axes[0].lines[:2]
    assert np.isfinite(dashed.get_ydata()).all()
    assert np.isfinite(solid.get_xdata()).sum() == 3


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0, 0.2))
def test_labels_are_moved_apart_in_their_order(positions, gap):
    moved = spread(np.array(positions), gap)
    least = min(gap, 1 / max(1, len(positions) - 1))
    assert moved.min() >= -1e-9
    assert moved.max() <= 1 + 1e-9
    assert (np.diff(np.sort(moved)) >= least - 1e-9).all()
    order = np.argsort(positions, kind="stable")
    assert (np.diff(moved[order]) >= -1e-9).all()


def on_dark(colour):
    """The colour that the page's filter for a dark ground makes: invert(1) hue-rotate(180deg)."""
    # the matrix of the Filter Effects specification at 180 degrees: cosine -1, sine 0
    turned = 2 * np.array([[0.213, 0.715, 0.072]] * 3) - np.eye(3)
    return tuple(np.clip(turned @ (1 - np.array(to_rgb(colour))), 0, 1))


def luminance(colour):
    """Relative luminance of WCAG 2."""
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot(parts, [0.2126, 0.7152, 0.0722]))


def contrast(one, two):
    """Ratio of contrast of WCAG 2, from 1 to 21."""
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colour", [ACCENT, CONTRAST, *HUES, *shades(9)])
def test_colours_stand_out_on_a_dark_ground(colour):
    assert contrast(on_dark(colour), "#15161a") >= 3


def test_ink_is_legible_on_both_grounds():
    assert contrast(INK, "#ffffff") >= 7
    assert contrast(on_dark(INK), "#15161a") >= 7
    assert luminance(on_dark("#e3e3e8")) < luminance(on_dark("#6a6a75")) < luminance(on_dark(INK))


# words for numbers


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (count(73.2e9), "73.2B"),
        (count(999.6e6), "1.00B"),
        (count(1.3116e12), "1.31T"),
        (count(512), "512"),
        (count(0), "0"),
        (count(3e17), "3.00×10¹⁷"),
        (count(math.nan), "–"),
        (scientific(5.76e23), "5.76×10²³"),
        (scientific(1e21), "10²¹"),
        (scientific(9.999e20), "10²¹"),
        (scientific(-2.5e-7, 2), "−2.5×10⁻⁷"),
        (significant(0.0334, 2), "0.033"),
        (significant(2143.4), "2143"),
        (significant(-0.5, 1), "−0.5"),
        (significant(math.inf), "–"),
        (estimate(0.34731, 0.3186, 0.3759), ("0.347", "[0.319, 0.376]")),
        (estimate(0.033, 0.0321, 0.0339), ("0.0330", "[0.0321, 0.0339]")),
        (estimate(478, 263, 731), ("478", "[263, 731]")),
        (estimate(7.3e10, 6e10, 9e10), ("7.30×10¹⁰", "[6.00×10¹⁰, 9.00×10¹⁰]")),
        (estimate(1.5, -math.inf, 2), ("1.500", "[−∞, 2.000]")),
        (estimate(1.5, 1.5, 1.5), ("1.500", "–")),
    ],
)
def test_numbers_as_people_read_them(got, expected):
    assert got == expected
