"""The count of an optimizer's steps, kept where the gradients are."""

import triton
from triton import language as tl

from .blocks import kernel
from .formats import as_double


@triton.jit
def known(at, bits):
    """One float32 or float64 there, or a float64's bits."""
    if at is None:
        return as_double(bits)
    else:
        return tl.load(at).to(tl.float64)


@kernel
def tally_kernel(
    before,  # in, float64 [5]: steps, clipped, skipped, skipped in a row, and with NaN or Inf
    factor,  # in, one float32 or float64: the step is clipped unless it is 1; or None, and then
    factor_bits: tl.int64,  # as the bits of a float64
    skip,  # in: the step is skipped, and not clipped, unless it is 0; as the factor
    skip_bits: tl.int64,
    found,  # in: the gradients held NaN or Inf unless it is 0; as the factor
    found_bits: tl.int64,
    after,  # out, [5]
):
    skipped = (known(skip, skip_bits) != 0.0).to(tl.float64)
    clipped = (known(factor, factor_bits) != 1.0).to(tl.float64) * (1.0 - skipped)
    tl.store(after, tl.load(before) + 1.0)
    tl.store(after + 1, tl.load(before + 1) + clipped)
    tl.store(after + 2, tl.load(before + 2) + skipped)
    tl.store(after + 3, (tl.load(before + 3) + 1.0) * skipped)
    tl.store(after + 4, tl.load(before + 4) + (known(found, found_bits) != 0.0).to(tl.float64))
