"""A bound for the norm, and a policy, from the norms that were seen."""

from __future__ import annotations

import math
import statistics

from fastclip.doctor.diagnosis import Bound
from fastclip.stats import GradStats

# Pascanu et al. 2013, section 3.2: from half to ten times the average norm over many updates. Twice what is usual lies
# in there. A few steps on one batch learn it by heart and their norms fall, so that of the first counts where it is
# larger than the median.
TIMES = 2.0
USUAL = 1.0  # where the norms say nothing
# With parameters and a loss around 1 no gradient is so long: inputs, targets or the loss are out of scale.
HUGE = 1e6
# A norm of so many times the median of those before it is a spike: a rule that learns what is usual tells it apart.
SPIKE = 10.0
# The gradient of one tensor, in units of its weight, against the median of all: then one bound for all is about this
# one.
DOMINATES, SHARE = 100.0, 0.99


def bound_of(norms: tuple[float, ...], stats: GradStats | None, codes: set[str], at: str) -> Bound:
    """Of the norms of a few steps.

    Args:
        norms: empty where every step that was tried led astray.
        stats: of the gradients and weights in the first pass.
        codes: of what was found.
        at: under what the norms were seen.
    """
    finite = [norm for norm in norms if 0 < norm < math.inf]
    exploding = explodes(codes)
    median, largest = (statistics.median(finite), max(finite)) if finite else (math.nan, math.nan)
    if exploding or not finite or len(finite) < len(norms):
        why = (
            "what explodes needs a bound from the first step on, and its norms are no measure for one"
            if exploding
            else "the norms that were seen are no measure for a bound"
        )
        why += f"; {USUAL:g} is the usual one to begin with. Check again when the causes are cured"
        return Bound(USUAL, f"GlobalNorm({USUAL})", why, norms, median, largest)
    seen = f"the norm was {median:.3g} in one pass"
    if len(finite) > 1:
        seen = f"over {len(finite)} steps{at} the norm began at {norms[0]:.3g} and was {largest:.3g} at most"
    bound = rounded(TIMES * max(median, norms[0]))
    if bound > HUGE:
        why = f"{seen}: that is a symptom, and no measure for a bound; look at the scale of the loss, and check again"
        return Bound(USUAL, f"GlobalNorm({USUAL})", why, norms, median, largest)
    if any(norm > SPIKE * statistics.median(norms[:i]) for i, norm in enumerate(norms) if i):
        policy = f"Chain(ZScore(), GlobalNorm({bound:g}))"
        why = f"{seen}, in a spike. ZScore learns what is usual and clips what isn't, GlobalNorm is the cap"
    elif (name := dominant(stats)) is not None:
        policy = "Unitwise(0.01)"
        why = f"{seen}, nearly all of it from {name}: a bound of the joint norm would be one for this tensor alone"
    else:
        policy = f"GlobalNorm({bound:g})"
        why = f"{seen}; twice what is usual lets it pass and stops a spike"
    return Bound(bound, policy, why, norms, median, largest)


def explodes(codes: set[str]) -> bool:
    """Whether one of these says so."""
    return any(code.startswith("exploding") for code in codes)


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
