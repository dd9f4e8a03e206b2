"""What one stretch of memory, units or a piece of one, says: the fields of a row.

The first look adds squares and asks nothing. Units whose sum is not finite or suspiciously small get a second one while
they are in cache: it tells NaN, Inf, overflow and underflow apart.
"""

import triton
from triton import language as tl

from .blocks import CHUNK, COLUMNS, LOOK, TILE_BYTES
from .formats import (
    LARGEST,
    bytes_of_real,
    joined_reals,
    least_trusted,
    magnitudes,
    pointer_to,
    reals_of_element,
    saturated,
    tile_of,
    unit_scale,
    widened,
    without_sign,
)
from .joins import INF, finished_norm, power


@triton.jit
def pairs_added(x, UNITS: tl.constexpr, COUNT: tl.constexpr):
    """Of neighbours, which one thread holds."""
    a, b = tl.split(tl.reshape(x, (UNITS, COUNT // 2, 2)))
    return a + b


@triton.jit
def pairs_ored(x, UNITS: tl.constexpr, COUNT: tl.constexpr):
    a, b = tl.split(tl.reshape(x, (UNITS, COUNT // 2, 2)))
    return a | b


@triton.jit
def squares_and_bits(b_bits, UNITS: tl.constexpr, COUNT: tl.constexpr, DTYPE: tl.constexpr):
    """[UNITS, COUNT] -> sums of a few squares in float64, and the same numbers' bits ored."""
    x = widened(b_bits, DTYPE)
    b_squares = x * x
    JOINED: tl.constexpr = joined_reals(DTYPE)
    if JOINED >= 2:
        b_squares = pairs_added(b_squares, UNITS, COUNT)
        b_bits = pairs_ored(b_bits, UNITS, COUNT)
    if JOINED == 4:
        b_squares = pairs_added(b_squares, UNITS, COUNT // 2)
        b_bits = pairs_ored(b_bits, UNITS, COUNT // 2)
    return b_squares.to(tl.float64), b_bits


@triton.jit
def squares_of_chunk(address, DTYPE: tl.constexpr):
    """Of a whole chunk at a multiple of 16: -> lanes of sums of squares and of ored bits, [1, n]."""
    TILE: tl.constexpr = tile_of(DTYPE, TILE_BYTES)
    WHOLE: tl.constexpr = CHUNK // bytes_of_real(DTYPE)
    p_reals = pointer_to(address, DTYPE, True)
    columns = tl.arange(0, TILE)[None, :]
    b_sum = tl.full((1, TILE // joined_reals(DTYPE)), 0, tl.float64)
    b_any = tl.full((1, TILE // joined_reals(DTYPE)), 0, p_reals.dtype.element_ty)
    # All loads stand in one stretch of code; those of 8-bit numbers, whose decoding fills the registers, in several.
    STRETCH: tl.constexpr = WHOLE if bytes_of_real(DTYPE) > 1 else 2 * TILE
    for stretch in range(0, WHOLE, STRETCH):
        for first in tl.static_range(0, STRETCH, TILE):
            b_squares, b_bits = squares_and_bits(tl.load(p_reals + (stretch + first + columns)), 1, TILE, DTYPE)
            b_sum += b_squares
            b_any |= b_bits
    return b_sum, b_any


@triton.jit
def squares_of_units(address, unit_size, size, units, UNITS: tl.constexpr, DTYPE: tl.constexpr):
    """Of anything else: the same lanes, [UNITS, n]. Sizes are in reals."""
    TILE: tl.constexpr = COLUMNS if UNITS > 1 else tile_of(DTYPE, TILE_BYTES)
    p_reals = pointer_to(address, DTYPE)
    unit = tl.arange(0, UNITS)[:, None]
    columns = tl.arange(0, TILE)[None, :]
    b_sum = tl.full((UNITS, TILE // joined_reals(DTYPE)), 0, tl.float64)
    b_any = tl.full((UNITS, TILE // joined_reals(DTYPE)), 0, p_reals.dtype.element_ty)
    for first in range(0, size, TILE):
        mask = (unit < units) & (first + columns < size)
        b_bits = tl.load(p_reals + unit * unit_size + (first + columns), mask=mask, other=0)
        b_squares, b_bits = squares_and_bits(b_bits, UNITS, TILE, DTYPE)
        b_sum += b_squares
        b_any |= b_bits
    return b_sum, b_any


@triton.jit
def first_look(address, unit_size, size, units, aligned, UNITS: tl.constexpr, DTYPE: tl.constexpr):
    """-> [UNITS] sum of squares, and whether a bit that is no sign is set. Sizes are in elements."""
    REALS: tl.constexpr = reals_of_element(DTYPE)
    if UNITS == 1:
        if aligned & (size * bytes_of_real(DTYPE) * REALS == CHUNK):
            b_sum, b_any = squares_of_chunk(address, DTYPE)
        else:
            b_sum, b_any = squares_of_units(address, unit_size * REALS, size * REALS, units, UNITS, DTYPE)
    else:
        b_sum, b_any = squares_of_units(address, unit_size * REALS, size * REALS, units, UNITS, DTYPE)
    return tl.sum(b_sum, axis=1), tl.max((without_sign(b_any, DTYPE) != 0).to(tl.int32), axis=1)


@triton.jit
def second_look(address, unit_size, size, units, p, UNITS: tl.constexpr, DTYPE: tl.constexpr):
    """-> every field, [UNITS] float64 each, from one survey and for most p a second pass; both find cached data."""
    TILE: tl.constexpr = COLUMNS if UNITS > 1 else LOOK
    p_reals = pointer_to(address, DTYPE)
    unit = tl.arange(0, UNITS)[:, None]
    columns = tl.arange(0, TILE)[None, :]
    b_max = tl.full((UNITS, TILE), 0, tl.float64)
    b_min = tl.full((UNITS, TILE), INF, tl.float64)
    b_sum = tl.full((UNITS, TILE), 0, tl.float64)
    b_zeros = tl.full((UNITS, TILE), 0, tl.int32)
    b_nans = tl.full((UNITS, TILE), 0, tl.int32)
    b_infs = tl.full((UNITS, TILE), 0, tl.int32)
    for first in range(0, size, TILE):
        mask = (unit < units) & (first + columns < size)
        x = magnitudes(p_reals, unit * unit_size + (first + columns), mask, DTYPE)
        nan = x != x
        b_nans += nan.to(tl.int32)
        b_infs += (x == INF).to(tl.int32)
        b_zeros += ((x == 0.0) & mask).to(tl.int32)
        b_sum += x
        known = tl.where(nan, 0.0, x)
        b_max = tl.maximum(b_max, known)
        b_min = tl.minimum(b_min, tl.where(mask & (x == x), known, INF))
    nans = tl.sum(b_nans, axis=1).to(tl.float64)
    infs = tl.sum(b_infs, axis=1).to(tl.float64)
    zeros = tl.sum(b_zeros, axis=1).to(tl.float64)
    largest, smallest, total = tl.max(b_max, axis=1), tl.min(b_min, axis=1), tl.sum(b_sum, axis=1)

    norm = size - zeros
    if p != 0.0:
        dominant = tl.where(p > 0.0, largest, smallest)
        norm = dominant
        ordinary = (dominant > 0.0) & (dominant < INF) & (nans == 0.0)
        if p == 1.0:  # which the survey has summed
            norm = tl.where(ordinary, saturated(total), dominant)
        elif (p != INF) & (p != -INF):
            unit_dominant = tl.where(ordinary, dominant, 1.0)
            scale = unit_scale(unit_dominant)
            b_powers = tl.full((UNITS, TILE), 0, tl.float64)
            for first in range(0, size, TILE):
                mask = (unit < units) & (first + columns < size)
                x = magnitudes(p_reals, unit * unit_size + (first + columns), mask, DTYPE)
                if p == 2.0:
                    b_powers += x * scale[:, None] * (x * scale[:, None])
                else:
                    b_powers += tl.where(mask, power(x / unit_dominant[:, None], p), 0.0)
            powers = tl.sum(b_powers, axis=1)
            norm = tl.where(ordinary, finished_norm(powers, unit_dominant, scale, p), dominant)
        norm = tl.where(nans > 0.0, float("nan"), norm)
    largest = tl.where(nans > 0.0, float("nan"), largest)
    total = tl.where(nans > 0.0, float("nan"), total)
    return norm, nans, infs, largest, total, zeros


@triton.jit
def stats_of(address, unit_size, size, units, aligned, p, ALL: tl.constexpr, UNITS: tl.constexpr, DTYPE: tl.constexpr):
    """-> norm, nans, infs, max_abs, sum_abs, zeros; ``ALL``: every field, for any p, else p is 2 and the last three are
    the norm again, which nobody asks for.

    Args:
        address: of the first element of the first unit.
        unit_size: elements from one unit to the next.
        size: elements to read of each unit.
        units: how many there are, of UNITS.
        aligned: whether ``address`` is a multiple of 16.
    """
    if ALL:
        return second_look(address, unit_size, size, units, p, UNITS, DTYPE)
    else:
        total, any_bit = first_look(address, unit_size, size, units, aligned, UNITS, DTYPE)
        LEAST: tl.constexpr = least_trusted(DTYPE)
        norm = tl.sqrt(total)
        nans = tl.full((UNITS,), 0, tl.float64)
        infs = tl.full((UNITS,), 0, tl.float64)
        # Most chunks of an embedding's gradient are zeros: they must not be read again.
        trusted = ((total >= LEAST) & (total > 0.0) & (total <= LARGEST)) | ((total == 0.0) & (any_bit == 0))
        if tl.min(trusted.to(tl.int32), axis=0) == 0:
            other_norm, other_nans, other_infs, _, _, _ = second_look(
                address, unit_size, size, units, 2.0, UNITS, DTYPE
            )
            norm = tl.where(trusted, norm, other_norm)
            nans = tl.where(trusted, 0.0, other_nans)
            infs = tl.where(trusted, 0.0, other_infs)
        return norm, nans, infs, norm, norm, norm
