"""Clipping rules: what one read of the gradients says -> what they are multiplied by. One rule, one class."""

from typing import Any

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

RULES: dict[str, type[Policy]] = {
    rule.__name__: rule
    for rule in (
        AdaGC,
        BlockRMS,
        GlobalNorm,
        PerTensorNorm,
        PerTensorPercentile,
        Percentile,
        SkipAboveMedian,
        SkipLarge,
        Unitwise,
        Value,
        ZScore,
    )
}


def policy_of(value: Any, name: str = "policy") -> Policy:
    """``value`` if it is a policy; with its defaults, the one of that name.

    Raises:
        ValueError: no such name; lists the known ones.
        TypeError: neither a policy nor a name.
    """
    if isinstance(value, Policy):
        if getattr(value.decide, "__func__", None) is Policy.decide:
            raise TypeError(f"{name}: {type(value).__name__} is no rule for gradients: it has no decide()")
        return value
    if isinstance(value, str):
        if value not in RULES:
            raise ValueError(f"{name}: there is no policy {value!r}; known are {', '.join(RULES)}")
        return RULES[value]()
    hint = f"; call it: {value.__name__}()" if isinstance(value, type) and issubclass(value, Policy) else ""
    raise TypeError(f"{name}: expected a policy of fastclip.policies or its name, got {value!r}{hint}")


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
    "policy_of",
]
