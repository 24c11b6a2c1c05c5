"""The familial model: the classes that travel with every checkpoint, and what builds them.

Code that came with a checkpoint has classes of its own. So other rooms recognise a family by what
it is and not by its class.
"""

from typing import Any

from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig


def is_family_config(x: Any) -> bool:
    """Return whether `x` is the config of a family."""
    return isinstance(x, PreTrainedConfig) and x.model_type == "familial"


def is_family(x: Any) -> bool:
    """Return whether `x` is a family with heads, itself and not in a wrapper."""
    return isinstance(x, PreTrainedModel) and is_family_config(x.config) and hasattr(x, "lm_head")
