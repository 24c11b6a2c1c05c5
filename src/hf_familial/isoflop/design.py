"""An IsoFLOP design: budgets, sizes and granularities, and the runs that follow from them."""

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
    """A grid of runs: every budget with every size, granularity and seed.

    Attributes:
        budgets (`tuple[float, ...]`): FLOPs C of a run.
        sizes (`tuple[float | str, ...]`): Backbones: parameters N by `counting`, from which width
            and depth follow, or `width x depth` such as `"64x4"`. N is that of G = 1, so that all
            granularities of a size share one backbone. Or one such list for each budget.
        vocab_size (`int`): Rows of the token embedding.
        seq_length (`int`): Tokens of a sequence.
        granularities (`tuple[int, ...]`): Numbers of exits G; 1, the dense model, is among them.
        placement (`str` or `tuple[float, ...]`): `"even"`, or shares of the depth in the order in
            which early exits are added: G takes the first G - 1 and the full depth.
        backbone ([`BackboneTemplate`]): How width and depth grow, and the host's architecture.
        num_exit_layers (`int`): Private layers of each early exit.
        exit_norm (`str`): `"own"` or `"shared"`, as in [`FamilialConfig`].
        exit_head (`str`): `"shared"` or `"own"`, likewise.
        seeds (`tuple[int, ...]`): One run for each.
        rule (`Fixed`, `StepLaw` or `Measured`): Learning rate and batch; in a file a mapping with
            `kind`: `fixed`, `step_law` or `measured`.
        counting (`str`): How N is counted: a field of [`~hf_familial.flops.ParameterCount`].
        data (`str`): Training data: empty or `stdlib` for the source code of Python's standard
            library, else a file or folder, or a dataset of the Hub.
        data_tokens (`int`, *optional*): Tokens of one pass over it.
        training (`Mapping[str, Any]`): Further arguments of data and training, by the names that
            `examples/pretrain.py` has for them, except those that follow from the design.
        expected ([`ExpectedLaw`]): The law by which optima are expected.

    Raises:
        DesignError: Naming the field that is wrong, and what would be right.

    Example:
        >>> design = IsoFlopDesign(budgets=[4e11, 1.6e12], sizes=["32x3", "64x4"], vocab_size=512,
        ...     seq_length=128)
        >>> print_runs(design)

    Reference: IsoFLOP profiles as in Hoffmann et al. 2022, arXiv:2203.15556, section 3.2; with G as
    in arXiv:2512.23407, which does not state placement, the counting of N, or the FLOPs of heads:
    all three are options here.
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
        """Check every field; lists become tuples."""
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
                "`granularities` must hold 1, the dense model that the others are compared with, "
                f"got {list(self.granularities)}.",
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
        """The sizes of every budget, in the order of `budgets`."""
        if any(isinstance(size, tuple) for size in self.sizes):
            return self.sizes  # type: ignore[return-value]
        return (self.sizes,) * len(self.budgets)  # type: ignore[return-value]

    def _check_sizes(self) -> None:
        lists = [isinstance(size, tuple) for size in self.sizes]
        if any(lists) and not (all(lists) and len(lists) == len(self.budgets)):
            raise DesignError(
                "`sizes` must be one list for all budgets, or one list for each of them "
                f"({len(self.budgets)} here), got {plain(self)['sizes']}.",
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
        """Return the runs, and the points of the grid that have none, with what would fit."""
        plans = tuple(_plan_runs(self))
        runs = tuple(plan for plan in plans if isinstance(plan, RunPlan))
        return runs, tuple(plan for plan in plans if isinstance(plan, InfeasibleRun))

    def runs(self) -> tuple[RunPlan, ...]:
        """Return all runs: budget by budget, size by size, G by G, seed by seed.

        Returns:
            `tuple[RunPlan, ...]`: Each within 0.5 % of its budget. An id depends on nothing but the
            run's own content, so runs that a changed design still has keep theirs.

        Raises:
            DesignError: If a backbone cannot be built.
            InfeasibleDesignError: If a point of the grid has no run. The message says what fits.
        """
        runs, infeasible = self.layout()
        if infeasible:
            raise InfeasibleDesignError(infeasible)
        return runs

    @classmethod
    def from_dict(cls, row: Any) -> IsoFlopDesign:
        """Return the design of a mapping, as YAML has it; errors as in `from_yaml`."""
        try:
            return FIELDS.read(cls, row)
        except RecursionError:
            raise DesignError("a design has lists or mappings nested too deep.") from None

    @classmethod
    def from_yaml(cls, source: str | os.PathLike[str]) -> IsoFlopDesign:
        """Read a design from a file.

        Raises:
            DesignError: If it is not YAML, or a field is unknown, missing or wrong.
            OSError: If it cannot be read.
        """
        return cls.from_dict(read_yaml(source))

    @classmethod
    def parse(cls, text: str) -> IsoFlopDesign:
        """Read a design from YAML text; errors as in `from_yaml`."""
        return cls.from_dict(parse_yaml(text))

    def to_yaml(self) -> str:
        """Return the design as YAML, every field written out."""
        return yaml.safe_dump(plain(self), sort_keys=False)


def _check_different(name: str, values: tuple[Any, ...]) -> None:
    if not values or len(set(values)) < len(values):
        raise DesignError(
            f"`{name}` must hold different values, at least one, got {list(values)}.", name
        )


class _Family(NamedTuple):
    """A family of one width, depth and G, which runs of all budgets and seeds share."""

    width: int
    depth: int
    exits: tuple[int, ...]
    fields: dict[str, Any]  # of the backbone's config
    cost: FlopCount  # of a token
    sizes: ParameterCount
    dense: ParameterCount  # of G = 1


def _plan_runs(design: IsoFlopDesign) -> Iterator[RunPlan | InfeasibleRun]:
    """Plan every point of the grid: budgets, then sizes, then G, then seeds."""
    shapes = {sizes: _shapes(design, sizes) for sizes in set(design.sizes_by_budget)}
    # counting the FLOPs of a family takes far longer than planning a run of it
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
    """Count FLOPs and parameters of a family, or say why it cannot be built."""
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
    """Plan one run for each seed, or say why the point has none."""
    width, depth, exits, fields, cost, sizes, dense = family
    per_sequence = cost.per_token * design.seq_length
    found = fit_budget(budget, per_sequence, design.seq_length, dense.non_embedding, design.rule)
    if not isinstance(found, Schedule):
        fits = " or ".join(f"{fit:.6g}" for fit in found)
        reason = f"no whole number of steps meets it within 0.5 %; a budget of {fits} would fit"
        yield InfeasibleRun(
            budget, width, depth, len(exits), f"{reason}, or a smaller batch.", found
        )
        return
    # the id hashes this content: its names and values name checkpoints on disks
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
        # how early exits are made does not matter where there are none
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
    """Return width and depth of every backbone, in the order of the sizes of a budget."""

    def count(width: int, depth: int) -> int:
        config = _family_config(design, width, depth, [depth])[1]
        return int(getattr(family_parameters(config).family, design.counting))

    shapes: list[tuple[int, int]] = []
    for size in map(read_size, sizes):
        found = size if isinstance(size, tuple) else design.backbone.shape(size, count)
        if found in shapes:
            raise DesignError(
                f"`sizes` must have different backbones: {size} is {found[0]}x{found[1]}, as "
                "another size is; choose sizes further apart, or a smaller `multiple`.",
                "sizes",
            )
        shapes.append(found)
    return tuple(shapes)


def _exits_at(design: IsoFlopDesign, depth: int, G: int) -> list[int] | str:
    """Return the depths of G exits, or why there cannot be so many."""
    if isinstance(design.placement, str):
        if G <= depth:
            return evenly_spaced_exits(depth, G)
        return f"{G} exits need {G} layers or more; leave out this G or this size."
    exits = sorted({round(share * depth) for share in design.placement[: G - 1]} | {depth})
    if len(exits) == G and exits[0] > 0:
        return exits
    return f"at {depth} layers `placement` gives depths {exits}, not {G} different ones."


def _exit_fields(design: IsoFlopDesign) -> dict[str, Any]:
    return {name: getattr(design, name) for name in ("num_exit_layers", "exit_norm", "exit_head")}


def _family_config(
    design: IsoFlopDesign, width: int, depth: int, exits: list[int]
) -> tuple[dict[str, Any], FamilialConfig]:
    """Return the fields of a backbone's config, and the family on it."""
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
