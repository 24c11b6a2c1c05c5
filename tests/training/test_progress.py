"""The progress bar at the width of a terminal: a bar, and the deepest exit's loss."""

from types import SimpleNamespace

import pytest
from tqdm.auto import tqdm

from hf_familial.training.callbacks import ExitProgressCallback, fitting


def logs_of(count):
    return {"loss": 3.14159} | {f"exit_{k}_loss": 9.5 - 0.5 * k for k in range(count)}


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
@pytest.mark.parametrize("exits", [1, 4, 8, 16])
@pytest.mark.parametrize("steps", [350, 1_000_000])
def test_a_narrow_bar_still_shows_a_bar_and_the_deepest_exit(columns, exits, steps, monkeypatch):
    callback = ExitProgressCallback()
    state = SimpleNamespace(max_steps=steps, global_step=steps // 3, is_world_process_zero=True)
    callback.on_train_begin(None, state, None)
    bar = callback.training_bar
    bar.ncols, bar.dynamic_ncols = columns, None
    callback.on_step_end(None, state, None)
    callback.on_log(None, state, None, logs_of(exits))
    shown = tqdm.format_meter(**(bar.format_dict | {"ncols": columns, "elapsed": 5000}))
    assert len(shown) <= columns
    assert "█" in shown or "#" in shown
    deepest = 9.5 - 0.5 * (exits - 1)
    assert f"{deepest:.2f}" in shown
    callback.training_bar.close()


def test_losses_without_a_terminal_are_whole():
    assert fitting(logs_of(2), None) == "loss 3.142, exits 9.500 9.000"
    assert fitting({"loss": 1.0}, 5) == "loss 1.000"
