"""Width, depth and config of a backbone with N parameters."""

from __future__ import annotations

import dataclasses
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .._wording import known_words
from ..errors import DesignError
from ._fields import FIELDS, check_positive


MAX_DEPTH = 512


@dataclass(frozen=True)
class BackboneTemplate:
    """A template for the backbones of a design: one Transformers architecture at any size.

    Attributes:
        model_type (`str`): Architecture in Transformers, for example `"llama"`.
        aspect (`float`): Width divided by depth.
        head_dim (`int`): Width of an attention head.
        multiple (`int`): Number that divides all widths. It must be a multiple of `head_dim`.
        mlp_ratio (`float`): Inner width of the MLP divided by the width. The inner width is rounded
            to `multiple`.
        kv_heads (`int`, *optional*): Maximum number of key and value heads. It is reduced to a
            number that divides the query heads. Defaults to the number of query heads.
        tie_word_embeddings (`bool`): Whether the output head shares the token embedding.
        scaled (`Mapping[str, float]`): Further config fields that grow with the width, such as
            `moe_intermediate_size`, and their shares of the width. Values are rounded to
            `multiple`.
        fields (`Mapping[str, Any]`): Further config fields with fixed values.

    Example:
        >>> template = BackboneTemplate("qwen3", aspect=64, head_dim=64, multiple=64)
    """

    model_type: str = "llama"
    aspect: float = 32.0
    head_dim: int = 32
    multiple: int = 32
    mlp_ratio: float = 8 / 3
    kv_heads: int | None = None
    tie_word_embeddings: bool = True
    scaled: Mapping[str, float] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        FIELDS.check(self)
        check_positive(self, "aspect", "head_dim", "multiple", "mlp_ratio", "kv_heads")
        if self.multiple % self.head_dim:
            raise DesignError(
                f"`multiple` must be a multiple of `head_dim` ({self.head_dim}), got "
                f"{self.multiple}.",
                "multiple",
            )
        if self.model_type not in CONFIG_MAPPING:
            hint = known_words(self.model_type, CONFIG_MAPPING.keys())
            raise DesignError(f"`model_type` {self.model_type!r} is unknown{hint}", "model_type")
        known = self._known()
        for group in ("scaled", "fields"):
            for name in getattr(self, group):
                if name not in known:
                    hint = known_words(name, known)
                    raise DesignError(
                        f"`{group}.{name}` is not a field of `{self.model_type}`{hint}",
                        f"{group}.{name}",
                    )

    def width(self, depth: int) -> int:
        """Return `aspect * depth`, rounded to a multiple of `multiple`."""
        return self._rounded(self.aspect * depth)

    def config_fields(
        self, width: int, depth: int, vocab_size: int, seq_length: int
    ) -> dict[str, Any]:
        """Return the config fields of a backbone that differ from the defaults."""
        heads = width // self.head_dim
        if width % self.head_dim or not heads:
            raise DesignError(
                f"`sizes` must have widths that are multiples of `head_dim` ({self.head_dim}), got "
                f"{width}.",
                "sizes",
            )
        kv_heads = min(self.kv_heads or heads, heads)
        kv_heads = max(n for n in range(1, kv_heads + 1) if heads % n == 0)
        usual: dict[str, Any] = {
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self._rounded(self.mlp_ratio * width),
            "vocab_size": vocab_size,
            "max_position_embeddings": seq_length,
            "tie_word_embeddings": self.tie_word_embeddings,
        }
        known = self._known()
        usual = {name: value for name, value in usual.items() if name in known}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            default = known.get(name)
            if isinstance(default, int) and default >= vocab_size:
                usual[name] = None
        scaled = {name: self._rounded(share * width) for name, share in self.scaled.items()}
        return usual | scaled | dict(self.fields)

    def text_config(self, fields: Mapping[str, Any]) -> Any:
        """Return the config of a backbone with these fields."""
        return AutoConfig.for_model(self.model_type, **fields)

    def shape(self, size: float, count: Callable[[int, int], int]) -> tuple[int, int]:
        """Return the width and depth whose number of parameters is nearest to `size`.

        `count(width, depth)` returns a number of parameters. The two depths around `size` follow
        from `aspect`. For each of them, the width changes in steps of `multiple`.
        Raise `DesignError` if no backbone is large enough, or if the nearest one differs from
        `size` by more than a factor of 2.
        """
        low, high = 1, max(1, round((size / (12 * self.aspect**2)) ** (1 / 3)))
        if high > 2 * MAX_DEPTH:  # raise before counting parameters, which would take minutes
            raise DesignError(
                f"`sizes` must be reachable: {size:.4g} parameters need about {high:,} layers at "
                f"`aspect` {self.aspect:g}. Increase `aspect`, or use fewer parameters.",
                "sizes",
            )
        while count(self.width(high), high) < size:
            low, high = high, 2 * high
            if high > MAX_DEPTH:
                raise DesignError(
                    f"`sizes` must be reachable: {size:.4g} parameters need more than {MAX_DEPTH} "
                    "layers.",
                    "sizes",
                )
        if high - low > 1:
            high = bisect_left(range(high), size, low + 1, key=lambda d: count(self.width(d), d))
            low = high - 1

        def miss(shape: tuple[int, int]) -> float:
            found = count(*shape)
            return max(found / size, size / found)

        def nearest(depth: int) -> tuple[int, int]:
            width = self.width(depth)
            for step in (-self.multiple, self.multiple):
                while width + step > 0 and miss((width + step, depth)) < miss((width, depth)):
                    width += step
            return width, depth

        best = min(map(nearest, (low, high)), key=miss)
        if miss(best) > 2:
            raise DesignError(
                f"`sizes` must be reachable with `multiple` {self.multiple}: the nearest to "
                f"{size:.4g} is {best[0]}x{best[1]} with {count(*best):,} parameters.",
                "sizes",
            )
        return best

    def _rounded(self, width: float) -> int:
        return max(1, round(width / self.multiple)) * self.multiple

    def _known(self) -> dict[str, Any]:
        """Return the defaults of the config class, under its own and under the common names."""
        cls: Any = CONFIG_MAPPING[self.model_type]
        known = {entry.name: entry.default for entry in dataclasses.fields(cls)}
        known = {name: value for name, value in known.items() if not name.startswith("_")}
        return known | {name: known.get(own) for name, own in cls.attribute_map.items()}


def read_size(size: float | str) -> float | tuple[int, int]:
    """Return a number of parameters, or the width and depth of text such as `"64x4"`."""
    found = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", str(size))
    if found and int(found[1]) * int(found[2]):
        return int(found[1]), int(found[2])
    try:
        number = float(size)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DesignError(
            "`sizes` must be numbers of parameters or `width x depth` such as `64x4`, got "
            f"{size!r}.",
            "sizes",
        )
    if number <= 0:
        raise DesignError(f"`sizes` must be positive, got {number}.", "sizes")
    return number
