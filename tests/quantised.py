"""A quantiser for Transformers that needs no other package: int8 weights with one scale per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin


METHOD = "tests-int8"


class Int8Linear(nn.Module):
    """A linear map with an int8 weight and one scale per row."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(out_features, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.scale)


@register_quantization_config(METHOD)
class Int8Config(QuantizationConfigMixin):
    def __init__(self, modules_to_not_convert: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(METHOD)
        self.modules_to_not_convert = modules_to_not_convert


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):
    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        listed = self.quantization_config.modules_to_not_convert
        replace(model, self.get_modules_to_not_convert(model, listed))

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, Int8Linear):
                plain = nn.Linear(*module.weight.shape[::-1], bias=False)
                plain.weight.data = module.weight * module.scale
                model.set_submodule(name, plain)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def replace(model: Any, skipped: list[str]) -> None:
    """Replace the linear maps of `model` by int8 ones in place, except biased and skipped ones."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and should_convert_module(name, skipped):
            packed = Int8Linear(module.in_features, module.out_features)
            weight = module.weight.data
            if weight.device.type != "meta":
                packed.scale = weight.abs().amax(dim=1, keepdim=True) / 127
                packed.weight = (weight / packed.scale).round().to(torch.int8)
            model.set_submodule(name, packed)


def quantised(host: PreTrainedModel, skipped: list[str] | None = None) -> PreTrainedModel:
    """Convert a model to int8 in place, with the attributes that Transformers sets on loading."""
    config = Int8Config(skipped)
    quantizer = Int8Quantizer(config, pre_quantized=True)
    replace(host, quantizer.get_modules_to_not_convert(host, skipped))
    host.hf_quantizer, host.is_quantized = quantizer, True
    host.quantization_method = host.hf_quantizer.quantization_config.quant_method
    host.config.quantization_config = config
    return host
