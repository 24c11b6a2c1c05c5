"""Transformers' tests, importable: the test files of its source distribution as one package.

The distribution carries the files right below `tests/` and none of its sub-packages. What the files
import from those is replaced by the stand-ins below, empty where `NOT_RUN` says so.
"""

import importlib
import os
import sys
from types import ModuleType
from unittest import mock

import transformers


NAME = "transformers_tests"

# groups of transformers' tests that are left out -> why
NOT_RUN = {
    "ExportTesterMixin": "not in the source distribution",
    "GenerationTesterMixin": "not in the source distribution; tests/models has its own oracles",
    "PipelineTesterMixin": "needs models from the Hub",
    "FSDPTesterMixin": "its helpers are not in the source distribution; needs several devices",
    "TensorParallelTesterMixin": "as FSDPTesterMixin",
    "ExpertParallelTesterMixin": "as FSDPTesterMixin",
}


def empty(mixin: str) -> type:
    """An empty class in the place of a mixin that is not run."""
    assert mixin in NOT_RUN
    return type(mixin, (), {})


def stand_in(name: str, **attributes: object) -> ModuleType:
    """Make `transformers_tests.<name>` importable with the given attributes."""
    module = ModuleType(f"{NAME}.{name}".removesuffix("."))
    module.__path__ = []
    vars(module).update(attributes)
    sys.modules[module.__name__] = module
    return module


def load(name: str) -> ModuleType:
    """Import one of transformers' test files."""
    if NAME not in sys.modules:
        stand_in("").__path__ = [os.environ["FAMILIAL_CONFORMANCE"]]
        stand_in("exporters")
        stand_in("exporters.test_export", ExportTesterMixin=empty("ExportTesterMixin"))
        stand_in("generation")
        stand_in("generation.test_utils", GenerationTesterMixin=empty("GenerationTesterMixin"))
        stand_in("utils")
        stand_in("utils.test_configuration_utils", config_common_kwargs={})
    # they look for transformers' sources beside them; the installed ones are meant
    with mock.patch("transformers.utils.direct_transformers_import", lambda _: transformers):
        return importlib.import_module(f"{NAME}.{name}")
