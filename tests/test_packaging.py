"""Metadata and pins agree with each other and with the code."""

import ast
import configparser
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from hf_familial.models.familial.configuration_familial import TRANSFORMERS


ROOT = Path(__file__).resolve().parents[1]
# extras whose requirements the tests do not install
UNPINNED_EXTRAS = {"dev", "clients", "peers"}


@pytest.fixture(scope="module")
def metadata():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


@pytest.fixture(scope="module")
def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[^*]+", str(r.specifier)) for r in requirements)
    return {canonicalize_name(r.name): Version(str(r.specifier)[2:]) for r in requirements}


@pytest.fixture(scope="module")
def version():
    tree = ast.parse((ROOT / "src/hf_familial/__init__.py").read_text(encoding="utf-8"))
    values = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and [ast.unparse(t) for t in node.targets] == ["__version__"]
    ]
    assert len(values) == 1, "`__version__` must be assigned once, a plain string"
    return values[0]


def requirements_of(metadata):
    """Every requirement of the package and of its pinned extras, our own name aside."""
    blocks = {"install_requires": metadata["options"]["install_requires"]}
    blocks |= dict(metadata["options.extras_require"])
    for name, block in blocks.items():
        if name not in UNPINNED_EXTRAS:
            for line in filter(None, block.splitlines()):
                requirement = Requirement(line)
                if canonicalize_name(requirement.name) != "hf-familial":
                    yield requirement


def test_the_oldest_transformers_is_said_once_and_tested(metadata):
    """By the models to an older one, by setup.cfg to pip, and run by CI."""
    lines = metadata["options"]["install_requires"].splitlines()
    (named,) = [Requirement(x) for x in lines if x.startswith("transformers")]
    assert f">={TRANSFORMERS}" in str(named.specifier).split(",")
    workflow = (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    assert f'OVERRIDE="transformers=={TRANSFORMERS}.0"' in workflow


def test_version_has_one_home(metadata, version):
    assert metadata["metadata"]["version"] == "attr: hf_familial.__version__"
    assert str(Version(version)) == version


def test_metadata_has_one_home():
    assert "\n[project]" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_changelog_knows_the_version(version):
    headings = re.findall(
        r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M
    )
    assert "Unreleased" in headings or version in headings


def test_every_requirement_is_pinned(metadata, pins):
    missing = [str(r) for r in requirements_of(metadata) if canonicalize_name(r.name) not in pins]
    assert missing == []


def test_every_pin_satisfies_its_requirement(metadata, pins):
    wrong = [
        f"{r} but {pins[canonicalize_name(r.name)]}"
        for r in requirements_of(metadata)
        if not r.specifier.contains(pins[canonicalize_name(r.name)], prereleases=True)
    ]
    assert wrong == []


def test_pins_carry_no_local_version(pins):
    assert [name for name, version in pins.items() if version.local] == []


def test_the_console_script_is_packaged_outside_the_package(metadata):
    """It imports nothing at its top, so that it starts before the package registers its models."""
    (script,) = metadata["options.entry_points"]["console_scripts"].split("\n")[1:]
    assert script == "hf-familial = hf_familial_command:main"
    assert metadata["options"]["py_modules"] == "hf_familial_command"
    tree = ast.parse((ROOT / "src" / "hf_familial_command.py").read_text(encoding="utf-8"))
    assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body)
