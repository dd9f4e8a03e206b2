"""Storage formats: bits in memory -> numbers, and back.

Numbers are loaded as integers and widened by bit arithmetic, so that each target, and Triton's interpreter, which
truncates float32 to bfloat16 and flushes its subnormals, gives the same bits.
"""

import triton
from triton import language as tl

# The order of DType in csrc/tensor_table.h; a complex number is two reals.
F64 = tl.constexpr(0)
F32 = tl.constexpr(1)
BF16 = tl.constexpr(2)
F16 = tl.constexpr(3)
C128 = tl.constexpr(4)
C64 = tl.constexpr(5)
F8_E4M3FN = tl.constexpr(6)
F8_E4M3FNUZ = tl.constexpr(7)
F8_E5M2 = tl.constexpr(8)
F8_E5M2FNUZ = tl.constexpr(9)
DTYPES = tl.constexpr(10)

LARGEST = tl.constexpr(1.7976931348623157e308)

ELEMENT_BYTES = (8, 4, 2, 2, 16, 8, 1, 1, 1, 1)


@triton.constexpr_function
def bytes_of_real(DTYPE):
    return (8, 4, 2, 2, 8, 4, 1, 1, 1, 1)[DTYPE]


@triton.constexpr_function
def reals_of_element(DTYPE):
    return (1, 1, 1, 1, 2, 2, 1, 1, 1, 1)[DTYPE]


@triton.constexpr_function
def joined_reals(DTYPE):
    """How many products are added in float32 before they go on in float64: 2 roundings, so 1 of the norm at most."""
    return (1, 2, 4, 4, 1, 2, 4, 4, 4, 4)[DTYPE]


@triton.constexpr_function
def tile_of(DTYPE, tile_bytes):
    """Reals of a tile; of 8-bit ones half as many, or they would fill the registers."""
    return tile_bytes // (8, 4, 2, 2, 8, 4, 2, 2, 2, 2)[DTYPE]


@triton.constexpr_function
def largest(DTYPE):
    """The largest number of the reals that are written."""
    wide, narrow = 1.7976931348623157e308, 3.4028234663852886e38
    return (wide, narrow, 255 * 2.0**120, 65504.0, wide, narrow)[DTYPE]


@triton.constexpr_function
def least_trusted(DTYPE):
    """A sum of squares from here on holds what the squares that underflowed could have added, below its own rounding.

    2^14 float32 lose half of 2^-149 each: 2^-36 of 2^-100. Those of float16 and float8 don't underflow.
    """
    return (2.0**-950, 2.0**-100, 2.0**-100, 0.0, 2.0**-950, 2.0**-100, 0.0, 0.0, 0.0, 0.0)[DTYPE]


@triton.jit
def pointer_to(address, DTYPE: tl.constexpr, WIDE: tl.constexpr = False):
    """To the bits of a tensor's reals. With WIDE ``address`` must be a multiple of 16.

    That promise, and no mask, is what makes loads of 16 bytes. It is given here, where the pointer is made: Triton 3.6
    loses it on what a function returned.
    """
    if DTYPE == F64 or DTYPE == C128:
        p_reals = address.to(tl.pointer_type(tl.int64))
    elif DTYPE == F32 or DTYPE == C64:
        p_reals = address.to(tl.pointer_type(tl.int32))
    elif DTYPE == BF16 or DTYPE == F16:
        p_reals = address.to(tl.pointer_type(tl.int16))
    else:
        p_reals = address.to(tl.pointer_type(tl.int8))
    if WIDE:
        p_reals = tl.multiple_of(p_reals, 16)
    return p_reals


@triton.jit
def without_sign(b_bits, DTYPE: tl.constexpr):
    """0 for zeros of both signs only."""
    if DTYPE == F64 or DTYPE == C128:
        return b_bits & 0x7FFFFFFFFFFFFFFF
    elif DTYPE == F32 or DTYPE == C64:
        return b_bits & 0x7FFFFFFF
    elif DTYPE == BF16 or DTYPE == F16:
        return b_bits & 0x7FFF
    else:
        return b_bits & 0x7F


@triton.jit
def widened(b_bits, DTYPE: tl.constexpr):
    """float64 for float64, else float32, without a rounding; of 8-bit floats, which are only read, the magnitude."""
    if DTYPE == F64 or DTYPE == C128:
        return b_bits.to(tl.float64, bitcast=True)
    elif DTYPE == F32 or DTYPE == C64:
        return b_bits.to(tl.float32, bitcast=True)
    elif DTYPE == BF16:
        return (b_bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == F16:
        return b_bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        # Exponent and mantissa, moved to float32's places, are the number but for the difference of the biases.
        FNUZ: tl.constexpr = (DTYPE == F8_E4M3FNUZ) or (DTYPE == F8_E5M2FNUZ)
        EXPONENT: tl.constexpr = 4 if DTYPE <= F8_E4M3FNUZ else 5
        UNIT: tl.constexpr = 2.0 ** (128 - 2 ** (EXPONENT - 1) - (1 if FNUZ else 0))
        code = b_bits.to(tl.int32) & 0xFF
        magnitude = code & 0x7F
        x = (magnitude << (16 + EXPONENT)).to(tl.float32, bitcast=True) * UNIT
        if FNUZ:
            return tl.where(code == 0x80, float("nan"), x)
        elif EXPONENT == 4:
            return tl.where(magnitude == 0x7F, float("nan"), x)
        else:
            return tl.where(magnitude > 0x7C, float("nan"), tl.where(magnitude == 0x7C, float("inf"), x))


@triton.jit
def narrowed(x, DTYPE: tl.constexpr):
    """The bits of ``x``, rounded once, to nearest even."""
    if DTYPE == F64 or DTYPE == C128:
        return x.to(tl.int64, bitcast=True)
    elif DTYPE == F32 or DTYPE == C64:
        return x.to(tl.int32, bitcast=True)
    elif DTYPE == F16:
        return x.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        # A NaN becomes 0x7fc0, as in PyTorch: rounding could carry it to 0.
        bits = x.to(tl.int32, bitcast=True)
        odd = (bits >> 16) & 1
        # halves of the sum, which could pass the largest integer
        rounded = (bits & 0xFFFF) + 0x7FFF + odd
        near = (bits >> 16) + (rounded >> 16)
        return tl.where(x != x, 0x7FC0, near).to(tl.int16)


@triton.jit
def as_double(bits):
    """A float64 that came as the integer of its bits: Triton passes a Python float on as float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def saturated(norm):
    """Finite elements never give an infinite norm: past the largest number it stays there."""
    return tl.where(norm > LARGEST, LARGEST, norm)


@triton.jit
def unit_scale(x):
    """A power of two that brings ``x`` >= 0 near 1, as far as it and its inverse are normal numbers."""
    exponent = ((x.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1023
    exponent = tl.minimum(tl.maximum(exponent, -1000), 1000)
    return ((1023 - exponent) << 52).to(tl.float64, bitcast=True)


@triton.jit
def magnitudes(p_reals, o_elements, mask, DTYPE: tl.constexpr):
    """|x| of elements in float64, 0 outside of the mask; a complex number with a NaN part is a NaN."""
    if DTYPE == C64 or DTYPE == C128:
        re = widened(tl.load(p_reals + 2 * o_elements, mask=mask, other=0), DTYPE).to(tl.float64)
        im = widened(tl.load(p_reals + 2 * o_elements + 1, mask=mask, other=0), DTYPE).to(tl.float64)
        if DTYPE == C64:
            return tl.sqrt(re * re + im * im)  # exact squares: no overflow, and NaN wins over Inf
        else:
            re, im = tl.abs(re), tl.abs(im)
            nan = (re != re) | (im != im)
            larger = tl.where(re > im, re, im)
            ordinary = (larger > 0) & (larger < float("inf"))
            scale = unit_scale(tl.where(ordinary, larger, 1.0))
            length = tl.sqrt(re * scale * (re * scale) + im * scale * (im * scale)) / scale
            # past the largest number a finite one stays there: Inf always means that a part is Inf
            return tl.where(nan, float("nan"), tl.where(ordinary, saturated(length), larger))
    else:
        return tl.abs(widened(tl.load(p_reals + o_elements, mask=mask, other=0), DTYPE).to(tl.float64))
