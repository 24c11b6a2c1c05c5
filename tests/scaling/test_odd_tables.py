"""Odd but honest tables: each is read right, or refused with the cause and the cure."""

import bz2
import gzip
import json
import lzma
import re
import warnings
import zipfile
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_familial.errors import TableError
from hf_familial.scaling import get_law
from hf_familial.scaling.tables._files import read_table
from hf_familial.scaling.tables.load import ColumnChoice, load_runs


LAW = get_law("hoffmann")
VALUES = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
N = np.array([round(m * f) for m in (9e7, 9e8, 9e9) for f in (0.3, 0.7, 1.0, 2.0)], float)
D = np.round(np.repeat([1e18, 1e20, 1e22], 4) / 6 / N)
C = 6 * N * D
LOSS = np.round(LAW.predict(VALUES, N=N, D=D), 5)


@pytest.fixture
def put(tmp_path):
    """Writes a file and returns its path."""

    def write(content, name="runs.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def csv(columns, mark=","):
    rows = zip(*columns.values(), strict=True)
    lines = [mark.join(columns), *(mark.join(map(str, row)) for row in rows)]
    return "\n".join(lines) + "\n"


PLAIN = csv({"N": N, "D": D, "loss": LOSS})
M, B = [f"{n / 1e6:.6g}" for n in N], [f"{d / 1e9:.6g}" for d in D]


def same(reading):
    return (
        reading.data.columns["N"] == pytest.approx(N, rel=1e-3)
        and reading.data.columns["D"] == pytest.approx(D, rel=1e-3)
        and reading.data.loss == pytest.approx(LOSS, rel=1e-3)
    )


# shapes of files

WRITTEN = {
    "excel-separator": "sep=;\n" + csv({"N": N, "D": D, "loss": LOSS}, ";"),
    "decimal-commas": csv({"N": N, "D": D, "loss": LOSS}, ";").replace(".", ","),
    "points-for-thousands": "N;D;loss\n"
    + "".join(
        f"{int(n):,};{int(d):,};".replace(",", ".") + f"{loss:.4f}\n".replace(".", ",")
        for n, d, loss in zip(N, D, LOSS, strict=True)
    ),
    "three-decimals-with-comma": "N\tD\tloss\n"
    + "".join(
        f"{n}\t{d}\t{loss:.3f}\n".replace(".0\t", "\t").replace(".", ",")
        for n, d, loss in zip(N, D, LOSS, strict=True)
    ),
    "quoted-thousands": "N,D,loss\n"
    + "".join(f'"{int(n):,}","{int(d):,}",{loss}\n' for n, d, loss in zip(N, D, LOSS, strict=True)),
    "suffixes": csv({"N": [f"{m}M" for m in M], "D": [f"{b}B tokens" for b in B], "loss": LOSS}),
    "blanks": csv({"N": N, "D": D, "loss": LOSS}, "   "),
    "savetxt": "# N D loss\n" + csv({"N": N, "D": D, "loss": LOSS}, " ").split("\n", 1)[1],
    "printed-frame": "      N     D   loss\n"
    + "".join(f"{i}  {n}  {d}  {v}\n" for i, (n, d, v) in enumerate(zip(N, D, LOSS, strict=True))),
    "index-column": csv({"": range(12), "N": N, "D": D, "loss": LOSS}),
    "title-above": "Table 3: our runs\n\n" + PLAIN,
    "title-of-a-spreadsheet": "Our runs,,\n" + PLAIN,
    "comment-above": "# written by a script, version 3\n" + PLAIN,
    "empty-rows-and-columns": PLAIN.replace("\n", ",,\n") + ",,,,\n,,,,\n",
    "markdown": "| N | D | loss |\n|:--|--:|---|\n"
    + "".join(f"| {m}M | {b}B | **{v}** |\n" for m, b, v in zip(M, B, LOSS, strict=True)),
    "latex": "\\hline\nN & D & loss \\\\\n\\hline\n"
    + "".join(
        f"{m}M & ${d / 1e9}\\times 10^{{9}}$ & \\textbf{{{v}}} \\\\\n"
        for m, d, v in zip(M, D, LOSS, strict=True)
    ),
    "errors-of-losses": csv({"N": N, "D": D, "loss": [f"{v} ± 0.004" for v in LOSS]}),
    "units-in-names": csv({"Params (M)": M, "Tokens (B)": B, "Val loss (nats)": LOSS}),
    "short-units": csv({"params_M": M, "tokens_b": B, "val_loss": LOSS}),
    "logarithms-in-names": csv({"log10_N": np.log10(N), "log10(D)": np.log10(D), "loss": LOSS}),
    "perplexity-by-name": csv({"N": N, "D": D, "val_ppl": np.exp(LOSS)}),
    "bits-by-name": csv({"N": N, "D": D, "loss_bits": LOSS / np.log(2)}),
    "petaflop-days": csv({"N": N, "compute (PF-days)": C / 8.64e19, "loss": LOSS}),
    "wandb": "Name,State,Notes,config/n_params,config/train_tokens,summary/val_loss\n"
    + "".join(
        f'run-{i},finished,"a note,\nof two lines",{n},{d},{v}\n'
        for i, (n, d, v) in enumerate(zip(N, D, LOSS, strict=True))
    )
    + "run-x,crashed,,1e9,2e9,9.5\n",
}


@pytest.mark.parametrize("text", WRITTEN.values(), ids=WRITTEN.keys())
def test_a_table_is_read_as_its_writer_meant_it(put, text):
    assert same(load_runs(put(text), LAW))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (WRITTEN["suffixes"], r"N was read from text in 'N': '27M' is 2.7e\+07\."),
        (WRITTEN["decimal-commas"], r"loss was read from text in 'loss': '3,\d+' is 3"),
        (WRITTEN["units-in-names"], r"N was read from 'Params \(M\)' in units of 1e6\."),
        (
            WRITTEN["logarithms-in-names"],
            r"N was read from 'log10_N', which is a logarithm \(log10\)\.",
        ),
        (WRITTEN["perplexity-by-name"], r"'val_ppl' is a perplexity, so the loss is its logarithm"),
        (WRITTEN["bits-by-name"], r"'loss_bits' was converted from bits to nats"),
        (WRITTEN["title-above"], r"Line 1 was skipped as a title or comment above the names\."),
        (WRITTEN["wandb"], r"Line 26 was left out: the status is crashed\."),
    ],
)
def test_what_is_converted_is_said(put, text, words):
    assert re.search(words, " ".join(load_runs(put(text), LAW).notes))


def test_compressed_and_encoded_files(put, tmp_path):
    raw = PLAIN.encode()
    archive = tmp_path / "one.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("runs.csv", raw)
    contents = {
        "gzip": gzip.compress(raw),
        "bzip2": bz2.compress(raw),
        "xz": lzma.compress(raw),
        "zip": archive.read_bytes(),
        "utf-16": PLAIN.replace(",", "\t").encode("utf-16"),
        "cp1252": PLAIN.encode() + "# größer\n".encode("cp1252"),
    }
    for content in contents.values():
        assert same(load_runs(put(content, "runs.anything"), LAW))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (gzip.compress(PLAIN.encode(), mtime=0)[:60], "is a damaged or incomplete gzip file"),
        (b"PK\x03\x04 and no more", "is a zip file that cannot be opened"),
        (b"\xd0\xcf\x11\xe0" + bytes(50), "an Excel workbook. Save the sheet as CSV"),
        (b"\x28\xb5\x2f\xfd" + bytes(50), "compressed with zstd"),
        (b"<!DOCTYPE html><table>", "is a web page"),
        (
            PLAIN.replace(".", ",").encode(),
            r"has no rows.*expected 3 cells, got \d. If numbers are written as 2,85",
        ),
        (b"[[1, 2], [3, 4]]", "lists without names"),
        (csv({"N": N, "D": D, "loss": ["low"] * 12}).encode(), "no number in 'loss'.*'low'"),
        (
            csv({"N": N, "D": D, "loss": [""] * 12}).encode(),
            "no number in 'loss'.*all cells are empty",
        ),
        (
            csv({"log N": np.log10(N), "D": D, "loss": LOSS}).encode(),
            "no N, but it has 'log N'. Pass `--column 'N=log N'` with `--unit N=log10`",
        ),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_a_file_that_cannot_be_read_says_what_to_do(put, content, match):
    with pytest.raises(TableError, match=match):
        load_runs(put(content), LAW)


@pytest.mark.parametrize("orient", ["columns", "split", "index", "records", "table"])
def test_json_of_pandas_in_every_orientation(tmp_path, orient):
    pandas = pytest.importorskip("pandas")
    path = tmp_path / "runs.json"
    pandas.DataFrame({"N": N, "D": D, "loss": LOSS}).to_json(path, orient=orient)
    assert same(load_runs(path, LAW))


def test_json_of_lists_and_of_a_wrapped_list(put):
    columns = {"N": N.tolist(), "D": D.tolist(), "loss": LOSS.tolist()}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    for value in (columns, {"made_by": "us", "runs": rows}, {f"run-{i}": r for i, r in (
        enumerate(rows))}, [list(columns), *zip(*columns.values(), strict=True)]):  # fmt: skip
        assert same(load_runs(put(json.dumps(value)), LAW))


def test_decimals_of_parquet_are_numbers(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "runs.parquet"
    columns = {
        "N": [Decimal(int(n)) for n in N],
        "D": [int(d) for d in D],
        "loss": [Decimal(str(v)) for v in LOSS],
    }
    parquet.write_table(pyarrow.table(columns), path)
    assert same(load_runs(path, LAW))


def test_huge_integers_and_deep_nesting_cost_their_own_row(put):
    lines = [json.dumps({"N": n, "D": d, "loss": v}) for n, d, v in zip(N, D, LOSS, strict=True)]
    huge = '{"N": 1' + "0" * 400 + ', "D": 1e9, "loss": 3}'
    path = put("\n".join([*lines, huge, "[" * 100_000, '{"a":' * 100_000, '{"N": 1e9']))
    reading = load_runs(path, LAW)
    assert same(reading)
    assert reading.notes[0] == "Lines 14, 15, 16 were left out: expected one JSON object."
    assert "Line 13 was left out: a number is not finite." in reading.notes


def test_names_of_runs_stay_as_they_are_written(put):
    """`1e5` and `100000` are two runs, and `007` is no 7."""
    path = put("run_id,N,D,loss\n1e5,1e8,2e9,3\n100000,1e8,3e9,2.9\n007,1e8,4e9,2.8\n")
    assert load_runs(path, LAW).data.run_names == ("1e5", "100000", "007")


def test_a_blank_row_does_not_cost_the_other_columns(put):
    rows = [*zip(N, D, C, np.minimum(D, 1e9), LOSS, strict=True), ("", "", "", "", "3.0")]
    lines = ["N,D,flops,unique_tokens,loss", *(",".join(map(str, row)) for row in rows)]
    data = load_runs(put("\n".join(lines)), LAW).data
    assert data.columns["C"] == pytest.approx(C)
    assert data.columns["D_unique"] == pytest.approx(np.minimum(D, 1e9))


def test_objects_inside_rows_are_columns(put):
    """As the API of an experiment tracker gives them."""
    rows = [
        {
            "id": f"r{i}",
            "state": "finished",
            "config": {"n_params": {"value": n}, "data": {"train_tokens": d}},
            "summary": {"val_loss": v},
        }
        for i, (n, d, v) in enumerate(zip(N.tolist(), D.tolist(), LOSS.tolist(), strict=True))
    ]
    reading = load_runs(put("\n".join(map(json.dumps, rows))), LAW)
    assert same(reading)
    assert reading.columns["N"] == "config.n_params.value"


def test_a_list_in_another_column_does_not_say_how_decimals_are_written(put):
    """`12,24` are two layers; `2.851` stays a loss."""
    losses = [f"{v:.3f}" for v in LOSS]
    rows = zip(N, D, ['"12,24"'] * 12, losses, strict=True)
    path = put("\n".join(["N,D,layers,loss", *(",".join(map(str, row)) for row in rows)]))
    assert same(load_runs(path, LAW))


def test_blanks_behind_delimiters(put):
    text = "N, D, loss\n" + "".join(
        f'{n}, "{int(d):,}", {v}\n' for n, d, v in zip(N, D, LOSS, strict=True)
    )
    assert same(load_runs(put(text), LAW))


def test_a_share_in_percent_is_refused(put):
    path = put(csv({"N": N, "D": D, "S": [0, 50, 90] * 4, "loss": LOSS}))
    with pytest.raises(TableError, match="S = 0 to 90 looks like percent. Pass `--unit S=0.01`"):
        load_runs(path, get_law("hossain"))
    data = load_runs(path, get_law("hossain"), ColumnChoice(units={"S": "0.01"})).data
    assert data.columns["S"].max() == pytest.approx(0.9)


# units

WRONG = {
    "millions-and-billions": ({"N": M, "D": B, "C": C}, "--unit N=1e6 --unit D=1e9"),
    "the-same-without-C": ({"N": M, "D": B}, "--unit N=1e6 --unit D=1e9"),
    "millions": ({"N": M, "D": D}, "--unit N=1e6"),
    "large-millions": ({"N": [f"{n / 1e3:.8g}" for n in N], "D": D, "C": C}, "--unit N=1000"),
    "billions-of-tokens": ({"N": N, "D": B}, "--unit D=1e9"),
    "exaflops": ({"N": N, "D": D, "C": C / 1e18}, "--unit C=1e18"),
    "petaflop-days": ({"N": N, "D": D, "C": C / 8.64e19}, "--unit C=8.64e19"),
    "millions-and-flops": ({"N": M, "C": C}, "--unit N=1e6"),
    "billions-and-flops": ({"D": B, "C": C}, "--unit D=1e9"),
    "log10": ({"N": np.log10(N), "D": np.log10(D)}, "--unit N=log10 --unit D=log10"),
    "log10-of-all": (
        {"N": np.log10(N), "D": np.log10(D), "C": np.log10(C)},
        "--unit N=log10 --unit D=log10 --unit C=log10",
    ),
    "ln": ({"N": np.log(N), "D": np.log(D)}, "--unit N=ln --unit D=ln"),
    "gigaflops-for-flops": ({"N": N, "D": D, "C": C / 1e9}, "--unit C=1e9"),
}


@pytest.mark.parametrize(("columns", "cure"), WRONG.values(), ids=WRONG.keys())
def test_a_unit_that_is_not_told_is_refused_and_its_cure_works(put, columns, cure):
    path = put(csv({**columns, "loss": LOSS}))
    with pytest.raises(TableError) as refusal:
        load_runs(path, LAW)
    assert f"Pass `{cure}`" in str(refusal.value)
    units = dict(word.split("=") for word in cure.replace("--unit ", "").split())
    assert same(load_runs(path, LAW, ColumnChoice(units=units)))


def test_numbers_that_the_user_vouches_for_are_taken(put):
    path = put(csv({"N": M, "D": B, "loss": LOSS}))
    data = load_runs(path, LAW, ColumnChoice(units={"N": "1", "D": "1"})).data
    assert data.columns["N"] == pytest.approx([float(m) for m in M])


def test_a_row_in_other_units_than_the_rest_is_named(put):
    mixed = [*N[:3], N[3] / 1e6, *N[4:]]
    with pytest.raises(
        TableError, match=r"line 5: N = 180 is not a plausible number .* The other lines are p"
    ):
        load_runs(put(csv({"N": mixed, "D": D, "C": C, "loss": LOSS})), LAW)


@pytest.mark.parametrize(
    ("loss", "cure"),
    [
        (np.exp(LOSS), {"loss": "ppl"}),
        (np.exp(LOSS - 0.7) + 1, None),
        (-LOSS, {"loss": "-1"}),
        (100 * LOSS, None),
    ],
)
def test_a_loss_that_is_none_is_refused(put, loss, cure):
    path = put(csv({"N": N * 100, "D": D, "loss": loss}))
    with pytest.raises(TableError, match="--unit loss="):
        load_runs(path, LAW)
    if cure:
        data = load_runs(path, LAW, ColumnChoice(units=cure)).data
        assert data.loss == pytest.approx(LOSS)


def test_an_accuracy_is_no_loss(put):
    with pytest.raises(TableError, match="'loss' grows with N and D, like an accuracy"):
        load_runs(put(csv({"N": N, "D": D, "loss": 1 / LOSS})), LAW)


def test_counting_heads_embeddings_or_active_parameters_is_no_wrong_unit(put):
    """C within a factor of 30 of 6ND, heads and inactive experts counted."""
    small = {"N": [1e5, 2e5, 4e5], "D": [1e8, 2e8, 3e8], "G": [1, 4, 8], "loss": [4.0, 3.8, 3.6]}
    heads = [6 * d * (n + g * 50_304 * 64) for n, d, g in zip(
        small["N"], small["D"], small["G"], strict=True)]  # fmt: skip
    load_runs(put(csv({**small, "C": heads})), get_law("familial"))
    sparse = {"N_total": N, "N_active": N / 64, "D": D, "C": C / 64, "loss": LOSS}
    load_runs(put(csv(sparse)), LAW)
    experts = {"N": N, "D": D, "E": [64] * 12, "C": C / 64, "loss": LOSS}
    load_runs(put(csv(experts)), get_law("ludziejewski"))
    with pytest.raises(TableError, match="C / 6ND"):
        load_runs(put(csv({"N": N, "D": D, "C": C / 64, "loss": LOSS})), LAW)


def test_published_tables_pass(published_runs):
    for parts in (
        ("epoch_chinchilla", "svg_extracted_data.csv"),
        ("llama3_isoflop", "isoflops_points.csv"),
        ("porian", "isoflop_points.csv"),
    ):
        assert len(load_runs(published_runs(*parts), LAW).data) > 100


# no table breaks the reader

CELLS = st.one_of(
    st.text(max_size=6),
    st.floats().map(str),
    st.integers().map(str),
    st.sampled_from(["", "NA", "70M", "1,000,000", "2,85", '"', "[1]", "{", "1e999", "-", "inf"]),
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.lists(CELLS, min_size=1, max_size=5), max_size=8),
    st.sampled_from([",", ";", "\t", "|", " ", "&"]),
    st.sampled_from(["N,D,loss", "N;D;C;loss", "params (M)\ttokens_B\tppl", "N|D|loss|run_id", ""]),
)
def test_no_text_ends_in_another_error_or_a_warning(tmp_path, rows, mark, head):
    path = tmp_path / "fuzz"
    path.write_text("\n".join([head, *(mark.join(row) for row in rows)]), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            load_runs(path, LAW)
        except ValueError:
            pass


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["N", "D", "loss", "data", "columns", "0", "1"]), inner)
    ),
    max_leaves=20,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(JSON)
def test_no_json_ends_in_another_error_or_a_warning(tmp_path, value):
    path = tmp_path / "fuzz.json"
    path.write_text(json.dumps(value))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            read_table(path)
            load_runs(path, LAW)
        except ValueError:
            pass
