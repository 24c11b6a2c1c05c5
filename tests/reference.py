"""Slow references for tests, which compute the results of a family without its code.

They use only stock Transformers, plain loops, and the family's weights by their names in a
checkpoint.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from backbones import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_familial import FamilialConfig, FamilialForCausalLM
from hf_familial.flops import family_parameters, training, training_flops_per_token


# model_type -> dotted paths of the layers and of the final norm in its causal LM
NAMES: dict[str, tuple[str, str]] = {
    "falcon_h1": ("model.layers", "model.final_layernorm"),
    "gpt2": ("transformer.h", "transformer.ln_f"),
    "gpt_neox": ("gpt_neox.layers", "gpt_neox.final_layer_norm"),
    "lfm2": ("model.layers", "model.embedding_norm"),
    "phi": ("model.layers", "model.final_layernorm"),
}
USUAL = ("model.layers", "model.norm")


def names(host: PreTrainedModel) -> tuple[str, str]:
    """Return the dotted paths of a host's layers and of its final norm."""
    return NAMES.get(host.config.model_type, USUAL)


def token_ids(batch: int = 2, length: int = 20, seed: int = 1) -> torch.Tensor:
    """Draw random token ids of the zoo's vocabulary without special tokens."""
    return torch.randint(8, 120, (batch, length), generator=torch.Generator().manual_seed(seed))


def tiny_family(model_type: str, exits: list[int], depth: int = 4, **fields: Any) -> Any:
    """Build a family on a tiny host. Its exits differ from the modules that they were copied from.

    Args:
        model_type (`str`): Model type of the host.
        exits (`list[int]`): Depths of the exits.
        depth (`int`, *optional*, defaults to 4): Number of layers of the host.
        **fields: Arguments of `from_backbone`.

    Returns:
        [`FamilialForCausalLM`] in eval mode.
    """
    family = FamilialForCausalLM.from_backbone(
        tiny_model(model_type, num_hidden_layers=depth), exits=exits, **fields
    )
    return stir(family)


def stir(family: FamilialForCausalLM, seed: int = 2) -> FamilialForCausalLM:
    """Add noise to the weights of early exits, which are copies of those of the backbone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in family.named_parameters():
            if name.startswith(("model.exits.", "exit_heads.")):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise.to(parameter))
    return family


def endless(model: Any) -> Any:
    """Change a model so that `generate` does not end a text early. Return it."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def agreeing(family: FamilialForCausalLM, share: float = 0.5) -> FamilialForCausalLM:
    """Scale down the layers above exit 0, so that exits agree with the deepest on some tokens."""
    with torch.no_grad():
        for layer in family.model.decoder.layers[family.config.exits[0] :]:
            for parameter in layer.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(share)
        for k in range(family.config.num_exits - 1):
            norm, deepest = family.model.members.norm(k), family.model.members.norm(-1)
            for own, shared in zip(norm.parameters(), deepest.parameters(), strict=True):
                own.copy_(shared)
    return family


def truncated_config(config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    """Return the config of a stock model with the first `depth` layers.

    Layers beyond the end are like the last one.
    """
    fields = config.to_dict()
    full = config.num_hidden_layers
    for name, value in fields.items():
        kinds = name == "no_rope_layers" or name.endswith("_types")
        if kinds and isinstance(value, list) and len(value) == full:
            fields[name] = (value + value[-1:] * depth)[:depth]
    fields[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = depth
    return type(config).from_dict(fields)


def truncated_host(family: FamilialForCausalLM, exit_idx: int) -> PreTrainedModel:
    """Build a member from scratch as a stock model with copies of the family's weights.

    Args:
        family ([`FamilialForCausalLM`]): A family with weights.
        exit_idx (`int`): Exit of the member, 0 or more.

    Returns:
        `PreTrainedModel`: The host's causal LM with fewer layers, in eval mode.
    """
    depth, early = family.config.exits[exit_idx], exit_idx < family.config.num_exits - 1
    private = family.config.num_exit_layers if early else 0
    config = truncated_config(family.config.text_config, depth + private)
    host = AutoModelForCausalLM.from_config(config).to(family.dtype)
    layers, norm = names(host)
    prefix = layers.rpartition(".")[0]
    weights = family.state_dict()

    def give(target: str, source: str) -> None:
        taken = {name[len(source) + 1 :]: w for name, w in weights.items() if in_(name, source)}
        host.get_submodule(target).load_state_dict(taken)

    inner = layers.removeprefix(f"{prefix}.")
    for part, module in host.get_submodule(prefix).named_children():
        if part != inner and list(module.parameters()):
            give(f"{prefix}.{part}", f"model.backbone.{part}")
    for layer in range(depth):
        give(f"{layers}.{layer}", f"model.backbone.{inner}.{layer}")
    for j in range(private):
        give(f"{layers}.{depth + j}", f"model.exits.{exit_idx}.layers.{j}")
    if early and family.config.exit_norm == "own":
        give(norm, f"model.exits.{exit_idx}.norm")
    own = early and family.config.exit_head == "own"
    head = f"exit_heads.{exit_idx}" if own else "lm_head"
    weight = weights[f"{head}.weight"]
    with torch.no_grad():
        # a separate head, because the family may untie a head that the host ties
        fresh = nn.Linear(weight.shape[1], weight.shape[0], bias=f"{head}.bias" in weights)
        fresh.to(weight.dtype).load_state_dict(
            {n: weights[f"{head}.{n}"] for n in fresh.state_dict()}
        )
        host.set_output_embeddings(fresh)
    return host.eval()


def in_(name: str, module: str) -> bool:
    """Return whether a weight of this name belongs to a module of that name."""
    return name.startswith(f"{module}.")


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Compute the logits in one pass without a cache."""
    return model(input_ids=ids, use_cache=False, **inputs).logits


@torch.no_grad()
def tap(host: PreTrainedModel, depth: int, ids: torch.Tensor) -> torch.Tensor:
    """Record the output of layer number `depth` of a host with a hook."""
    seen = []
    layer = host.get_submodule(names(host)[0])[depth - 1]
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    host(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, denominator: int | None = None
) -> torch.Tensor:
    """Compute the mean negative log probability of the targets, one target at a time.

    Args:
        logits (`torch.Tensor` of shape `(batch, seq, vocab)`): Position t predicts label t + 1.
        labels (`torch.Tensor` of shape `(batch, seq)`): Targets, or -100 to ignore a position.
        denominator (`int`, *optional*): Divisor of the sum. Defaults to the number of targets.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    terms = [
        -torch.log_softmax(logits[row, t].float(), dim=-1)[labels[row, t + 1]]
        for row in range(labels.shape[0])
        for t in range(labels.shape[1] - 1)
        if labels[row, t + 1] != -100
    ]
    return torch.stack(terms).sum() / (denominator or len(terms))


def greedy(
    model: nn.Module,
    ids: torch.Tensor,
    steps: int,
    attention_mask: torch.Tensor | None = None,
    **inputs: Any,
) -> torch.Tensor:
    """Decode greedily without a cache. Run the whole text again for every token."""
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    for _ in range(steps):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        found = logits(model, ids, attention_mask=mask, position_ids=positions, **inputs)
        ids = torch.cat([ids, found[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
    return ids


def gradients(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """Return copies of all gradients, by name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _stopping_at(model: Any, exit_idx: int) -> Any:
    """Make a family run one exit wherever none is named, and return it."""
    model.config.default_exit = exit_idx
    model.get_output_embeddings = lambda: model.head(exit_idx)

    def name_exit(_: nn.Module, args: Any, given: dict[str, Any]) -> Any:
        reads_loss = "labels" in given and "fused_lm_head" not in given  # trl's own head
        return args, given | ({"exit_idx": exit_idx} if reads_loss else {})

    model.register_forward_pre_hook(name_exit, with_kwargs=True)
    return model


def gradients_by_exit(
    make_trainer: Any, gradients_of: Any, model: Any, weights: Any
) -> dict[str, torch.Tensor]:
    """Return the weighted sum of the gradients of one step of a plain trainer for each exit."""
    total: dict[str, torch.Tensor] = {}
    for k, weight in enumerate(weights):
        one = _stopping_at(copy.deepcopy(model), k)
        trainer = make_trainer(one)
        if getattr(trainer, "ref_model", None) is not None:
            _stopping_at(trainer.ref_model, k)
        for name, gradient in gradients_of(trainer).items():
            total[name] = total.get(name, 0) + weight * gradient
    return total


def copy_of(model: nn.Module) -> Any:
    """Return a deep copy, for tests that hand a model over to a family."""
    return copy.deepcopy(model)


def without_kept_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the cache of FLOPs counts by an empty one until the end of a test."""
    fresh = functools.cache(training._kept_counts.__wrapped__)
    monkeypatch.setattr(training, "_kept_counts", fresh)


@dataclass(frozen=True)
class Approximation:
    """FLOPs of a run by C = 6ND, and the exact count."""

    flops: float
    exact_flops: float
    convention: str

    @property
    def relative_error(self) -> float:
        """`float`: Relative error of 6ND, negative if it is too small."""
        return self.flops / self.exact_flops - 1

    def __str__(self) -> str:
        return (
            f"6ND = {self.flops:.3e} FLOPs with N = {self.convention}, {self.relative_error:+.1%} "
            f"against {self.exact_flops:.3e} counted"
        )


def approximate_training_flops(
    config: FamilialConfig, tokens: float, seq_length: int, convention: str = "non_embedding"
) -> Approximation:
    """Return the usual C = 6ND (Kaplan et al. 2020, arXiv:2001.08361, section 2.1).

    6ND ignores attention and heads. If N includes embeddings, it counts the head once, and the
    embedding as a matmul, which it is not. Heads are most of the cost at small widths, and their
    cost grows with the number of exits.
    """
    size = getattr(family_parameters(config).family, convention)
    exact = training_flops_per_token(config, seq_length).per_token * tokens
    return Approximation(6.0 * size * tokens, exact, convention)


def counted_training_flops(config: FamilialConfig, length: int, train: Any = "all") -> int:
    """Count the FLOPs of training on one sequence by running the whole family at this length."""
    return training._Counts(config, train)._count(length)
