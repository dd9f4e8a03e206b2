"""Attention that looks at one place only: scores so far apart that the softmax passes no gradient."""

from __future__ import annotations

from collections.abc import Iterator

from fastclip.doctor.diagnosis import WARNING, Finding
from fastclip.doctor.operations import Attention

# Vaswani et al. 2017, section 3.2.1: scores are divided by sqrt(d) so that their spread is about 1 and the softmax
# keeps its gradient. With 64 dimensions per head and no division it is 8.
SPREAD = 4.0
# And the weights show it: from 1 (all keys alike) to 0 (a single one). Scores of spread 1 give 0.9 and more.
ENTROPY = 0.5


def findings(attentions: list[Attention]) -> Iterator[Finding]:
    """Of the sharpest call in each module."""
    sharpest: dict[str, Attention] = {}
    for one in attentions:
        if one.where not in sharpest or one.entropy < sharpest[one.where].entropy:
            sharpest[one.where] = one
    for where, one in sharpest.items():
        if one.std > SPREAD and one.entropy < ENTROPY:
            yield Finding(
                "attention-saturated",
                WARNING,
                f"the attention scores in {where} have standard deviation {one.std:.3g} over {one.keys} "
                f"keys, so the weights lie on few of them (entropy {one.entropy:.0%} of the possible) and pass "
                "hardly any "
                "gradient",
                "divide the scores by the root of the head's size, scores = q @ k.transpose(-1, -2) / q.shape[-1] "
                "** 0.5 "
                "(torch's scaled_dot_product_attention does), and start the projections with "
                "torch.nn.init.xavier_uniform_",
                (where,),
                {"std": one.std, "entropy": one.entropy, "keys": float(one.keys)},
            )
