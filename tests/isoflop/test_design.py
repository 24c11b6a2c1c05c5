"""A design: what it refuses, how it survives a file, and which runs and ids follow from it."""

import functools
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from hf_familial.errors import DesignError, InfeasibleDesignError
from hf_familial.flops import count_family, training_flops_per_token
from hf_familial.isoflop import (
    BackboneTemplate,
    ExpectedLaw,
    Fixed,
    IsoFlopDesign,
    MachineRate,
    Measured,
    MeasuredRow,
    StepLaw,
    calibrate_rate,
    check_budgets,
    print_runs,
)
from hf_familial.isoflop.arguments import check_design, check_training
from hf_familial.isoflop.estimate import expected_tokens


TEMPLATE = BackboneTemplate(head_dim=16, multiple=16, kv_heads=2)
SIZES = ("32x3", "48x3", "64x4")


def design_of(**fields: Any) -> IsoFlopDesign:
    usual: dict[str, Any] = {
        "budgets": (4e11, 1.6e12),
        "sizes": SIZES,
        "vocab_size": 512,
        "seq_length": 64,
        "granularities": (1, 3),
        "backbone": TEMPLATE,
    }
    return IsoFlopDesign(**(usual | fields))


rules = st.one_of(
    st.builds(Fixed, lr=st.floats(1e-5, 1e-1), batch_tokens=st.integers(64, 4096)),
    st.builds(StepLaw, lr_scale=st.floats(0.1, 2), batch_scale=st.floats(0.1, 2)),
    st.builds(
        Measured,
        table=st.lists(
            st.builds(
                MeasuredRow,
                N=st.floats(1e4, 1e9),
                D=st.floats(1e6, 1e12),
                lr=st.floats(1e-5, 1e-1),
                batch_tokens=st.floats(64, 1e6),
            ),
            min_size=1,
            max_size=3,
        ),
    ),
)
one_size = st.one_of(st.floats(1e4, 1e12), st.just("64x4"))
designs = st.builds(
    design_of,
    budgets=st.lists(st.floats(1e9, 1e21), min_size=1, max_size=3, unique=True),
    sizes=st.lists(one_size, min_size=1, unique=True),
    granularities=st.sets(st.integers(2, 8), max_size=3).map(lambda s: [1, *sorted(s)]),
    placement=st.one_of(st.just("even"), st.permutations([0.1 * i for i in range(1, 9)])),
    seeds=st.lists(st.integers(0, 9), min_size=1, unique=True),
    rule=rules,
    counting=st.sampled_from(["total", "non_embedding", "active", "layers_and_head"]),
    data=st.text(max_size=8),
    data_tokens=st.none() | st.integers(1, 10**12),
    training=st.dictionaries(st.text(max_size=5), st.integers() | st.booleans(), max_size=2),
    exit_head=st.sampled_from(["own", "shared"]),
)


@settings(max_examples=40, deadline=None)
@given(designs)
def test_a_design_survives_its_file(design: IsoFlopDesign) -> None:
    assert IsoFlopDesign.parse(design.to_yaml()) == design


def test_yaml_numbers_in_words(tmp_path: Any) -> None:
    file = tmp_path / "design.yaml"
    file.write_text(
        "budgets: [4e11, 1.6e12]\nsizes: [32x3, 2e5]\nvocab_size: 512\nseq_length: 64\n"
        "rule: {kind: fixed, lr: 3e-3, batch_tokens: 1024}\ndata_tokens: 1e9\n"
    )
    design = IsoFlopDesign.from_yaml(file)
    assert design.budgets == (4e11, 1.6e12)
    assert design.sizes == ("32x3", 2e5)
    assert design.rule == Fixed(lr=3e-3, batch_tokens=1024)
    assert design.data_tokens == 10**9


def test_a_size_in_words_is_a_number() -> None:
    words, number = (design_of(sizes=(size,), granularities=(1,)) for size in ("1e5", 1e5))
    assert [run.id for run in words.runs()] == [run.id for run in number.runs()]


WRONG = [
    ({"budgts": [1]}, "`budgts` is unknown; did you mean `budgets`?"),
    ({"budgets": 3}, "`budgets` must be a list, got 3"),
    ({"budgets": [-1]}, "`budgets` must be positive, got -1.0"),
    ({"budgets": ["much"]}, "`budgets` must be a list, each item a finite number"),
    ({"budgets": [1e12, 1e12]}, "`budgets` must have different values"),
    ({"budgets": [math.nan]}, "each item a finite number"),
    ({"seq_length": True}, "`seq_length` must be an integer, got True"),
    ({"seq_length": 1.5}, "`seq_length` must be an integer, got 1.5"),
    ({"sizes": ["64 by 4"]}, "`sizes` must be numbers of parameters or `width x depth`"),
    ({"sizes": [-1e5]}, "`sizes` must be positive, got -100000.0"),
    ({"sizes": ["64x4", "64x4"]}, "`sizes` must have different values"),
    ({"sizes": [["64x4"], ["32x4"], ["16x4"]]}, "one list for each of the 1 budgets"),
    ({"sizes": [["64x4"], "32x4"]}, "must be one list for all budgets"),
    ({"sizes": [[]]}, "`sizes` must have different values, at least one"),
    ({"sizes": [["64 by 4"]]}, "`sizes` must be numbers of parameters"),
    ({"granularities": [2, 4]}, "`granularities` must contain 1, the ordinary model"),
    ({"placement": [0.5]}, "one for each early exit of G = 3"),
    ({"placement": "odd"}, "`placement` must be `even`"),
    ({"placement": [0.5, 1.0]}, "`placement` must be"),
    ({"seeds": [-1]}, "`seeds` must be 0 or more"),
    ({"counting": "nonembedding"}, "`counting` 'nonembedding' is unknown; did you mean `non_emb"),
    ({"exit_head": "none"}, "`exit_head` must be shared or own, got 'none'"),
    ({"rule": {"kind": "steplaw"}}, "`rule.kind` 'steplaw' is unknown; did you mean `step_law`?"),
    ({"rule": {"kind": "fixed", "lr": 1}}, "`rule.batch_tokens` is missing"),
    ({"rule": {"kind": "fixed", "lr": 0, "batch_tokens": 1}}, "`rule.lr` must be positive"),
    ({"rule": {"kind": "measured", "table": []}}, "`rule.table` must have at least one row"),
    ({"rule": {"kind": "measured", "table": [{"N": 1, "D": 1, "lr": 1}]}}, "batch_tokens` is miss"),
    ({"backbone": {"model_typ": "llama"}}, "`backbone.model_typ` is unknown; did you mean"),
    ({"backbone": {"model_type": "lama"}}, "`backbone.model_type` 'lama' is unknown; did you"),
    ({"backbone": {"multiple": 48}}, "`backbone.multiple` must be a multiple of `head_dim`"),
    (
        {"backbone": {"fields": {"rms_eps": 1}}},
        "`backbone.fields.rms_eps` is not a field",
    ),
    ({"backbone": [1]}, "`backbone` must be an object with fields"),
    ({"training": {"a": {1, 2}}}, "`training` must be a mapping of JSON values"),
    ({"expected": {"A": "x"}}, "`expected.A` must be a finite number"),
    ({"data_tokens": 0}, "`data_tokens` must be positive"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_what_is_wrong_is_named(fields: dict[str, Any], message: str) -> None:
    row = {"budgets": [1e12], "sizes": ["64x4"], "vocab_size": 512, "seq_length": 64}
    with pytest.raises(DesignError) as found:
        IsoFlopDesign.from_dict(row | {"granularities": [1, 3]} | fields)
    assert message in str(found.value)
    assert found.value.field.split(".")[0] in fields


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("budgets: [1", "a design must be YAML"),
        ("budgets: [1]\nbudgets: [2]", "`budgets` appears twice"),
        ("- 1", "a design must be an object with fields"),
        ("budgets: [1e12]", "`sizes` is missing"),
    ],
)
def test_what_is_no_design_is_refused(text: str, message: str) -> None:
    with pytest.raises(DesignError, match=message):
        IsoFlopDesign.parse(text)


def test_runs_are_the_whole_grid() -> None:
    design = design_of(seeds=(0, 7), num_exit_layers=1)
    runs = design.runs()
    assert len(runs) == 2 * 3 * 2 * 2
    assert len({run.id for run in runs}) == len(runs)
    for run in runs:
        config = run.config()
        assert config.exits == list(run.exits)
        assert (config.hidden_size, config.num_hidden_layers) == (run.width, run.depth)
        per_token = training_flops_per_token(config, 64).per_token
        assert run.tokens == run.steps * run.batch_sequences * 64
        assert run.flops == per_token * run.tokens
        assert abs(run.flops / run.budget - 1) <= 0.005
        assert run.sizes.total == count_family(config)["total"]
    dense = {run.width: run.N for run in runs if run.G == 1}
    assert all(run.N == dense[run.width] for run in runs)
    # heads and private layers are paid for in tokens
    first, paired = runs[0], runs[2]
    assert (first.G, paired.G) == (1, 3)
    ratio = paired.flops_per_token / first.flops_per_token
    assert first.tokens / paired.tokens == pytest.approx(ratio, rel=0.01)


def test_every_budget_may_have_its_own_sizes() -> None:
    small, large = ["16x4", "32x4"], ["32x4", "48x4", "64x4"]
    design = design_of(sizes=[small, large])
    assert IsoFlopDesign.parse(design.to_yaml()) == design
    widths = {C: {run.width for run in design.runs() if run.budget == C} for C in design.budgets}
    assert list(widths.values()) == [{16, 32}, {32, 48, 64}]
    # each run is the one that a design of its budget alone would have
    apart = [
        run.id
        for budget, sizes in zip(design.budgets, (small, large), strict=True)
        for run in design_of(budgets=[budget], sizes=sizes).runs()
    ]
    assert [run.id for run in design.runs()] == apart


def test_an_id_is_its_content() -> None:
    of = functools.partial(design_of, sizes=("32x3",))
    runs = {run.id: run for run in of().runs()}
    same = [run.id for run in of(data_tokens=5, counting="total").runs()]
    assert same == list(runs)
    for fields in (
        {"data": "other"},
        {"training": {"weight_decay": 0.2}},
        {"seeds": (3,)},
        {"seq_length": 32},
        {"vocab_size": 500},
        {"rule": StepLaw(lr_scale=0.5)},
        {"backbone": BackboneTemplate(head_dim=16, multiple=16, tie_word_embeddings=False)},
    ):
        assert not runs.keys() & {run.id for run in of(**fields).runs()}, fields


def test_a_dense_run_does_not_depend_on_how_exits_are_made() -> None:
    of = functools.partial(design_of, sizes=("32x3",))
    runs, others = of().runs(), of(exit_norm="shared", exit_head="own").runs()
    for run, other in zip(runs, others, strict=True):
        assert (run.id == other.id) == (run.G == 1)


def test_ids_do_not_change_between_versions() -> None:
    # these name checkpoints on disk: a change here loses them
    assert [run.id for run in design_of(budgets=(4e11,), sizes=("32x3",)).runs()] == GOLDEN


GOLDEN = ["615fa65fa8f40f8c", "b43e256abfce0c95"]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(2e10, 1e14), min_size=1, max_size=3, unique=True),
    st.floats(2e10, 1e14),
    st.sampled_from([StepLaw(), StepLaw(batch_scale=3), Fixed(lr=1e-3, batch_tokens=128)]),
)
def test_budgets_are_met_and_runs_kept(
    budgets: list[float], more: float, rule: Fixed | StepLaw
) -> None:
    before = design_of(budgets=budgets, rule=rule).layout()[0]
    for run in before:
        assert abs(run.flops / run.budget - 1) <= 0.005
    if more not in budgets:
        after = design_of(budgets=[more, *budgets], rule=rule).layout()[0]
        assert {run.id for run in before} <= {run.id for run in after}


def test_a_budget_that_whole_steps_miss_is_refused_with_what_fits() -> None:
    rule = Fixed(lr=1e-3, batch_tokens=64 * 1000)
    design = design_of(budgets=(3e11,), sizes=("64x4",), granularities=(1,), rule=rule)
    with pytest.raises(InfeasibleDesignError) as found:
        design.runs()
    (refusal,) = found.value.infeasible
    assert (refusal.width, refusal.depth, refusal.G) == (64, 4, 1)
    assert len(refusal.fits) == 2
    assert refusal.fits[0] < 3e11 < refusal.fits[1]
    assert f"{refusal.fits[0]:.6g} or {refusal.fits[1]:.6g} would fit" in str(found.value)
    for budget in refusal.fits:
        (run,) = design_of(budgets=(budget,), sizes=("64x4",), granularities=(1,), rule=rule).runs()
        assert run.batch_sequences == 1000


def test_more_exits_than_layers_are_refused_alone() -> None:
    design = design_of(budgets=(4e11,), granularities=(1, 4))
    runs, refused = design.layout()
    assert [(r.depth, r.G) for r in refused] == [(3, 4), (3, 4)]
    assert len(runs) == 4
    assert "4 exits need at least 4 layers" in refused[0].reason


def test_placement_adds_exits_in_order() -> None:
    design = design_of(
        budgets=(4e12,), sizes=("64x8",), granularities=(1, 2, 3, 4), placement=(0.5, 0.25, 0.75)
    )
    assert [run.exits for run in design.runs()] == [(8,), (4, 8), (2, 4, 8), (2, 4, 6, 8)]
    narrow = design_of(budgets=(4e11,), sizes=("32x2",), placement=(0.5, 0.6))
    assert "`placement` gives the depths [1, 2], not 3 different" in narrow.layout()[1][0].reason


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "gemma2", "phi3", "gpt_neox"])
def test_sizes_are_reached_by_any_family(model_type: str) -> None:
    template = BackboneTemplate(model_type, head_dim=16, multiple=16)
    sizes = (1e5, 4e5, 2e6)
    design = design_of(budgets=(1e13,), sizes=sizes, backbone=template, granularities=(1,))
    for run, size in zip(design.runs(), sizes, strict=True):
        assert run.N == run.sizes.non_embedding == pytest.approx(size, rel=0.2)
        assert 16 <= run.width / run.depth <= 64
    assert [run.width for run in design.runs()] == sorted({run.width for run in design.runs()})


def test_experts_grow_with_the_width() -> None:
    template = BackboneTemplate(
        "qwen3_moe",
        head_dim=16,
        multiple=16,
        scaled={"moe_intermediate_size": 0.5},
        fields={"num_experts": 4, "num_experts_per_tok": 2},
    )
    for run in design_of(budgets=(1e12,), backbone=template, counting="active").runs():
        config = run.config().text_config
        assert config.moe_intermediate_size == max(1, round(run.width / 32)) * 16
        assert run.sizes.active < run.sizes.total


def test_sizes_that_cannot_be_are_named() -> None:
    with pytest.raises(DesignError, match="`sizes` must have different backbones"):
        design_of(sizes=(1e5, 1.001e5)).runs()
    with pytest.raises(DesignError, match="reachable with `multiple` 16: the nearest to 10"):
        design_of(sizes=(10.0,)).runs()
    with pytest.raises(DesignError, match="widths that are multiples of `head_dim`"):
        design_of(sizes=("50x2",)).runs()


def test_rules() -> None:
    assert StepLaw().at(1e8, 2e9) == pytest.approx(
        (1.79 * 1e8**-0.713 * 2e9**0.307, 0.58 * 2e9**0.571)
    )
    table = [
        MeasuredRow(N, D, 3 * N**-0.5 * D**0.1, D**0.5) for N in (1e5, 1e6) for D in (1e7, 1e8)
    ]
    inside = Measured(tuple(table)).at(3e5, 4e7)
    assert inside == pytest.approx((3 * 3e5**-0.5 * 4e7**0.1, 4e7**0.5))
    # beyond the table, its edge; along what it does not vary, the same
    assert Measured(tuple(table)).at(1e9, 4e7) == pytest.approx(Measured(tuple(table)).at(1e6, 4e7))
    one = Measured((MeasuredRow(1e5, 1e7, 1e-2, 4096),))
    assert one.at(1e8, 1e3) == pytest.approx((1e-2, 4096))
    flat = Measured(tuple(row for row in table if row.D == 1e7))
    assert flat.at(3e5, 1e9) == pytest.approx((3 * 3e5**-0.5 * 1e7**0.1, 1e7**0.5))


def test_expected_optima() -> None:
    law = ExpectedLaw()
    N, D = law.optimum(1e21)
    assert 6 * N * D == pytest.approx(1e21)
    grid = [N * 10 ** (step / 100) for step in range(-100, 101)]
    assert min(grid, key=lambda n: law.reducible(n, 1e21 / (6 * n))) == pytest.approx(N, rel=0.03)
    # a law with its minimum where N = D / 20 says so
    runs = design_of(budgets=(4e11, 6.4e12), sizes=("32x3", "48x3", "64x4", "96x5")).runs()
    found = {(b.budget, b.G): b for b in check_budgets(runs, law)}
    assert not found[4e11, 1].brackets
    assert "add sizes below" in found[4e11, 1].advice
    assert found[6.4e12, 1].brackets
    assert found[6.4e12, 1].best in found[6.4e12, 1].sizes[1:-1]
    assert "three sizes" in check_budgets(runs[:1], law)[0].advice


def printed(design: IsoFlopDesign, rate: Any = None) -> str:
    out = io.StringIO()
    print_runs(design, rate, Console(file=out, width=200, color_system=None))
    return out.getvalue()


def test_the_table_says_what_will_happen() -> None:
    design = design_of(budgets=(4e11, 6.4e12), data_tokens=10**6)
    runs = design.runs()
    text = printed(design, rate=1e11)
    assert f"{len(runs)} runs, {sum(run.flops for run in runs):.3e} FLOPs" in text
    names = [cell.strip() for cell in text.splitlines()[2].split("┃")[1:-1]]
    for run in runs:
        (line,) = (line for line in text.splitlines() if run.id[:8] in line)
        assert f"{6 * run.N * run.tokens / run.flops - 1:+.0%}" in line
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        row = dict(zip(names, cells, strict=True))
        assert row["steps"] == f"{run.steps:,}"
        assert row["seed"] == str(run.seed)
        assert row["exits"] == " ".join(map(str, run.exits))
    seconds = sum(run.flops for run in runs) / 1e11
    assert f"{seconds / 60:.1f} min on given" in text
    repeated = sum(run.tokens > 10**6 for run in runs)
    assert repeated
    assert f"{repeated} runs see their data more than once" in text
    assert "C = 6.4e+12, G = 1" in text
    assert "smaller than the models that Step Law was fitted on" in text
    refused = printed(design_of(granularities=(1, 4)))
    assert "infeasible 32x3, G = 4" in refused
    assert "`data_tokens` is not set" in printed(design_of(data="somebody/texts"))


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_the_table_fits_its_terminal_and_names_what_it_leaves_out(width: int) -> None:
    out = io.StringIO()
    design = design_of(budgets=(4e11, 6.4e12), granularities=(1, 2), rule=StepLaw())
    print_runs(design, 1e11, Console(file=out, width=width, color_system=None))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for run in design.runs():
        (line,) = (line for line in text.splitlines() if run.id[:8] in line)
        assert f"{run.steps:,}" in line
        assert f"{run.N:,}" in line
    assert ("no room for" in text) == (width < 140)


def test_files_tell_how_often_data_would_repeat(tmp_path: Path) -> None:
    data = tmp_path / "notes.txt"
    data.write_text("some words of a text\n" * 1000)
    design = design_of(data=str(data))
    runs = design.runs()
    tokens = expected_tokens(design)
    assert 21_000 * 0.98 / 4 < tokens < 21_000
    text = printed(design)
    assert f"{len(runs)} runs see their data more than once, up to about" in text
    assert "by the size of the files" in text
    assert expected_tokens(design_of(data="stdlib")) > 1e6
    few = design_of(training={"max_train_bytes": 1000})
    assert expected_tokens(few) < 1000
    assert expected_tokens(design_of(data="somebody/texts")) is None
    assert expected_tokens(design_of(data_tokens=7)) == 7


def test_the_rate_of_this_machine() -> None:
    state = torch.get_rng_state()
    runs = design_of(budgets=(4e11,)).runs()
    rate = calibrate_rate(runs, seconds=0.2)
    assert torch.equal(torch.get_rng_state(), state)
    costs = [cost for cost, _ in rate.points]
    assert costs == sorted(costs)
    assert costs[0] == min(run.flops_per_token for run in runs)
    assert costs[-1] == max(run.flops_per_token for run in runs)
    assert all(speed > 0 for _, speed in rate.points)
    assert rate.total(runs) == sum(rate.seconds_for(run) for run in runs)
    with pytest.raises(ValueError, match="`seconds` must be positive, got 0"):
        calibrate_rate(seconds=0)


def test_rates_between_models() -> None:
    rate = MachineRate(((1e6, 1e9), (1e8, 1e11)), 1.0, "cpu")
    assert rate.at(1e7) == pytest.approx(1e10)
    assert rate.at(1e3) == pytest.approx(1e9)
    assert rate.at(1e9) == pytest.approx(1e11)


def test_a_plan_can_be_written_down() -> None:
    run = design_of(budgets=(4e11,)).runs()[0]
    row = json.loads(json.dumps(run.to_dict()))
    assert row["id"] == run.id
    assert type(run).from_dict(row) == run
    assert yaml.safe_load(yaml.safe_dump(row)) == row


TEXT = """
budgets: [4.3e8]
sizes: [16x2, 32x2]
granularities: [1, 2]
vocab_size: 300
seq_length: 32
backbone: {head_dim: 16, multiple: 16}
rule: {kind: fixed, lr: 8e-3, batch_tokens: 32}
"""
SLIPS = {
    "an octal number": ("seq_length: 32", "seq_length: 0200", "`0200` in line 6"),
    "a hexadecimal size": ("16x2, 32x2", "0x40", "`0x40` in line 3"),
    "a time": ("seq_length: 32", "seq_length: 1:30", "`1:30`"),
    "a list for a rule": ("{kind: fixed, lr: 8e-3, batch_tokens: 32}", "[fixed]", "`rule.kind`"),
    "a list for a kind": ("kind: fixed", "kind: [fixed]", "`rule.kind`"),
    "nested brackets": ("[4.3e8]", "[" * 3000, "nested too deep"),
    "nested brackets that close": ("[4.3e8]", "[" * 3000 + "]" * 3000, "nested too deep"),
    "lists in lists": ("[16x2, 32x2]", "[[[16x2]]]", "`sizes`"),
    "a seed of 33 bits": ("vocab_size", "seeds: [4294967296]\nvocab_size", "`seeds` must be less"),
    "a size that no depth reaches": ("16x2, 32x2", "1e15", "`sizes` must be reachable"),
    "a huge vocabulary": ("vocab_size: 300", "vocab_size: 1e20", "`vocab_size`"),
    "a misspelt placement": ("vocab_size", "placement: evne\nvocab_size", "did you mean `even`"),
    "a misspelt norm": ("vocab_size", "exit_norm: onw\nvocab_size", "did you mean `own`"),
    "an unknown activation": ("multiple: 16", "multiple: 16, fields: {hidden_act: no}", "backbone"),
    "a tab": ("seq_length: 32", "seq_length:\t32\n\tx: 1", "line 6"),
    "two documents": ("seq_length: 32", "seq_length: 32\n---\na: 1", "must be YAML: line"),
}


@pytest.mark.parametrize(("old", "new", "said"), SLIPS.values(), ids=SLIPS)
def test_a_slip_in_a_file_is_a_design_error_in_one_line(old: str, new: str, said: str) -> None:
    assert old in TEXT
    with pytest.raises(DesignError) as found:
        IsoFlopDesign.parse(TEXT.replace(old, new)).layout()
    assert said in str(found.value)
    assert len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_is_read_in_the_encodings_of_editors(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "design.yaml").write_text(TEXT + "# größer\n", encoding=encoding)
    assert IsoFlopDesign.from_yaml(tmp_path / "design.yaml") == IsoFlopDesign.parse(TEXT)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-32"])
def test_a_file_in_another_encoding_is_named(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "design.yaml").write_text(TEXT + "# größer\n", encoding=encoding)
    with pytest.raises(DesignError, match="design.yaml must be text in UTF-8"):
        IsoFlopDesign.from_yaml(tmp_path / "design.yaml")


def test_exponents_without_a_point_are_numbers_and_mappings_merge() -> None:
    design = IsoFlopDesign.parse(TEXT + "training: {weight_decay: 1e-1, warmup_steps: 1e3}")
    assert design.training == {"weight_decay": 0.1, "warmup_steps": 1000.0}
    assert IsoFlopDesign.parse(TEXT.replace("seq_length: 32", "<<: {seq_length: 32}")).seq_length


def test_a_file_that_is_not_there_names_a_near_one(tmp_path: Path) -> None:
    (tmp_path / "design.yaml").write_text(TEXT)
    with pytest.raises(FileNotFoundError, match=r"did you mean `.*/design\.yaml`"):
        IsoFlopDesign.from_yaml(tmp_path / "desing.yaml")


TRAINING: list[tuple[dict[str, Any], str]] = [
    ({"adam_beta1": 2}, "`adam_beta1`"),
    ({"exit_weights": "foo"}, "`exit_weights`"),
    ({"exit_weights": "0.2,0.8"}, "one number for each of the 1 exits"),
    ({"exit_weights": [0.5, 0.5]}, "one number for each of the 1 exits"),
    ({"warmup_steps": "many"}, "`training.warmup_steps` must be a finite number, got 'many'"),
    ({"bf16": "yes"}, "`training.bf16` must be true or false, got 'yes'"),
    ({"per_device_train_batch_size": 0}, "`training.per_device_train_batch_size`"),
    ({"per_device_eval_batch_size": 1.5}, "must be an integer, got 1.5"),
    ({"optim": "adamw_troch"}, "Did you mean 'adamw_torch'"),
    ({"eval_fraction": 2}, "`eval_fraction`"),
    ({"weight_dacay": 1}, "did you mean `weight_decay`?"),
]


@pytest.mark.parametrize(("training", "said"), TRAINING)
def test_training_of_a_design_is_typed_and_checked_before_its_runs(
    training: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    design = design_of(training=training)
    monkeypatch.setattr(IsoFlopDesign, "layout", None)
    with pytest.raises(DesignError) as found:
        check_design(design)
    assert said in str(found.value)


def test_words_in_training_become_what_they_stand_for() -> None:
    found = check_training({"weight_decay": "1e-1", "eval_strategy": False, "max_eval_tokens": 1e3})
    assert found == {"weight_decay": 0.1, "eval_strategy": "no", "max_eval_tokens": 1000}


@pytest.mark.parametrize("fields", [{"data": "stdlbi"}, {"data": "./absent"}, {"data": "a.txt"}])
def test_data_that_are_nowhere_are_refused_before_the_runs(fields: dict[str, Any]) -> None:
    with pytest.raises((DesignError, FileNotFoundError), match="`data`"):
        check_design(design_of(**fields))
    with pytest.raises(FileNotFoundError, match=r"training\.tokenizer_name"):
        check_design(design_of(training={"tokenizer_name": "./absent"}))
