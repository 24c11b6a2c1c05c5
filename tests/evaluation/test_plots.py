"""Pictures of exits: written, and no label on another."""

import numpy as np
import pytest
from test_results import evaluation

from hf_familial.evaluation import plot_exits
from hf_familial.evaluation._plots import spread


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_is_written(tmp_path, suffix):
    path = tmp_path / f"exits.{suffix}"
    plot_exits(evaluation([1e6, 2e6]), path)
    assert path.stat().st_size > 1000


@pytest.mark.parametrize(
    "flops",
    [
        pytest.param([2.5e9], id="one"),
        pytest.param(np.linspace(1e8, 8e8, 8).tolist(), id="eight"),
        pytest.param([1e8, 1.01e8, 1.02e8, 1.03e8, 9e8, 9.9e8, 9.95e8, 1e9], id="crowded"),
        pytest.param(np.linspace(1e8, 28e8, 28).tolist(), id="twenty-eight"),
    ],
)
def test_no_label_lies_on_another(flops):
    figure = plot_exits(evaluation(flops))
    figure.set_dpi(150)  # as it is saved
    figure.draw_without_rendering()
    names = [axes.yaxis.label for axes in figure.axes]
    texts = [*figure.axes[0].texts, figure._suptitle, *names]
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) == len(flops) + 1 + 3
    canvas = figure.bbox
    for i, box in enumerate(boxes):
        assert canvas.x0 <= box.x0, texts[i]
        assert box.x1 <= canvas.x1, texts[i]
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_spread_moves_no_more_than_needed():
    assert spread([0.1, 0.5, 0.9], gap=0.2).tolist() == pytest.approx([0.1, 0.5, 0.9])
    assert spread([0.4, 0.4, 0.9], gap=0.2).tolist() == pytest.approx([0.3, 0.5, 0.9])
    assert spread([0.95, 1.0], gap=0.2).tolist() == pytest.approx([0.8, 1.0])
    assert spread([0.5] * 3, gap=0.9).tolist() == pytest.approx([0.0, 0.5, 1.0])
