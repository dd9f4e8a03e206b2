"""The words that every floor shares: requests, field orders, the backend contract, errors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

# Rows of a backend's per-tensor result, in float64; the same order stands in csrc/cpu/engine.h.
FIELDS = ("norm", "nans", "infs", "max_abs", "sum_abs", "zeros")
NORM, NANS, INFS, MAX_ABS, SUM_ABS, ZEROS = range(len(FIELDS))
ALWAYS_FIELDS = MAX_ABS  # norm, nans and infs are always filled, the others on request

# Rows of what is told of the weights, in float64; the same order stands in csrc/cpu/engine.h.
WEIGHT_FIELDS = ("norm", "max_abs", "sum_abs")
WEIGHT_NORM, WEIGHT_MAX_ABS, WEIGHT_SUM_ABS = range(len(WEIGHT_FIELDS))

TOTALS = ("total_norm", "clip_coef", "nans", "infs")
TOTAL_NORM, CLIP_COEF, TOTAL_NANS, TOTAL_INFS = range(len(TOTALS))

# What callers get of them where the host doesn't look at them, in float32: total_norm (its largest number for what lies
# past it) and 1.0 if a gradient is not finite.
HEADS = ("total_norm", "found_inf")
HEAD_NORM, HEAD_INF = range(len(HEADS))

# What is counted of an optimizer's steps.
COUNTS = ("steps", "clipped", "skipped", "skipped in a row, up to now", "whose gradients held NaN or Inf")
STEPS, CLIPPED, SKIPPED, IN_A_ROW, BAD = range(len(COUNTS))

Strengths: TypeAlias = list[tuple[float, float]]  # of a weight penalty: (of the sign, of the weight) per gradient

NONFINITE = ("propagate", "skip", "zero", "raise")


class Request(NamedTuple):
    """What one read of the gradients shall yield.

    Args:
        norm_type: p of the p-norm; any number, ``inf`` and ``-inf`` included.
        max_norm: bound from which ``clip_coef`` follows; ``inf`` asks for statistics alone.
        eps: added to the total norm in the denominator of ``clip_coef``.
        extras: also fill ``max_abs``, ``sum_abs`` and ``zeros``.
        units: also give the norm of each unit (row, filter) of each gradient and of its weight; see
            :func:`fastclip.units.unit_dims`. None for no units.
        weights: also give norm, largest magnitude and sum of magnitudes of each gradient's weight. A penalty brings
            them by itself.
    """

    norm_type: float = 2.0
    max_norm: float = math.inf
    eps: float = 1e-6
    extras: bool = False
    units: str | tuple[int, ...] | None = None
    weights: bool = False

    @property
    def fields(self) -> int:
        return len(FIELDS) if self.extras else ALWAYS_FIELDS


class Table(Protocol):
    """A backend's view of the gradients it will work on in one call; it keeps them alive."""

    @property
    def grads(self) -> list[Tensor]:
        """The served gradients, dense, in the order of the rows' columns."""

    @property
    def positions(self) -> list[int]:
        """Where they stood in the list that was given; empty if all are served."""

    @property
    def refused(self) -> dict[int, str]:
        """Position -> why this backend can't serve it; another backend may."""

    @property
    def readonly(self) -> dict[int, str]:
        """Position -> why it can be read but not written."""

    @property
    def wide(self) -> bool:
        """Whether one of them is float64 or complex128."""

    @property
    def size_bytes(self) -> int:
        """Of all of them together."""

    def __len__(self) -> int: ...


class Backend(Protocol):
    """The contract of all backends: a module with these names and nothing more.

    The caller allocates what comes back; a workspace a backend may keep. It never synchronises with the host, works on
    the current stream, and accepts an empty table.
    """

    @property
    def name(self) -> str: ...

    @property
    def device_type(self) -> int | None:
        """The type of device it serves, in DLPack's numbers; None for any."""

    @property
    def returns_early(self) -> bool:
        """Whether ``scale_`` writes nothing where the factor is 1 and only the device knows it."""

    def unavailable(self) -> str:
        """Why this backend can't run here at all; "" if it can."""

    def table_of(self, grads: list[Tensor], native: Any = None) -> Any:
        """A :class:`Table` over ``grads``. Raises nothing: what it can't serve is in ``refused``.

        ``native`` is the native core's table over the same gradients, where there is one.
        """

    def read(
        self,
        table: Any,
        request: Request,
        rows: Tensor,
        grad_scale: float | Tensor | None = None,
        totals: Tensor | None = None,
        heads: Tensor | None = None,
    ) -> None:
        """The one read. Fills ``rows``, ``[request.fields, len(table)]``, every element of it. But for p = 0 a norm
        is NaN where a NaN was counted and, for p > 0, else Inf where an Inf was: whoever joins rows may rely on it.

        With ``grad_scale``, a number or one element, norms and magnitudes are divided by it. With ``totals`` does what
        ``finish`` does, too.
        """

    def read_penalised_(
        self,
        table: Any,
        weights: list[Tensor],
        strengths: Tensor,
        request: Request,
        rows: Tensor,
        weight_rows: Tensor,
    ) -> None:
        """Adds a weight penalty to each gradient in place and reads what that gives, in one pass.

        Gradient i becomes ``(g + strengths[0, i] * sign(w)) + strengths[1, i] * w``, w being ``weights[i]``: in
        float32 or wider (float64 for float64 gradients), rounded once to g's dtype. ``sign(0)`` is 0, that of a
        complex number ``w / |w|``; NaN and Inf follow from the formula. Where both strengths are 0 the gradient is not
        written, and where only a device knows that, it keeps its values.

        Then fills ``rows`` as ``read`` of the written gradients would, bit by bit, and ``weight_rows``,
        ``[len(WEIGHT_FIELDS), len(table)]``, every element: the 2-norm, right at every magnitude, the largest
        magnitude and the sum of magnitudes of each weight, NaN if it holds one.

        Args:
            weights: of the shapes of the gradients and on their devices, in any memory order and any dtype; they may
                require grad and be subclasses. A sparse gradient's values are not paired with them: it is only read.
            strengths: ``[2, len(table)]`` float64 (the widest of the device), contiguous, on the gradients' device.
        """

    def read_units(self, table: Any, dims: list[tuple[int, ...]], request: Request, unit_rows: Tensor) -> None:
        """The one read, unit by unit: a unit of tensor i are the elements that differ only in ``dims[i]``.

        Fills ``unit_rows``, ``[ALWAYS_FIELDS, u]``, with the units of each tensor in row-major order of the
        dimensions that are left.
        """

    def join_units(self, unit_rows: Tensor, counts: list[int], request: Request, rows: Tensor) -> None:
        """Joins ``unit_rows`` into ``rows``, ``[ALWAYS_FIELDS, n]``: tensor i has ``counts[i]`` units."""

    def finish(self, rows: Tensor, request: Request, totals: Tensor, heads: Tensor | None = None) -> None:
        """Joins ``rows`` (of any number of tensors, tables or ranks) into ``totals``, ``[len(TOTALS)]`` in the dtype of
        ``rows``, and ``heads``, ``[len(HEADS)]`` float32."""

    def scale_(self, table: Any, factor: float | Tensor, skip: Tensor | None = None) -> None:
        """Multiplies in place by a number, a 0-d tensor, or one factor per tensor (1-d float64).

        A tensor whose factor is 1 is not written, where the host or the kernel can know it. With ``skip``, 0-d float32
        on the table's device, which the host need not know, every gradient keeps its values unless it is 0; so for all
        that follow.
        """

    def scale_units_(
        self, table: Any, dims: list[tuple[int, ...]], factors: Tensor, skip: Tensor | None = None
    ) -> None:
        """Multiplies each unit in place by its factor, ``[u]``; one whose factor is 1 need not be written."""

    def clamp_(self, table: Any, bound: float, skip: Tensor | None = None) -> None:
        """Clamps every real element into [-bound, bound]; NaN stays NaN."""

    def zero_nonfinite_(self, table: Any) -> None:
        """Replaces every NaN and Inf element by 0."""

    def tally(
        self, before: Tensor, factor: float | Tensor, skip: float | Tensor, found: float | Tensor, after: Tensor
    ) -> None:
        """Counts one step: fills ``after`` from ``before``, ``[len(COUNTS)]`` each, float64 (the widest of the device).

        Args:
            factor: a number, or one element on any device: the step is clipped unless it is 1.
            skip: a number, or one element on any device: the step is skipped, and not clipped, unless it is 0.
            found: likewise: its gradients held NaN or Inf unless it is 0.
        """


class FastclipError(Exception):
    """Base of every error that is fastclip's own."""


class UnsupportedGradientError(FastclipError, TypeError):
    """A gradient that no backend, or not the forced one, can serve. Nothing was written."""


class BackendUnavailableError(FastclipError, RuntimeError):
    """``FASTCLIP_BACKEND`` or ``FASTCLIP_CPU_CAPABILITY`` names what is unknown or can't run here."""


class NonFiniteGradientError(FastclipError, RuntimeError):
    """A gradient holds NaN or Inf and the caller asked to hear of it. Nothing was written, but where only a weight
    penalty, from weights that aren't finite themselves, brought them in.

    Attributes:
        tensor: name or position of the first bad gradient; "" where somebody else raised it anew from its message.
        index: position of its first bad element, one number per dimension.
        value: that element, ``nan`` or ``±inf``.
    """

    def __init__(self, message: str, tensor: str = "", index: tuple[int, ...] = (), value: complex = math.nan):
        super().__init__(message)
        self.tensor, self.index, self.value = tensor, index, value


class RankError(FastclipError, RuntimeError):
    """The ranks of a job can't join what they have read: there is no process group between them, they were given
    different lists, or one of them has failed. Nothing was written, on any of them."""


class SkipLimitError(FastclipError, RuntimeError):
    """So many steps in a row were skipped that this is no training any more. The last one was skipped too."""


def map_magnitudes(rows: Tensor, request: Request, mapped: Callable[[Tensor], Tensor]) -> None:
    """Replaces norms and magnitudes in ``rows``; counts have no scale."""
    for field in (NORM, MAX_ABS, SUM_ABS):
        if field < len(rows) and not (field == NORM and request.norm_type == 0):
            rows[field] = mapped(rows[field])


def known_to_host(tensor: Tensor) -> bool:
    """Whether looking at the value waits for nothing: plain CPU memory, neither meta nor fake."""
    return type(tensor) is Tensor and tensor.is_cpu


def cuda_in_use() -> bool:
    """Whether torch has initialised CUDA; asking for a GPU would do so, after which a forked child can't use it."""
    initialised: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialised


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return cuda_in_use() and torch.cuda.is_current_stream_capturing()


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Itself, or a copy there. The host waits only for what comes to it: the memory of such a copy would be filled
    later."""
    return tensor.to(device, dtype, non_blocking=device.type != "cpu")


def on_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor there, without waiting for the device, as ``torch.tensor`` would."""
    return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)


@functools.cache
def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest real dtype of a device: MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
