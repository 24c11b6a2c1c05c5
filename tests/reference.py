"""Slow oracles: what a family must compute, said again without its machinery.

They use stock transformers and plain loops only. From the family they take weights, by the names
that its checkpoint gives them, and nothing else.
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


# model_type -> where its causal LM keeps the layers and the final norm
NAMES: dict[str, tuple[str, str]] = {
    "falcon_h1": ("model.layers", "model.final_layernorm"),
    "gpt2": ("transformer.h", "transformer.ln_f"),
    "gpt_neox": ("gpt_neox.layers", "gpt_neox.final_layer_norm"),
    "lfm2": ("model.layers", "model.embedding_norm"),
    "phi": ("model.layers", "model.final_layernorm"),
}
USUAL = ("model.layers", "model.norm")


def names(host: PreTrainedModel) -> tuple[str, str]:
    """Dotted paths of a host's layers and of its final norm."""
    return NAMES.get(host.config.model_type, USUAL)


def token_ids(batch: int = 2, length: int = 20, seed: int = 1) -> torch.Tensor:
    """Random token ids of the zoo's vocabulary, none of them special."""
    return torch.randint(8, 120, (batch, length), generator=torch.Generator().manual_seed(seed))


def tiny_family(model_type: str, exits: list[int], depth: int = 4, **fields: Any) -> Any:
    """A family over a tiny host whose exits differ visibly from the modules they were copied from.

    Args:
        model_type (`str`): Of the host.
        exits (`list[int]`): Depths.
        depth (`int`, *optional*, defaults to 4): Number of the host's layers.
        **fields: Of `from_backbone`.

    Returns:
        [`FamilialForCausalLM`] in eval mode.
    """
    family = FamilialForCausalLM.from_backbone(
        tiny_model(model_type, num_hidden_layers=depth), exits=exits, **fields
    )
    return stir(family)


def stir(family: FamilialForCausalLM, seed: int = 2) -> FamilialForCausalLM:
    """Move the weights of early exits away from those of the backbone they were copied from."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in family.named_parameters():
            if name.startswith(("model.exits.", "exit_heads.")):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise.to(parameter))
    return family


def endless(model: Any) -> Any:
    """A model whose `generate` ends no text early."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def agreeing(family: FamilialForCausalLM, share: float = 0.5) -> FamilialForCausalLM:
    """Let exits agree with the deepest now and then: the layers above the first say less."""
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
    """The config of a stock model of `depth` layers that are the first of this one's.

    Beyond its depth, what is particular to its last layer holds for all that follow.
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
    """A member as a stock model, built from scratch and given copies of the family's weights.

    Args:
        family ([`FamilialForCausalLM`]): With weights.
        exit_idx (`int`): Exit at which the member ends, 0 or more.

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
        # a head that is tied in the host and is not in the family
        fresh = nn.Linear(weight.shape[1], weight.shape[0], bias=f"{head}.bias" in weights)
        fresh.to(weight.dtype).load_state_dict(
            {n: weights[f"{head}.{n}"] for n in fresh.state_dict()}
        )
        host.set_output_embeddings(fresh)
    return host.eval()


def in_(name: str, module: str) -> bool:
    """Whether a weight of this name belongs to a module of that name."""
    return name.startswith(f"{module}.")


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits of one pass without a cache."""
    return model(input_ids=ids, use_cache=False, **inputs).logits


@torch.no_grad()
def tap(host: PreTrainedModel, depth: int, ids: torch.Tensor) -> torch.Tensor:
    """What layer number `depth` of a host puts out, seen by a hook."""
    seen = []
    layer = host.get_submodule(names(host)[0])[depth - 1]
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    host(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, denominator: int | None = None
) -> torch.Tensor:
    """Sum over the targets, one by one, of minus log probability; divided by their number.

    Args:
        logits (`torch.Tensor` of shape `(batch, seq, vocab)`): Position t predicts label t + 1.
        labels (`torch.Tensor` of shape `(batch, seq)`): -100 where there is no target.
        denominator (`int`, *optional*): Instead of the number of targets.

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
    """Greedy decoding without a cache, the whole text anew for every token."""
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    for _ in range(steps):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        found = logits(model, ids, attention_mask=mask, position_ids=positions, **inputs)
        ids = torch.cat([ids, found[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
    return ids


def gradients(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """Copies of all gradients, by name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def gradients_by_exit(
    make_trainer: Any, gradients_of: Any, model: Any, weights: Any
) -> dict[str, torch.Tensor]:
    """Return the weighted sum of the gradients of one step of a plain trainer for each exit."""
    total: dict[str, torch.Tensor] = {}
    for k, weight in enumerate(weights):
        one = copy.deepcopy(model)
        one.config.default_exit = k
        one.get_output_embeddings = lambda one=one, k=k: one.head(k)
        named = {"exit_idx": k}
        hook = lambda _, args, given, named=named: (args, given | named)  # noqa: E731
        one.register_forward_pre_hook(hook, with_kwargs=True)
        trainer = make_trainer(one)
        reference = getattr(trainer, "ref_model", None)
        if reference is not None:
            reference.config.default_exit = k
        for name, gradient in gradients_of(trainer).items():
            total[name] = total.get(name, 0) + weight * gradient
    return total


def copy_of(model: nn.Module) -> Any:
    """A deep copy, for a model that something is about to take over."""
    return copy.deepcopy(model)


def without_kept_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count training FLOPs anew until the end of a test."""
    fresh = functools.cache(training._kept_counts.__wrapped__)
    monkeypatch.setattr(training, "_kept_counts", fresh)


@dataclass(frozen=True)
class Approximation:
    """FLOPs of a run by C = 6ND, beside the exact count."""

    flops: float
    exact_flops: float
    convention: str

    @property
    def relative_error(self) -> float:
        """Negative where 6ND says too little."""
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

    Attention and heads are left out (or, if N counts them, the head once and the embedding, which
    is no matmul, as one): at small widths that is most of the cost, and it grows with the number
    of exits.
    """
    size = getattr(family_parameters(config).family, convention)
    exact = training_flops_per_token(config, seq_length).per_token * tokens
    return Approximation(6.0 * size * tokens, exact, convention)


def counted_training_flops(config: FamilialConfig, length: int, train: Any = "all") -> int:
    """FLOPs of training on one sequence, by running the whole family at that very length."""
    return training._Counts(config, train)._count(length)
