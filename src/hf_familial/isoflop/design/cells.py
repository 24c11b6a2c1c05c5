"""From the fields of a design to its runs: one cell for each budget, backbone and granularity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from ...errors import DesignError
from ...flops import family_parameters, training_flops_per_token
from ...models.familial import FamilialConfig, evenly_spaced_exits
from .backbones import read_size
from .plans import Refusal, RunPlan, content_id, fit_budget


if TYPE_CHECKING:
    from .grid import IsoFlopDesign


EVEN = "even"


@dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Attributes:
        design ([`IsoFlopDesign`]): Whose grid it is.
        budget (`float`): FLOPs of a run.
        width (`int`): Of the backbone.
        depth (`int`): Of the backbone.
        G (`int`): Number of exits.
    """

    design: IsoFlopDesign
    budget: float
    width: int
    depth: int
    G: int

    def plans(self) -> Iterator[RunPlan | Refusal]:
        """A run for each seed, or why there is none."""
        design = self.design
        exits = exits_at(design, self.depth, self.G)
        if isinstance(exits, str):
            yield self._refused(exits)
            return
        fields, config = family_config(design, self.width, self.depth, exits)
        cost = training_flops_per_token(config, design.seq_length)
        dense = family_parameters(family_config(design, self.width, self.depth, [self.depth])[1])
        found = fit_budget(
            self.budget,
            cost.per_token * design.seq_length,
            design.seq_length,
            dense.family.non_embedding,
            design.rule,
        )
        if isinstance(found, tuple):
            fits = " or ".join(f"{fit:.6g}" for fit in found)
            reason = f"no whole number of steps meets it within 0.5 %; a budget of {fits} would fit"
            yield self._refused(f"{reason}, or a smaller batch.", found)
            return
        content: dict[str, Any] = {
            "model_type": design.backbone.model_type,
            "backbone": fields,
            "exits": tuple(exits),
            "family": exit_fields(design),
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
            matters = own if self.G > 1 else own | {"family": {}}
            yield RunPlan(
                id=content_id(matters),
                budget=self.budget,
                flops=cost.per_token * tokens,
                flops_per_token=cost.per_token,
                exact=cost.exact,
                N=getattr(dense.family, design.counting),
                sizes=family_parameters(config).family,
                width=self.width,
                depth=self.depth,
                tokens=tokens,
                **own,
            )

    def _refused(self, reason: str, fits: tuple[float, ...] = ()) -> Refusal:
        return Refusal(self.budget, self.width, self.depth, self.G, reason, fits)


def plan_runs(design: IsoFlopDesign) -> Iterator[RunPlan | Refusal]:
    """Every run of a design, or why it cannot be: budgets, then sizes, then G, then seeds.

    Raises:
        DesignError: If a backbone cannot be.
    """
    shapes = {sizes: shapes_of(design, sizes) for sizes in set(design.sizes_by_budget)}
    for budget, sizes in zip(design.budgets, design.sizes_by_budget, strict=True):
        for width, depth in shapes[sizes]:
            for G in design.granularities:
                yield from Cell(design, budget, width, depth, G).plans()


def shapes_of(design: IsoFlopDesign, sizes: tuple[float | str, ...]) -> tuple[tuple[int, int], ...]:
    """Width and depth of every backbone, in the order of the sizes of a budget.

    Raises:
        DesignError: If a size cannot be reached, or two sizes have the same backbone.
    """

    def count(width: int, depth: int) -> int:
        config = family_config(design, width, depth, [depth])[1]
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


def exits_at(design: IsoFlopDesign, depth: int, G: int) -> list[int] | str:
    """Depths of G exits, or why there cannot be so many."""
    if isinstance(design.placement, str):
        if G <= depth:
            return evenly_spaced_exits(depth, G)
        return f"{G} exits need {G} layers or more; leave out this G or this size."
    exits = sorted({round(share * depth) for share in design.placement[: G - 1]} | {depth})
    if len(exits) == G and exits[0] > 0:
        return exits
    return f"at {depth} layers `placement` gives depths {exits}, not {G} different ones."


def exit_fields(design: IsoFlopDesign) -> dict[str, Any]:
    """What a family is told of its exits, beside where they are."""
    names = ("num_exit_layers", "exit_norm", "exit_head")
    return {name: getattr(design, name) for name in names}


def family_config(
    design: IsoFlopDesign, width: int, depth: int, exits: list[int]
) -> tuple[dict[str, Any], FamilialConfig]:
    """The fields of a backbone's config, and the family on it.

    Raises:
        DesignError: If it cannot be.
    """
    fields = design.backbone.config_fields(width, depth, design.vocab_size, design.seq_length)
    try:
        text_config = design.backbone.text_config(fields)
        family = FamilialConfig(text_config=text_config, exits=exits, **exit_fields(design))
        family_parameters(family)
    except (TypeError, ValueError, KeyError, RuntimeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise DesignError(
            f"`backbone` of {width}x{depth} cannot be built: {reason}", "backbone"
        ) from error
    return fields, family
