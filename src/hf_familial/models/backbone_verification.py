"""A numeric check that a backbone works in a family. It compares segments with the whole model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache

from .familial.backbones import UNSUPPORTED, LogitTransform, host_class, unsupported_backbone
from .familial.segments import HostDecoder, Segment, grow_cache


# Types that passed `verify_backbone` at tiny size (scripts/list_backbones.py). Other types are
# checked when a family is built.
VERIFIED: frozenset[str] = frozenset(
    """
    afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid bamba beam biogpt bitnet bloom
    codegen cohere cohere2 cohere2_moe cohere_compass_text ctrl cwm dbrx deepseek_v2
    deepseek_v3 deepseek_v32 diffllama doge dots1 dots3_note_text ernie4_5 ernie4_5_moe
    exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint gemma gemma2 gemma3_text
    gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt-sw3 gpt2
    gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe
    granitemoe_swa granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe
    hy_v3 hyperclovax inkling_text internlm3 iquestcoder jais2 jamba jetmoe kimi_linear
    kolibri1 laguna lfm2 lfm2_moe lfm3 llama llama4_text mamba mamba2 mellum mimo_v2_flash
    minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral moshi
    mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt
    persimmon phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text
    qwen3_5_text qwen3_moe qwen3_next recurrent_gemma seed_oss smollm3 solar_open stablelm
    starcoder2 vaultgemma xglm xlstm youtu zamba zamba2 zaya
    """.split()
)

# Methods that a host's causal LM may override. A family calls them or does not need them.
KNOWN_HOOKS = frozenset(
    {
        "prepare_inputs_for_generation",
        # the backbone builds its masks itself (see `own_mask` for the exception)
        "create_masks_for_generate",
    }
)

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-6}
HALF_TOLERANCE = 5e-2


def decoder_of(host: Any) -> Any:
    """Return the decoder inside a causal LM or a multimodal model, as `AutoModel` builds it."""
    config = host.config.get_text_config(decoder=True)
    if config.model_type in UNSUPPORTED:
        raise unsupported_backbone(config.model_type, UNSUPPORTED[config.model_type])
    base = MODEL_MAPPING.get(type(config), None)
    for module in host.modules():
        if type(module) is base:
            return module
    reason = f"{type(host).__name__} does not contain a {getattr(base, '__name__', base)}"
    raise unsupported_backbone(config.model_type, reason)


@dataclass(frozen=True)
class BackboneReport:
    """The result of `verify_backbone`.

    Attributes:
        model_type (`str`): Model type of the backbone.
        errors (`dict[str, float]`): Largest relative difference in each check, or `inf` if the
            check could not run.
        reasons (`dict[str, str]`): For each check that could not run, the error message.
        tolerance (`float`): Largest relative difference that passes.
    """

    model_type: str
    errors: dict[str, float]
    reasons: dict[str, str]
    tolerance: float

    @property
    def ok(self) -> bool:
        """`bool`: Whether the backbone can have exits (`logits`, `taps` and `steps` pass)."""
        return not self.failure("logits", "taps", "steps")

    @property
    def continues(self) -> bool:
        """`bool`: Whether exits can also have private layers (`segments` passes too)."""
        return self.ok and not self.failure("segments")

    @property
    def relays(self) -> bool:
        """`bool`: Whether relays work too (`relay` passes too)."""
        return self.continues and not self.failure("relay")

    def failure(self, *checks: str) -> str:
        """Describe the first of these checks that failed. Return an empty string if all passed."""
        for name in checks:
            error = self.errors[name]
            if not error <= self.tolerance:
                return f"{name}: {self.reasons.get(name) or f'relative difference {error:.1e}'}"
        return ""


def verify_backbone(
    model: PreTrainedModel,
    depth: int | None = None,
    tolerance: float | None = None,
    seq_length: int = 24,
) -> BackboneReport:
    """Check numerically whether a causal LM can become the backbone of a family.

    The function splits the layers into two segments and runs five checks on random tokens:

    - `logits`: The final norm, the head and the known logit operations compute the model's logits.
    - `taps`: The first segment with the final norm computes the same as that norm on the hidden
      states of the whole model at that depth.
    - `steps`: The first segment computes the same token by token with a cache as without one.
    - `segments`: The second segment, run on the output of the first, computes the whole model's
      output.
    - `relay`: As `segments`, but with one cache. The first segment runs token by token, the second
      in chunks of pending positions.

    Args:
        model (`PreTrainedModel`): A causal LM with weights. It does not change.
        depth (`int`, *optional*): Number of layers in the first segment. Defaults to half of them.
        tolerance (`float`, *optional*): Largest relative difference that passes. Defaults to 1e-4
            in float32, 1e-6 in float64 and 5e-2 in half precision.
        seq_length (`int`, *optional*, defaults to 24): Number of tokens in each of two rows.

    Returns:
        [`BackboneReport`]: The error of each check, and what the backbone can do.

    Raises:
        ValueError: If the model has no list of decoder layers or no final norm.

    Example:
        >>> report = verify_backbone(AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B"))
        >>> report.ok, report.relays
    """
    backbone: Any = decoder_of(model)
    if tolerance is None:
        tolerance = TOLERANCES.get(backbone.dtype, HALF_TOLERANCE)
    probe = _Probe(model, backbone, depth or max(1, backbone.config.num_hidden_layers // 2))
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    with torch.no_grad(), evaluation_mode(model):
        ids = probe.tokens(seq_length)
        for check in (probe.logits, probe.taps, probe.steps, probe.segments, probe.relay):
            try:
                errors[check.__name__] = check(ids)
            except Exception as error:  # the backbone's forward may raise anything
                errors[check.__name__] = float("inf")
                reasons[check.__name__] = f"{type(error).__name__}: {error}"
    return BackboneReport(backbone.config.model_type, errors, reasons, tolerance)


def check_unverified(host: PreTrainedModel, private_layers: bool) -> None:
    """Raise `ValueError` if a model of an unverified type fails the numeric checks."""
    text_config = host.config.get_text_config(decoder=True)
    # a multimodal model may change the logits of its language model
    known = text_config.model_type in VERIFIED and text_config is host.config
    if known or host.device.type == "meta":
        return
    report = verify_backbone(host)
    if not (report.continues if private_layers else report.ok):
        reason = report.failure("logits", "taps", "steps", "segments")
        raise unsupported_backbone(text_config.model_type, reason)


def check_family(family: Any) -> None:
    """Raise `ValueError` if the backbone of a family fails the checks that it needs."""
    check_hooks(family.config.text_config)
    if family.device.type == "meta":
        return  # `from_pretrained` loads the weights later
    if family.config.text_config.model_type not in VERIFIED:
        check_unverified(as_host(family), private_layers=bool(family.config.num_exit_layers))


def check_hooks(text_config: Any) -> None:
    """Raise if a host's class overrides a method of `GenerationMixin` that a family ignores."""
    host = host_class(text_config)
    own = [
        name
        for base in GenerationMixin.__mro__
        for name in vars(base)
        if callable(getattr(base, name)) and not name.startswith("__")
        if name not in KNOWN_HOOKS and _function(host, name) is not _function(base, name)
    ]
    if own and issubclass(host, GenerationMixin):
        raise unsupported_backbone(text_config.model_type, f"its causal LM overrides `{own[0]}`")


def _function(owner: Any, name: str) -> Any:
    method = getattr(owner, name, None)
    return getattr(method, "__func__", method)


def as_host(family: Any) -> PreTrainedModel:
    """Build the host's causal LM from a family's backbone and its `lm_head`."""
    with torch.device("meta"):
        host = AutoModelForCausalLM.from_config(copy.deepcopy(family.config.text_config))
    empty = decoder_of(host)
    for module in host.modules():
        for name, child in module.named_children():
            if child is empty:
                setattr(module, name, family.model.backbone)
    host.set_output_embeddings(family.lm_head)
    return host


class _Probe:
    """The five checks of a backbone. Each method returns the largest relative difference."""

    def __init__(self, model: PreTrainedModel, backbone: Any, depth: int) -> None:
        self.model, self.backbone, self.depth = model, backbone, depth
        self.decoder = HostDecoder(backbone)
        self.spec, layers, self.norm = self.decoder.spec, self.decoder.layers, self.decoder.norm
        self.num_layers = len(layers)
        self.lower = Segment(list(layers[:depth]), 0, None, range(depth))
        self.member = replace(self.lower, norm=self.norm)
        self.upper = Segment(list(layers[depth:]), depth, self.norm, range(depth, len(layers)))

    def tokens(self, seq_length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        vocab_size = self.model.get_input_embeddings().weight.shape[0]
        # avoid low ids, which are often special or padding
        low = min(8, vocab_size // 2)
        ids = torch.randint(low, vocab_size, (2, seq_length), generator=generator)
        return ids.to(self.model.device)

    def logits(self, ids: torch.Tensor) -> float:
        hidden = self.whole(ids).last_hidden_state
        transform = LogitTransform.of(self.backbone.config)
        found = transform.read(hidden, self.model.get_output_embeddings())
        return _difference(found, self.model(input_ids=ids, use_cache=False).logits)

    def taps(self, ids: torch.Tensor) -> float:
        index = self.depth + self.spec.host.tap_shift
        tap = self.whole(ids, output_hidden_states=[index]).hidden_states[index]
        return _difference(self.run(self.member, input_ids=ids), self.norm(tap))

    def steps(self, ids: torch.Tensor) -> float:
        if not self.spec.cache:
            return 0.0
        starts = [0, *range(ids.shape[1] // 3, ids.shape[1])]
        found = self.in_pieces(self.member, "input_ids", ids, starts, self.new_cache())
        return _difference(found, self.run(self.member, input_ids=ids))

    def segments(self, ids: torch.Tensor) -> float:
        if self.spec.host.whole:
            raise ValueError(self.spec.host.whole)
        tap = self.run(self.lower, input_ids=ids)
        found = self.run(self.upper, inputs_embeds=tap, position_ids=_positions(ids))
        return _difference(found, self.whole(ids).last_hidden_state)

    def relay(self, ids: torch.Tensor) -> float:
        if self.spec.host.whole or not self.spec.cache:
            raise ValueError(self.spec.host.whole or "it does not use a cache of Transformers")
        cache, length = self.new_cache(), ids.shape[1]
        starts, chunks = [0, *range(length // 3, length)], [0, *range(length // 3, length, 5)]
        taps = self.in_pieces(self.lower, "input_ids", ids, starts, cache)
        found = self.in_pieces(self.upper, "inputs_embeds", taps, chunks, cache)
        return _difference(found, self.whole(ids).last_hidden_state)

    def new_cache(self) -> DynamicCache:
        cache, config = DynamicCache(config=self.backbone.config), self.backbone.config
        grow_cache(cache, range(self.num_layers), [(config, i) for i in range(self.num_layers)])
        return cache

    def in_pieces(
        self,
        segment: Segment,
        name: str,
        values: torch.Tensor,
        starts: list[int],
        cache: DynamicCache,
    ) -> torch.Tensor:
        """Run a segment on pieces of a sequence with one cache."""
        positions = _positions(values)
        pieces = zip(starts, [*starts[1:], values.shape[1]], strict=True)
        outputs = [
            self.run(
                segment,
                past_key_values=cache,
                use_cache=True,
                position_ids=positions[:, a:b],
                **{name: values[:, a:b]},
            )
            for a, b in pieces
        ]
        return torch.cat(outputs, dim=1)

    def whole(self, ids: torch.Tensor, **kwargs: Any) -> Any:
        return self.backbone(**self.spec.accepted({"use_cache": False, **kwargs}), input_ids=ids)

    def run(self, segment: Segment, use_cache: bool = False, **inputs: Any) -> torch.Tensor:
        return self.decoder.run(segment, use_cache=use_cache, **inputs).last_hidden_state


def _positions(values: torch.Tensor) -> torch.Tensor:
    return torch.arange(values.shape[1], device=values.device).unsqueeze(0)


def _difference(found: torch.Tensor, right: torch.Tensor) -> float:
    """Return the largest difference divided by the largest correct value."""
    if found.shape != right.shape:
        raise ValueError(f"shape {tuple(found.shape)} instead of {tuple(right.shape)}")
    difference = (found.float() - right.float()).abs().max() / right.float().abs().max()
    return difference.item() if torch.isfinite(difference) else float("inf")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode. Restore the mode of each module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
