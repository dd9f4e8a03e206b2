"""A program's share of the work: the tensor and the units that its chunk covers. table.py makes what is read here."""

import triton
from triton import language as tl

from .blocks import CHUNK
from .formats import bytes_of_real, reals_of_element

# What the table holds of each tensor, int64.
WORDS = tl.constexpr(7)
ADDRESS = tl.constexpr(0)
UNIT_SIZE = tl.constexpr(1)  # elements
TAG = tl.constexpr(2)  # dtype, and which of the addresses are multiples of 16
COUNT = tl.constexpr(3)  # chunks of each unit, or where units are short, units
FIRST_CHUNK = tl.constexpr(4)
FIRST_ROW = tl.constexpr(5)
WEIGHT = tl.constexpr(6)  # address; 0 for none

DTYPE_BITS = tl.constexpr(0xFF)
ALIGNED = tl.constexpr(1 << 8)
WEIGHT_ALIGNED = tl.constexpr(1 << 9)


@triton.jit
def chunk_of(table, owners, UNITS: tl.constexpr):
    """-> of this program's chunk: its tensor's words, its first unit there, how many units, which piece of the unit it
    is, and of how many.

    ``UNITS`` is 1 where a chunk is a unit or a piece of one, else the number of short units of a chunk.
    """
    chunk = tl.program_id(0)
    p_tensor = table + tl.load(owners + chunk).to(tl.int64) * WORDS
    number = tl.load(p_tensor + COUNT)
    k = chunk - tl.load(p_tensor + FIRST_CHUNK)
    one = tl.full((), 1, tl.int64)
    if UNITS == 1:
        # Divided as 32 bits: 64 take a GPU hundreds of cycles, in which nothing of this program is read.
        unit = k.to(tl.int32) // number.to(tl.int32)
        return p_tensor, unit.to(tl.int64), one, k - unit * number, number
    else:
        return p_tensor, k * UNITS, tl.minimum(number - k * UNITS, UNITS), one - 1, one


@triton.jit
def stretch_of(unit_size, unit, piece, UNITS: tl.constexpr, DTYPE: tl.constexpr):
    """-> bytes from the tensor's address to the chunk, and how many elements of each of its units it covers."""
    ELEMENT: tl.constexpr = bytes_of_real(DTYPE) * reals_of_element(DTYPE)
    MOST: tl.constexpr = CHUNK // ELEMENT
    size = unit_size
    if UNITS == 1:
        size = tl.minimum(unit_size - piece * MOST, MOST)
    return (unit * unit_size + piece * MOST) * ELEMENT, size.to(tl.int32)
