"""Who may import whom: the layers of the package, held by its syntax trees alone."""

import sys
from pathlib import Path

import pytest
from imports import Import, cycles, imports_of, modules_of


SRC = Path(__file__).resolve().parents[1] / "src" / "hf_familial"
MAX_LINES, MAX_LINES_CLOSED = 400, 450

# room (a module or folder right below the package) -> the rooms it may import, itself aside
GROUND = {"errors", "paths", "runs", "_records", "_files", "_wording"}
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "_wording": set(),
    "paths": {"errors"},
    "_files": {"errors", "paths"},
    "_records": {"errors", "_wording"},
    "runs": GROUND - {"runs"},
    "scaling": GROUND,
    "models": GROUND,
    "toy": {"models"},
    "scripts": GROUND | {"models", "toy"},
    "checkpoints": GROUND | {"models"},
    "flops": GROUND | {"models"},
    "decoding": GROUND | {"models", "flops", "checkpoints"},
    "evaluation": GROUND | {"models", "flops", "checkpoints"},
    "extension": GROUND | {"models", "checkpoints", "decoding"},
    "hub": GROUND | {"models", "flops", "checkpoints", "evaluation", "decoding"},
    "handoff": GROUND | {"models", "flops", "checkpoints", "evaluation", "decoding"},
    "training": GROUND | {"models", "flops", "checkpoints", "evaluation", "decoding"},
}
ROOMS["isoflop"] = {*ROOMS} - {"scaling", "scripts", "extension"}
ROOMS["cli"] = set(ROOMS)
ROOMS["__main__"] = {"cli"}

# rooms inside a room and modules beside them, from the ground up: each may import those before it
FLOORS: dict[str, tuple[str, ...]] = {
    "scaling": (
        "laws",
        "flop_models",
        "_cells",
        "data",
        "optima",
        "quantities",
        "leverage",
        "simulation",
        "tables",
        "isoflop_optima",
        "results",
        "_problem",
        "_search",
        "fitting",
        "bias",
        "comparison",
        "_covariance",
        "resampling",
        "confidence",
        "diagnostics",
        "prediction",
        "planning",
        "candidates",
        "advice",
        "report",
    ),
}

# rooms whose imports from outside the package and the standard library are counted
THIRD_PARTY: dict[str, set[str]] = {
    **dict.fromkeys(GROUND, set()),
    "models": {"torch", "transformers", "safetensors"},
    "scaling": {"numpy", "scipy", "matplotlib", "jinja2", "markupsafe", "pyarrow"},
}

# folders shipped flat, as remote code: of ours they may write `from .sibling import name` alone
CLOSED = {"models.familial"}

# what any room outside the closed ones may take from the package itself
ROOT_NAMES = {"__version__"}


def is_closed(module: str) -> bool:
    """Whether a module stands in a closed room."""
    return any(module == room or module.startswith(f"{room}.") for room in CLOSED)


def judge(found: Import, package: str, known: set[str]) -> str | None:
    """Return what is wrong with one import, or `None`; `known` are the modules of the package."""
    room = found.module.split(".")[0]
    top, *rest = found.target.split(".")
    if top != package:
        allowed = THIRD_PARTY.get(room)
        if allowed is None or top in allowed or top in sys.stdlib_module_names:
            return None
        return f"`{room}` may import only {sorted(allowed)} from outside, not `{top}`"
    if is_closed(found.module):
        return None if found.sibling else "a closed room imports siblings by `from .name import`"
    target = rest[0] if rest else ""
    if not room:  # the package itself: names are lazy, the models alone are not
        if found.eager and target != "models":
            return f"the package imports `{target}` eagerly; make the name lazy"
        return None
    if target in ROOT_NAMES:
        return None if room not in THIRD_PARTY else f"`{room}` may not import the package"
    if target == room:
        return judge_floor(found)
    if any(part.startswith("_") for part in rest[1:]) and found.target in known:
        return f"`{room}` may not import the private module `{'.'.join(rest)}`"
    if target in ROOMS[room]:
        return None
    return f"`{room}` may not import `{target or package}`"


def judge_floor(found: Import) -> str | None:
    """What is wrong with an import from one floor of a room to another, or None."""
    room, *inside = found.module.split(".")
    floors = FLOORS.get(room, ())
    if not inside or inside[0] not in floors:  # the room itself shows names of every floor
        return None
    lower = [*found.target.split("."), ""][2]
    if lower in floors[: floors.index(inside[0]) + 1]:
        return None
    return f"`{room}.{inside[0]}` may not import `{lower or room}`"


def violations(root: Path) -> list[str]:
    """Everything the layers forbid in the package at `root`, one line each."""
    modules, problems = modules_of(root), []
    edges: dict[str, set[str]] = {}
    for module, path in modules.items():
        room, *inside = module.split(".")
        if room and room not in ROOMS:
            problems.append(f"{module}: no row for `{room}` in ROOMS")
        if inside and inside[0] not in FLOORS.get(room, inside):
            problems.append(f"{module}: no floor for `{inside[0]}` in FLOORS")
        lines = len(path.read_text(encoding="utf-8").splitlines())
        limit = MAX_LINES_CLOSED if is_closed(module) else MAX_LINES
        if lines > limit:
            problems.append(f"{module}: {lines} lines, more than {limit}")
    for found in imports_of(root):
        if found.module.split(".")[0] not in {"", *ROOMS}:
            continue
        problem = judge(found, root.name, {f"{root.name}.{name}" for name in modules})
        if problem:
            problems.append(f"{found.module or root.name}:{found.line}: {problem}")
        target = found.target.removeprefix(root.name).removeprefix(".")
        # a room's lazy and TYPE_CHECKING imports count too; the package's own show its names
        lazy_name = not found.module and not found.eager
        if found.target.startswith(f"{root.name}.") and target in modules and not lazy_name:
            if target != found.module:
                edges.setdefault(found.module, set()).add(target)
    return problems + [f"cycle: {cycle}" for cycle in cycles(edges)]


def test_the_package_keeps_its_layers():
    assert violations(SRC) == []


@pytest.fixture
def tree(tmp_path):
    """Writes a small package `hf_familial` from {path: source} and returns its folder."""

    def write(files: dict[str, str]) -> Path:
        root = tmp_path / "hf_familial"
        for name, source in {"__init__.py": "", **files}.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source, encoding="utf-8")
        return root

    return write


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(
            {"training/trainer.py": "from ..handoff import state", "handoff/state.py": ""},
            "`training` may not import `handoff`",
            id="sideways",
        ),
        pytest.param(
            {"flops.py": "import hf_familial.training.args", "training/args.py": ""},
            "`flops` may not import `training`",
            id="upward",
        ),
        pytest.param(
            {"flops.py": "def f():\n    from hf_familial.hub import export", "hub/export.py": ""},
            "flops:2: `flops` may not import `hub`",
            id="upward-in-a-function",
        ),
        pytest.param(
            {"hub/push.py": "from .. import training", "training.py": ""},
            "`hub` may not import `training`",
            id="same-floor",
        ),
        pytest.param(
            {"hub/push.py": "from ..flops._count import f", "flops/_count.py": ""},
            "`hub` may not import the private module `flops._count`",
            id="private-of-another-room",
        ),
        pytest.param(
            {"training/data.py": "from hf_familial import FamilialConfig"},
            "`training` may not import `FamilialConfig`",
            id="lazy-name-of-the-package",
        ),
        pytest.param(
            {"runs.py": "from .flops import count", "flops.py": ""},
            "`runs` may not import `flops`",
            id="runs-stand-on-the-ground",
        ),
        pytest.param(
            {"isoflop/sweep.py": "from ..scaling import fit", "scaling/fit.py": ""},
            "`isoflop` may not import `scaling`",
            id="nobody-imports-the-island",
        ),
        pytest.param(
            {"scaling/fit.py": "import torch"},
            "`scaling` may import only ['jinja2', 'markupsafe', 'matplotlib', 'numpy', 'pyarrow', "
            "'scipy'] from outside, not `torch`",
            id="island-without-torch",
        ),
        pytest.param(
            {"runs.py": "import torch"},
            "`runs` may import only [] from outside, not `torch`",
            id="runs-on-the-standard-library",
        ),
        pytest.param(
            {"scaling/fit.py": "from ..flops import count", "flops.py": ""},
            "`scaling` may not import `flops`",
            id="island-without-ours",
        ),
        pytest.param(
            {"models/familial/losses.py": "import numpy"},
            "`models` may import only ['safetensors', 'torch', 'transformers'] from outside, not "
            "`numpy`",
            id="closed-room-third-party",
        ),
        pytest.param(
            {
                "models/familial/a.py": "from hf_familial.models.familial.b import x",
                "models/familial/b.py": "x = 1",
            },
            "a closed room imports siblings by `from .name import`",
            id="closed-room-absolute",
        ),
        pytest.param(
            {"models/familial/a.py": "from . import b", "models/familial/b.py": ""},
            "a closed room imports siblings by `from .name import`",
            id="closed-room-bare-dot",
        ),
        pytest.param(
            {"models/familial/a.py": "from ...flops import x", "flops.py": ""},
            "a closed room imports siblings by `from .name import`",
            id="closed-room-parent",
        ),
        pytest.param(
            {"hub/a.py": "from .b import x", "hub/b.py": "from .a import y"},
            "cycle: hub.a -> hub.b -> hub.a",
            id="cycle",
        ),
        pytest.param(
            {"hub/__init__.py": "from .a import x", "hub/a.py": "from hf_familial.hub import x"},
            "cycle: hub -> hub.a -> hub",
            id="cycle-through-a-package",
        ),
        pytest.param(
            {"__init__.py": "from .training import FamilialTrainer", "training/__init__.py": ""},
            "the package imports `training` eagerly",
            id="eager-package",
        ),
        pytest.param(
            {"scaling/laws/law.py": "from ..data import rows", "scaling/data/rows.py": ""},
            "`scaling.laws` may not import `data`",
            id="upstairs",
        ),
        pytest.param(
            {"scaling/data/rows.py": "def f():\n    from .. import fit", "scaling/__init__.py": ""},
            "scaling.data.rows:2: `scaling.data` may not import `scaling`",
            id="floor-to-its-room",
        ),
        pytest.param(
            {"scaling/attic.py": ""},
            "scaling.attic: no floor for `attic` in FLOORS",
            id="unknown-floor",
        ),
        pytest.param({"utils.py": ""}, "utils: no row for `utils` in ROOMS", id="unknown-room"),
        pytest.param({"flops.py": "#\n" * 401}, "flops: 401 lines, more than 400", id="too-long"),
    ],
)
def test_a_violation_is_found(tree, files, expected):
    found = violations(tree(files))
    assert any(expected in line for line in found), found


def test_a_lawful_tree_passes(tree):
    root = tree(
        {
            "__init__.py": (
                "from typing import TYPE_CHECKING\n"
                "from . import models\n"
                "if TYPE_CHECKING:\n    from .training import FamilialTrainer\n"
            ),
            "models/__init__.py": "from .familial import FamilialConfig",
            "models/familial/__init__.py": "from .exits import FamilialConfig",
            "models/familial/exits.py": "import math\nimport torch\nfrom .losses import loss",
            "models/familial/losses.py": "from transformers.utils import logging",
            "runs.py": "import json",
            "flops.py": "from hf_familial.models import FamilialConfig\nfrom .runs import read",
            "hub/__init__.py": "from .push import push",
            "hub/push.py": "from .. import __version__\nfrom ..flops import count\nimport rich",
            "training/__init__.py": "from ..evaluation import judge",
            "evaluation.py": "judge = 1",
            "scaling/__init__.py": "from .fitting.fit import fit",
            "errors.py": "",
            "scaling/laws/law.py": "from ...errors import UnknownLawError",
            "scaling/fitting/fit.py": (
                "import numpy as np\nfrom scipy import optimize\nimport dataclasses\n"
                "from ..laws.law import Law\nfrom .search import minimise"
            ),
            "scaling/fitting/search.py": "from hf_familial.errors import TooFewError",
            "cli.py": "from .scaling import fit\nfrom .training import args\nimport typer",
        }
    )
    assert violations(root) == []


def test_a_cycle_that_only_types_see_is_found(tree):
    lazy = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import y\n"
    found = violations(tree({"hub/a.py": "from .b import x", "hub/b.py": lazy}))
    assert found == ["cycle: hub.a -> hub.b -> hub.a"]
