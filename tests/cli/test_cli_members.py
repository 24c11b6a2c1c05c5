"""The command line: `hf-familial describe`, `export` and `push`, as a user runs them."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from backbones import tiny_model
from hub.hub_server import Hub, let_out
from transformers import AutoModelForCausalLM

from hf_familial import FamilialForCausalLM, describe
from hf_familial._wording import metric, size
from hf_familial.cli.app import joined
from hf_familial.cli.members import parse_exits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("family") / "fam"
    FamilialForCausalLM.from_backbone(tiny_model("llama"), exits=[2, 4]).save_pretrained(out)
    (out / "members.json").write_text(
        json.dumps([{"depth": 2, "eval_loss": 3.14159}, {"depth": 4, "eval_loss": None}])
    )
    return out


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The usual Hub of this process is a small one."""
    with Hub().running() as hub:
        let_out(monkeypatch, tmp_path / "cache", hub)
        yield hub


def fails(result: tuple[int, str, str], *said: str) -> None:
    """Exit code 1, one line, and nothing printed."""
    code, out, err = result
    assert code == 1
    assert out == ""
    # progress bars of the client aside
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert err.splitlines()[-1] == lines[0]
    for words in said:
        assert words in lines[0]


# describe


def test_describe_prints_a_bare_table_into_a_pipe(cli, folder):
    code, out, _ = cli("describe", folder, "--context", 64)
    assert code == 0
    assert "─" not in out
    assert "\x1b" not in out
    assert "2 exits on llama" in out
    rows = [line.split() for line in out.splitlines() if re.match(r"\s+\d", line)]
    found = describe(folder, context=64).exits
    for cells, row in zip(rows, found, strict=True):
        assert cells[:2] == [str(row.exit_idx), str(row.depth)]
        assert cells[2:4] == [metric(row.parameters), metric(row.non_embedding)]
        assert cells[4:6] == [size(row.weight_bytes[n]) for n in ("float32", "bfloat16")]
        assert cells[8] == f"{row.kv_bytes_per_token:,}"
    assert [cells[-1] for cells in rows] == ["3.1416", "-"]


def test_describe_prints_json(cli, folder):
    code, out, _ = cli("describe", folder, "--json", "--context", 64, "--dtype", "bfloat16")
    assert code == 0
    found = describe(folder, context=64, dtype="bfloat16")
    assert json.loads(out) == json.loads(json.dumps(found.to_dict()))


def test_describe_says_which_member_fits(cli, folder):
    rows = describe(folder, context=8).exits
    need = 4 * rows[0].parameters + rows[0].cache_bytes
    code, out, _ = cli("describe", folder, "--context", 8, "--memory", need)
    assert code == 0
    assert "exit 1 (depth 4) does not fit" in out
    assert out.rstrip().endswith("The deepest member that fits is exit 0.")
    code, out, _ = cli("describe", folder, "--context", 8, "--flops", "1e9", "--json")
    assert json.loads(out)["fits"] == 1
    code, out, _ = cli("describe", folder, "--memory", "1kB", "--json")
    assert json.loads(out)["fits"] is None
    code, _, err = cli("describe", folder, "--memory", "1kB")
    assert code == 1
    assert err.startswith("error: no member of")
    assert len(err.splitlines()) == 1


def test_describe_refuses_in_one_line(cli, folder, tmp_path):
    fails(cli("describe", tmp_path / "nothing"), "there is no folder")
    fails(cli("describe", tmp_path), "has no `config.json`")
    fails(cli("describe", folder, "--context", 0), "`context` must be")
    fails(cli("describe", folder, "--memory", "much"), "2GB or 512MiB, got 'much'")
    fails(cli("describe", folder, "--dtype", "int4"), "`dtype` must be")


def test_describe_a_repository_that_is_not_there(cli, hub):
    fails(cli("describe", "me/nothing"), "there is no such repository")


# export


def test_export_one_and_all(cli, folder, tmp_path):
    code, out, _ = cli("export", folder, tmp_path / "small", "--exit", 0)
    assert code == 0
    assert "exit 0: LlamaForCausalLM with 2 layers" in out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.num_hidden_layers == 2
    code, out, _ = cli("export", folder, tmp_path / "all", "--dtype", "bfloat16")
    assert code == 0
    assert len(out.splitlines()) == 2
    for k, depth in enumerate((2, 4)):
        member = AutoModelForCausalLM.from_pretrained(tmp_path / "all" / f"exit_{k}")
        assert member.dtype == torch.bfloat16
        assert member.config.num_hidden_layers == depth


def test_export_a_smaller_family(cli, folder, tmp_path):
    code, _, _ = cli("export", folder, tmp_path / "out", "--exit", -2, "--format", "familial")
    assert code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["exits"]) == ("familial", [2])


def test_export_refuses_in_one_line(cli, folder, tmp_path):
    out = tmp_path / "out"
    fails(cli("export", folder, out, "--exit", 2), "got 2. This family has")
    fails(cli("export", folder, out, "--exit", "two"), "`all` or numbers such as 0,-1, got 'two'")
    fails(cli("export", folder, out, "--exit", 0, "--format", "onnx"), "plain, familial")
    fails(cli("export", tmp_path, out), "has no `config.json`")
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    fails(cli("export", folder, out, "--exit", 0), "is not empty")


# push


def test_push_members_and_family(cli, folder, hub):
    code, out, _ = cli("push", folder, "me/fam", "--family", "--private")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("family: me/fam, ")
    assert lines[1].startswith("exit 0: me/fam-depth2, ")
    assert lines[3].startswith("collection: me/")
    assert set(hub.repos) == {"me/fam", "me/fam-depth2", "me/fam-depth4"}
    assert all(repo.private for repo in hub.repos.values())
    code, out, _ = cli("push", folder, "me/fam", "--exits", "0,-1", "--no-collection")
    assert [line.split(", ")[1] for line in out.splitlines()] == ["up to date"] * 2


def test_push_into_branches(cli, folder, hub):
    code, out, _ = cli("push", folder, "me/fam", "--exits", 1, "--layout", "revisions")
    assert code == 0
    assert out.startswith("exit 1: me/fam@depth4, ")
    assert set(hub.repos["me/fam"].branches) == {"main", "depth4"}


def test_push_the_family_alone(cli, folder, hub):
    code, out, _ = cli("push", folder, "me/fam", "--exits", "none", "--family")
    assert code == 0
    assert set(hub.repos) == {"me/fam"}


def test_push_refuses_in_one_line(cli, folder, hub, monkeypatch, tmp_path):
    fails(cli("push", folder, "me/fam", "--exits", "none"), "pushes nothing")
    fails(cli("push", folder, "me/fam", "--exits", "5"), "`exit_idx` must be between")
    fails(cli("push", folder, "me/fam", "--layout", "flat"), "repos, revisions, got 'flat'")
    fails(cli("push", tmp_path, "me/fam"), "has no `config.json`")
    assert hub.log == []
    fails(cli("push", folder, "somebody/fam"), "role `write`", "settings/tokens")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    fails(cli("push", folder, "me/fam"), "does not accept the token")


# the rest


def test_exits_of_a_command_line():
    assert parse_exits("all") is None
    assert parse_exits("0,-1,2") == [0, -1, 2]
    for words in ("", "0,", "a", "0 1", "--1"):
        with pytest.raises(ValueError, match="numbers such as"):
            parse_exits(words)


def test_numbers_have_three_digits():
    assert [metric(n) for n in (None, 0, 999, 1000, 29_920, 999_600, 1.35e9, 7e20)] == [
        "-", "0", "999", "1.00k", "29.9k", "1.00M", "1.35G", "700E",
    ]  # fmt: skip
    assert [size(n) for n in (None, 512, 2**20, 1535 * 2**20)] == [
        "-", "512", "1.00MiB", "1.50GiB",
    ]  # fmt: skip


# the first second: what can be wrong is said before torch is there

COMMAND = "from hf_familial_command import main; main()"
SLIPS = {
    "--help": (0, ""),
    "sweep plan --help": (0, ""),
    "descrbe x": (2, "'describe'"),
    "describe fam --contxt 8": (2, "--context"),
    "describe nested/fma": (1, "did you mean `nested/fam`?"),
    "describe ./fma": (1, "there is no folder `./fma`; did you mean `fam`?"),
    "describe nested": (1, "Did you mean `nested/fam`?"),
    "describe fam/config.json": (1, "must be the folder of a checkpoint"),
    "describe fam --memory lots": (1, "2GB or 512MiB, got 'lots'"),
    "export fam out --exit 0 x": (2, "x"),
    "export fam fam/config.json": (1, "`OUT` must be a folder"),
    "sweep plan absent.yaml": (1, "there is no design `absent.yaml`"),
    "sweep plan desing.yaml": (1, "did you mean `design.yaml`?"),
    "sweep run design.yaml": (1, "nested too deep"),
    "sweep status fam": (1, "is a folder"),
    "export fam out --format plian": (1, "Did you mean 'plain'?"),
    "push fam me/fam --layout repo": (1, "Did you mean 'repos'?"),
    "plan hofmann --flops 1e20": (1, "Did you mean hoffmann"),
    "fit absent.csv": (1, "there is no file or folder `absent.csv`"),
}


@pytest.mark.slow
@pytest.mark.parametrize("words", SLIPS)
def test_a_slip_is_told_before_torch_is_imported(words, folder, tmp_path):
    (tmp_path / "nested").mkdir()
    for place in (tmp_path / "fam", tmp_path / "nested" / "fam"):
        shutil.copytree(folder, place)
    (tmp_path / "design.yaml").write_text("budgets: " + "[" * 3000)
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *words.split()],
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    code, said = SLIPS[words]
    told = " ".join(done.stderr.replace("│", " ").split())
    assert done.returncode == code, told
    assert said in told
    assert "Traceback" not in told
    assert max(map(len, done.stdout.splitlines()), default=0) <= 80


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("export a b --exit 0 -1", "export a b --exit 0,-1"),
        ("push --exits 0, 1, 2 a b", "push --exits 0,1,2 a b"),
        ("push --exits=0 1 a b", "push --exits=0,1 a b"),
        ("plan --members 0.5 1", "plan --members 0.5,1"),
        ("export a b --exit 0,1", "export a b --exit 0,1"),
        ("describe --context 8 4 --exit all 1", "describe --context 8 4 --exit all 1"),
    ],
)
def test_numbers_of_exits_may_stand_apart(words, expected):
    assert joined(words.split()) == expected.split()


def test_an_error_that_is_no_users_is_one_line_too(cli, folder, monkeypatch):
    def broken(*args: object, **options: object) -> None:
        raise KeyError("some\nthing")

    monkeypatch.setattr("hf_familial.hub.description.describe", broken)
    fails(cli("describe", folder), "KeyError", "HF_FAMILIAL_TRACEBACK=1")
    monkeypatch.setenv("HF_FAMILIAL_TRACEBACK", "1")
    with pytest.raises(KeyError):
        cli("describe", folder)
