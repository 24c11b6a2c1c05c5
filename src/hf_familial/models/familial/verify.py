"""A numeric proof that a backbone can be cut: segments against the whole, with and without cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from .contract import Contract, find_contract, logit_ops
from .exits import read_out
from .segments import Segment, grow_cache, run_segment


TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-6}
HALF_TOLERANCE = 5e-2


@dataclass(frozen=True)
class BackboneReport:
    """What `verify_backbone` found.

    Attributes:
        model_type (`str`): Of the backbone.
        errors (`dict[str, float]`): Largest difference found by each check, relative to the largest
            value compared; `inf` where the check could not run.
        reasons (`dict[str, str]`): Why a check could not run.
        tolerance (`float`): What the errors are held against.
    """

    model_type: str
    errors: dict[str, float]
    reasons: dict[str, str]
    tolerance: float

    @property
    def ok(self) -> bool:
        """`bool`: Whether every check passed."""
        return all(error <= self.tolerance for error in self.errors.values())

    @property
    def reason(self) -> str:
        """`str`: The first check that failed and how; empty if none did."""
        for name, error in self.errors.items():
            if not error <= self.tolerance:
                return self.reasons.get(name) or f"{name}: relative difference {error:.1e}"
        return ""


def verify_backbone(
    model: PreTrainedModel,
    depth: int | None = None,
    tolerance: float | None = None,
    seq_length: int = 24,
) -> BackboneReport:
    """Check numerically that a causal LM of transformers can be the backbone of a family.

    Four checks, on random tokens, in evaluation mode:

    - `logits`: final norm, head and the known logit operations give the host's own logits;
    - `taps`: the first segment ends where the whole forward has its tap;
    - `segments`: the first segment, then the second on its output, give the whole;
    - `cache`: the first segment token by token, then the second in chunks of pending positions, both
      on one cache, give the whole.

    Args:
        model (`PreTrainedModel`): A causal LM with weights; it is not changed.
        depth (`int`, *optional*): Depth of the cut, in layers; defaults to half the backbone.
        tolerance (`float`, *optional*): Largest relative difference allowed. Defaults to 1e-4 in
            float32, 1e-6 in float64, 5e-2 in half precision, where rounding depends on the batching.
        seq_length (`int`, *optional*, defaults to 24): Number of tokens per row; two rows are run.

    Returns:
        [`BackboneReport`]: The error of each check, and whether all are within the tolerance.

    Raises:
        ValueError: If the backbone has no list of layers or final norm.
    """
    backbone = model.base_model
    contract = find_contract(backbone)
    if tolerance is None:
        tolerance = TOLERANCES.get(backbone.dtype, HALF_TOLERANCE)
    probe = _Probe(model, contract, depth or max(1, backbone.config.num_hidden_layers // 2))
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    with torch.no_grad(), _evaluating(model):
        ids = probe.tokens(seq_length)
        for check in (probe.logits, probe.taps, probe.segments, probe.cache):
            try:
                errors[check.__name__] = check(ids)
            except Exception as error:  # any failure of a host's forward is a finding here
                errors[check.__name__] = float("inf")
                reasons[check.__name__] = f"{check.__name__}: {type(error).__name__}: {error}"
    return BackboneReport(backbone.config.model_type, errors, reasons, tolerance)


class _Probe:
    """The checks, each giving its largest relative difference."""

    def __init__(self, model: PreTrainedModel, contract: Contract, depth: int) -> None:
        self.model, self.backbone, self.contract = model, model.base_model, contract
        owner = self.backbone.get_submodule(contract.owner)
        layers, norm = getattr(owner, contract.layers), getattr(owner, contract.norm)
        self.lower = Segment(list(layers[:depth]), 0, None, range(depth))
        self.upper = Segment(list(layers[depth:]), depth, norm, range(depth, len(layers)))
        self.depth = depth

    def tokens(self, seq_length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        vocab_size = self.model.get_input_embeddings().weight.shape[0]
        # low ids are often special, and some hosts treat a row's padding id apart
        low = min(8, vocab_size // 2)
        ids = torch.randint(low, vocab_size, (2, seq_length), generator=generator)
        return ids.to(self.model.device)

    def logits(self, ids: torch.Tensor) -> float:
        hidden = self.whole(ids).last_hidden_state
        ops = logit_ops(self.backbone.config)
        found = read_out(hidden, self.model.get_output_embeddings(), ops)
        return _difference(found, self.model(input_ids=ids, use_cache=False).logits)

    def taps(self, ids: torch.Tensor) -> float:
        hidden_states = self.whole(ids, output_hidden_states=[self.depth]).hidden_states
        return _difference(self.run(self.lower, input_ids=ids), hidden_states[self.depth])

    def segments(self, ids: torch.Tensor) -> float:
        tap = self.run(self.lower, input_ids=ids)
        found = self.run(self.upper, inputs_embeds=tap, position_ids=_positions(ids))
        return _difference(found, self.whole(ids).last_hidden_state)

    def cache(self, ids: torch.Tensor) -> float:
        cache = DynamicCache(config=self.backbone.config)
        config, length = self.backbone.config, ids.shape[1]
        grow_cache(cache, self.lower_and_upper, [(config, i) for i in range(self.lower_and_upper)])
        positions = _positions(ids)
        prompt = length // 3
        starts = [0, *range(prompt, length)]
        taps = self.in_pieces(self.lower, "input_ids", ids, positions, starts, cache)
        chunks = [0, *range(prompt, length, 5)]
        found = self.in_pieces(self.upper, "inputs_embeds", taps, positions, chunks, cache)
        return _difference(found, self.whole(ids).last_hidden_state)

    @property
    def lower_and_upper(self) -> int:
        return len(self.lower.layers) + len(self.upper.layers)

    def in_pieces(
        self,
        segment: Segment,
        name: str,
        values: torch.Tensor,
        positions: torch.Tensor,
        starts: list[int],
        cache: DynamicCache,
    ) -> torch.Tensor:
        """Run a segment over pieces of a sequence, on one cache."""
        pieces = zip(starts, [*starts[1:], values.shape[1]], strict=True)
        return torch.cat(
            [
                self.run(
                    segment,
                    past_key_values=cache,
                    use_cache=True,
                    position_ids=positions[:, a:b],
                    **{name: values[:, a:b]},
                )
                for a, b in pieces
            ],
            dim=1,
        )

    def whole(self, ids: torch.Tensor, **kwargs: Any) -> Any:
        return self.backbone(input_ids=ids, use_cache=False, **kwargs)

    def run(self, segment: Segment, use_cache: bool = False, **inputs: Any) -> torch.Tensor:
        outputs = run_segment(self.backbone, self.contract, segment, use_cache=use_cache, **inputs)
        return outputs.last_hidden_state


def _positions(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)


def _difference(found: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference, relative to the largest right value; shapes that differ raise."""
    if found.shape != right.shape:
        raise ValueError(f"shape {tuple(found.shape)} where the host has {tuple(right.shape)}")
    difference = (found.float() - right.float()).abs().max() / right.float().abs().max()
    return difference.item() if torch.isfinite(difference) else float("inf")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
