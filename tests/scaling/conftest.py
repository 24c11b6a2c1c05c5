"""Published runs for the tests that need them: read in place, never copied, skipped when absent."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest


REPOSITORY = Path(__file__).resolve().parents[2]


def _folders():
    if os.environ.get("HF_FAMILIAL_DATA"):
        yield Path(os.environ["HF_FAMILIAL_DATA"])
    yield REPOSITORY / "shared" / "data"
    yield REPOSITORY.parent / "shared" / "data"


@pytest.fixture(scope="session")
def published_runs():
    """Path of a file of published runs, or a skip: `published_runs("porian", "optimal.csv")`."""

    def find(*parts):
        for folder in _folders():
            path = folder.joinpath(*parts)
            if path.is_file():
                return path
        pytest.skip(f"no published runs {'/'.join(parts)}; set HF_FAMILIAL_DATA to their folder")

    return find


@pytest.fixture(scope="session")
def published_columns(published_runs):
    """Columns of a CSV of published runs: lists of numbers, of text where there are no numbers."""

    def read(*parts):
        with published_runs(*parts).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        columns = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            try:
                columns[name] = np.array(values, dtype=np.float64)
            except ValueError:
                columns[name] = values
        return columns

    return read


@pytest.fixture(scope="session")
def epoch_runs(published_columns):
    """The 245 runs of Hoffmann et al. that Epoch AI read off a figure: N, D, C, loss."""
    columns = published_columns("epoch_chinchilla", "svg_extracted_data.csv")
    size, compute = columns["Model Size"], columns["Training FLOP"]
    return {"N": size, "D": compute / (6 * size), "C": compute, "loss": columns["loss"]}


@pytest.fixture(scope="session")
def llama_runs(published_columns):
    """The 133 runs of the Llama 3 report, figure 2: N, D, C, loss."""
    columns = published_columns("llama3_isoflop", "isoflops_points.csv")
    compute, tokens = columns["compute_budget"], columns["training_tokens"]
    return {
        "N": compute / (6 * tokens),
        "D": tokens,
        "C": compute,
        "loss": columns["validation_loss"],
    }
