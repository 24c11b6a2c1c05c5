"""An IsoFLOP design: budgets, sizes and granularities, and the runs that follow from them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]

from ..flops import CONVENTIONS, family_parameters, training_flops_per_token
from ..models.familial import FamilialConfig, evenly_spaced_exits
from .backbones import BackboneTemplate, read_size
from .fields import DesignError, check_fields, near, plain, read
from .plans import Refusal, RefusedRunsError, RunPlan, content_id, fit_budget
from .rules import ExpectedLaw, Fixed, Measured, StepLaw, positive, read_rule


if TYPE_CHECKING:
    from rich.console import Console

    from .rate import MachineRate


EVEN = "even"


@dataclass(frozen=True)
class IsoFlopDesign:
    """A grid of runs: every budget with every size, granularity and seed.

    Attributes:
        budgets (`tuple[float, ...]`): FLOPs C of a run.
        sizes (`tuple[float | str, ...]`): Backbones: parameters N by `counting`, from which width
            and depth follow, or `width x depth` such as `"64x4"`. N is that of G = 1, so that all
            granularities of a size share one backbone.
        vocab_size (`int`): Rows of the token embedding.
        seq_length (`int`): Tokens of a sequence.
        granularities (`tuple[int, ...]`): Numbers of exits G; 1, the dense model, is among them.
        placement (`str` or `tuple[float, ...]`): `"even"`, or shares of the depth in the order in
            which early exits are added: G takes the first G - 1 and the full depth.
        backbone ([`BackboneTemplate`]): How width and depth grow, and of what family.
        num_exit_layers (`int`): Private layers of each early exit.
        exit_norm (`str`): `"own"` or `"shared"`, as in [`FamilialConfig`].
        exit_head (`str`): `"shared"` or `"own"`, likewise.
        seeds (`tuple[int, ...]`): One run for each.
        rule (`Fixed`, `StepLaw` or `Measured`): Learning rate and batch; in a file a mapping with
            `kind`: `fixed`, `step_law` or `measured`.
        counting (`str`): How N is counted: a field of [`~hf_familial.flops.ParameterCount`].
        data (`str`): What is trained on: a name for those who run the design.
        data_tokens (`int`, *optional*): Tokens of one pass over it.
        training (`Mapping[str, Any]`): Further training arguments, for those who run the design.
        expected ([`ExpectedLaw`]): Where optima are expected.

    Raises:
        DesignError: Naming the field that is wrong, and what would be right.

    Example:
        >>> design = IsoFlopDesign(budgets=[4e11, 1.6e12], sizes=["32x3", "64x4"], vocab_size=512,
        ...     seq_length=128)
        >>> design.table()

    Reference: IsoFLOP profiles as in Hoffmann et al. 2022, arXiv:2203.15556, section 3.2; with G as
    in arXiv:2512.23407, which does not state placement, the counting of N, or the FLOPs of heads:
    all three are options here.
    """

    budgets: tuple[float, ...]
    sizes: tuple[float | str, ...]
    vocab_size: int
    seq_length: int
    granularities: tuple[int, ...] = (1, 4)
    placement: str | tuple[float, ...] = EVEN
    backbone: BackboneTemplate = BackboneTemplate()
    num_exit_layers: int = 0
    exit_norm: str = "own"
    exit_head: str = "shared"
    seeds: tuple[int, ...] = (0,)
    rule: Fixed | StepLaw | Measured = StepLaw()
    counting: str = "non_embedding"
    data: str = ""
    data_tokens: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    expected: ExpectedLaw = ExpectedLaw()

    def __post_init__(self) -> None:
        """Check every field; lists become tuples."""
        object.__setattr__(self, "rule", read_rule(self.rule))
        check_fields(self)
        positive(self, "budgets", "sizes", "vocab_size", "seq_length", "granularities")
        positive(self, "data_tokens")
        for name in ("budgets", "sizes", "granularities", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise DesignError(
                    f"`{name}` must hold different values, at least one, got {list(values)}.", name
                )
        for size in self.sizes:
            read_size(size)
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
            hint = near(self.counting, CONVENTIONS)
            raise DesignError(f"`counting` {self.counting!r} is unknown{hint}", "counting")
        for name, choices in (("exit_norm", ("own", "shared")), ("exit_head", ("shared", "own"))):
            if getattr(self, name) not in choices:
                raise DesignError(
                    f"`{name}` must be {' or '.join(choices)}, got {getattr(self, name)!r}.", name
                )
        self._check_placement()

    def _check_placement(self) -> None:
        if self.placement == EVEN:
            return
        shares = self.placement
        wrong = isinstance(shares, str) or not all(0 < share < 1 for share in shares)
        if wrong or len(set(shares)) < len(shares) or len(shares) < max(self.granularities) - 1:
            raise DesignError(
                "`placement` must be `even`, or different shares of the depth between 0 and 1, one "
                f"for each early exit of G = {max(self.granularities)}, got {shares!r}.",
                "placement",
            )

    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Width and depth of every backbone, in the order of `sizes`.

        Raises:
            DesignError: If a size cannot be reached, or two sizes have the same backbone.
        """
        shapes = []
        for size in map(read_size, self.sizes):
            found = size if isinstance(size, tuple) else self.backbone.shape(size, self._count)
            if found in shapes:
                raise DesignError(
                    f"`sizes` must have different backbones: {size} is {found[0]}x{found[1]}, as "
                    "another size is; choose sizes further apart, or a smaller `multiple`.",
                    "sizes",
                )
            shapes.append(found)
        return tuple(shapes)

    def layout(self) -> tuple[tuple[RunPlan, ...], tuple[Refusal, ...]]:
        """The runs that can be, and those that cannot, with what would fit.

        Raises:
            DesignError: If a backbone cannot be.
        """
        plans = tuple(self._plans())
        runs = tuple(plan for plan in plans if isinstance(plan, RunPlan))
        return runs, tuple(plan for plan in plans if isinstance(plan, Refusal))

    def runs(self) -> tuple[RunPlan, ...]:
        """All runs: budget by budget, size by size, G by G, seed by seed.

        Returns:
            `tuple[RunPlan, ...]`: Each within 0.5 % of its budget. An id depends on nothing but the
            run's own content, so runs that a changed design still has keep theirs.

        Raises:
            DesignError: If a backbone cannot be.
            RefusedRunsError: If some runs cannot be; it says what would fit.
        """
        runs, refused = self.layout()
        if refused:
            raise RefusedRunsError(refused)
        return runs

    def table(
        self, rate: float | MachineRate | None = None, console: Console | None = None
    ) -> None:
        """Print the runs before anything runs: sizes, tokens, time, and what to worry about.

        Args:
            rate (`float` or [`MachineRate`], *optional*): FLOP/s of the machine, for times.
            console (`rich.console.Console`, *optional*): Where to.
        """
        from .table import print_table

        print_table(self, rate, console)

    @classmethod
    def from_dict(cls, row: Any) -> IsoFlopDesign:
        """A design from a mapping, as YAML has it.

        Raises:
            DesignError: If a field is unknown, missing or wrong.
        """
        return read(cls, row)

    @classmethod
    def from_yaml(cls, source: str | os.PathLike[str]) -> IsoFlopDesign:
        """Read a design.

        Args:
            source (`str` or `os.PathLike`): File.

        Raises:
            DesignError: If it is not YAML, or a field is unknown, missing or wrong.
            OSError: If it cannot be read.
        """
        return cls.parse(Path(source).read_text(encoding="utf-8"))

    @classmethod
    def parse(cls, text: str) -> IsoFlopDesign:
        """Read a design from YAML text; errors as in `from_yaml`."""
        try:
            return cls.from_dict(yaml.load(text, _OnceLoader))
        except yaml.YAMLError as error:
            raise DesignError(f"a design must be YAML: {error}") from None

    def to_yaml(self) -> str:
        """The design as YAML, every field written out."""
        return yaml.safe_dump(plain(self), sort_keys=False)

    def _plans(self) -> Iterator[RunPlan | Refusal]:
        shapes = self.shapes()
        for budget in self.budgets:
            for width, depth in shapes:
                for G in self.granularities:
                    yield from self._cell(budget, width, depth, G)

    def _cell(self, budget: float, width: int, depth: int, G: int) -> Iterator[RunPlan | Refusal]:
        """The runs of one point of the grid, one for each seed."""
        exits = self._exits(depth, G)
        if isinstance(exits, str):
            yield Refusal(budget, width, depth, G, exits)
            return
        fields, config = self._config(width, depth, exits)
        sizes = family_parameters(config).family
        cost = training_flops_per_token(config, self.seq_length)
        found = fit_budget(
            budget,
            cost.per_token * self.seq_length,
            self.seq_length,
            family_parameters(self._config(width, depth, [depth])[1]).family.non_embedding,
            self.rule,
        )
        if isinstance(found, str):
            yield Refusal(budget, width, depth, G, found)
            return
        content = {
            "model_type": self.backbone.model_type,
            "backbone": fields,
            "exits": tuple(exits),
            "family": self._family(),
            "seq_length": self.seq_length,
            "steps": found.steps,
            "batch_sequences": found.batch_sequences,
            "lr": found.lr,
            "data": self.data,
            "training": dict(self.training),
        }
        tokens = found.steps * found.batch_sequences * self.seq_length
        for seed in self.seeds:
            own = content | {"seed": seed}
            yield RunPlan(
                id=content_id(own),
                budget=budget,
                flops=cost.per_token * tokens,
                flops_per_token=cost.per_token,
                exact=cost.exact,
                N=self._count(width, depth),
                sizes=sizes,
                width=width,
                depth=depth,
                tokens=tokens,
                **own,
            )

    def _exits(self, depth: int, G: int) -> list[int] | str:
        """Depths of G exits, or why there cannot be so many."""
        if self.placement == EVEN:
            if G <= depth:
                return evenly_spaced_exits(depth, G)
            return f"{G} exits need {G} layers or more; leave out this G or this size."
        exits = sorted({round(float(share) * depth) for share in self.placement[: G - 1]} | {depth})
        if len(exits) == G and exits[0] > 0:
            return exits
        return f"at {depth} layers `placement` gives depths {exits}, not {G} different ones."

    def _family(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("num_exit_layers", "exit_norm", "exit_head")}

    def _config(
        self, width: int, depth: int, exits: list[int]
    ) -> tuple[dict[str, Any], FamilialConfig]:
        fields = self.backbone.config_fields(width, depth, self.vocab_size, self.seq_length)
        try:
            text_config = self.backbone.text_config(fields)
            return fields, FamilialConfig(text_config=text_config, exits=exits, **self._family())
        except (TypeError, ValueError) as error:
            raise DesignError(
                f"`backbone` of {width}x{depth} cannot be built: {error}", "backbone"
            ) from error

    def _count(self, width: int, depth: int) -> int:
        """N of a dense backbone, by the design's convention."""
        config = self._config(width, depth, [depth])[1]
        return int(getattr(family_parameters(config).family, self.counting))


class _OnceLoader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which a field stands once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise DesignError(f"`{twice[0]}` stands twice.", str(twice[0]))
        return super().construct_mapping(node, deep)

