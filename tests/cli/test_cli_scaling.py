"""The commands of the fitter as a user types them: what they say, write and refuse."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_familial._wording import significant
from hf_familial.scaling import LAWS, get_law
from hf_familial.scaling.report import read_analysis


ROOT = Path(__file__).resolve().parents[2]
LAW = get_law("familial")
TRUTH = LAW.published["assumed"].values


def write_runs(path, granularities=(1, 2, 4)):
    """A runs.jsonl of noisy runs, one of them failed, and a last line cut off."""
    noise = np.random.default_rng(1)
    lines = []
    for flops, middle in ((1e19, 2.6e8), (1e20, 8.5e8), (1e21, 2.8e9)):
        for factor in (0.3, 0.6, 1.0, 1.8, 3.2):
            for exits in granularities:
                size, i = round(middle * factor), len(lines)
                tokens = round(flops / (6 * size))
                loss = float(LAW.predict(TRUTH, N=size, D=tokens, G=exits))
                loss *= float(np.exp(noise.normal(0, 0.001)))
                losses = [loss * (1 + 0.02 * (exits - 1 - k)) for k in range(exits)]
                run = {"run_id": f"run-{i}", "N_total": size, "N_non_embedding": round(0.9 * size)}
                run |= {"D_tokens": tokens, "C_flops": flops, "G": exits, "loss_mean": loss}
                run |= {"exits": list(range(1, exits + 1)), "loss_exits": losses}
                lines.append(run | {"status": "failed" if i == 3 else "finished"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"run_id": "torn')
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("runs") / "runs.jsonl")


@pytest.fixture
def undrawn(monkeypatch):
    """Pages have no pictures: only what is beside them is looked at."""
    monkeypatch.setattr("hf_familial.scaling.report.page.pictures", lambda analysis: [])


@pytest.fixture(scope="module")
def fit_json(runs, cli_once):
    """A fit of the runs, made by the command itself."""
    out = runs.parent / "fit.json"
    words = ("fit", runs, "--law", "familial", "--bootstrap", "80", "--out", out)
    code, shown, errors = cli_once(*words)
    assert (code, errors) == (0, "")
    assert "Data: 44 rows of 44 runs, 1 left out in reading.\nSearch: converged" in shown
    assert "Line 46 was left out: expected one JSON object." in shown
    assert "Line 4 was left out: the status is failed." in shown
    assert f"Saved {out}" in shown
    assert f"Next: `hf-familial plan {out} --flops 1e21`" in shown
    assert "Compute-optimal training" in shown
    return out


def test_what_fit_writes(fit_json):
    analysis = read_analysis(fit_json)
    assert len(analysis.replicates) + analysis.replicates.failed == 80
    assert analysis.source.columns["N"] == "N_total"
    assert analysis.fit.data.run_names[0] == "run-0"
    for name in ("alpha", "beta", "gamma"):
        assert TRUTH[name] in analysis.intervals["delta"][name]
    assert set(analysis.profiles) == set(TRUTH)


def test_fit_as_json(cli, runs, tmp_path):
    words = ("--law", "hoffmann", "--fix", "E=1.8", "--tie", "beta=alpha", "--no-profiles")
    code, out, err = cli("fit", runs, *words, "--json", "--level", "0.9", "--objective", "mse")
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert record["schema"] == 2
    assert record["level"] == 0.9
    assert record["fit"]["values"]["E"] == 1.8
    assert record["fit"]["values"]["alpha"] == record["fit"]["values"]["beta"]
    assert record["fit"]["settings"]["objective"] == "mse"
    assert record["profiles"] == {}
    assert record["bootstrap"] is None
    assert list(tmp_path.iterdir()) == []


def test_fit_of_every_exit(cli, runs, tmp_path):
    out = tmp_path / "branch.json"
    code, shown, _ = cli(
        "fit", runs, "--law", "branch", "--loss", "exits", "--no-profiles", "--out", out
    )
    assert code == 0
    assert re.search(r"gamma_V\s+0\.\d+", shown)
    assert len(read_analysis(out).fit.data) == 15 * (1 + 2 + 4) - 1


def test_fit_against_other_laws(cli, runs, tmp_path, undrawn):
    out, report = tmp_path / "fit.json", tmp_path / "report.html"
    words = ("--against", "hoffmann", "--drop-far", "4", "--no-profiles")
    code, shown, err = cli("fit", runs, *words, "--out", out, "--report", report)
    assert (code, err) == (0, "")
    tables = read_analysis(out).tables
    assert {row["law"] for row in tables["Laws compared"]} == {"familial", "hoffmann"}
    assert "Laws compared" in report.read_text(encoding="utf-8")
    assert "report.html" in shown


def test_the_catalogue(cli):
    code, out, _ = cli("fit", "--law", "list")
    assert code == 0
    for law in LAWS.values():
        assert law.name in out
    assert "L = E + (A N^-alpha + B D^-beta) G^gamma" in out
    assert "arXiv 2203.15556" in out


def test_plan(cli, fit_json):
    code, out, err = cli("plan", fit_json, "--flops", "1e21", "--granularity", "4")
    assert (code, err) == (0, "")
    for words in ("10²¹ FLOPs with G = 4", "parameters N", "95% interval", "Efficiency Leverage"):
        assert words in out
    shown = out
    code, out, _ = cli("plan", fit_json, "--flops", "1e21", "--granularity", "4", "--json")
    heads = json.loads(out)
    assert heads["N"]["interval"]["low"] < heads["N"]["value"] < heads["N"]["interval"]["high"]
    assert 6 * heads["N"]["value"] * heads["D"]["value"] < 0.99e21
    # exits cost their loss, and their heads besides
    alone, paid = (heads[name]["value"] for name in ("granularity", "granularity_with_heads"))
    assert alone < paid
    rows = " ".join(shown.split())
    assert f"needed to match the loss of G = 1 {significant(alone, 3)} [" in rows
    assert f"with the FLOPs of all heads {significant(paid, 3)} [" in rows
    code, out, _ = cli("plan", fit_json, "--flops", "1e21", "--no-head-flops", "--json")
    plain = json.loads(out)
    _, out, _ = cli("plan", fit_json, "--flops", "1e21", "--granularity", "4", "--no-head-flops")
    assert "needed to match the loss of G = 1" in out
    assert "FLOPs of all heads" not in out
    assert 6 * plain["N"]["value"] * plain["D"]["value"] == pytest.approx(1e21)
    assert plain["N"]["value"] == pytest.approx(2.8e9, rel=0.1)


def test_plan_within_limits(cli, fit_json):
    words = ("--flops", "1e22", "--tokens", "1e11", "--memory", "8GB", "--json")
    _, out, _ = cli("plan", fit_json, *words)
    plan = json.loads(out)
    assert plan["N"]["value"] <= 4e9 * (1 + 1e-9)
    assert plan["D"]["value"] <= 1e11 * (1 + 1e-9)
    assert set(plan["limits_hit"]) == {"memory", "tokens"}


def test_plan_by_published_values(cli):
    _, out, _ = cli("plan", "hoffmann", "--flops", "5.76e23", "--no-head-flops", "--json")
    plan = json.loads(out)
    assert plan["N"]["interval"] is None
    assert 6 * plan["N"]["value"] * plan["D"]["value"] == pytest.approx(5.76e23)


def test_report(cli, fit_json, tmp_path):
    page, folder = tmp_path / "page.html", tmp_path / "figures"
    code, out, err = cli("report", fit_json, "--out", page, "--figures", folder)
    assert (code, err) == (0, "")
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    stems = {path.stem for path in folder.iterdir()}
    assert {"isoflop_0", "penalty_G", "frontier_N", "agreement", "profile_gamma"} <= stems
    assert f"{len(stems) * 2} files in" in out


def test_compare(cli, runs):
    code, out, err = cli("compare", runs, "--laws", "familial,hoffmann")
    assert (code, err) == (0, "")
    assert "Laws compared" in out
    code, out, _ = cli("compare", runs, "--laws", "familial,hoffmann", "--json")
    entries = {entry["law"]: entry for entry in json.loads(out)["entries"]}
    assert entries["familial"]["aicc"] < entries["hoffmann"]["aicc"]


def test_advise(cli, fit_json):
    words = ("--unique-tokens", "1e11", "--flops", "1e21", "--memory", "2e9,8GB")
    code, out, err = cli("advise", fit_json, "hoffmann:error=0.01", *words, "--losses-compare")
    assert (code, err) == (0, "")
    assert "nats per token" in out
    assert "Under other assumptions" in out
    code, out, _ = cli("advise", fit_json, "hoffmann", *words, "--losses-compare", "--json")
    assert sum(option["chance"] for option in json.loads(out)["options"]) == pytest.approx(1)


def test_advice_does_not_rank_published_laws_of_different_papers(cli):
    words = ("--unique-tokens", "1e11", "--flops", "1e21", "--memory", "2e9,8GB")
    code, out, err = cli("advise", "frantar:S=0.5", "hoffmann", *words)
    assert (code, err) == (0, "")
    assert out.startswith("No ranking: The losses of 'frantar' and 'hoffmann' cannot be compared")
    assert "learly" not in out
    assert "Under other assumptions" not in out
    _, out, _ = cli("advise", "frantar:S=0.5", "hoffmann", *words, "--json")
    record = json.loads(out)
    assert record["winner"] is None
    assert record["confidence"] is None
    assert record["incomparable"]


def test_a_plan_takes_the_vocabulary_of_the_runs(cli, tmp_path, undrawn):
    """Runs of a vocabulary of 300 are planned with heads of 300 rows, unless asked otherwise."""
    path, lines = tmp_path / "runs.jsonl", []
    noise = np.random.default_rng(0)
    for layers, width in ((4, 64), (6, 96), (8, 128), (12, 192)):
        for exits in (1, 4):
            for tokens in (3e7, 1e8, 1e9):
                inner = 12 * layers * width**2
                size = inner + 300 * width
                loss = float(LAW.predict(TRUTH, N=size, D=tokens, G=exits))
                run = {"run_id": f"r{len(lines)}", "N_total": size, "D_tokens": tokens, "G": exits}
                run |= {"C_flops": 6 * tokens * (inner + exits * 300 * width), "vocab_size": 300}
                run |= {"loss_mean": loss * float(np.exp(noise.normal(0, 0.001)))}
                run |= {"data": "books", "seq_len": 128}
                run |= {"backbone": {"hidden": width, "layers": layers}}
                lines.append(json.dumps(run))
    path.write_text("\n".join(lines))
    out = tmp_path / "fit.json"
    code, shown, _ = cli("fit", path, "--no-profiles", "--out", out)
    assert code == 0
    assert "vocabulary of 300" in shown
    facts = read_analysis(out).source.facts
    assert (facts.vocab_size, facts.seq_len, facts.data) == (300, 128, "books")
    assert (facts.size, facts.flops) == ("total", "heads")
    words = ("plan", out, "--flops", "1e17", "--granularity", "4")
    _, shown, _ = cli(*words)
    assert "for a vocabulary of 300 (from the fitted runs)" in shown
    own = json.loads(cli(*words, "--json")[1])
    other = json.loads(cli(*words, "--vocab", "50304", "--json")[1])
    N, D = own["N"]["value"], own["D"]["value"]
    # the width of the runs, not that of a decoder of aspect 64
    width = facts.width[0] * N ** facts.width[1]
    assert 6 * D * (N + 3 * 300 * width) == pytest.approx(1e17, rel=1e-6)
    assert other["D"]["value"] < 0.6 * D
    page = tmp_path / "report.html"
    assert cli("report", out, "--out", page)[0] == 0
    text = page.read_text(encoding="utf-8")
    assert "C counted as in the runs, 6ND plus the head of every exit with 300 tokens" in text


# mistakes: one line, exit code 1, nothing written


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (
            ("fit", "RUNS", "--law", "famillial"),
            "named 'famillial'. Did you mean familial",
        ),
        (
            ("fit", "RUNS", "--law", "xyzzy"),
            "named 'xyzzy'. `hf-familial fit --law list`",
        ),
        (("fit",), "RUNS is missing"),
        (("fit", "absent.jsonl"), "absent.jsonl"),
        (("fit", "EMPTY"), "empty.csv is empty"),
        (
            ("fit", "BINARY"),
            "binary.csv is a binary file. Save the runs as CSV, JSON lines or parquet",
        ),
        (("fit", "WRONG"), "wrong.csv has no column for N, D, G. Its columns are width, loss"),
        (("fit", "RUNS", "--column", "N"), "`--column` must look like N=my_column, got 'N'"),
        (
            ("fit", "RUNS", "--column", "N=wide"),
            "has no column 'wide' for N. Its columns are run_id",
        ),
        (
            ("fit", "RUNS", "--size", "all"),
            "`--size` must be one of total, non_embedding, active, got 'all'",
        ),
        (("fit", "RUNS", "--loss", "median"), "has no loss 'median'"),
        (("fit", "RUNS", "--status", "stopped"), "no run with status stopped, only finished"),
        (("fit", "RUNS", "--where", "G"), "'G' is not a condition. Write it like"),
        (("fit", "RUNS", "--where", "g == 1"), "no column 'g' .* Did you mean 'G'"),
        (("fit", "RUNS", "--where", "G == 3"), "has no row where G == 3"),
        (("fit", "RUNS", "--unit", "N=lots"), "'lots' is not a unit of N. Write it like"),
        (("fit", "RUNS", "--unit", "Q=1"), "`--unit` must name one of the variables"),
        (("fit", "RUNS", "--runs-are", "many"), "checkpoints or independent, got 'many'"),
        (
            ("fit", "RUNS", "--law", "familial:G=4"),
            "a law without 'G=4'. Set G with",
        ),
        (
            ("advise", "familial:G=4", "FIT", "--unique-tokens", "1e9", "--flops", "1e20")
            + ("--memory", "1e9,2e9"),
            "Candidate 'familial': leave G out, because there is one exit",
        ),
        (("fit", "RUNS", "--fix", "beta=x"), "`--fix` must look like beta=0.28, got 'beta=x'"),
        (("fit", "RUNS", "--fix", "delta=1"), "delta"),
        (("fit", "RUNS", "--bound", "gamma=1"), "`--bound` must look like gamma=0:1"),
        (("fit", "RUNS", "--objective", "l2"), "objective"),
        (
            ("fit", "RUNS", "--drop-far", "4", "--drop-largest", "1"),
            "not both",
        ),
        (("fit", "RUNS", "--bootstrap", "5", "--no-profiles"), "replicates"),
        (
            ("fit", "RUNS", "--no-profiles", "--out", "absent/fit.json"),
            "cannot write absent/fit.json",
        ),
        (("plan", "FIT"), "Pass `--flops` or `--loss`."),
        (("plan", "FIT", "--flops", "1e21", "--loss", "2"), "`--flops` or `--loss`, not both"),
        (("plan", "FIT", "--flops", "-1"), "`C` must be positive"),
        (("plan", "RUNS.json", "--flops", "1e21"), "RUNS.json"),
        (("plan", "NEWER", "--flops", "1e21"), "newer.json: `schema` is 99.*Upgrade"),
        (("plan", "RUNS/", "--flops", "1e21"), "RUNS"),
        (("plan", "hofman", "--flops", "1e21"), "Did you mean hoffmann"),
        (("plan", "FIT", "--flops", "1e21", "--set", "G"), "`--set` must look like S=0.5"),
        (
            ("plan", "FIT", "--flops", "1e21", "--members", "a"),
            "`--members` must look like 0.25",
        ),
        (("report", "RUNS"), "not a fit"),
        (("report", "FIT", "--out", "."), "cannot write ."),
        (("compare", "RUNS", "--laws", "familial,nope"), "No law is named 'nope'"),
        (
            ("advise", "FIT", "--unique-tokens", "1", "--flops", "1", "--memory", "x"),
            "a size must look like 2GB or 512MiB, got 'x'",
        ),
    ],
    ids=lambda value: "-".join(value[:4]) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line(cli, runs, fit_json, tmp_path, monkeypatch, words, match):
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    (tmp_path / "wrong.csv").write_text("width,loss\n1,2\n")
    newer = json.loads(fit_json.read_text()) | {"schema": 99}
    (tmp_path / "newer.json").write_text(json.dumps(newer))
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    names = {"RUNS": runs, "FIT": fit_json, "EMPTY": "empty.csv", "BINARY": "binary.csv"}
    names |= {"WRONG": "wrong.csv", "NEWER": "newer.json"}
    code, out, err = cli(*(names.get(word, word) for word in words))
    assert code == 1
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert re.search(match, err), err
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_that_cannot_be_replaced_stays(cli, fit_json, tmp_path, monkeypatch, undrawn):
    page = tmp_path / "report.html"
    page.write_text("before")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    code, _, err = cli("report", fit_json, "--out", page)
    assert code == 1
    assert "cannot write" in err
    assert page.read_text() == "before"
    assert list(tmp_path.iterdir()) == [page]


# pages and examples made from the same data


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_of_laws_is_fresh(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["list_laws.py", "--check"])
    assert load(ROOT / "scripts" / "list_laws.py").main() == 0, capsys.readouterr().out


def test_the_example(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["fit_scaling_law.py", "--smoke", "--draws", "60", "--out", "out"]
    )
    load(ROOT / "examples" / "fit_scaling_law.py").main()
    shown = capsys.readouterr().out
    assert "gamma" in shown
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"fit.json", "report.html"}


@pytest.mark.parametrize("page", ["scaling.md"])
def test_every_command_of_the_manual_is_one(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    sources = "".join(
        path.read_text(encoding="utf-8")
        for path in (ROOT / "src" / "hf_familial" / "cli").glob("*.py")
    )
    known = {f"--{name.replace('_', '-')}" for name in re.findall(r"^    (\w+): ", sources, re.M)}
    known |= {f"--no-{name[2:]}" for name in known} | set(re.findall(r'"(--[a-z-]+)"', sources))
    assert options <= known, options - known
    for law in re.findall(r"--law (\w+)", text):
        assert law == "list" or get_law(law)
