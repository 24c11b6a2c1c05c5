"""Every Python block of the documentation runs, page by page, as a reader would run it.

The Hub is a small one, in this process; the repositories, folders and files that pages speak of are
made of one tiny family. A page may take the names of `given` for granted, and nothing else.
"""

import shutil
from pathlib import Path

import pytest
import torch
from backbones import tiny_model
from datasets import Dataset
from docs.blocks import Block, blocks_of, name_of, pages
from hub.hub_server import LFS_SUFFIXES, Blob, Hub, Repo, let_out

from hf_familial import FamilialForCausalLM, FamilialTrainingArguments
from hf_familial.scaling import fit, get_law
from hf_familial.scaling.report import analyse, write_analysis
from hf_familial.scaling.simulation import isoflop_design, simulate
from hf_familial.toy import toy_decoder


# what pages call a decoder or a family on the Hub
DECODERS = {"Qwen/Qwen3-0.6B": "qwen3", "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2"}
FAMILIES = ("me/family",)
# what they call a family on the disk
FOLDERS = ("family", "outputs/pretrain")

# page -> blocks that say of themselves, in their first line, why no test runs them
NOT_RUN: dict[str, int] = {"docs/how-to/ray.md": 1, "docs/quickstart.md": 1}
# page -> why it takes longer than others
SLOW = {
    "docs/quickstart.md": "tunes exits for 120 steps",
    "docs/trainers.md": "imports trl and trains 10 steps of 30 layers",
}


def python_blocks(page: Path) -> list[Block]:
    found = blocks_of(name_of(page), page.read_text(encoding="utf-8"))
    return [block for block in found if block.language in ("python", "py")]


PAGES = [page for page in pages() if python_blocks(page)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Decoders with as many layers as those on the Hub, a family, and a fit."""
    folder = tmp_path_factory.mktemp("checkpoints")
    _, tokenizer = toy_decoder()
    words = {"vocab_size": len(tokenizer), "tie_word_embeddings": True}
    qwen3 = tiny_model("qwen3", 28, layer_types=["full_attention"] * 28, **words)
    smollm2 = tiny_model("llama", 30, **words)
    family = FamilialForCausalLM.from_backbone(tiny_model("llama", 10, **words), exits=[8, 9, 10])
    for model, name in ((qwen3, "qwen3"), (smollm2, "smollm2"), (family, "family")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    law = get_law("familial")
    truth = law.published["assumed"].values
    design = isoflop_design(law, truth, [1e19, 1e20, 1e21], G=[1, 2, 4])
    write_analysis(
        folder / "fit.json", analyse(fit(law, simulate(law, truth, design, noise=0.002)))
    )
    return folder


def repository(folder: Path) -> Repo:
    """What a push of the folder would have made."""
    repo = Repo()
    files = {path.name: path for path in folder.iterdir()}
    tree = {n: Blob(p.read_bytes(), n.endswith(LFS_SUFFIXES)) for n, p in files.items()}
    repo.commit("main", tree, "as pushed")
    return repo


@pytest.fixture
def desk(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where a reader sits: a folder with their checkpoints, and the Hub."""
    for name in FOLDERS:
        shutil.copytree(checkpoints / "family", tmp_path / name)
    shutil.copy(checkpoints / "fit.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    with Hub().running() as hub:
        let_out(monkeypatch, tmp_path / "cache", hub)
        names = DECODERS | dict.fromkeys(FAMILIES, "family")
        hub.repos |= {name: repository(checkpoints / kind) for name, kind in names.items()}
        yield tmp_path


def given() -> dict[str, object]:
    """What a page may take for granted: a tokenizer, a text, rows, and training arguments."""
    _, tokenizer = toy_decoder()
    inputs = tokenizer("import os\n\n\ndef main():", return_tensors="pt")
    rows = {"input_ids": torch.randint(250, (32, 32)).tolist()}
    args = FamilialTrainingArguments(
        "outputs/run", max_steps=2, use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    return {
        "args": args,
        "dataset": Dataset.from_dict(rows | {"labels": rows["input_ids"]}),
        "input_ids": inputs.input_ids,
        "inputs": inputs,
        "tokenizer": tokenizer,
    }


def marked(page: Path):
    return pytest.param(page, marks=[pytest.mark.slow] if name_of(page) in SLOW else [])


@pytest.mark.parametrize("page", [marked(page) for page in PAGES], ids=map(name_of, PAGES))
def test_a_page_runs(page: Path, desk: Path) -> None:
    torch.manual_seed(0)
    namespace = given() | {"__name__": "__main__"}
    for block in blocks_of(name_of(page), page.read_text(encoding="utf-8")):
        if block.title is not None and block.language in ("yaml", "json", "toml"):
            (desk / block.title).write_text(block.text)
        if block.language not in ("python", "py") or block.reason_not_run:
            continue
        # so that a traceback names the page and its line
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        exec(code, namespace)


def test_what_is_not_run_says_so() -> None:
    counts = {name_of(p): sum(bool(b.reason_not_run) for b in python_blocks(p)) for p in PAGES}
    assert {name: count for name, count in counts.items() if count} == NOT_RUN


def test_blocks_are_found() -> None:
    markdown = (
        'a\n```python title="x.py"\n1\n```\n  ```bash\n  b\n  ```\n'
        "````text\n```python\n2\n```\n````\n"
    )
    found = blocks_of("page", markdown)
    assert [(b.language, b.title, b.text, b.line) for b in found] == [
        ("python", "x.py", "1\n", 3),
        ("bash", None, "b\n", 6),
        ("text", None, "```python\n2\n```\n", 9),
    ]
    with pytest.raises(ValueError, match="not closed"):
        blocks_of("page", "```python\n1\n")
