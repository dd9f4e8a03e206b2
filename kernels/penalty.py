"""A weight penalty, added to a chunk of gradients before it is read."""

import triton
from triton import language as tl

from .blocks import CHUNK, TILE_BYTES
from .formats import bytes_of_real, narrowed, pointer_to, widened


@triton.jit
def penalise(address, weights, size, of_sign, of_weight, aligned, DTYPE: tl.constexpr):
    """g = (g + of_sign * sign(w)) + of_weight * w in place; g is then visible to the whole program."""
    TILE: tl.constexpr = TILE_BYTES // bytes_of_real(DTYPE) // 2
    WHOLE: tl.constexpr = CHUNK // bytes_of_real(DTYPE)
    columns = tl.arange(0, TILE)
    if aligned & (size == WHOLE):
        p_grads, p_weights = pointer_to(address, DTYPE, True), pointer_to(weights, DTYPE, True)
        for first in range(0, WHOLE, TILE):
            b_g = widened(tl.load(p_grads + first + columns), DTYPE)
            b_w = widened(tl.load(p_weights + first + columns), DTYPE)
            tl.store(p_grads + first + columns, penalised(b_g, b_w, of_sign, of_weight, DTYPE))
    else:
        p_grads, p_weights = pointer_to(address, DTYPE), pointer_to(weights, DTYPE)
        for first in range(0, size, TILE):
            mask = first + columns < size
            b_g = widened(tl.load(p_grads + first + columns, mask=mask, other=0), DTYPE)
            b_w = widened(tl.load(p_weights + first + columns, mask=mask, other=0), DTYPE)
            tl.store(p_grads + first + columns, penalised(b_g, b_w, of_sign, of_weight, DTYPE), mask=mask)
    tl.debug_barrier()


@triton.jit
def penalised(b_g, b_w, of_sign, of_weight, DTYPE: tl.constexpr):
    sign = (b_w > 0).to(b_g.dtype) - (b_w < 0).to(b_g.dtype)
    return narrowed((b_g + of_sign.to(b_g.dtype) * sign) + of_weight.to(b_g.dtype) * b_w, DTYPE)
