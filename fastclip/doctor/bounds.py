"""A bound for the norm, and a policy, from the norms that were seen."""

from __future__ import annotations

import math
import statistics

from fastclip.doctor.diagnosis import Bound
from fastclip.stats import GradStats

# Pascanu et al. 2013, section 3.2: from half to ten times the average norm over many updates. Twice the median of a few
# lies in there, and lets what is usual pass.
TIMES = 2.0
EXPLODED = 1.0  # where norms say nothing because they explode: the usual bound to start with
SPREAD = 10.0  # a largest norm of so many times the median: spikes, which a rule that learns what is usual tells apart
# The gradient of one tensor, in units of its weight, against the median of all: then one bound for all is about this
# one.
DOMINATES, SHARE = 100.0, 0.99


def bound_of(norms: tuple[float, ...], stats: GradStats | None, codes: set[str], at: str) -> Bound:
    """Of the norms of a few steps.

    Args:
        stats: of the gradients and weights in the first pass.
        codes: of what was found.
        at: under what the norms were seen.
    """
    finite = [norm for norm in norms if 0 < norm < math.inf]
    if not finite:
        return Bound(
            math.nan,
            "GlobalNorm(1.0)",
            "no norm was finite and above 0: a bound can't be told before that is cured",
            norms,
            math.nan,
            math.nan,
        )
    median, largest = statistics.median(finite), max(finite)
    seen = f"over {len(finite)} passes{at} the norm was {median:.3g} in the middle and {largest:.3g} at most"
    bound = rounded(TIMES * median)
    exploding = sorted(code for code in codes if code.startswith("exploding"))
    if exploding or len(finite) < len(norms):
        policy = f"GlobalNorm({EXPLODED})"
        why = f"{seen}; what explodes needs a bound from the first step on, and it is no measure for one"
        bound = EXPLODED
    elif largest > SPREAD * median:
        policy = f"Chain(ZScore(), GlobalNorm({bound:g}))"
        why = f"{seen}: spikes. ZScore learns what is usual and clips what isn't, GlobalNorm is the cap"
    elif (name := dominant(stats)) is not None:
        policy = "Unitwise(0.01)"
        why = f"{seen}, nearly all of it from {name}: a bound of the joint norm would be one for this tensor alone"
    else:
        policy = f"GlobalNorm({bound:g})"
        why = f"{seen}: twice the middle lets what is usual pass and stops a spike"
    return Bound(bound, policy, why, norms, median, largest)


def dominant(stats: GradStats | None) -> str | None:
    """The tensor whose gradient is nearly all of the norm, and far larger beside its weight than others."""
    if stats is None or stats.weight_norms is None or len(stats.names) < 3:
        return None
    tensors = stats.to_dict()["tensors"]
    total = float(stats.total_norm)
    ratios = {
        name: facts["norm"] / facts["weight_norm"]
        for name, facts in tensors.items()
        if facts["weight_norm"] > 0 and facts["norm"] > 0
    }
    if len(ratios) < 3 or not 0 < total < math.inf:
        return None
    worst = max(ratios, key=ratios.__getitem__)
    share = (tensors[worst]["norm"] / total) ** 2
    return worst if share > SHARE and ratios[worst] > DOMINATES * statistics.median(ratios.values()) else None


def rounded(value: float) -> float:
    """To one digit: more of them would claim what a few passes can't know."""
    return float(f"{value:.0e}")
