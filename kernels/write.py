"""What is written in place: scaled, clamped, or without its NaN and Inf."""

import triton
from triton import language as tl

from .blocks import CHUNK, COLUMNS, WRITE_BYTES, kernel
from .chunks import ADDRESS, ALIGNED, DTYPE_BITS, FIRST_ROW, TAG, UNIT_SIZE, chunk_of, stretch_of
from .formats import (
    C64,
    C128,
    DTYPES,
    F64,
    as_double,
    bytes_of_real,
    largest,
    narrowed,
    pointer_to,
    reals_of_element,
    widened,
)

SCALE = tl.constexpr(0)  # by one factor, which the host or the device knows
SCALE_EACH = tl.constexpr(1)  # by one factor per unit
CLAMP = tl.constexpr(2)
ZERO_NONFINITE = tl.constexpr(3)

SMALLEST_FLOAT = tl.constexpr(2.0**-126)  # with all its bits


@triton.jit
def any_of(tiny):
    """Of one bool, or [UNITS, 1]."""
    if tiny.shape == ():
        return tiny
    else:
        return tl.max(tl.max(tiny.to(tl.int32), axis=1), axis=0) > 0


@triton.jit
def scaled(b_bits, factor, DTYPE: tl.constexpr):
    """``factor``: float64, one or [UNITS, 1]. One below float32's normal range, from a norm above 1e38, would lose its
    bits as a float: the product is taken in float64."""
    x = widened(b_bits, DTYPE)
    if DTYPE == F64 or DTYPE == C128:
        return narrowed(x * factor, DTYPE)
    else:
        tiny = (tl.abs(factor) < SMALLEST_FLOAT) & (factor != 0.0)
        product = x * factor.to(tl.float32)
        if any_of(tiny):
            product = tl.where(tiny, (x.to(tl.float64) * factor).to(tl.float32), product)
        return narrowed(product, DTYPE)


@triton.jit
def clamped(b_bits, bound, DTYPE: tl.constexpr):
    """|x| > bound becomes sign(x) * bound, in the format's own numbers; NaN stays. A bound past the largest of them
    leaves all as it is."""
    x = widened(b_bits, DTYPE)
    if DTYPE == F64 or DTYPE == C128:
        own = bound
    else:
        own = widened(narrowed(bound.to(tl.float32), DTYPE), DTYPE)
        own = tl.where(bound > largest(DTYPE), float("inf"), own)
    return narrowed(tl.where(x > own, own, tl.where(x < -own, -own, x)), DTYPE)


@triton.jit
def zeroed(b_bits, ROWS: tl.constexpr, COUNT_: tl.constexpr, DTYPE: tl.constexpr):
    """An element of which a part is not finite becomes 0."""
    finite = (tl.abs(widened(b_bits, DTYPE)) < float("inf")).to(tl.int32)
    if DTYPE == C64 or DTYPE == C128:
        re, im = tl.split(tl.reshape(finite, (ROWS, COUNT_ // 2, 2)))
        finite = tl.reshape(tl.join(re & im, re & im), (ROWS, COUNT_))
    return tl.where(finite != 0, b_bits, tl.zeros_like(b_bits))


@triton.jit
def changed(b_bits, scalar, CHANGE: tl.constexpr, ROWS: tl.constexpr, COUNT_: tl.constexpr, DTYPE: tl.constexpr):
    if CHANGE == CLAMP:
        return clamped(b_bits, scalar, DTYPE)
    elif CHANGE == ZERO_NONFINITE:
        return zeroed(b_bits, ROWS, COUNT_, DTYPE)
    else:
        return scaled(b_bits, scalar, DTYPE)


@triton.jit
def change_chunk(address, scalar, CHANGE: tl.constexpr, DTYPE: tl.constexpr):
    """A whole chunk at a multiple of 16."""
    TILE: tl.constexpr = WRITE_BYTES // bytes_of_real(DTYPE)
    WHOLE: tl.constexpr = CHUNK // bytes_of_real(DTYPE)
    p_reals = pointer_to(address, DTYPE, True)
    columns = tl.arange(0, TILE)[None, :]
    for first in range(0, WHOLE, TILE):
        b_before = tl.load(p_reals + (first + columns))
        b_after = changed(b_before, scalar, CHANGE, 1, TILE, DTYPE)
        if CHANGE == SCALE or CHANGE == SCALE_EACH:
            tl.store(p_reals + (first + columns), b_after)
        elif tl.max(tl.max((b_after != b_before).to(tl.int32), axis=1), axis=0) > 0:  # else nothing is written
            tl.store(p_reals + (first + columns), b_after)


@triton.jit
def change_units(
    address, unit_size, size, units, scalar, CHANGE: tl.constexpr, UNITS: tl.constexpr, DTYPE: tl.constexpr
):
    """Anything else; sizes are in reals, ``scalar`` is one number, or for several units [UNITS, 1]."""
    TILE: tl.constexpr = COLUMNS if UNITS > 1 else WRITE_BYTES // bytes_of_real(DTYPE)
    p_reals = pointer_to(address, DTYPE)
    unit = tl.arange(0, UNITS)[:, None]
    columns = tl.arange(0, TILE)[None, :]
    for first in range(0, size, TILE):
        mask = (unit < units) & (first + columns < size)
        if CHANGE == SCALE_EACH and UNITS > 1:
            mask = mask & (scalar != 1.0)
        p_here = p_reals + unit * unit_size + (first + columns)
        b_before = tl.load(p_here, mask=mask, other=0)
        b_after = changed(b_before, scalar, CHANGE, UNITS, TILE, DTYPE)
        tl.store(p_here, b_after, mask=mask & (b_after != b_before))


@kernel
def write_kernel(
    table,  # in, see read_kernel
    owners,
    factors,  # in, one float32 or float64, or with SCALE_EACH float64 [units]; None where none is needed
    bound_bits: tl.int64,  # of a clamp, as the bits of a float64
    skip,  # in, one float32: unless it is 0 nothing is written; or None
    PRESENT: tl.constexpr,
    CHANGE: tl.constexpr,
    UNITS: tl.constexpr,
):
    p_tensor, unit, units, piece, _ = chunk_of(table, owners, UNITS)
    tensor_address = tl.load(p_tensor + ADDRESS)
    unit_size = tl.load(p_tensor + UNIT_SIZE)
    tag = tl.load(p_tensor + TAG)
    lane = tl.arange(0, UNITS)[:, None]
    if CHANGE == SCALE:
        scalar = tl.load(factors).to(tl.float64)
        needed = scalar != 1.0
    elif CHANGE == SCALE_EACH:
        p_factors = factors + tl.load(p_tensor + FIRST_ROW) + unit
        if UNITS == 1:
            scalar = tl.load(p_factors)
            needed = scalar != 1.0
        else:
            scalar = tl.load(p_factors + lane, mask=lane < units, other=1.0)
            needed = tl.max(tl.max((scalar != 1.0).to(tl.int32), axis=1), axis=0) > 0
    else:
        scalar = as_double(bound_bits)
        needed = True
    if skip is not None:
        needed = needed & (tl.load(skip) == 0.0)
    if needed:
        for DTYPE in tl.static_range(DTYPES):
            if (PRESENT >> DTYPE) & 1:
                if (tag & DTYPE_BITS) == DTYPE:
                    REALS: tl.constexpr = reals_of_element(DTYPE)
                    offset, size = stretch_of(unit_size, unit, piece, UNITS, DTYPE)
                    address = tensor_address + offset
                    unit_reals = unit_size * REALS
                    if UNITS == 1:
                        if ((tag & ALIGNED) != 0) & (size * bytes_of_real(DTYPE) * REALS == CHUNK):
                            change_chunk(address, scalar, CHANGE, DTYPE)
                        else:
                            change_units(address, unit_reals, size * REALS, units, scalar, CHANGE, UNITS, DTYPE)
                    else:
                        change_units(address, unit_reals, size * REALS, units, scalar, CHANGE, UNITS, DTYPE)
