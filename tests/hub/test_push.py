"""Pushing, by the real client, to a server that fails on demand."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backbones import tiny_model
from hub_server import READ, USER, WRITE, Blob, Hub, Repo, let_out
from huggingface_hub import ModelCard, constants
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_familial import (
    FamilialForCausalLM,
    describe,
    export_exit,
    push_exits_to_hub,
    push_family_to_hub,
)
from hf_familial.errors import (
    HubAuthError,
    HubError,
    HubNotFoundError,
    HubPermissionError,
    HubUnavailableError,
)
from hf_familial.hub import Retry
from hf_familial.hub._source import find_source


EXITS = [1, 2, 4]
NAMES = [f"me/fam-depth{depth}" for depth in EXITS]
LOSSES = [3.5, 3.0, 2.5]
IDS = [[5, 17, 3, 88, 42]]
COMMIT, PUT = r"/commit/main$", r"^/lfs/"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A family with a tokenizer, recorded losses and a card of its owner's."""
    out = tmp_path_factory.mktemp("family") / "fam"
    model = FamilialForCausalLM.from_backbone(
        tiny_model("llama", tie_word_embeddings=True), exits=EXITS, num_exit_layers=1
    )
    model.save_pretrained(out)
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "once", "upon"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"]
    ).save_pretrained(out)
    rows = [{"depth": d, "eval_loss": x} for d, x in zip(EXITS, LOSSES, strict=True)]
    (out / "members.json").write_text(json.dumps(rows))
    (out / "README.md").write_text("---\nlicense: mit\nbase_model: some/base\n---\n\nBy hand.\n")
    return out


@pytest.fixture
def hub():
    with Hub().running() as hub:
        yield hub


@pytest.fixture
def waits(monkeypatch, tmp_path):
    return let_out(monkeypatch, tmp_path / "cache")


@pytest.fixture
def to(hub, waits):
    """Where a push goes; small waits, so that they can be told from the server's."""
    return {"token": WRITE, "endpoint": hub.url, "retry": Retry(4, 0.25, 1.0)}


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(IDS), use_cache=False).logits


def changed(report) -> list[bool]:
    return [row.changed for row in report.pushed]


def weights_of(hub, repo, branch="main") -> list[str]:
    return sorted(n for n in hub.repos[repo].files(branch) if n.endswith(".safetensors"))


def model_at(hub, repo, where, branch="main"):
    """The model that a branch holds, read by stock transformers from its files."""
    for name, data in hub.repos[repo].files(branch).items():
        path = where / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return AutoModelForCausalLM.from_pretrained(where)


# what a push leaves


def test_each_member_is_one_commit_and_a_plain_model(hub, to, folder, tmp_path):
    report = push_exits_to_hub(folder, "me/fam", **to)
    assert [row.place.repo_id for row in report.pushed] == NAMES
    assert changed(report) == [True] * 3
    family = FamilialForCausalLM.from_pretrained(folder)
    for k, name in enumerate(NAMES):
        depth = EXITS[k]
        assert hub.commits_of(name) == [f"Member of depth {depth} (exit {k} of 3)"]
        assert report.pushed[k].commit == hub.repos[name].branches["main"]
        model = model_at(hub, name, tmp_path / str(k))
        assert type(model).__name__ == "LlamaForCausalLM"
        assert model.config.num_hidden_layers == depth + (k < 2)
        expected = family(torch.tensor(IDS), exit_idx=k, use_cache=False).logits
        assert torch.equal(logits_of(model), expected)
        assert "tokenizer.json" in hub.repos[name].files()
        assert not any(path.endswith(".py") for path in hub.repos[name].files())
    assert set(hub.repos) == set(NAMES)


@pytest.mark.parametrize("layout", ["repos", "revisions"])
def test_a_second_push_sends_nothing(hub, to, folder, layout):
    first = push_exits_to_hub(folder, "me/fam", layout=layout, **to)
    seen = len(hub.log)
    second = push_exits_to_hub(folder, "me/fam", layout=layout, **to)
    assert changed(second) == [False] * 3
    assert [row.commit for row in second.pushed] == [row.commit for row in first.pushed]
    assert [row.uploaded for row in second.pushed] == [()] * 3
    hub.log = hub.log[seen:]
    for method, path in (
        ("POST", "/commit/"),
        ("POST", "/preupload/"),
        ("POST", r"lfs"),
        ("PUT", ""),
    ):
        assert hub.count(method, path) == 0


def test_only_what_changed_is_sent(hub, to, folder, tmp_path):
    push_exits_to_hub(folder, "me/fam", **to)
    copy = tmp_path / "fam"
    shutil.copytree(folder, copy)
    model = FamilialForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        model.model.exits[0].norm.weight.add_(1.0)
    model.save_pretrained(copy)
    hub.log.clear()
    report = push_exits_to_hub(copy, "me/fam", **to)
    assert changed(report) == [True, False, False]
    assert report.pushed[0].uploaded == ("model.safetensors",)
    assert hub.count("PUT", PUT) == 1


def test_exits_are_chosen_from_either_end(hub, to, folder):
    report = push_exits_to_hub(folder, "me/fam", exits=[-1, 0, 2], **to)
    assert [row.exit_idx for row in report.pushed] == [0, 2]
    assert set(hub.repos) == {NAMES[0], NAMES[2]}


def test_members_in_branches(hub, to, folder, tmp_path):
    report = push_exits_to_hub(folder, "me/fam", layout="revisions", **to)
    assert [row.place.revision for row in report.pushed] == ["depth1", "depth2", "depth4"]
    assert set(hub.repos) == {"me/fam"}
    assert not hub.collections
    assert report.collection is None
    assert sorted(hub.repos["me/fam"].files()) == [".gitattributes", "README.md"]
    family = FamilialForCausalLM.from_pretrained(folder)
    for k, depth in enumerate(EXITS):
        model = model_at(hub, "me/fam", tmp_path / str(k), f"depth{depth}")
        expected = family(torch.tensor(IDS), exit_idx=k, use_cache=False).logits
        assert torch.equal(logits_of(model), expected)
        messages = hub.commits_of("me/fam", f"depth{depth}")
        assert messages == [f"Member of depth {depth} (exit {k} of 3)"]


def test_branches_beside_a_family_leave_it_alone(hub, to, folder):
    push_family_to_hub(folder, "me/fam", **to)
    before = hub.repos["me/fam"].branches["main"]
    push_exits_to_hub(folder, "me/fam", exits=[0], layout="revisions", **to)
    assert hub.repos["me/fam"].branches["main"] == before
    files = set(hub.repos["me/fam"].files("depth1"))
    # nothing of the family that its branch began with
    assert not any(name.endswith(".py") or name == "members.json" for name in files)
    assert weights_of(hub, "me/fam", "depth1") == ["model.safetensors"]


def test_the_family_with_its_code(hub, to, folder):
    report = push_family_to_hub(folder, "me/fam", **to)
    assert hub.commits_of("me/fam") == ["Family of 3 members"]
    files = hub.repos["me/fam"].files()
    assert {"modeling_familial.py", "configuration_familial.py", "tokenizer.json"} <= set(files)
    assert "auto_map" in json.loads(files["config.json"])
    rows = json.loads(files["members.json"])
    assert [row["eval_loss"] for row in rows] == LOSSES
    assert "By hand." in files["README.md"].decode()
    assert report.pushed[0].exit_idx is None
    assert changed(push_family_to_hub(folder, "me/fam", **to)) == [False]


def test_a_family_in_memory(hub, to, folder, tmp_path):
    model = FamilialForCausalLM.from_pretrained(folder)
    push_exits_to_hub(model, "me/fam", exits=[1], **to)
    assert torch.equal(
        logits_of(model_at(hub, NAMES[1], tmp_path / "member")),
        model(torch.tensor(IDS), exit_idx=1, use_cache=False).logits,
    )
    push_family_to_hub(model, "me/fam", **to)
    assert "modeling_familial.py" in hub.repos["me/fam"].files()


@pytest.fixture
def bare(folder, tmp_path):
    """The family without a tokenizer, as `save_pretrained` of a model leaves it."""
    return shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))


def warnings_of(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "hf_familial.hub.push"]


def test_without_a_tokenizer_the_cards_have_none_and_one_warning_says_so(hub, to, bare, caplog):
    push_exits_to_hub(bare, "me/fam", exits=[0, 1], **to)
    assert warnings_of(caplog) == [
        "`me/fam-depth1`, `me/fam-depth2` have no tokenizer. Pass `tokenizer=`, or save one in the "
        "family's folder."
    ]
    caplog.clear()
    push_exits_to_hub(bare, "me/fam", exits=[2], layout="revisions", **to)
    push_family_to_hub(bare, "me/fam", **to)
    assert [line.split(".")[0] for line in warnings_of(caplog)] == [
        "`me/fam@depth4` has no tokenizer",
        "`me/fam` has no tokenizer",
    ]
    for repo, branch in [(NAMES[0], "main"), ("me/fam", "depth4"), ("me/fam", "main")]:
        files = hub.repos[repo].files(branch)
        assert not any("tokenizer" in name for name in files)
        assert "AutoTokenizer" not in files["README.md"].decode()


def test_a_tokenizer_may_be_passed_or_stand_on_the_hub(hub, to, folder, bare, caplog):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    push_exits_to_hub(bare, "me/fam", exits=[0], tokenizer=tokenizer, **to)
    push_family_to_hub(bare, "me/whole", tokenizer=tokenizer, **to)
    for repo in (NAMES[0], "me/whole"):
        assert "tokenizer.json" in hub.repos[repo].files()
    # from now on it is there: its owner's, whoever brought it
    assert changed(push_exits_to_hub(bare, "me/fam", exits=[0], **to)) == [False]
    assert changed(push_family_to_hub(bare, "me/whole", **to)) == [False]
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    ("load", "name"),
    [
        (FamilialForCausalLM.from_pretrained, "me/fam"),
        (FamilialForCausalLM.from_backbone, NAMES[2]),
    ],
)
def test_a_family_in_memory_takes_the_tokenizer_that_the_client_has(
    hub, to, folder, tmp_path, monkeypatch, load, name
):
    push_family_to_hub(folder, "me/fam", **to)
    push_exits_to_hub(folder, "me/fam", exits=[2], **to)
    let_out(monkeypatch, tmp_path / "client", hub)
    model = load(name)
    without = export_exit(model, 0, tmp_path / "without")
    assert not any("tokenizer" in file for file in without.files)
    AutoTokenizer.from_pretrained(name)
    hub.log.clear()
    report = export_exit(model, 0, tmp_path / "member")
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(report.files)
    assert AutoTokenizer.from_pretrained(report.path)("once upon").input_ids == [3, 4]
    assert hub.log == []  # what is in the cache, and no request


def test_a_name_alone_belongs_to_the_tokens_user(hub, to, folder):
    report = push_exits_to_hub(folder, "fam", exits=[0], **to)
    assert report.pushed[0].place.repo_id == NAMES[0]


@pytest.mark.parametrize(("private", "expected"), [(True, True), (None, False)])
def test_visibility(hub, to, folder, private, expected):
    push_exits_to_hub(folder, "me/fam", exits=[0], private=private, **to)
    assert hub.repos[NAMES[0]].private is expected
    (collection,) = hub.collections.values()
    assert collection["private"] is expected


def test_shards_of_an_older_push_go(hub, to, folder):
    options = {"exits": [2], "collection": False} | to
    push_exits_to_hub(folder, "me/fam", max_shard_size="30KB", **options)
    assert len(weights_of(hub, NAMES[2])) > 1
    report = push_exits_to_hub(folder, "me/fam", dtype="bfloat16", **options)
    assert weights_of(hub, NAMES[2]) == ["model.safetensors"]
    assert "model.safetensors.index.json" not in hub.repos[NAMES[2]].files()
    assert len(hub.commits_of(NAMES[2])) == 2
    assert "config.json" in report.pushed[0].uploaded  # its dtype


def test_code_of_an_older_push_goes_and_other_code_stays(hub, to, folder):
    push_family_to_hub(folder, "me/fam", **to)
    repo = hub.repos["me/fam"]
    ours = set(repo.files())
    tree = dict(repo.commits[repo.branches["main"]])
    # an older version of the code had more files, which name each other; the owner has one more
    old = {
        "modeling_familial.py": b"from .relay_old import relay\n",
        "relay_old.py": b"from .relay_older import relay\n",
        "relay_older.py": b"relay = None\n",
        "handler.py": b"import torch\n",
    }
    repo.commit("main", tree | {n: Blob(text, lfs=False) for n, text in old.items()}, "older")
    report = push_family_to_hub(folder, "me/fam", **to)
    assert set(repo.files()) == ours | {"handler.py"}
    assert report.pushed[0].uploaded == ("modeling_familial.py",)
    assert changed(push_family_to_hub(folder, "me/fam", **to)) == [False]


def test_the_collection_holds_what_there_is(hub, to, folder):
    push_family_to_hub(folder, "me/fam", **to)
    slug = push_exits_to_hub(folder, "me/fam", exits=[0], **to).collection
    items = hub.collections[slug]["items"]
    assert [item["id"] for item in items] == ["me/fam", NAMES[0]]
    push_exits_to_hub(folder, "me/fam", exits=[2], **to)
    assert [item["id"] for item in items] == ["me/fam", NAMES[0], NAMES[2]]
    assert items[2]["note"]["text"].startswith("Exit 2: 4 layers, ")
    seen = hub.count("POST", "/api/collections/")
    push_exits_to_hub(folder, "me/fam", exits=[2], **to)
    assert hub.count("POST", "/api/collections/") == seen


# cards


def test_the_card_of_a_member(hub, to, folder):
    push_family_to_hub(folder, "me/fam", **to)
    push_exits_to_hub(folder, "me/fam", **to)
    card = ModelCard(hub.repos[NAMES[1]].files()["README.md"].decode())
    assert card.data.license == "mit"
    assert card.data.base_model == "some/base"
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert card.data.library_name == "transformers"
    results = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert results == {"loss": 3.0, "perplexity": pytest.approx(20.085537)}
    rows = [line.split(" | ") for line in card.text.splitlines() if re.match(r"\| \d", line)]
    described = describe(folder)
    assert len(rows) == 3
    for row, cells in zip(described.exits, rows, strict=True):
        assert cells[1:4] == [str(row.depth), f"{row.parameters:,}", f"{row.non_embedding:,}"]
        assert cells[6] == f"{row.kv_bytes_per_token:,}"
        assert cells[8] == f"{row.eval_loss:.4f}"
    assert [row[-1].strip(" |") for row in rows][1] == "this"
    assert f'from_pretrained("{NAMES[1]}")' in card.text
    assert f'from_pretrained("{NAMES[0]}")' in card.text  # the draft
    assert '"me/fam", trust_remote_code=True' in card.text
    assert "relay_generate" in card.text


def test_the_licence_comes_from_the_bases_card(hub, to, folder, tmp_path):
    copy = tmp_path / "fam"
    shutil.copytree(folder, copy)
    (copy / "README.md").unlink()
    hub.repos["me/base"] = base = Repo()
    card = b"---\nlicense: other\nlicense_name: l\n---\n"
    base.commit("main", {"README.md": Blob(card, lfs=False)}, "c")
    push_exits_to_hub(copy, "me/fam", exits=[0], base_model="me/base", **to)
    data = ModelCard(hub.repos[NAMES[0]].files()["README.md"].decode()).data
    assert (data.license, data.license_name, data.base_model) == ("other", "l", "me/base")
    # a base that is not there is no reason not to push
    push_exits_to_hub(copy, "me/fam", exits=[1], base_model="me/nobody", **to)
    data = ModelCard(hub.repos[NAMES[1]].files()["README.md"].decode()).data
    assert (data.license, data.base_model) == (None, "me/nobody")


def test_what_the_owner_wrote_on_the_hub_stays(hub, to, folder):
    push_exits_to_hub(folder, "me/fam", exits=[0], **to)
    repo = hub.repos[NAMES[0]]
    tree = dict(repo.commits[repo.branches["main"]])
    text = tree["README.md"].data.decode().replace("license: mit", "license: apache-2.0")
    tree["README.md"] = Blob((text + "\n## Limits\n\nMine.\n").encode(), lfs=False)
    repo.commit("main", tree, "by hand")
    push_exits_to_hub(folder, "me/fam", **to)  # the other members are new to its table
    card = ModelCard(repo.files()["README.md"].decode())
    assert card.data.license == "apache-2.0"
    assert card.text.rstrip().endswith("## Limits\n\nMine.")
    assert NAMES[2] in card.text
    assert changed(push_exits_to_hub(folder, "me/fam", **to)) == [False] * 3


# what goes wrong


REQUESTS = [
    ("POST", "/api/repos/create"),
    ("POST", "/preupload/"),
    ("POST", "info/lfs/objects/batch"),
    ("PUT", PUT),
    ("POST", COMMIT),
    ("GET", "/tree/"),
    ("GET", "/api/models/me/fam-depth1$"),
    ("HEAD", "README.md"),
    ("POST", "/api/collections$"),
    ("POST", "/items?$"),
]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *((*request, status) for request in REQUESTS for status in (429, 500)),
        *(("POST", COMMIT, status) for status in (408, 502, 503, 504)),
    ],
)
def test_what_may_pass_is_tried_again(hub, to, folder, method, path, status):
    fault = hub.fail(method, path, status=status, times=2)
    report = push_exits_to_hub(folder, "me/fam", exits=[0], **to)
    assert fault.times == 0
    assert changed(report) == [True]
    assert len(hub.commits_of(NAMES[0])) == 1
    assert len(hub.collections[report.collection]["items"]) == 1


def test_the_wait_that_the_hub_asks_for_is_kept(hub, to, folder, waits):
    hub.fail("POST", COMMIT, status=429, headers={"Retry-After": "37"})
    push_exits_to_hub(folder, "me/fam", exits=[0], collection=False, **to)
    assert waits == [37.0]


def test_the_wait_of_the_hubs_own_header_is_kept(hub, to, folder, waits):
    hub.fail("POST", COMMIT, status=429, headers={"RateLimit": '"api";r=0;t=55'})
    push_exits_to_hub(folder, "me/fam", exits=[0], collection=False, **to)
    assert waits == [55.0]


def test_waits_grow_and_end(hub, to, folder, waits):
    hub.fail("POST", COMMIT, status=503, times=99)
    with pytest.raises(HubUnavailableError, match=r"could not write to `me/fam-depth1` in 4 tries"):
        push_exits_to_hub(folder, "me/fam", exits=[0], **to)
    assert waits == [0.25, 0.5, 1.0]
    assert hub.commits_of(NAMES[0]) == []


@pytest.mark.parametrize("drop", ["before", "after"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", COMMIT),
        ("PUT", PUT),
        ("POST", "/api/repos/create"),
        ("POST", "/api/collections$"),
        ("POST", "/items?$"),
        ("POST", "info/lfs/objects/batch"),
    ],
)
def test_a_connection_that_drops(hub, to, folder, method, path, drop):
    """Also when what was asked for was done, and only the answer was lost."""
    fault = hub.fail(method, path, drop=drop)
    report = push_exits_to_hub(folder, "me/fam", exits=[0], **to)
    assert fault.times == 0
    assert len(hub.commits_of(NAMES[0])) == 1
    assert changed(report) == [True]
    assert report.pushed[0].commit == hub.repos[NAMES[0]].branches["main"]
    assert "model.safetensors" in report.pushed[0].uploaded
    assert len(hub.collections[report.collection]["items"]) == 1
    # the large file went over the line no more often than it had to
    assert hub.count("PUT", PUT, status=200) == 1


def test_a_download_that_drops_half_way(hub, to, folder):
    push_exits_to_hub(folder, "me/fam", exits=[0], **to)
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
    fault = hub.fail("GET", "/resolve/main/README.md", drop="half")
    assert changed(push_exits_to_hub(folder, "me/fam", exits=[0], **to)) == [False]
    assert fault.times == 0


def test_a_commit_that_lands_later_is_not_made_twice(hub, to, folder, monkeypatch):
    """The first answer is lost while the Hub still works on it; the second names a parent."""
    push_exits_to_hub(folder, "me/fam", exits=[0], **to)
    repo = hub.repos[NAMES[0]]
    done = repo.commits[repo.branches["main"]]
    # back to the beginning; the commit lands between the look and the second try
    repo.branches["main"] = repo.history["main"][0]
    repo.history["main"] = repo.history["main"][:1]
    original = hub.server.RequestHandlerClass.commit

    def commit(self, name, branch):
        if len(repo.history["main"]) == 1:
            repo.commit("main", done, "landed meanwhile")
        return original(self, name, branch)

    monkeypatch.setattr(hub.server.RequestHandlerClass, "commit", commit)
    report = push_exits_to_hub(folder, "me/fam", exits=[0], **to)
    assert hub.commits_of(NAMES[0]) == ["landed meanwhile"]
    assert hub.count("POST", COMMIT, status=412) == 1
    assert report.pushed[0].commit == repo.branches["main"]


def test_a_push_that_was_cut_off_goes_on(hub, to, folder):
    fault = hub.fail("POST", f"{NAMES[1]}/commit/", status=500, times=99)
    with pytest.raises(HubUnavailableError, match="Try again later"):
        push_exits_to_hub(folder, "me/fam", **to)
    assert len(hub.commits_of(NAMES[0])) == 1
    assert NAMES[2] not in hub.repos
    fault.times = 0
    hub.log.clear()
    report = push_exits_to_hub(folder, "me/fam", **to)
    assert changed(report) == [False, True, True]
    # the second member's weights were there already, without a commit
    assert hub.count("PUT", PUT) == 1
    assert [len(hub.commits_of(name)) for name in NAMES] == [1, 1, 1]


def test_no_token(hub, to, folder):
    with pytest.raises(HubAuthError, match="`hf auth login`"):
        push_exits_to_hub(folder, "me/fam", **to | {"token": None})
    with pytest.raises(HubAuthError, match="there is no token"):
        push_exits_to_hub(folder, "fam", **to | {"token": None})
    assert not hub.repos


def test_a_token_that_nobody_knows(hub, to, folder, waits):
    with pytest.raises(HubAuthError, match=r"does not accept the token .* `hf auth login`"):
        push_exits_to_hub(folder, "me/fam", **to | {"token": "hf_wrong"})
    assert not hub.repos
    assert waits == []


@pytest.mark.parametrize(("token", "repo_id"), [(READ, "me/fam"), (WRITE, "somebody/fam")])
def test_a_token_that_may_not(hub, to, folder, token, repo_id, waits):
    with pytest.raises(HubPermissionError, match="needs the role `write`"):
        push_exits_to_hub(folder, repo_id, **to | {"token": token})
    assert not hub.repos
    assert waits == []


def test_a_token_without_collections(hub, to, folder):
    hub.fail("POST", "/api/collections$", status=403, times=99)
    with pytest.raises(HubPermissionError, match="every member is pushed, but .*collection=False"):
        push_exits_to_hub(folder, "me/fam", **to)
    assert [len(hub.commits_of(name)) for name in NAMES] == [1, 1, 1]
    report = push_exits_to_hub(folder, "me/fam", collection=False, **to)
    assert report.collection is None
    assert changed(report) == [False] * 3


def test_the_hub_refuses_a_file(hub, to, folder):
    hub.fail("POST", COMMIT, status=422, times=99)
    with pytest.raises(HubError, match="could not write to `me/fam-depth1`: 422: injected"):
        push_exits_to_hub(folder, "me/fam", **to)
    assert hub.count("POST", COMMIT) == 1


def test_offline(monkeypatch, to, folder):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnavailableError, match="Unset `HF_HUB_OFFLINE`"):
        push_exits_to_hub(folder, "me/fam", **to)


def test_nobody_at_home(to, folder):
    with pytest.raises(HubUnavailableError, match="could not read .* refused") as caught:
        push_exits_to_hub(folder, "me/fam", **to | {"endpoint": "http://127.0.0.1:9"})
    assert "must be a repository" not in str(caught.value)  # a place to push to is one


def test_what_was_uploaded_is_kept_and_nothing_else(hub, to, folder):
    hub.fail("POST", COMMIT, status=503, times=99)
    with pytest.raises(HubUnavailableError, match="again later. Files that were uploaded are kept"):
        push_exits_to_hub(folder, "me/fam", **to)
    hub.fail("POST", "/repos/create", status=503, times=99)
    with pytest.raises(HubUnavailableError) as caught:
        push_exits_to_hub(folder, "me/fam", **to)
    assert str(caught.value).endswith("Try again later.")


# bad input: before anything is on the Hub


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"layout": "branches"}, ValueError, "must be one of repos, revisions, got 'branches'"),
        ({"exits": [3]}, IndexError, "got 3. This family has"),
        ({"exits": []}, ValueError, "at least one exit"),
        ({"exits": 1}, ValueError, "must be a list"),
        ({"exits": "all"}, ValueError, "must be a list"),
        ({"dtype": "int4"}, ValueError, "`dtype` must be"),
        ({"repo_id": "a/b/c"}, ValueError, "must look like `user/name`, got 'a/b/c'"),
        ({"repo_id": ""}, ValueError, "must look like `user/name`"),
    ],
)
def test_wrong_options_are_refused(hub, to, folder, options, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        push_exits_to_hub(folder, **{"repo_id": "me/fam"} | options | to)
    assert hub.log == []


def test_what_is_no_family_is_refused(hub, to, folder, tmp_path):
    for push in (push_exits_to_hub, push_family_to_hub):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            push(tmp_path / "nothing", "me/fam", **to)
        with pytest.raises(FileNotFoundError, match=r"no `config\.json`"):
            push(tmp_path, "me/fam", **to)
    (tmp_path / "bare").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "bare")
    with pytest.raises(FileNotFoundError, match="neither `model.safetensors` nor"):
        push_exits_to_hub(tmp_path / "bare", "me/fam", **to)
    torch.save({}, tmp_path / "bare" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only pickle files"):
        push_exits_to_hub(tmp_path / "bare", "me/fam", **to)
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="is a `llama`, not a family"):
        push_exits_to_hub(tmp_path / "plain", "me/fam", **to)
    assert hub.log == []


# reading back, in processes of their own: the client reads its address when it is imported

READ_BACK = r"""
import json, re, sys
sys.modules["hf_familial"] = None  # not even installed
import torch
from huggingface_hub import hf_hub_download
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = torch.tensor(json.loads(sys.argv[1]))
found = {}
with torch.no_grad():
    for name, revision in [("me/fam-depth1", None), ("me/fam-depth4", None), ("me/fam", "depth2")]:
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision)
        found[f"{name}@{revision}"] = model(ids).logits.tolist()
    family = AutoModelForCausalLM.from_pretrained("me/fam", trust_remote_code=True)
    for k in range(3):
        found[f"exit {k}"] = family(ids, exit_idx=k).logits.tolist()
for name in sys.argv[2:]:
    names, card = {}, open(hf_hub_download(name, "README.md")).read()
    for block in re.findall(r"```python\n(.*?)```", card, re.S):
        exec(block, names)
    family, inputs = names["family"], names["inputs"]
    texts = family.generate(**inputs), family.relay_generate(**inputs)
    found[f"card of {name}"] = [text.tolist() for text in texts]
found["text"] = AutoTokenizer.from_pretrained("me/fam-depth1")("once upon").input_ids
print(json.dumps(found))
"""


def run(code: str, *words: str, hub: Hub, home: Path, **env: str) -> str:
    """Python in a process of its own, with the server as its Hub."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment | env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stock_transformers_reads_members_and_family(hub, to, folder, bare, tmp_path):
    push_family_to_hub(folder, "me/fam", **to)
    push_family_to_hub(bare, "me/bare", **to)
    push_exits_to_hub(bare, "me/bare", exits=[1], **to)
    push_exits_to_hub(folder, "me/fam", **to)
    push_exits_to_hub(folder, "me/fam", exits=[1], layout="revisions", **to)
    cards = ("me/fam", "me/fam-depth4", "me/bare", "me/bare-depth2")
    shown = run(READ_BACK, json.dumps(IDS), *cards, hub=hub, home=tmp_path / "home")
    found = json.loads(shown.splitlines()[-1])
    family = FamilialForCausalLM.from_pretrained(folder)
    names = {0: "me/fam-depth1@None", 1: "me/fam@depth2", 2: "me/fam-depth4@None"}
    for k, name in names.items():
        expected = family(torch.tensor(IDS), exit_idx=k).logits.tolist()
        assert found[name] == expected
        assert found[f"exit {k}"] == expected
    assert found["text"] == [3, 4]
    # what the cards say runs as it stands, the relay too
    for name in cards:
        text, relayed = found[f"card of {name}"]
        assert text == relayed
        assert len(text[0]) > 3


def test_a_repository_is_described_without_its_weights(hub, to, folder, tmp_path):
    model = FamilialForCausalLM.from_backbone(tiny_model("llama", vocab_size=8000), exits=[2, 4])
    model.save_pretrained(tmp_path)
    (tmp_path / "members.json").write_text(
        json.dumps([{"depth": 2, "eval_loss": 2.0}, {"depth": 4, "eval_loss": 1.0}])
    )
    push_family_to_hub(tmp_path, "me/fam", max_shard_size="1200KB", **to)
    files = hub.repos["me/fam"].files()
    shards = {name: len(files[name]) for name in weights_of(hub, "me/fam")}
    assert len(shards) == 3
    hub.sent.clear()
    found = describe("me/fam", token=WRITE, endpoint=hub.url)
    local = describe(tmp_path)
    assert [row.eval_loss for row in found.exits] == [2.0, 1.0]
    assert found.exits == local.exits
    assert found.stored_bytes == local.stored_bytes
    # the client asks for the first 100 kB of a file, where its header is
    assert {name: n for name, n in hub.sent.items() if name in shards} == {
        name: min(size, 100_001) for name, size in shards.items()
    }
    assert sum(shards.values()) > 2_000_000


def test_a_repository_that_is_not_there(hub, to):
    with pytest.raises(HubNotFoundError, match="there is no such repository") as caught:
        describe("me/nothing", token=WRITE, endpoint=hub.url)
    # most often a folder was meant, and its name was wrong
    assert "`me/nothing` (there is no folder with this name, so it must be" in str(caught.value)
    with pytest.raises(HubNotFoundError, match="or it is private"):
        describe("me/nothing", endpoint=hub.url)


def test_a_folder_that_is_not_there_is_said_before_the_hub_is_asked(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert find_source("outputs/family").guessed
    assert caplog.messages == []
    (tmp_path / "outputs").mkdir()
    assert find_source("outputs/family").guessed
    assert caplog.messages == ["There is no folder `outputs/family`. Looking for it on the Hub."]


def test_what_the_client_asks_for(hub, to, folder):
    push_exits_to_hub(folder, "me/fam", **to)
    assert {name.split("/")[0] for name in hub.repos} == {USER}
    assert set(hub.endpoints()) == {
        "GET /api/models/{repo}",
        "GET /api/models/{repo}/tree/{revision}",
        "HEAD /{repo}/resolve/{revision}/{file}",
        "POST /api/collections",
        "POST /api/collections/{slug}",
        "POST /api/models/{repo}/commit/{revision}",
        "POST /api/models/{repo}/preupload/{revision}",
        "POST /api/repos/create",
        "POST /api/validate-yaml",
        "POST /lfs/{oid}/verify",
        "POST /{repo}.git/info/lfs/objects/batch",
        "PUT /lfs/{oid}",
    }


def test_the_clients_own_protocol_for_large_files_is_used_where_it_is_on(
    hub, to, folder, monkeypatch
):
    """Xet needs storage that this server has not; its failure is told like any other."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(HubUnavailableError, match="could not write to `me/fam-depth1` in 2 tries"):
        push_exits_to_hub(folder, "me/fam", **to | {"retry": Retry(2, 0.0, 0.0)})
    assert hub.count("GET", "/xet-write-token/main") == 2
    assert hub.commits_of(NAMES[0]) == []


def test_the_example(hub, folder, tmp_path, monkeypatch, capsys):
    let_out(monkeypatch, tmp_path / "cache", hub)
    path = Path(__file__).parents[2] / "examples" / "push_exits.py"
    words = [str(path), str(folder), "me/fam", "--exits", "0", "-1", "--memory", "1e9"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(path), run_name="__main__")
    shown = capsys.readouterr().out
    assert "The deepest member that fits is exit 2." in shown
    assert set(hub.repos) == {"me/fam", NAMES[0], NAMES[2]}
    hub.log.clear()
    monkeypatch.setattr(sys, "argv", [*words, "--dry_run", "True"])
    runpy.run_path(str(path), run_name="__main__")
    assert hub.log == []
    monkeypatch.setattr(sys, "argv", [str(path)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    assert stop.value.code == 2
