"""Two processes, DDP or FSDP2, compute what one does on the same rows."""

import copy
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model
from backbones import tiny_model
from datasets import Dataset
from reference import stir
from torch import distributed, multiprocessing, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import default_data_collator
from transformers.distributed import DistributedConfig

from hf_familial import FamilialForCausalLM, export_exit
from hf_familial.models.familial import Distillation, losses
from hf_familial.models.familial.backbones import LogitTransform
from hf_familial.training.args import FamilialTrainingArguments
from hf_familial.training.trainer import FamilialTrainer
from hf_familial.training.tuning import train_exits_only


CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "accelerate"
EXITS = [1, 2, 4]
PROCESSES = 2
LIMIT = 240  # seconds


# two processes


def launch(worker: Callable[..., None], folder: Path, *args: Any) -> None:
    """Run a worker in two processes that form a group; what fails there fails here."""
    context = multiprocessing.start_processes(
        _enter, (worker, folder, args), nprocs=PROCESSES, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + LIMIT
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"not done after {LIMIT} seconds"
    finally:
        for process in context.processes:
            process.kill()


def _enter(rank: int, worker: Callable[..., None], folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # accelerate asks for an address as well, and does not use it
    os.environ |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    ranks = {"RANK": rank, "LOCAL_RANK": rank}
    sizes = {"WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
    os.environ |= {name: str(value) for name, value in (ranks | sizes).items()}
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=60),
    )
    worker(rank, folder, *args)
    distributed.barrier()
    distributed.destroy_process_group()


def family_of(tied: bool = False, **fields: Any) -> FamilialForCausalLM:
    host = tiny_model("llama", num_hidden_layers=EXITS[-1], tie_word_embeddings=tied)
    return stir(FamilialForCausalLM.from_backbone(host, exits=EXITS, **fields))


def rows_of(count: int, length: int = 12) -> dict[str, torch.Tensor]:
    """Rows whose numbers of targets differ widely."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, 120, (count, length), generator=generator)
    kept = torch.randint(2, length + 1, (count, 1), generator=generator)
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(length) >= kept, -100)}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(found: dict[str, Any], expected: dict[str, Any], case: str) -> None:
    assert found.keys() == expected.keys(), case
    for name, value in expected.items():
        message = f"{case}: {name}: "
        torch.testing.assert_close(
            whole(found[name]), value, rtol=1e-6, atol=1e-6, msg=lambda text, m=message: m + text
        )


# FSDP2


def shard_layers(model: FamilialForCausalLM) -> FamilialForCausalLM:
    """Every layer, then what is left: the heads belong to the root."""
    private = [layer for early in model.model.exits for layer in early.layers]
    for layer in [*model.model.backbone.layers, *private]:
        fully_shard(layer)
    return fully_shard(model)


def shard_heads(model: FamilialForCausalLM) -> FamilialForCausalLM:
    """The heads as well, each on its own, or with the embedding that it is tied to."""
    embedding = model.get_input_embeddings()
    tied = embedding.weight is model.lm_head.weight
    fully_shard([embedding, model.lm_head] if tied else model.lm_head)
    for head in model.exit_heads:
        fully_shard(head)
    return shard_layers(model)


def fsdp_options() -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / "fsdp2_1node.yaml").read_text())["fsdp_config"]


def shard_by_accelerate(
    model: FamilialForCausalLM, checkpointing: bool = False, mixed: str = "no"
) -> FamilialForCausalLM:
    """As accelerate does under the options of our config files, which it does not do on a CPU."""
    options = fsdp_options()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=options["fsdp_version"],
        reshard_after_forward=options["fsdp_reshard_after_forward"],
        auto_wrap_policy=options["fsdp_auto_wrap_policy"].lower(),
        state_dict_type=options["fsdp_state_dict_type"],
        cpu_ram_efficient_loading=options["fsdp_cpu_ram_efficient_loading"],
        activation_checkpointing=checkpointing,
    )
    if mixed != "no":
        plugin.set_mixed_precision(mixed)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        device=torch.device("cpu"),
        mixed_precision=mixed,
        is_main_process=distributed.get_rank() == 0,
    )
    plugin.set_auto_wrap_policy(model)
    if checkpointing:
        model = fsdp2_apply_ac(accelerator, model)
    return fsdp2_prepare_model(accelerator, model)


def shard_with_checkpoints(model: FamilialForCausalLM) -> FamilialForCausalLM:
    """By accelerate, which also lets it wrap every layer to be computed again."""
    return shard_by_accelerate(model, checkpointing=True)


OBJECTIVES: dict[str, dict[str, Any]] = {
    "equal weights": {},
    "an exit of weight 0": {"exit_weights": (0.5, 0.0, 0.5)},
    "the deepest of weight 0": {"exit_weights": (0.5, 0.5, 0.0)},
    "distillation": {"distillation": Distillation(1.0, 2.0)},
}


# every two of the choices together
FAMILIES: list[dict[str, Any]] = [
    {"tied": False, "num_exit_layers": 0, "exit_head": "shared"},
    {"tied": False, "num_exit_layers": 1, "exit_head": "own"},
    {"tied": True, "num_exit_layers": 0, "exit_head": "own"},
    {"tied": True, "num_exit_layers": 1, "exit_head": "shared"},
]


def compare_fsdp(rank: int, folder: Path, how: str) -> None:
    watch_heads()
    shard: Any = globals()[how]
    for fields in FAMILIES:
        for checkpointing in (False, True):
            one, two = family_of(**fields), shard(family_of(**fields))
            assert_sharded(two)
            if checkpointing and shard is not shard_with_checkpoints:
                for model in (one, two):
                    model.train().activation_checkpointing_enable()
            for name, objective in OBJECTIVES.items():
                case = f"{fields}, {name}, checkpointing: {checkpointing}"
                compare_losses(rank, one, two, objective, case)
            compare_losses(rank, one, two, {}, f"{fields}, an idle process", idle=1)
            if not checkpointing:
                compare_members(one, two, str(fields))
                compare_steps(rank, one, two, str(fields))


def assert_sharded(model: nn.Module) -> None:
    assert isinstance(model, FSDPModule)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    layers = [m for m in model.modules() if type(m).__name__.endswith("LlamaDecoderLayer")]
    expected = EXITS[-1] + (len(EXITS) - 1) * model.config.num_exit_layers
    # a layer that is computed again is sharded together with what wraps it
    wrappers = [m for m in model.modules() if hasattr(m, "_checkpoint_wrapped_module")]
    assert len(layers) == expected
    assert all(isinstance(m, FSDPModule) for m in wrappers or layers)


def watch_heads() -> None:
    """Fail where the loss in chunks reads a head in shards, or logits of a whole batch are made."""
    in_chunks, whole_logits = losses.linear_cross_entropy, LogitTransform.read

    def watched(hidden: Any, heads: Any, *args: Any, **kwargs: Any) -> Any:
        assert not any(isinstance(p, DTensor) for head in heads for p in head.parameters())
        return in_chunks(hidden, heads, *args, **kwargs)

    def refused(*args: Any) -> torch.Tensor:
        assert not torch.is_grad_enabled(), "training makes whole logits"
        return whole_logits(*args)

    losses.linear_cross_entropy, LogitTransform.read = watched, refused


def compare_losses(
    rank: int,
    one: nn.Module,
    two: nn.Module,
    objective: dict[str, Any],
    case: str,
    idle: int | None = None,
) -> None:
    """Loss, losses of the exits and gradients; the sharded model sees its share of the rows.

    The process `idle` has rows without a target.
    """
    rows = rows_of(2 * PROCESSES)
    if idle is not None:
        rows["labels"][idle::PROCESSES] = -100
    half = {name: value[rank::PROCESSES] for name, value in rows.items()}
    objective = objective | {
        "num_items_in_batch": (rows["labels"][:, 1:] != -100).sum(),
        "skip_logits": True,
    }
    expected = backward(one, rows, objective, scale=1)
    # gradients are averaged over the processes, each of which holds its share of a sum
    found = backward(two, half, objective, scale=PROCESSES)
    for name in ("loss", "exit_losses"):
        distributed.all_reduce(found[name])
    assert_same(found, expected, case)
    assert expected["loss"] > 1
    assert any(name.startswith("model.exits.0.") for name in expected)


def backward(
    model: nn.Module, rows: dict[str, torch.Tensor], objective: dict[str, Any], scale: int
) -> dict[str, torch.Tensor]:
    """Loss, losses of the exits and all gradients, by name."""
    model.zero_grad()
    outputs = model(**rows, **objective)
    assert outputs.logits is None
    (scale * outputs.loss).backward()
    return {
        "loss": outputs.loss.detach().clone(),
        "exit_losses": outputs.exit_losses.clone(),
        **{name: parameter.grad.clone() for name, parameter in named(model)},
    }


def named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        yield name.replace("_checkpoint_wrapped_module.", ""), parameter


def compare_members(one: Any, two: Any, case: str) -> None:
    """An early exit, which runs some of the sharded layers only; then the whole again."""
    ids = rows_of(2)["input_ids"][:, :5]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    for exit_idx in (0, -1):
        found, expected = (at_exit(model, ids, exit_idx) for model in (one.eval(), two.eval()))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=case)
    texts = [model.generate(ids, exit_idx=0, **options) for model in (one, two)]
    assert torch.equal(*texts), case
    # without a backward pass what is kept stays gathered, and shows other parameters than its own
    for module in two.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def at_exit(model: nn.Module, ids: torch.Tensor, exit_idx: int) -> torch.Tensor:
    return model(ids, exit_idx=exit_idx).logits


def compare_steps(rank: int, one: nn.Module, two: nn.Module, case: str) -> None:
    """Steps of an optimiser, each from gradients that the step before has changed."""
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (one, two)]
    before = copy.deepcopy(dict(one.named_parameters()))
    for _ in range(2):
        compare_losses(rank, one.train(), two.train(), {}, case)
        for optimiser in optimisers:
            optimiser.step()
    assert_same(dict(named(two)), dict(named(one)), case)
    assert all((p - before[name]).abs().max() > 1e-5 for name, p in one.named_parameters()), case


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["shard_layers", "shard_heads", "shard_by_accelerate", "shard_with_checkpoints"]
)
def test_fsdp_equals_one_process(tmp_path: Path, how: str) -> None:
    launch(compare_fsdp, tmp_path, how)


def compare_loaded(rank: int, folder: Path) -> None:
    watch_heads()
    one = family_of(num_exit_layers=1, exit_head="own")
    if rank == 0:
        one.save_pretrained(folder / "family")
    distributed.barrier()
    two = FamilialForCausalLM.from_pretrained(
        folder / "family", distributed_config=DistributedConfig(fsdp_size=PROCESSES)
    )
    assert isinstance(two, FSDPModule)
    assert all(isinstance(layer, FSDPModule) for layer in two.model.backbone.layers)
    compare_losses(rank, one, two, {}, "loaded in shards")
    compare_members(one, two, "loaded in shards")
    compare_losses(rank, one, two, {"distillation": Distillation(1.0, 2.0)}, "distillation")
    assert not any("_read" in vars(module) for module in two.modules())
    for fields in FAMILIES:
        compare_half(fields)
    # what else takes part in a head is not left out
    two.lm_head.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(ValueError, match="`distillation` needs unquantised linear heads"):
        two(**rows_of(2), distillation=Distillation(1.0, 2.0), skip_logits=True)


def compare_half(fields: dict[str, Any]) -> None:
    """Accelerate's policy for bf16 costs as much as bf16 does without shards, on the same rows."""
    models = family_of(**fields), family_of(**fields).bfloat16()
    sharded = shard_by_accelerate(family_of(**fields), mixed="bf16")
    rows, objective = rows_of(2), {"skip_logits": True, "distillation": Distillation(1.0)}
    right, half, found = (backward(m, rows, objective, scale=1) for m in (*models, sharded))
    for name, value in right.items():
        rounding, error = ((whole(x[name]) - value).norm() for x in (half, found))
        assert error <= 2 * rounding + 5e-3 * value.norm(), (fields, name, error, rounding)


@pytest.mark.slow
def test_fsdp_of_the_host(tmp_path: Path) -> None:
    launch(compare_loaded, tmp_path)


def refuse_export(rank: int, folder: Path) -> None:
    for shard in (shard_layers, shard_heads):
        for kind in ("plain", "familial"):
            with pytest.raises(ValueError, match="several processes.*First save the family"):
                export_exit(shard(family_of()), 0, folder / "member", format=kind)
    assert not (folder / "member").exists()


@pytest.mark.slow
def test_a_sharded_family_is_not_exported_from_memory(tmp_path: Path) -> None:
    """Every process refuses, with the same words, before anything is written."""
    launch(refuse_export, tmp_path)


# tensor parallelism


def compare_tensor_parallel(rank: int, folder: Path) -> None:
    """Loss, losses of the exits and gradients of the family that transformers splits."""
    one = FamilialForCausalLM.from_pretrained(folder / "family")
    two = FamilialForCausalLM.from_pretrained(folder / "family", tp_plan="auto")
    assert isinstance(two.lm_head.weight, DTensor)
    rows = rows_of(2)
    for objective in ({}, {"exit_weights": (0.5, 0.0, 0.5)}):
        objective = objective | {"skip_logits": True}
        expected = backward(one, rows, objective, scale=1)
        found = backward(two, rows, objective, scale=1)
        # each process sums its part of a product: in another order than one alone
        found = {name: whole(value) for name, value in found.items()}
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="`distillation` needs .* in each process"):
        two(**rows, distillation=Distillation(1.0))
    with pytest.raises(ValueError, match="sharded over several processes"):
        export_exit(two, 0, folder / f"member{rank}")


@pytest.mark.slow
@pytest.mark.parametrize("fields", FAMILIES[:2], ids=str)
def test_tensor_parallel_losses_equal_those_of_one_process(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    family_of(**fields).save_pretrained(tmp_path / "family")
    launch(compare_tensor_parallel, tmp_path)


# the Trainer: exits without weight, frozen backbones

RUNS: dict[str, dict[str, Any]] = {
    "rotating": {"exit_schedule": "rotating"},
    "gradual": {"exit_schedule": "gradual", "exit_schedule_fraction": 1.0},
    # nothing above the first layer has a gradient other than 0
    "shallowest alone": {"exit_weights": "1,0,0"},
    "exits only": {"exit_weights": "1,2,3"},
    # the second process has no target in the first step
    "idle": {},
}


def train(folder: Path, run: str, rows_each: int) -> FamilialTrainer:
    """Train a family for four steps, a number of rows in each process at a step."""
    family = family_of(num_exit_layers=1, exit_head="own")
    if run == "exits only":
        train_exits_only(family)
    args = FamilialTrainingArguments(
        str(folder / run),
        per_device_train_batch_size=rows_each,
        max_steps=4,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        logging_steps=1,
        save_strategy="no",
        train_sampling_strategy="sequential",
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
        **RUNS[run],
    )
    rows = rows_of(16)
    if run == "idle":
        rows["labels"][2:4] = -100
    data = Dataset.from_dict({name: value.tolist() for name, value in rows.items()})
    trainer = FamilialTrainer(family, args, default_data_collator, train_dataset=data)
    trainer.train()
    return trainer


def train_in_each(rank: int, folder: Path, wrapper: str) -> None:
    if wrapper == "FSDPFamilialForCausalLM":
        take_cpus_for_gpus()
    for run in RUNS:
        trainer = train(folder, run, rows_each=2)
        assert trainer.args.world_size == PROCESSES
        assert type(trainer.model_wrapped).__name__ == wrapper
        weights = {name: whole(value) for name, value in trainer.model.state_dict().items()}
        found = {"weights": weights, "log": trainer.state.log_history}
        torch.save(found, folder / f"{run} {rank}.pt")


def take_cpus_for_gpus() -> None:
    """Let accelerate shard as our config asks, which it does on accelerators only."""
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    for name, value in fsdp_options().items():
        os.environ[name.upper()] = str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "FSDPFamilialForCausalLM"])
def test_two_processes_train_as_one(tmp_path: Path, wrapper: str) -> None:
    launch(train_in_each, tmp_path, wrapper)
    start = family_of(num_exit_layers=1, exit_head="own").state_dict()
    for run in RUNS:
        first, second = (torch.load(tmp_path / f"{run} {rank}.pt") for rank in range(PROCESSES))
        for name, value in first["weights"].items():
            assert torch.equal(value, second["weights"][name]), (run, name)
        one = train(tmp_path, run, rows_each=2 * PROCESSES)
        assert one.args.world_size == 1
        assert_same(first["weights"], one.model.state_dict(), run)
        logged = [row for row in first["log"] if "loss" in row]
        assert len(logged) == 4
        for row, expected in zip(logged, one.state.log_history, strict=False):
            for name in ("loss", "exit_0_loss", "exit_1_loss", "exit_2_loss"):
                assert row[name] == pytest.approx(expected[name], rel=1e-5), (run, name)
        moved = {n for n, value in first["weights"].items() if not torch.equal(value, start[n])}
        assert moved == expected_to_move(run, set(start)), run


def expected_to_move(run: str, names: set[str]) -> set[str]:
    """The weights that have another value after a run than before."""
    if run == "exits only":
        return {name for name in names if name.startswith(("model.exits.", "exit_heads."))}
    if run == "shallowest alone":
        early = ("model.backbone.embed_tokens.", "model.backbone.layers.0.")
        early += ("model.exits.0.", "exit_heads.0.")
        return {name for name in names if name.startswith(early)}
    return names


# configs


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configs(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_machines == (2 if "2nodes" in path.stem else 1)
    assert config.num_processes % config.num_machines == 0
    kind, _, _ = path.stem.partition("_")
    distributed_type = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}[kind]
    assert config.distributed_type == distributed_type
    assert config.use_cpu == ("cpu" in path.stem)
    assert path.name in (CONFIGS / "README.md").read_text()


def test_the_fsdp_configs_differ_in_the_machines_only() -> None:
    paths = [CONFIGS / f"fsdp2_{machines}.yaml" for machines in ("1node", "2nodes")]
    one, two = (load_config_from_file(str(path)) for path in paths)
    assert one.fsdp_config == two.fsdp_config
    assert one.mixed_precision == two.mixed_precision
    assert two.num_processes == 2 * one.num_processes
