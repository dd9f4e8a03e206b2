"""Clipping rules: what one read of the gradients says -> what they are multiplied by. One rule, one class."""

from fastclip.policies.adagc import AdaGC
from fastclip.policies.base import Bound, Decision, Policy
from fastclip.policies.chain import Chain
from fastclip.policies.elementwise import Value
from fastclip.policies.global_norm import GlobalNorm
from fastclip.policies.per_tensor import BlockRMS, PerTensorNorm
from fastclip.policies.percentile import Percentile, PerTensorPercentile
from fastclip.policies.skip_large import SkipAboveMedian, SkipLarge
from fastclip.policies.unitwise import Unitwise
from fastclip.policies.zscore import ZScore

__all__ = [
    "AdaGC",
    "BlockRMS",
    "Bound",
    "Chain",
    "Decision",
    "GlobalNorm",
    "PerTensorNorm",
    "PerTensorPercentile",
    "Percentile",
    "Policy",
    "SkipAboveMedian",
    "SkipLarge",
    "Unitwise",
    "Value",
    "ZScore",
]
