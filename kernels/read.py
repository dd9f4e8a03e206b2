"""The one read: every gradient once, in one launch up to the coefficient; finish and join as kernels of their own."""

import triton
from triton import language as tl

from .blocks import kernel
from .chunks import (
    ADDRESS,
    ALIGNED,
    DTYPE_BITS,
    FIRST_ROW,
    TAG,
    UNIT_SIZE,
    WEIGHT,
    WEIGHT_ALIGNED,
    chunk_of,
    stretch_of,
)
from .formats import DTYPES, F8_E4M3FN, LARGEST, as_double
from .joins import INF, LARGEST_FLOAT, LEAST_JOINED, join_max, join_norms, join_squares, join_sum
from .penalty import penalise
from .stats import stats_of


@triton.jit
def store_row(p_rows, stride, rows, mask, norm, nans, infs, largest, total, zeros, divisor, p, EXTRAS: tl.constexpr):
    tl.store(p_rows + rows, tl.where(p == 0.0, norm, norm / divisor), mask=mask)
    tl.store(p_rows + stride + rows, nans, mask=mask)
    tl.store(p_rows + 2 * stride + rows, infs, mask=mask)
    if EXTRAS:
        tl.store(p_rows + 3 * stride + rows, largest / divisor, mask=mask)
        tl.store(p_rows + 4 * stride + rows, total / divisor, mask=mask)
        tl.store(p_rows + 5 * stride + rows, zeros, mask=mask)


@triton.jit
def join_row(p_pieces, stride, count, p, EXTRAS: tl.constexpr):
    """The fields of pieces 0, ..., count - 1, which lie ``stride`` apart from field to field."""
    norm = tl.sqrt(join_squares(p_pieces, count))
    nans = tl.full((), 0, tl.float64)
    infs = nans
    # Nearly always that is enough: a NaN or Inf among the norms shows in the sum of their squares.
    enough = (p == 2.0) & (norm >= LEAST_JOINED) & (norm < INF)
    if not enough:
        norm = join_norms(p_pieces, count, p)
        nans = join_sum(p_pieces + stride, count)
        infs = join_sum(p_pieces + 2 * stride, count)
    largest, total, zeros = norm, norm, norm
    if EXTRAS:
        largest = tl.where(nans > 0.0, float("nan"), join_max(p_pieces + 3 * stride, count))
        total = join_sum(p_pieces + 4 * stride, count)
        zeros = join_sum(p_pieces + 5 * stride, count)
    return norm, nans, infs, largest, total, zeros


@triton.jit
def store_totals(p_rows, count, stride, totals, heads, p, max_norm, eps):
    norm, nans, infs, _, _, _ = join_row(p_rows, stride, count, p, False)
    norm = tl.where(count > 0, norm, 0.0)
    bounded = (norm <= max_norm) | (max_norm == INF)
    tl.store(totals, norm)
    tl.store(totals + 1, tl.where(bounded, 1.0, max_norm / (norm + eps)))
    tl.store(totals + 2, nans)
    tl.store(totals + 3, infs)
    if heads is not None:
        # float32's largest number stands for what lies past it: Inf always means that a gradient holds one
        past = (norm > LARGEST_FLOAT) & (norm <= LARGEST)
        tl.store(heads, tl.where(past, LARGEST_FLOAT, norm).to(tl.float32))
        tl.store(heads + 1, (nans + infs > 0.0).to(tl.float32))


@kernel
def read_kernel(
    table,  # in, int64 [tensors][WORDS]
    owners,  # in, int32 [chunks]: each chunk's tensor
    rows,  # out, float64 [3, or 6 with EXTRAS][row_stride]
    row_stride,
    partials,  # workspace, float64 [3 or 6][chunks]: of the pieces of long units
    chunks,
    done,  # workspace, int32 [count + 1], 0 before and after: pieces of each unit, and units, that are done
    count,  # units in all
    p_bits: tl.int64,  # the norm's p, as the bits of a float64
    divisor,  # in, one float32 or float64: of the norms; None for 1
    totals,  # out, float64 [4]: total_norm, clip_coef, nans, infs; None if not wanted
    heads,  # out, float32 [2]: total_norm, found_inf; None if not wanted
    max_norm_bits: tl.int64,
    eps_bits: tl.int64,
    strengths,  # in, float64 [2][row_stride]: of a penalty's sign(w) and w; None without one
    weight_rows,  # out, float64 [3][row_stride]: norm, max_abs and sum_abs of the weights
    weight_partials,  # workspace, float64 [3][chunks]
    PRESENT: tl.constexpr,  # bit k: dtype k is among them
    ALL: tl.constexpr,  # any p, and every field; else p is 2
    EXTRAS: tl.constexpr,  # rows have 6 fields
    UNITS: tl.constexpr,  # 1: a chunk is a unit or a piece of one; else it is so many short units
):
    chunk = tl.program_id(0)
    p_tensor, unit, units, piece, pieces = chunk_of(table, owners, UNITS)
    row = tl.load(p_tensor + FIRST_ROW) + unit
    tensor_address = tl.load(p_tensor + ADDRESS)
    unit_size = tl.load(p_tensor + UNIT_SIZE)
    tag = tl.load(p_tensor + TAG)
    p = as_double(p_bits)
    if divisor is not None:
        scale = tl.load(divisor).to(tl.float64)
    else:
        scale = tl.full((), 1.0, tl.float64)

    norm = tl.full((UNITS,), 0, tl.float64)
    nans = norm
    infs = norm
    largest = norm
    total = norm
    zeros = norm
    weight_norm = norm
    weight_max = norm
    weight_sum = norm
    for DTYPE in tl.static_range(DTYPES):
        if (PRESENT >> DTYPE) & 1:
            if (tag & DTYPE_BITS) == DTYPE:
                offset, size = stretch_of(unit_size, unit, piece, UNITS, DTYPE)
                address = tensor_address + offset
                aligned = (tag & ALIGNED) != 0
                if strengths is not None and DTYPE < F8_E4M3FN:
                    weights = tl.load(p_tensor + WEIGHT)
                    if weights != 0:
                        weights_aligned = (tag & WEIGHT_ALIGNED) != 0
                        of_sign, of_weight = tl.load(strengths + row), tl.load(strengths + row_stride + row)
                        if (of_sign != 0.0) | (of_weight != 0.0):
                            both = aligned & weights_aligned
                            penalise(address, weights + offset, size, of_sign, of_weight, both, DTYPE)
                        weight_norm, _, _, weight_max, weight_sum, _ = stats_of(
                            weights + offset, unit_size, size, units, weights_aligned, 2.0, True, UNITS, DTYPE
                        )
                norm, nans, infs, largest, total, zeros = stats_of(
                    address, unit_size, size, units, aligned, p, ALL, UNITS, DTYPE
                )

    lane = tl.arange(0, UNITS)
    if UNITS > 1:
        store_row(rows, row_stride, row + lane, lane < units, norm, nans, infs, largest, total, zeros, scale, p, EXTRAS)
    else:
        if pieces == 1:
            store_row(rows, row_stride, row + lane, lane < 1, norm, nans, infs, largest, total, zeros, scale, p, EXTRAS)
            if strengths is not None:
                store_weight_row(weight_rows, row_stride, row + lane, weight_norm, weight_max, weight_sum, p_tensor)
        else:
            # one slot per chunk, joined below in index order: the same gradients give the same bits
            own = chunk + lane
            store_row(partials, chunks, own, lane < 1, norm, nans, infs, largest, total, zeros, 1.0, p, EXTRAS)
            if strengths is not None:
                tl.store(weight_partials + own, weight_norm)
                tl.store(weight_partials + chunks + own, weight_max)
                tl.store(weight_partials + 2 * chunks + own, weight_sum)
        last_of_unit = pieces == 1
        if pieces > 1:
            # Release: what this program stored is there before its count is. Acquire: what others stored is seen.
            tl.debug_barrier()
            if tl.atomic_add(done + 1 + row, 1, sem="acq_rel", scope="gpu") == pieces - 1:
                tl.debug_barrier()
                first = chunk - piece
                norm_, nans_, infs_, largest_, total_, zeros_ = join_row(partials + first, chunks, pieces, p, EXTRAS)
                store_row(rows, row_stride, row, None, norm_, nans_, infs_, largest_, total_, zeros_, scale, p, EXTRAS)
                if strengths is not None:
                    joined = join_norms(weight_partials + first, pieces, 2.0)
                    joined_max = join_max(weight_partials + chunks + first, pieces)
                    joined_sum = join_sum(weight_partials + 2 * chunks + first, pieces)
                    joined_max = tl.where(joined != joined, float("nan"), joined_max)
                    store_weight_row(weight_rows, row_stride, row, joined, joined_max, joined_sum, p_tensor)
                tl.store(done + 1 + row, 0)
                last_of_unit = True
        if totals is not None:
            if last_of_unit:
                tl.debug_barrier()
                if tl.atomic_add(done, 1, sem="acq_rel", scope="gpu") == count - 1:
                    tl.debug_barrier()
                    store_totals(
                        rows, count, row_stride, totals, heads, p, as_double(max_norm_bits), as_double(eps_bits)
                    )
                    tl.store(done, 0)


@triton.jit
def store_weight_row(weight_rows, row_stride, row, norm, largest, total, p_tensor):
    if tl.load(p_tensor + WEIGHT) != 0:
        tl.store(weight_rows + row, norm)
        tl.store(weight_rows + row_stride + row, largest)
        tl.store(weight_rows + 2 * row_stride + row, total)


@kernel
def finish_kernel(rows, count, p_bits: tl.int64, totals, heads, max_norm_bits: tl.int64, eps_bits: tl.int64):
    """rows: in, float64 [>= 3][count]. totals, heads: out, see read_kernel."""
    store_totals(rows, count, count, totals, heads, as_double(p_bits), as_double(max_norm_bits), as_double(eps_bits))


@kernel
def join_kernel(
    unit_rows,  # in, float64 [3][unit_stride]
    unit_stride,
    first_units,  # in, int64 [row_stride + 1]: each tensor's first unit
    rows,  # out, float64 [3][row_stride]
    row_stride,
    p_bits: tl.int64,
):
    tensor = tl.program_id(0)
    p = as_double(p_bits)
    first = tl.load(first_units + tensor)
    count = tl.load(first_units + tensor + 1) - first
    norm, nans, infs, _, _, _ = join_row(unit_rows + first, unit_stride, count, p, False)
    norm = tl.where((count == 0) & (p < 0.0), INF, norm)
    store_row(rows, row_stride, tensor, None, norm, nans, infs, norm, norm, norm, 1.0, p, False)
