"""IsoFLOP designs: grids of budgets, sizes and granularities, and the runs of each grid."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]
from huggingface_hub.errors import StrictDataclassError

from .._records import plain
from .._wording import known_words, near_words
from ..errors import DesignError, InfeasibleDesignError
from ..flops import (
    CONVENTIONS,
    FlopCount,
    ParameterCount,
    family_parameters,
    training_flops_per_token,
)
from ..models.familial import FamilialConfig, evenly_spaced_exits
from ._fields import FIELDS, check_positive
from .backbones import BackboneTemplate, read_size
from .plan import InfeasibleRun, RunPlan, Schedule, content_id, fit_budget
from .rules import ExpectedLaw, Rule, StepLaw, read_rule
from .yaml_file import parse_yaml, read_yaml


EVEN = "even"
CHOICES = {"exit_norm": ("own", "shared"), "exit_head": ("shared", "own")}
BELOW = {"budgets": 1e30, "vocab_size": 2**31, "seq_length": 2**31, "seeds": 2**32}


@dataclass(frozen=True)
class IsoFlopDesign:
    """A grid of training runs, with one run for each budget, size, granularity and seed.

    Attributes:
        budgets (`tuple[float, ...]`): FLOPs C of a run.
        sizes (`tuple[float | str, ...]`): Backbones, as numbers of parameters N or as
            `width x depth` such as `"64x4"`. The design finds width and depth for an N. N is that
            of a model with G = 1, so all granularities of a size share one backbone. You can also
            pass one list of sizes for each budget.
        vocab_size (`int`): Rows of the token embedding.
        seq_length (`int`): Tokens in a sequence.
        granularities (`tuple[int, ...]`): Numbers of exits G. They must contain 1, the ordinary
            model.
        placement (`str` or `tuple[float, ...]`): Depths of the early exits. `"even"` spaces them
            evenly. Otherwise pass shares of the full depth. A family with G exits uses the first
            G - 1 of them.
        backbone ([`BackboneTemplate`]): Architecture of the backbone, and its growth with size.
        num_exit_layers (`int`): Private layers of each early exit.
        exit_norm (`str`): `"own"` or `"shared"`, as in [`FamilialConfig`].
        exit_head (`str`): `"shared"` or `"own"`, as in [`FamilialConfig`].
        seeds (`tuple[int, ...]`): Seeds. The design has one run for each.
        rule (`Fixed`, `StepLaw` or `Measured`): Rule for the learning rate and the batch. In a
            file, it is a mapping whose `kind` is `fixed`, `step_law` or `measured`.
        counting (`str`): Convention for counting N: the name of a field of
            [`~hf_familial.flops.ParameterCount`].
        data (`str`): Training data: a file, a folder or a dataset on the Hub. An empty string or
            `stdlib` means the source code of Python's standard library.
        data_tokens (`int`, *optional*): Tokens in one pass over the data.
        training (`Mapping[str, Any]`): Further arguments for data and training, with the names of
            the options of `examples/pretrain.py`. Arguments that the design sets are not allowed.
        expected ([`ExpectedLaw`]): Law of the expected losses.

    Raises:
        DesignError: If a field is wrong. The message names the field and the allowed values.

    Example:
        >>> design = IsoFlopDesign(budgets=[4e11, 1.6e12], sizes=["32x3", "64x4"], vocab_size=512,
        ...     seq_length=128)
        >>> print_runs(design)

    Reference: IsoFLOP profiles of Hoffmann et al. 2022, arXiv:2203.15556, section 3.2. G is from
    arXiv:2512.23407, which does not state the placement of exits, the counting of N or the FLOPs of
    heads. All three are options here.
    """

    budgets: tuple[float, ...]
    sizes: tuple[float | str | tuple[float | str, ...], ...]
    vocab_size: int
    seq_length: int
    granularities: tuple[int, ...] = (1, 4)
    placement: str | tuple[float, ...] = EVEN
    backbone: BackboneTemplate = BackboneTemplate()
    num_exit_layers: int = 0
    exit_norm: str = "own"
    exit_head: str = "shared"
    seeds: tuple[int, ...] = (0,)
    rule: Rule = StepLaw()
    counting: str = "non_embedding"
    data: str = ""
    data_tokens: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    expected: ExpectedLaw = ExpectedLaw()

    def __post_init__(self) -> None:
        """Check every field, and convert lists to tuples."""
        object.__setattr__(self, "rule", read_rule(self.rule))
        FIELDS.check(self)
        check_positive(self, "budgets", "vocab_size", "seq_length", "granularities", "data_tokens")
        for name in ("budgets", "granularities", "seeds"):
            _check_different(name, getattr(self, name))
        self._check_sizes()
        for name, limit in BELOW.items():
            value = getattr(self, name)
            if (largest := max(value) if isinstance(value, tuple) else value) >= limit:
                raise DesignError(f"`{name}` must be less than {limit:,}, got {largest}.", name)
        if 1 not in self.granularities:
            raise DesignError(
                "`granularities` must contain 1, the ordinary model to compare with, got "
                f"{list(self.granularities)}.",
                "granularities",
            )
        if min(self.seeds) < 0 or self.num_exit_layers < 0:
            name = "seeds" if min(self.seeds) < 0 else "num_exit_layers"
            raise DesignError(f"`{name}` must be 0 or more, got {getattr(self, name)}.", name)
        if self.counting not in CONVENTIONS:
            hint = known_words(self.counting, CONVENTIONS)
            raise DesignError(f"`counting` {self.counting!r} is unknown{hint}", "counting")
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                hint = near_words(value, choices) or "."
                right = " or ".join(choices)
                raise DesignError(f"`{name}` must be {right}, got {value!r}{hint}", name)
        self._check_placement()

    @property
    def sizes_by_budget(self) -> tuple[tuple[float | str, ...], ...]:
        """The sizes of each budget, in the order of `budgets`."""
        if any(isinstance(size, tuple) for size in self.sizes):
            return self.sizes  # type: ignore[return-value]
        return (self.sizes,) * len(self.budgets)  # type: ignore[return-value]

    def _check_sizes(self) -> None:
        lists = [isinstance(size, tuple) for size in self.sizes]
        if any(lists) and not (all(lists) and len(lists) == len(self.budgets)):
            raise DesignError(
                "`sizes` must be one list for all budgets, or one list for each of the "
                f"{len(self.budgets)} budgets, got {plain(self)['sizes']}.",
                "sizes",
            )
        for sizes in self.sizes_by_budget:
            _check_different("sizes", sizes)
            for size in sizes:
                read_size(size)

    def _check_placement(self) -> None:
        shares = self.placement
        if shares == EVEN:
            return
        if isinstance(shares, str):
            hint = near_words(shares, [EVEN]) or "."
            raise DesignError(
                f"`placement` must be `even` or a list of shares, got {shares!r}{hint}", "placement"
            )
        wrong = not all(0 < share < 1 for share in shares)
        if wrong or len(set(shares)) < len(shares) or len(shares) < max(self.granularities) - 1:
            raise DesignError(
                "`placement` must be `even`, or different shares of the depth between 0 and 1, one "
                f"for each early exit of G = {max(self.granularities)}, got {shares!r}.",
                "placement",
            )

    def layout(self) -> tuple[tuple[RunPlan, ...], tuple[InfeasibleRun, ...]]:
        """Return all possible runs, and the points of the grid for which no run is possible."""
        plans = tuple(_plan_runs(self))
        runs = tuple(plan for plan in plans if isinstance(plan, RunPlan))
        return runs, tuple(plan for plan in plans if isinstance(plan, InfeasibleRun))

    def runs(self) -> tuple[RunPlan, ...]:
        """Return all runs, ordered by budget, then size, then G, then seed.

        Returns:
            `tuple[RunPlan, ...]`: Runs whose FLOPs are within 0.5 % of their budget. The id of a
            run depends on the content of that run only. If you change the design, the runs that
            stay in it keep their ids.

        Raises:
            DesignError: If a backbone cannot be built.
            InfeasibleDesignError: If no run is possible at a point of the grid. The message names
                the nearest budgets that fit.
        """
        runs, infeasible = self.layout()
        if infeasible:
            raise InfeasibleDesignError(infeasible)
        return runs

    @classmethod
    def from_dict(cls, row: Any) -> IsoFlopDesign:
        """Build a design from a mapping of its fields. Raise `DesignError` if a field is wrong."""
        try:
            return FIELDS.read(cls, row)
        except RecursionError:
            raise DesignError("The design has lists or mappings nested too deep.") from None

    @classmethod
    def from_yaml(cls, source: str | os.PathLike[str]) -> IsoFlopDesign:
        """Read a design from a YAML file.

        Raises:
            DesignError: If the file is not YAML, or if a field is unknown, missing or wrong.
            OSError: If the file cannot be read.
        """
        return cls.from_dict(read_yaml(source))

    @classmethod
    def parse(cls, text: str) -> IsoFlopDesign:
        """Read a design from YAML text. Raise `DesignError` if it is wrong."""
        return cls.from_dict(parse_yaml(text))

    def to_yaml(self) -> str:
        """Return the design as YAML with all fields."""
        return yaml.safe_dump(plain(self), sort_keys=False)


def _check_different(name: str, values: tuple[Any, ...]) -> None:
    if not values or len(set(values)) < len(values):
        raise DesignError(
            f"`{name}` must have different values, at least one, got {list(values)}.", name
        )


class _Family(NamedTuple):
    """A family of one width, depth and G. Runs of all budgets and seeds share it."""

    width: int
    depth: int
    exits: tuple[int, ...]
    fields: dict[str, Any]  # fields of the backbone's config
    cost: FlopCount  # training FLOPs per token
    sizes: ParameterCount
    dense: ParameterCount  # parameters of the same backbone with G = 1


def _plan_runs(design: IsoFlopDesign) -> Iterator[RunPlan | InfeasibleRun]:
    """Plan all points of the grid, ordered by budget, then size, then G, then seed."""
    shapes = {sizes: _shapes(design, sizes) for sizes in set(design.sizes_by_budget)}
    # cached, because counting the FLOPs of a family takes far longer than planning its runs
    family_of = functools.cache(functools.partial(_measure, design))
    for budget, sizes in zip(design.budgets, design.sizes_by_budget, strict=True):
        for width, depth in shapes[sizes]:
            for G in design.granularities:
                family = family_of(width, depth, G)
                if isinstance(family, str):
                    yield InfeasibleRun(budget, width, depth, G, family)
                else:
                    yield from _plan_point(design, budget, family)


def _measure(design: IsoFlopDesign, width: int, depth: int, G: int) -> _Family | str:
    """Count the FLOPs and parameters of a family, or return the reason why it is impossible."""
    exits = _exits_at(design, depth, G)
    if isinstance(exits, str):
        return exits
    fields, config = _family_config(design, width, depth, exits)
    cost = training_flops_per_token(config, design.seq_length)
    dense = family_parameters(_family_config(design, width, depth, [depth])[1]).family
    sizes = family_parameters(config).family
    return _Family(width, depth, tuple(exits), fields, cost, sizes, dense)


def _plan_point(
    design: IsoFlopDesign, budget: float, family: _Family
) -> Iterator[RunPlan | InfeasibleRun]:
    """Plan one run for each seed, or yield the reason why no run is possible."""
    width, depth, exits, fields, cost, sizes, dense = family
    per_sequence = cost.per_token * design.seq_length
    found = fit_budget(budget, per_sequence, design.seq_length, dense.non_embedding, design.rule)
    if not isinstance(found, Schedule):
        fits = " or ".join(f"{fit:.6g}" for fit in found)
        reason = "no whole number of steps meets the budget within 0.5 %. "
        reason += f"A budget of {fits} would fit, or a smaller batch."
        yield InfeasibleRun(budget, width, depth, len(exits), reason, found)
        return
    # The id is a hash of this content. A change here would orphan the checkpoints on disk.
    content: dict[str, Any] = {
        "model_type": design.backbone.model_type,
        "backbone": fields,
        "exits": exits,
        "family": _exit_fields(design),
        "seq_length": design.seq_length,
        "steps": found.steps,
        "batch_sequences": found.batch_sequences,
        "lr": found.lr,
        "data": design.data,
        "training": dict(design.training),
    }
    tokens = found.steps * found.batch_sequences * design.seq_length
    for seed in design.seeds:
        own = content | {"seed": seed}
        # without early exits, the fields of `family` have no effect, so they are not hashed
        yield RunPlan(
            id=content_id(own if len(exits) > 1 else own | {"family": {}}),
            budget=budget,
            flops=cost.per_token * tokens,
            flops_per_token=cost.per_token,
            exact=cost.exact,
            N=getattr(dense, design.counting),
            sizes=sizes,
            width=width,
            depth=depth,
            tokens=tokens,
            **own,
        )


def _shapes(design: IsoFlopDesign, sizes: tuple[float | str, ...]) -> tuple[tuple[int, int], ...]:
    """Return the width and depth of each size in `sizes`."""

    def count(width: int, depth: int) -> int:
        config = _family_config(design, width, depth, [depth])[1]
        return int(getattr(family_parameters(config).family, design.counting))

    shapes: list[tuple[int, int]] = []
    for size in map(read_size, sizes):
        found = size if isinstance(size, tuple) else design.backbone.shape(size, count)
        if found in shapes:
            raise DesignError(
                f"`sizes` must have different backbones, but {size} and another size are both "
                f"{found[0]}x{found[1]}. Choose sizes further apart, or a smaller `multiple`.",
                "sizes",
            )
        shapes.append(found)
    return tuple(shapes)


def _exits_at(design: IsoFlopDesign, depth: int, G: int) -> list[int] | str:
    """Return the depths of G exits, or the reason why G exits are impossible."""
    if isinstance(design.placement, str):
        if G <= depth:
            return evenly_spaced_exits(depth, G)
        return f"{G} exits need at least {G} layers. Leave out this G or this size."
    exits = sorted({round(share * depth) for share in design.placement[: G - 1]} | {depth})
    if len(exits) == G and exits[0] > 0:
        return exits
    return f"with {depth} layers, `placement` gives the depths {exits}, not {G} different depths."


def _exit_fields(design: IsoFlopDesign) -> dict[str, Any]:
    return {name: getattr(design, name) for name in ("num_exit_layers", "exit_norm", "exit_head")}


def _family_config(
    design: IsoFlopDesign, width: int, depth: int, exits: list[int]
) -> tuple[dict[str, Any], FamilialConfig]:
    """Return the fields of a backbone's config, and the config of the family."""
    fields = design.backbone.config_fields(width, depth, design.vocab_size, design.seq_length)
    try:
        text_config = design.backbone.text_config(fields)
        family = FamilialConfig(text_config=text_config, exits=exits, **_exit_fields(design))
        family_parameters(family)
    except (TypeError, ValueError, KeyError, RuntimeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise DesignError(
            f"`backbone` of {width}x{depth} cannot be built: {reason}", "backbone"
        ) from error
    return fields, family
