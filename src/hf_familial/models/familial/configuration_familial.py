"""The config of a family, with the config of its backbone and the depths of its exits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import is_dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from numbers import Integral
from typing import Any, ClassVar

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging
from transformers.utils.versions import require_version

from .backbones import HOSTS, UNSUPPORTED, unsupported_backbone


try:
    from transformers.configuration_utils import SubConfigSpec
except ImportError:  # before Transformers 5.20
    SubConfigSpec = None

logger = logging.get_logger(__name__)

# The config loads with any Transformers 5. The models need 5.23, which added `DummyLayer` and
# lists of `output_hidden_states` that count the embedding.
TRANSFORMERS = "5.23"

# The limit protects against configs from untrusted sources, because every layer takes time to
# build. Private layers count too. The deepest decoders of Transformers have about 130 layers.
MAX_LAYERS = 4096
SHAPE = ("exits", "exit_norm", "exit_head", "num_exit_layers")  # fields that name weights

# A process without this package loads a checkpoint by these names if `trust_remote_code=True`.
AUTO_MAP = {
    "AutoConfig": "configuration_familial.FamilialConfig",
    "AutoModel": "modeling_base.FamilialModel",
    "AutoModelForCausalLM": "modeling_familial.FamilialForCausalLM",
}


def evenly_spaced_exits(num_hidden_layers: int, num_exits: int) -> list[int]:
    """Return evenly spaced depths, for example `[7, 14, 21, 28]` for 28 layers and 4 exits."""
    if not is_int(num_exits) or not 1 <= num_exits <= num_hidden_layers:
        raise ValueError(
            f"`num_exits` must be an integer from 1 to {num_hidden_layers}, got {num_exits!r}."
        )
    return [round(num_hidden_layers * (k + 1) / num_exits) for k in range(num_exits)]


def is_int(value: object) -> bool:
    """Return whether a value is an integer. A boolean does not count as one."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise `ValueError` unless an option is one of `choices`. The message suggests a near name."""
    known = list(choices)
    if value not in known:
        close = get_close_matches(str(value).lower(), known, 2)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        several = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
        raise ValueError(f"`{name}` must be one of {several}, got {value!r}.{hint}")


def check_exits(exits: Sequence[int], num_hidden_layers: int) -> None:
    """Raise `ValueError` unless `exits` are increasing integers that end at the full depth."""
    integers = bool(exits) and all(map(is_int, exits))
    increasing = integers and all(a < b for a, b in zip([0, *exits], exits, strict=False))
    if not increasing or exits[-1] != num_hidden_layers:
        raise ValueError(
            "`exits` must be strictly increasing integers of 1 or more, and the last must equal "
            f"`num_hidden_layers` ({num_hidden_layers}), got {list(exits)}."
        )


def check_model_type(model_type: object) -> None:
    """Raise `ValueError`, with near names, if Transformers has no config of this type."""
    if model_type not in CONFIG_MAPPING:
        known = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        close = get_close_matches(str(model_type).lower(), known, 3)
        near = f"Did you mean {' or '.join(close)}?" if close else "Use for example llama or qwen3."
        raise ValueError(f"`model_type` {model_type!r} is unknown to Transformers. {near}")


def check_text_fields(text_config: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a backbone's config has no known type or too many layers."""
    if "model_type" not in text_config:
        raise ValueError(
            "`text_config` must have a `model_type`, got only the keys "
            f"{sorted(text_config)}. Add for example `model_type='llama'`."
        )
    check_model_type(text_config["model_type"])
    kind: Any = CONFIG_MAPPING[text_config["model_type"]]
    name = kind.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    for field in {name, "num_hidden_layers"}:
        if is_int(count := text_config.get(field, 0)) and count > MAX_LAYERS:
            raise ValueError(f"`{field}` must be {MAX_LAYERS} or less, got {count}.")


def _text_config_property(name: str) -> property:
    def read(self: FamilialConfig) -> Any:
        try:
            return getattr(self.text_config, name)
        except RuntimeError as error:
            # the field differs from layer to layer, so the config has no single value for it
            raise AttributeError(str(error)) from error

    return property(
        read,
        lambda self, value: setattr(self.text_config, name, value),
        doc=f"`{name}` of `text_config`.",
    )


class AutoMap(dict[str, str]):
    """An `AUTO_MAP` that raises `ImportError` if Transformers is too old for the models."""

    def __getitem__(self, name: str) -> str:
        if name.startswith("AutoModel"):
            check_transformers()
        return super().__getitem__(name)


class FamilialConfig(PreTrainedConfig):
    r"""The config of a family, a decoder (the backbone) with G exits.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a [`LlamaConfig`]):
            Config of the backbone. A dict must contain `model_type`.
        exits (`list[int]`, *optional*): Depths of the exits, which are numbers of backbone layers.
            They increase strictly, and the last is `num_hidden_layers`. Defaults to 4 evenly spaced
            exits (fewer if the backbone has fewer layers).
        num_exit_layers (`int`, *optional*, defaults to 0): Number of private layers, which are
            extra decoder layers that only one early exit uses.
        exit_norm (`str`, *optional*, defaults to `"own"`): `"own"` gives each early exit its own
            norm. With `"shared"` all exits use the backbone's final norm.
        exit_head (`str`, *optional*, defaults to `"shared"`): With `"shared"` all exits use
            `lm_head`. `"own"` gives each early exit its own head, never tied to the embedding.
        default_exit (`int`, *optional*, defaults to -1): Index of the exit that `forward` and
            `generate` use if they get no `exit_idx`.
        tie_word_embeddings (`bool`, *optional*): Whether `lm_head` shares the weights of the input
            embedding, if the backbone's class can do that. Defaults to the value in `text_config`.

    Raises:
        ValueError: If a field is out of range, or `text_config` does not describe a decoder.

    Example:
        >>> text_config = {"model_type": "llama", "num_hidden_layers": 12}
        >>> config = FamilialConfig(text_config=text_config, exits=[4, 8, 12])

    Reference: arXiv:2512.23407 defines granularity G.
    """

    model_type: ClassVar[str] = "familial"
    if SubConfigSpec is None:
        sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    else:
        sub_configs_defaults: ClassVar[dict[str, Any]] = {
            "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")
        }
    keys_to_ignore_at_inference: ClassVar[list[str]] = (
        "past_key_values exit_losses exit_logits exit_hidden_states".split()
    )

    # `__post_init__` replaces both `None`
    text_config: PreTrainedConfig = None
    exits: list[int] = None  # type: ignore[assignment]
    num_exit_layers: int = 0
    exit_norm: str = "own"
    exit_head: str = "shared"
    default_exit: int = -1
    tie_word_embeddings: bool | None = None

    if not is_dataclass(PreTrainedConfig):  # before Transformers 5.4

        def __init__(self, **kwargs: Any) -> None:
            for name, kind in type(self).__annotations__.items():
                if not kind.startswith("ClassVar"):
                    setattr(self, name, kwargs.pop(name, getattr(type(self), name)))
            self.__post_init__(**kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.text_config, (dict, PreTrainedConfig, type(None))):
            raise ValueError(f"`text_config` must be a config or a dict, got {self.text_config!r}.")
        if isinstance(self.text_config, dict):
            check_text_fields(self.text_config)
        for name in kwargs:
            own = (*SHAPE, "default_exit")
            near = ["exits"] if name == "num_exits" else get_close_matches(name, own, 1, 0.75)
            if near:
                raise ValueError(f"`{name}` is not a config field. Did you mean `{near[0]}`?")
        if SubConfigSpec is None and not isinstance(self.text_config, PreTrainedConfig):
            fields = {"model_type": "llama"} | (self.text_config or {})
            self.text_config = AutoConfig.for_model(**fields)
            kwargs["auto_map"] = AutoMap(AUTO_MAP)
        parent: Any = super()
        made = getattr(parent, "__post_init__", None) or parent.__init__
        made(**kwargs)
        self._check_text_config()
        if self.exits is None:
            depth = self.num_hidden_layers
            self.exits = evenly_spaced_exits(depth, min(4, depth))
        if not isinstance(self.exits, Iterable):
            raise ValueError(f"`exits` must be a list of depths, got {self.exits!r}.")
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        # JSON cannot store the number types of numpy and torch
        if isinstance(value, list):
            value = [item.tolist() if hasattr(item, "tolist") else item for item in value]
        super().__setattr__(name, value.tolist() if hasattr(value, "tolist") else value)

    def check(self) -> None:
        """Check every field. The models call this again, in case a field was changed by hand."""
        self._check_text_config()
        self.exits = list(self.exits)  # runs `__setattr__` on depths that were changed in place
        depth = self.num_hidden_layers
        check_exits(self.exits, depth)
        layers = self.num_exit_layers
        if not is_int(layers) or not 0 <= layers <= depth:
            what = f"`num_exit_layers` must be an integer from 0 to {depth}"
            raise ValueError(f"{what}, got {layers!r}.")
        private = layers * (self.num_exits - 1)
        if depth + private > MAX_LAYERS:
            raise ValueError(
                f"The family must have {MAX_LAYERS} layers or less, got {depth} and {private} "
                "private ones. Choose fewer exits or a smaller `num_exit_layers`."
            )
        check_choice("exit_norm", self.exit_norm, ("own", "shared"))
        check_choice("exit_head", self.exit_head, ("shared", "own"))
        count, default = self.num_exits, self.default_exit
        if not is_int(default) or not -count <= default < count:
            raise ValueError(
                f"`default_exit` must be an integer from {-count} to {count - 1}, got {default}."
            )

    def _check_text_config(self) -> None:
        text_config = self.text_config
        if getattr(text_config, "is_encoder_decoder", False):
            raise ValueError(
                f"`{text_config.model_type}` is an encoder-decoder. The backbone of a family must "
                "be a decoder-only language model such as `llama` or `qwen3`."
            )
        if (inner := text_config.get_text_config(decoder=True)) is not text_config:
            raise ValueError(
                f"`{text_config.model_type}` consists of several models. Pass the config of its "
                f"language model (`{inner.model_type}`) as `text_config`."
            )
        kind = text_config.model_type
        if kind in UNSUPPORTED:
            raise unsupported_backbone(kind, UNSUPPORTED[kind])
        # A type that Transformers does not have may be a decoder. Its own types are all known.
        known = kind in CONFIG_MAPPING_NAMES and not kind.endswith("_text")
        encoder = kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (
            getattr(text_config, "is_decoder", True) is False
        )
        if known and encoder and kind not in HOSTS:
            raise unsupported_backbone(kind, "it is not a decoder-only language model")

    @property
    def num_exits(self) -> int:
        """`int`: Granularity G, the number of exits including the deepest one."""
        return len(self.exits)

    def resolve_exit(self, exit_idx: int | None = None) -> int:
        """Return an exit index between 0 and G - 1. `None` means `default_exit`."""
        exit_idx = self.default_exit if exit_idx is None else exit_idx
        if not is_int(exit_idx):
            raise TypeError(f"`exit_idx` must be an integer, got {exit_idx!r}.")
        if not -self.num_exits <= exit_idx < self.num_exits:
            raise IndexError(
                f"`exit_idx` must be between {-self.num_exits} and {self.num_exits - 1}, got "
                f"{exit_idx}. This family has {self.num_exits} exits, at depths {self.exits}."
            )
        return int(exit_idx) % self.num_exits

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a config from its fields. Raise `ValueError` if they have another `model_type`."""
        if (model_type := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(
                f"The checkpoint is a `{model_type}`, not a family. Call "
                "`FamilialForCausalLM.from_backbone` to turn it into a family."
            )
        for name in [n for n in SHAPE if n in config_dict and n in kwargs]:
            if kwargs[name] != config_dict[name]:
                what = f"`{name}` of a saved family is {config_dict[name]!r} and cannot change"
                raise ValueError(f"{what}, got {kwargs[name]!r}.")
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as they are saved in `config.json`, `auto_map` included."""
        return super().to_dict() | {"auto_map": dict(AUTO_MAP)}


for _name in (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "intermediate_size max_position_embeddings initializer_range use_cache pad_token_id "
    "bos_token_id eos_token_id".split()
):
    setattr(FamilialConfig, _name, _text_config_property(_name))


def check_transformers() -> None:
    """Raise `ImportError` if Transformers is too old for the models."""
    hint = (
        "Familial models need that version, although their configs load with any Transformers 5. "
        "Run `pip install -U transformers`. An exported member needs only the version of its class."
    )
    require_version(f"transformers>={TRANSFORMERS}", hint)


# --- The files of this folder run without the package. If it is installed, it adds features. ------

PACKAGE = "hf_familial"
SEAM = 3  # increased with every change of a signature in `Extension` or `Accelerator`


class Accelerator:
    """Replacements that make the relays of one model faster. This base class changes nothing.

    Every replacement must return the same numbers as the original.
    """

    def cache(self, cache: Any) -> Any:
        """Return a cache that is cheaper to extend, with the same keys and values."""
        return cache

    def prepare(self, relay: Any, fused_weights: bool | None) -> None:
        """Set faster norms, heads and segment passes in a new [`RelayCache`].

        A pass has a method `takes(new, attention_mask)`, which returns whether the pass can run
        `new` positions. Its arguments are states of shape `(batch, new, hidden)`, the segment's
        cache layers and position ids (`None` if they continue the count). `fused_weights=None`
        leaves the decision to the accelerator.
        """

    def decoder(self, decoder: Any) -> Any:
        """Return the decoder to use instead of a relay policy's `decoder`."""
        return decoder

    def flops(self, relay: Any, rows: int, tokens: int) -> tuple[float | None, float | None]:
        """Return the FLOPs that a [`RelayCache`] used, and those of plain decoding."""
        return None, None


class Extension:
    """The features that the package adds to a family. This base class runs without the package.

    Here the loss of sharded heads or of a compiled model keeps all logits in memory. Relays lack
    fused weights, chains, learned draft lengths and FLOPs.
    """

    def warm_start(self, cls: Any, backbone: Any, loading: Any, **fields: Any) -> Any:
        """Build a family of class `cls` from a decoder, or from its name and `loading` options."""
        raise _missing("`from_backbone`")

    def check_backbone(self, model: Any) -> None:
        """Raise if a backbone of an unknown type fails the numeric checks."""

    def construction(self, model: Any) -> AbstractContextManager[None]:
        """Return a context in which a model builds its modules from whole parameters."""
        return nullcontext()

    def load_cut(self, load: Any, name: Any, max_exit: int, *args: Any, **kwargs: Any) -> Any:
        """Load the members up to one exit with `load`, the `from_pretrained` of Transformers."""
        raise _missing("`max_exit`")

    def save(self, save: Any, model: Any, folder: Any, *args: Any, **kwargs: Any) -> None:
        """Save a family with `save`, the `save_pretrained` of Transformers."""
        if kwargs.pop("by_segment", None):
            raise _missing("`by_segment=True`")
        save(folder, *args, **kwargs)

    def gathered(self, head: Any, read: Callable[..., Any]) -> Callable[..., Any] | None:
        """Return a function that gathers a sharded head and calls `read`, else `None`."""
        return None

    def compiled_loss(self) -> Callable[..., Any] | None:
        """Return `linear_cross_entropy` as one operator that a compiler can trace, or `None`."""
        return None

    def accelerator(self, model: Any) -> Accelerator:
        """Return the accelerator of a model."""
        return Accelerator()


def _missing(feature: str) -> ImportError:
    return ImportError(
        f"{feature} needs the package `{PACKAGE}`. Run `pip install .` in a clone of its source."
    )


def extension() -> Extension:
    """Return the extension of the installed package, or a plain [`Extension`] without one."""
    try:
        installed = find_spec(PACKAGE) is not None
    except (ImportError, ValueError):  # `sys.modules` has a broken entry of this name
        installed = False
    if not installed:
        return Extension()
    try:
        offered = import_module(f"{PACKAGE}.extension").offer(SEAM)
    except ImportError:  # a version of the package that has no `extension` module
        offered = None
    if offered is None:
        logger.warning_once(
            f"The installed `{PACKAGE}` does not match the version of this checkpoint's code. The "
            "family runs without it. Update the package, or save the family again with it."
        )
    return offered or Extension()
