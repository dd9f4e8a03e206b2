"""The float64 oracle: what every number must be, computed the slow and plain way."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
HALVES = (torch.bfloat16, torch.float16)
REALS = (torch.float64, torch.float32, *HALVES)
COMPLEX = (torch.complex128, torch.complex64)
WRITABLE = (*REALS, *COMPLEX)
DTYPES = (*WRITABLE, *FLOAT8)

NAN, INF = math.nan, math.inf
NORM_TYPES = (2.0, 1.0, INF, -INF, 0.0, 3.0, 0.5, -1.0, -2.5, 17.0, 100.0, 4.7)

# significand bits (the hidden one included) and the exponent of the smallest normal number
FORMATS = {torch.float32: (24, -126), torch.bfloat16: (8, -126), torch.float16: (11, -14)}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def magnitudes(tensor: Tensor) -> Tensor:
    """|x| of every element in float64; a complex number with a NaN part is a NaN."""
    x = tensor.detach()
    if x.layout != torch.strided:
        x = x.coalesce().values() if x.layout == torch.sparse_coo else x.values()
    x = x.resolve_conj().resolve_neg()
    if x.is_complex():
        re, im = x.real.double().flatten(), x.imag.double().flatten()
        return torch.where(re.isnan() | im.isnan(), NAN, torch.hypot(re, im))
    return (x.float() if x.dtype in FLOAT8 else x).double().abs().flatten()


def norm_of_magnitudes(x: Tensor, p: float) -> float:
    """p-norm; NaN wins, Inf comes next, a finite list never overflows."""
    if p == 0:
        return float((x != 0).sum())
    if x.isnan().any():
        return NAN
    if x.numel() == 0:
        return INF if p < 0 else 0.0
    largest, smallest = float(x.max()), float(x.min())
    if abs(p) == INF:
        return largest if p > 0 else smallest
    dominant = largest if p > 0 else smallest
    if dominant in (0.0, INF):
        return dominant
    # a power of two keeps every quotient exact where it matters
    unit = math.ldexp(1.0, max(min(math.frexp(dominant)[1], 1000), -1000))
    terms = (x / unit / (dominant / unit)).pow(p)
    powers = math.fsum(terms.tolist()) if terms.numel() < 2000 else float(terms.sum())  # pairwise: 1e-15
    return min(dominant * powers ** (1.0 / p), torch.finfo(torch.float64).max)


def norm(tensors: Tensor | Iterable[Tensor], p: float = 2.0) -> float:
    """p-norm of all tensors as one vector."""
    listed = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    return norm_of_magnitudes(torch.cat([magnitudes(t) for t in listed] or [torch.zeros(0).double()]), p)


def coef(total_norm: float, max_norm: float, eps: float = 1e-6) -> float:
    """The multiplier of the gradients, exactly 1 at or below the bound."""
    return 1.0 if total_norm <= max_norm or max_norm == INF else max_norm / (total_norm + eps)


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 numbers rounded once to ``dtype``, to nearest even, subnormals included; float64 again."""
    bits, least = FORMATS[dtype]
    exponent = torch.frexp(exact).exponent.double() - 1
    quantum = torch.exp2(exponent.clamp(min=least) - (bits - 1))
    near = torch.round(exact / quantum) * quantum  # torch.round takes halfway cases to even
    overflow = near.abs() > torch.finfo(dtype).max
    near = torch.where(overflow, torch.copysign(torch.full_like(near, INF), exact), near)
    return torch.where(torch.isfinite(exact), near, exact)


def bits(tensor: Tensor) -> Tensor:
    """The memory of a tensor as integers, so that equality is equality of bits."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    return flat.view(BITS[flat.dtype.itemsize]) if flat.dtype.itemsize > 1 else flat.view(torch.uint8)


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """Distance in representable numbers; NaN to NaN is 0, NaN to a number is huge."""
    assert a.dtype == b.dtype
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    low = torch.iinfo(BITS[a.dtype.itemsize]).min

    def ordered(x: Tensor) -> Tensor:
        raw = x.contiguous().view(BITS[x.dtype.itemsize]).to(torch.int64)
        return torch.where(raw < 0, low - raw, raw)

    far = (ordered(a) - ordered(b)).abs()
    one_nan = a.isnan() != b.isnan()
    return torch.where(a.isnan() & b.isnan(), 0, torch.where(one_nan, 2**62, far))


def assert_norm(got: Tensor | float, want: float, p: float = 2.0, dtype: torch.dtype = torch.float32) -> None:
    """``got`` is within 1 float32 ulp of the float64 ``want``; float64 norms within 1e-13 of it."""
    got = torch.as_tensor(got)
    assert got.dtype == dtype
    assert got.dim() == 0
    expected = torch.tensor(want, dtype=torch.float64)
    if dtype == torch.float64 and math.isfinite(want) and want > 1e-300:
        assert abs(float(got) - want) <= 1e-13 * want, (float(got), want, p)
        return
    far = int(ulps(got.to(torch.float32).reshape(1), expected.to(torch.float32).reshape(1)))
    assert far <= 1, f"p={p}: {float(got)!r} is {far} ulp away from {want!r}"


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers of any dtype, fp8 included; seeded by the tests' fixture."""
    if dtype.is_complex:
        return torch.randn(shape, dtype=torch.complex128).mul_(scale).to(dtype)
    return torch.randn(shape, dtype=torch.float64).mul_(scale).to(torch.float32 if dtype in FLOAT8 else dtype).to(dtype)


def all_patterns(dtype: torch.dtype) -> Tensor:
    """Every one of the 65,536 (or 256) bit patterns of a dtype."""
    if dtype.itemsize == 1:
        return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def parameter(grad: Tensor | None, shape: tuple[int, ...] | None = None) -> torch.nn.Parameter:
    """A parameter with this gradient."""
    if grad is None:
        return torch.nn.Parameter(torch.zeros(shape or (2,)))
    like = torch.zeros(grad.shape, dtype=grad.dtype, device=grad.device)
    p = torch.nn.Parameter(like, requires_grad=grad.is_floating_point() or grad.is_complex())
    p.grad = grad
    return p


def parameters(grads: Iterable[Tensor]) -> list[torch.nn.Parameter]:
    return [parameter(grad) for grad in grads]
