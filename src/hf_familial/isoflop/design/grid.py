"""An IsoFLOP design: budgets, sizes and granularities, and the runs that follow from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]

from ...errors import DesignError, RefusedRunsError
from ...flops import CONVENTIONS
from .backbones import BackboneTemplate, read_size
from .cells import EVEN, plan_runs
from .fields import check_fields, near, nearest, plain, read
from .plans import Refusal, RunPlan
from .reading import parse, read_file
from .rules import ExpectedLaw, Fixed, Measured, StepLaw, positive, read_rule


if TYPE_CHECKING:
    from rich.console import Console

    from .rate import MachineRate


@dataclass(frozen=True)
class IsoFlopDesign:
    """A grid of runs: every budget with every size, granularity and seed.

    Attributes:
        budgets (`tuple[float, ...]`): FLOPs C of a run.
        sizes (`tuple[float | str, ...]`): Backbones: parameters N by `counting`, from which width
            and depth follow, or `width x depth` such as `"64x4"`. N is that of G = 1, so that all
            granularities of a size share one backbone. Or a list of such lists, one for each
            budget in its order, so that every budget's sizes stand around its own optimum.
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
        data (`str`): What is trained on: empty or `stdlib` for the source code of Python's standard
            library, else a file or folder, or a dataset of the Hub.
        data_tokens (`int`, *optional*): Tokens of one pass over it.
        training (`Mapping[str, Any]`): Further arguments of data and training, by the names that
            `examples/pretrain.py` has for them; what follows from the design is refused.
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
        positive(self, "budgets", "vocab_size", "seq_length", "granularities")
        positive(self, "data_tokens")
        for name in ("budgets", "granularities", "seeds"):
            self._check_different(name, getattr(self, name))
        self._check_sizes()
        most = {"budgets": 1e30, "vocab_size": 2**31, "seq_length": 2**31, "seeds": 2**32}
        for name, limit in most.items():
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
            hint = near(self.counting, CONVENTIONS)
            raise DesignError(f"`counting` {self.counting!r} is unknown{hint}", "counting")
        for name, choices in (("exit_norm", ("own", "shared")), ("exit_head", ("shared", "own"))):
            if (value := getattr(self, name)) not in choices:
                hint = nearest(value, choices) or "."
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
            self._check_different("sizes", sizes)
            for size in sizes:
                read_size(size)

    def _check_different(self, name: str, values: tuple[Any, ...]) -> None:
        if not values or len(set(values)) < len(values):
            raise DesignError(
                f"`{name}` must hold different values, at least one, got {list(values)}.", name
            )

    def _check_placement(self) -> None:
        if self.placement == EVEN:
            return
        shares = self.placement
        if isinstance(shares, str):
            hint = nearest(shares, [EVEN]) or "."
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

    def layout(self) -> tuple[tuple[RunPlan, ...], tuple[Refusal, ...]]:
        """The runs that can be, and those that cannot, with what would fit.

        Raises:
            DesignError: If a backbone cannot be.
        """
        plans = tuple(plan_runs(self))
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
        try:
            return read(cls, row)
        except RecursionError:
            raise DesignError("a design has lists or mappings nested too deep.") from None

    @classmethod
    def from_yaml(cls, source: str | os.PathLike[str]) -> IsoFlopDesign:
        """Read a design.

        Args:
            source (`str` or `os.PathLike`): File.

        Raises:
            DesignError: If it is not YAML, or a field is unknown, missing or wrong.
            OSError: If it cannot be read.
        """
        return cls.from_dict(read_file(source))

    @classmethod
    def parse(cls, text: str) -> IsoFlopDesign:
        """Read a design from YAML text; errors as in `from_yaml`."""
        return cls.from_dict(parse(text))

    def to_yaml(self) -> str:
        """The design as YAML, every field written out."""
        return yaml.safe_dump(plain(self), sort_keys=False)
