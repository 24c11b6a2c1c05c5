"""Configuration of a familial model: any decoder's config plus the depths of its exits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
except ImportError:  # before transformers 5.20
    SubConfigSpec = None

logger = logging.get_logger(__name__)

# The config loads with any transformers 5; the models need lists of `output_hidden_states` that
# count the embedding, and `DummyLayer`, of this version on.
TRANSFORMERS = "5.23"

# The most layers, private ones counted: a config may come from anywhere, and building it takes time
# for every layer. The deepest decoders of transformers have some 130.
MAX_LAYERS = 4096

# What a process without this package needs to load a checkpoint with `trust_remote_code=True`.
AUTO_MAP = {
    "AutoConfig": "configuration_familial.FamilialConfig",
    "AutoModel": "modeling_base.FamilialModel",
    "AutoModelForCausalLM": "modeling_familial.FamilialForCausalLM",
}


def evenly_spaced_exits(num_hidden_layers: int, num_exits: int) -> list[int]:
    """Return the depths of evenly spaced exits: `[7, 14, 21, 28]` for 28 layers and 4 exits."""
    if not is_int(num_exits) or not 1 <= num_exits <= num_hidden_layers:
        raise ValueError(
            f"`num_exits` must be an integer between 1 and the {num_hidden_layers} layers of the "
            f"backbone, got {num_exits!r}."
        )
    return [round(num_hidden_layers * (k + 1) / num_exits) for k in range(num_exits)]


def is_int(value: object) -> bool:
    """Return whether a value is an integer, which a boolean is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise `ValueError`, with the nearest name, if an option is none of the `choices`."""
    known = list(choices)
    if value not in known:
        close = get_close_matches(str(value).lower(), known, 2)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        several = ", ".join(known[:12]) + (" or another" if len(known) > 12 else "")
        raise ValueError(f"`{name}` must be one of {several}, got {value!r}.{hint}")


def check_exits(exits: Sequence[int], num_hidden_layers: int) -> None:
    """Raise `ValueError` unless depths are integers that increase from 1 up to the full depth."""
    integers = bool(exits) and all(map(is_int, exits))
    increasing = integers and all(a < b for a, b in zip([0, *exits], exits, strict=False))
    if not increasing or exits[-1] != num_hidden_layers:
        raise ValueError(
            "`exits` must be integers, strictly increasing depths from 1 up, ending at "
            f"`num_hidden_layers` ({num_hidden_layers}), got {list(exits) or 'none'}."
        )


def check_model_type(model_type: object) -> None:
    """Raise `ValueError`, with the nearest names, if transformers does not know a type."""
    if model_type not in CONFIG_MAPPING:
        known = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        close = get_close_matches(str(model_type).lower(), known, 3)
        near = f"did you mean {' or '.join(close)}?" if close else "llama or qwen3, for example."
        raise ValueError(f"`model_type` {model_type!r} is unknown to transformers; {near}")


def check_text_fields(text_config: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a backbone has no known type or too many layers to be counted."""
    if "model_type" not in text_config:
        raise ValueError(
            "`text_config` must name its architecture: it has no `model_type`, only "
            f"{sorted(text_config)}. Add for example `model_type='llama'`."
        )
    check_model_type(text_config["model_type"])
    kind: Any = CONFIG_MAPPING[text_config["model_type"]]
    name = kind.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    for field in {name, "num_hidden_layers"}:
        count = text_config.get(field, 0)
        if is_int(count) and count > MAX_LAYERS:
            raise ValueError(f"`{field}` must be {MAX_LAYERS} at most, got {count}.")


def _of_text_config(name: str) -> property:
    def read(self: FamilialConfig) -> Any:
        try:
            return getattr(self.text_config, name)
        except RuntimeError as error:
            # a host whose layers differ in it has no one answer, and must not look as if it had
            raise AttributeError(str(error)) from error

    return property(
        read,
        lambda self, value: setattr(self.text_config, name, value),
        doc=f"`{name}` of `text_config`.",
    )


class AutoMap(dict[str, str]):
    """An `AUTO_MAP` that raises for a transformers too old to find the files that files import."""

    def __getitem__(self, name: str) -> str:
        if name.startswith("AutoModel"):
            check_transformers()
        return super().__getitem__(name)


class FamilialConfig(PreTrainedConfig):
    r"""Configuration of a [`FamilialModel`] or [`FamilialForCausalLM`].

    A familial model is a decoder (the backbone, of any type) with G exits.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a [`LlamaConfig`]):
            Config of the backbone. A dict must hold `model_type`.
        exits (`list[int]`, *optional*): Depth of every exit, the number of backbone layers before
            it: strictly increasing up to `num_hidden_layers`. Defaults to 4 evenly spaced exits, or
            as many as there are layers. `exits=[num_hidden_layers]` is the dense model.
        num_exit_layers (`int`, *optional*, defaults to 0): Number of private decoder layers of each
            early exit, run between its tap and its norm.
        exit_norm (`str`, *optional*, defaults to `"own"`): `"own"`: early exits have norms of their
            own; `"shared"`: the backbone's final norm.
        exit_head (`str`, *optional*, defaults to `"shared"`): `"shared"`: every exit uses
            `lm_head`; `"own"`: early exits have heads of their own, which are never tied.
        default_exit (`int`, *optional*, defaults to -1): Index of the exit that `forward` and
            `generate` use when `exit_idx` is not given.
        tie_word_embeddings (`bool`, *optional*): Whether `lm_head` is the input embedding, in a
            host that can tie the two. Defaults to what `text_config` says.

    Raises:
        ValueError: If a field is out of its range, or `text_config` is not a decoder's.

    Reference: granularity G as in arXiv:2512.23407.
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

    # never `None` once made: `__post_init__` fills both in
    text_config: PreTrainedConfig = None
    exits: list[int] = None  # type: ignore[assignment]
    num_exit_layers: int = 0
    exit_norm: str = "own"
    exit_head: str = "shared"
    default_exit: int = -1
    tie_word_embeddings: bool | None = None

    if not is_dataclass(PreTrainedConfig):  # before transformers 5.4

        def __init__(self, **kwargs: Any) -> None:
            for name, kind in type(self).__annotations__.items():
                if not kind.startswith("ClassVar"):
                    setattr(self, name, kwargs.pop(name, getattr(type(self), name)))
            self.__post_init__(**kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.text_config, (dict, PreTrainedConfig, type(None))):
            raise ValueError(
                "`text_config` must be a config or a dict with `model_type`, got "
                f"{self.text_config!r}."
            )
        if isinstance(self.text_config, dict):
            check_text_fields(self.text_config)
        for name in kwargs:
            own = ("exits", "exit_norm", "exit_head", "num_exit_layers", "default_exit")
            near = ["exits"] if name == "num_exits" else get_close_matches(name, own, 1, 0.75)
            if near:
                raise ValueError(f"`{name}` is no field of a family; did you mean `{near[0]}`?")
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
        # numbers of numpy or torch become Python's, which JSON can hold
        if isinstance(value, list):
            value = [item.tolist() if hasattr(item, "tolist") else item for item in value]
        super().__setattr__(name, value.tolist() if hasattr(value, "tolist") else value)

    def check(self) -> None:
        """Check every field; the models call this again, for a config changed since it was made."""
        self._check_text_config()
        self.exits = list(self.exits)  # a depth may have been changed in place
        depth = self.num_hidden_layers
        check_exits(self.exits, depth)
        if not is_int(self.num_exit_layers) or not 0 <= self.num_exit_layers <= depth:
            raise ValueError(
                "`num_exit_layers` must be an integer of 0 or more, and at most the number of the "
                f"backbone's layers ({depth}), got {self.num_exit_layers!r}."
            )
        private = self.num_exit_layers * (self.num_exits - 1)
        if depth + private > MAX_LAYERS:
            raise ValueError(
                f"a family has {MAX_LAYERS} layers at most, got {depth} and "
                f"{private} private ones: choose fewer exits or a smaller `num_exit_layers`."
            )
        check_choice("exit_norm", self.exit_norm, ("own", "shared"))
        check_choice("exit_head", self.exit_head, ("shared", "own"))
        count, default = self.num_exits, self.default_exit
        if not is_int(default) or not -count <= default < count:
            raise ValueError(
                f"`default_exit` must be between {-count} and {count - 1} for {count} exits, got "
                f"{default}."
            )

    def _check_text_config(self) -> None:
        text_config = self.text_config
        if getattr(text_config, "is_encoder_decoder", False):
            raise ValueError(
                f"`{text_config.model_type}` is an encoder-decoder; a familial backbone must be a "
                "decoder-only language model such as `llama` or `qwen3`."
            )
        if (inner := text_config.get_text_config(decoder=True)) is not text_config:
            raise ValueError(
                f"`{text_config.model_type}` is a composite of several models; pass the config of "
                f"its language model (`{inner.model_type}`) as `text_config`."
            )
        kind = text_config.model_type
        if kind in UNSUPPORTED:
            raise unsupported_backbone(kind, UNSUPPORTED[kind])
        # a stranger may be a decoder; of its own types the host says which are
        known = kind in CONFIG_MAPPING_NAMES and not kind.endswith("_text")
        encoder = kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (
            getattr(text_config, "is_decoder", True) is False
        )
        if known and encoder and kind not in HOSTS:
            raise unsupported_backbone(kind, "it is not a decoder-only language model")

    @property
    def num_exits(self) -> int:
        """`int`: Granularity G, the number of exits, the deepest one counted."""
        return len(self.exits)

    def resolve_exit(self, exit_idx: int | None = None) -> int:
        """Return an index, negative or `None` too, as one of 0 to G - 1; raise `IndexError`."""
        if exit_idx is None:
            exit_idx = self.default_exit
        if not is_int(exit_idx):
            raise TypeError(f"`exit_idx` must be an integer, got {exit_idx!r}.")
        if not -self.num_exits <= exit_idx < self.num_exits:
            raise IndexError(
                f"`exit_idx` {exit_idx} is out of range: this family has {self.num_exits} exits, "
                f"at depths {self.exits}, so `exit_idx` goes from {-self.num_exits} to "
                f"{self.num_exits - 1}."
            )
        return int(exit_idx) % self.num_exits

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a config from its fields; raise for those of another architecture."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"this is a `{model_type}`, not a family: `FamilialForCausalLM.from_backbone` "
                "makes a family of it."
            )
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON holds them, with the `auto_map` that names the classes."""
        return super().to_dict() | {"auto_map": dict(AUTO_MAP)}


for _name in (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "intermediate_size max_position_embeddings initializer_range use_cache pad_token_id "
    "bos_token_id eos_token_id".split()
):
    setattr(FamilialConfig, _name, _of_text_config(_name))


def check_transformers() -> None:
    """Raise `ImportError` if transformers is too old for the models."""
    hint = (
        "That is what a familial model needs; its configuration loads with any transformers 5. "
        "Run `pip install -U transformers`. A plain member needs no newer one than its class does."
    )
    require_version(f"transformers>={TRANSFORMERS}", hint)


# --- the seam: a family runs from its own files alone; the package, if installed, adds more -------

PACKAGE = "hf_familial"
SEAM = 2  # raised with every change of a signature in `Extension` or `Accelerator`


class Accelerator:
    """Faster ways to decode with one model, kept from its first relay on; this one has none.

    What a method returns must compute what it was given.
    """

    def cache(self, cache: Any) -> Any:
        """Return a cache that is cheaper to extend; it holds the same keys and values."""
        return cache

    def prepare(self, relay: Any, fused_weights: bool | None) -> None:
        """Give a new relay cache faster norms, heads and passes through its segments.

        A pass says by `takes(new, attention_mask)` whether it can run so many new positions, and is
        called with states `(batch, new, hidden)`, the cache layers of the segment and position ids,
        `None` where they count on. `fused_weights` says whether to; by default where it pays.
        """

    def decoder(self, decoder: Any) -> Any:
        """Return a decoder around a policy's, of whose parts it may make other use."""
        return decoder

    def flops(self, relay: Any, rows: int, tokens: int) -> tuple[float | None, float | None]:
        """Return FLOPs that a [`RelayCache`] spent on rows of tokens, and those of plain text."""
        return None, None


class Extension:
    """The package's part of a family; the bodies say what is without it.

    Then the loss of sharded heads or of a compiled model is the host's, with all logits, and relays
    run without fused weights, chains of drafts, learned draft lengths and FLOPs.
    """

    def warm_start(self, cls: Any, backbone: Any, loading: Any, **fields: Any) -> Any:
        """Build a family of class `cls` around a decoder, given or loaded with `loading`."""
        raise _missing("`from_backbone`")

    def check_backbone(self, model: Any) -> None:
        """Raise if a backbone of an unknown type fails the numeric checks."""

    def load_cut(self, load: Any, name: Any, max_exit: int, *args: Any, **kwargs: Any) -> Any:
        """Load the members up to one exit, reading their tensors only; `load` is the host's."""
        raise _missing("`max_exit`")

    def save(self, save: Any, model: Any, folder: Any, *args: Any, **kwargs: Any) -> None:
        """Save a family; `save` is the host's `save_pretrained` of the model."""
        if kwargs.pop("by_segment", None):
            raise _missing("`by_segment=True`")
        save(folder, *args, **kwargs)

    def gathered(self, head: Any, read: Callable[..., Any]) -> Callable[..., Any] | None:
        """Return `read` as a call with the whole weight of a sharded head, or `None`."""
        return None

    def compiled_loss(self) -> Callable[..., Any] | None:
        """Return `linear_cross_entropy` as one operator that a compiler can trace, or `None`."""
        return None

    def accelerator(self, model: Any) -> Accelerator:
        """Return the accelerator of a model."""
        return Accelerator()


def _missing(what: str) -> ImportError:
    return ImportError(f"{what} needs the package: run `pip install {PACKAGE}`.")


def extension() -> Extension:
    """Return what the installed package offers, or the plain [`Extension`] where it has nothing."""
    try:
        installed = find_spec(PACKAGE) is not None
    except (ImportError, ValueError):  # something stands in its place
        installed = False
    if not installed:
        return Extension()
    try:
        offered = import_module(f"{PACKAGE}.extension").offer(SEAM)
    except ImportError:  # a version from before the seam
        offered = None
    if offered is None:
        logger.warning_once(
            f"The installed `{PACKAGE}` is of another version than the code of this family, which "
            "runs without it. Update the package, or save the family anew with it."
        )
    return offered or Extension()
