"""A norm of norms: how chunks join to tensors, and tensors to the total; the rule of csrc/norms.h.

The p-norm of a list is the p-norm of the norms of its pieces, so one rule serves every level, and a norm, unlike a sum
of powers, neither overflows nor underflows where its elements don't.
"""

import triton
from triton import language as tl

from .blocks import JOIN, JOIN_PLAIN
from .formats import saturated, unit_scale

INF = tl.constexpr(float("inf"))
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
LEAST_JOINED = tl.constexpr(2.0**-475)  # a plain sum of squares from the square of it on lost nothing to underflow


@triton.jit
def power(x, p):
    """x^p in float64 for x >= 0."""
    return tl.exp2(p * tl.log2(x))


@triton.jit
def finished_norm(powers, dominant, scale, p):
    """Of a sum of powers whose dominant part was 1, or for p = 2 scaled by ``scale``."""
    if p == 2.0:
        norm = tl.sqrt(powers) / scale
    else:
        norm = dominant * power(powers, 1.0 / p)
    return saturated(norm)


@triton.jit
def join_norms(p_norms, count, p):
    """p-norm of norms[0], ..., norms[count - 1]; in an order that ``count`` alone decides. NaN wins, Inf comes next."""
    lanes = tl.arange(0, JOIN)
    b_largest = tl.full((JOIN,), 0, tl.float64)
    b_smallest = tl.full((JOIN,), INF, tl.float64)
    b_sum = tl.full((JOIN,), 0, tl.float64)
    b_nans = tl.full((JOIN,), 0, tl.int32)
    for first in range(0, count, JOIN):
        # .cg: other multiprocessors wrote them, past this one's own cache
        norms = tl.load(p_norms + first + lanes, mask=first + lanes < count, other=0.0, cache_modifier=".cg")
        nan = norms != norms
        b_nans += nan.to(tl.int32)
        known = tl.where(nan, 0.0, norms)
        b_largest = tl.maximum(b_largest, known)
        b_smallest = tl.minimum(b_smallest, tl.where(first + lanes < count, known, INF))
        b_sum += norms
    largest, smallest = tl.max(b_largest, axis=0), tl.min(b_smallest, axis=0)
    total = tl.sum(b_sum, axis=0)
    norm = total
    if p == INF:
        norm = largest
    elif p == -INF:
        norm = smallest
    elif p == 1.0:
        norm = tl.where(largest == INF, INF, saturated(total))
    elif p != 0.0:
        dominant = tl.where(p > 0.0, largest, smallest)
        norm = dominant
        if (dominant > 0.0) & (dominant < INF):
            scale = unit_scale(largest)
            b_powers = tl.full((JOIN,), 0, tl.float64)
            for first in range(0, count, JOIN):
                mask = first + lanes < count
                norms = tl.load(p_norms + first + lanes, mask=mask, other=0.0, cache_modifier=".cg")
                if p == 2.0:
                    b_powers += norms * scale * (norms * scale)
                else:
                    b_powers += tl.where(mask, power(norms / dominant, p), 0.0)
            norm = finished_norm(tl.sum(b_powers, axis=0), dominant, scale, p)
    return tl.where(tl.sum(b_nans, axis=0) > 0, float("nan"), norm)


@triton.jit
def join_squares(p_norms, count):
    """Of norms, as they are: the sum overflows, or loses what underflows, where join_norms would not."""
    lanes = tl.arange(0, JOIN_PLAIN)
    b_sum = tl.full((JOIN_PLAIN,), 0, tl.float64)
    for first in range(0, count, JOIN_PLAIN):
        norms = tl.load(p_norms + first + lanes, mask=first + lanes < count, other=0.0, cache_modifier=".cg")
        b_sum += norms * norms
    return tl.sum(b_sum, axis=0)


@triton.jit
def join_sum(p_values, count):
    """Of counts, or sums of magnitudes."""
    lanes = tl.arange(0, JOIN)
    b_sum = tl.full((JOIN,), 0, tl.float64)
    for first in range(0, count, JOIN):
        b_sum += tl.load(p_values + first + lanes, mask=first + lanes < count, other=0.0, cache_modifier=".cg")
    return tl.sum(b_sum, axis=0)


@triton.jit
def join_max(p_values, count):
    """Of magnitudes; a NaN has to be put in by the caller."""
    lanes = tl.arange(0, JOIN)
    b_max = tl.full((JOIN,), 0, tl.float64)
    for first in range(0, count, JOIN):
        values = tl.load(p_values + first + lanes, mask=first + lanes < count, other=0.0, cache_modifier=".cg")
        b_max = tl.maximum(b_max, tl.where(values != values, 0.0, values))
    return tl.max(b_max, axis=0)
