"""Parameters, FLOPs and KV cache of a family and its members, computed from its config.

A multiply-add counts as two FLOPs. All exits and heads count. Attention counts all pairs of
positions. No weights are allocated: a model of fake tensors runs, and its operations are counted.
"""

from .counting import Flops
from .forward import ForwardFlops, forward_flops, measure_flops_per_token
from .members import CacheSize, MemberFlops, cache_sizes, member_flops
from .parameters import (
    CONVENTIONS,
    FamilyParameters,
    ParameterCount,
    count_family,
    count_parameters,
    family_parameters,
    member_parameters,
)
from .training import FlopCount, prepare_training_flops, training_flops_per_token


__all__ = [
    "CONVENTIONS",
    "CacheSize",
    "FamilyParameters",
    "FlopCount",
    "Flops",
    "ForwardFlops",
    "MemberFlops",
    "ParameterCount",
    "cache_sizes",
    "count_family",
    "count_parameters",
    "family_parameters",
    "forward_flops",
    "measure_flops_per_token",
    "member_flops",
    "member_parameters",
    "prepare_training_flops",
    "training_flops_per_token",
]
