"""Offline, on one thread, and quiet: set before anything imports transformers."""

import atexit
import gc
import os
import shutil
import tempfile


os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()  # code of checkpoints, of this process alone

import hypothesis
import pytest
import torch
from module_keywords import keywords
from transformers.utils import logging


atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
torch.set_num_threads(1)
logging.disable_progress_bar()
hypothesis.settings.register_profile("offline", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile("offline")


def pytest_collection_finish() -> None:
    # accelerate collects all garbage at both ends of each training: without this, each time takes
    # a third of a second, spent on the modules and tests loaded by now
    gc.collect()
    gc.freeze()


def pytest_itemcollected(item: pytest.Item) -> None:
    # `-k cuts` runs the tests of every file that concerns the module of that name
    item.extra_keyword_matches.update(keywords(item.path))
