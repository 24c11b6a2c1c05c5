"""Offline, on one thread, and quiet: set before anything imports transformers."""

import os


os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import hypothesis
import torch
from transformers.utils import logging


torch.set_num_threads(1)
logging.disable_progress_bar()
hypothesis.settings.register_profile("offline", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile("offline")
