"""Parameters, FLOPs and cache of a family and its members, from its config alone.

A multiply-add is two FLOPs; every exit and every head counts; attention counts every pair of
positions. Nothing is allocated: a family without weights runs once, and its operations are counted.
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
    "prepare_training_flops",
    "training_flops_per_token",
]
