"""Search for the newest checkpoint from which a training can resume."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import CONFIG_NAME

from ..models.familial import FamilialConfig
from ..models.familial.configuration_familial import SHAPE


logger = logging.getLogger(__name__)


def last_complete_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """Return the newest complete checkpoint in an output folder of a trainer.

    A process that was killed while it saved leaves an incomplete checkpoint. `Trainer` writes
    `trainer_state.json` last, so a checkpoint without this file is skipped, with a warning.

    Args:
        folder (`str` or `os.PathLike`): The `output_dir` of the training.

    Returns:
        `str` or `None`: Path of the checkpoint, or `None` if the folder has no complete one.

    Example:
        >>> trainer.train(resume_from_checkpoint=last_complete_checkpoint("outputs/pretrain"))
    """
    named = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = [(named.fullmatch(path.name), path) for path in Path(folder).glob("*/")]
    steps = {int(match[1]): path for match, path in found if match}
    for _, path in sorted(steps.items(), reverse=True):
        if _has_state(path):
            return str(path)
        logger.warning(
            "The checkpoint %s is incomplete, so the training does not resume from it. Its file "
            "`%s` is missing or damaged.",
            path,
            TRAINER_STATE_NAME,
        )
    return None


def checkpoint_to_resume(given: str | bool, folder: str, config: FamilialConfig) -> str | bool:
    """Return a checked checkpoint. `given=True` means the newest complete one in `folder`.

    Raises:
        ValueError: If the checkpoint has other exits, because `Trainer` would load it, or if the
            folder has incomplete checkpoints only.
    """
    checkpoint = given
    if checkpoint is True and Path(folder).is_dir():
        checkpoint = last_complete_checkpoint(folder) or True
        damaged = get_last_checkpoint(folder)
        if checkpoint is True and damaged is not None:
            raise ValueError(
                "`resume_from_checkpoint=True` needs a complete checkpoint, but the folder "
                f"`{folder}` has only incomplete ones, such as `{Path(damaged).name}`. Delete "
                "them and start a new training."
            )
    if isinstance(checkpoint, bool) or not (Path(checkpoint) / CONFIG_NAME).is_file():
        return checkpoint  # `Trainer` reports a missing checkpoint; adapters alone have no config
    stored = FamilialConfig.from_pretrained(checkpoint)
    for name in SHAPE:
        before, now = getattr(stored, name), getattr(config, name)
        if before != now:
            raise ValueError(
                f"`resume_from_checkpoint` ({checkpoint}) has the `{name}` {before!r}, but "
                f"this model has {now!r}. Resume with a model like that of the checkpoint, or "
                "load its weights and start a new training."
            )
    return checkpoint


def _has_state(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
