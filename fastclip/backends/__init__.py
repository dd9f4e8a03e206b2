"""The choice of backend: for each gradient the first in ``BACKENDS`` that serves it.

``FASTCLIP_BACKEND=name`` forces one; a forced one that can't run raises and says why.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip._native import C, why_missing
from fastclip.backends import cpu, cuda, reference, triton
from fastclip.tensors import Grads, TensorOrTensors, grads_or_parameters
from fastclip.types import (
    Backend,
    BackendUnavailableError,
    Request,
    UnsupportedGradientError,
    cuda_in_use,
    moved,
    wide_dtype,
)

ON_GPU: tuple[Backend, ...] = (cuda, triton)
EMULATED = tuple(backend for backend, on_cpu in ((cuda, cuda.EMULATED), (triton, triton.INTERPRETED)) if on_cpu)

# Best first; the reference serves what the others don't. Kernels of a GPU that run on the CPU are the last choice.
BACKENDS: tuple[Backend, ...] = (*(b for b in (*ON_GPU, cpu, reference) if b not in EMULATED), *EMULATED)

forced: str | None = os.environ.get("FASTCLIP_BACKEND") or None

if why_missing and forced != reference.name:
    warnings.warn(f"fastclip runs on its slower reference backend: {why_missing}", RuntimeWarning, stacklevel=3)

if (
    C is not None
    and (_capability := os.environ.get("FASTCLIP_CPU_CAPABILITY"))
    and not C.cpu_use_capability(_capability)
):
    raise BackendUnavailableError(
        f"FASTCLIP_CPU_CAPABILITY={_capability}: this machine has {', '.join(C.cpu_capabilities())}"
    )


class Part(NamedTuple):
    """The share of a list that one backend works on; ``positions`` None means all of it."""

    backend: Backend
    table: Any
    positions: list[int] | None

    def to_list(self, index: int) -> int:
        """Position in the whole list of the table's tensor ``index``."""
        return index if self.positions is None else self.positions[index]

    @property
    def runs(self) -> list[tuple[int, int, int]]:
        """Where tensors stand side by side in the whole list, too: (first there, first in the table, how many)."""
        if self.positions is None:
            return [(0, 0, len(self.table))]
        ends = [i for i, at in enumerate(self.positions) if i == 0 or at != self.positions[i - 1] + 1]
        return [(self.positions[a], a, b - a) for a, b in pairwise([*ends, len(self.positions)])]

    def own(self, of_list: Tensor) -> Tensor:
        """Of the whole list's columns those of its tensors; by slices, as a list of places would be waited for."""
        if self.positions is None:
            return of_list
        return torch.cat([of_list.narrow(-1, first, count) for first, _, count in self.runs], dim=-1)

    def factors(self, given: Tensor) -> Tensor:
        """``[k]`` of any dtype, as its backend takes them."""
        if not len(self.table):
            return given
        device = self.table.grads[0].device
        return moved(given, device, wide_dtype(device)).contiguous()

    def flag(self, given: Tensor | None) -> Tensor | None:
        """0-d of any dtype, as its backend takes it."""
        if given is None or not len(self.table):
            return given
        return moved(given, self.table.grads[0].device, torch.float32)


@functools.cache
def _runnable(with_cuda: bool, device_type: int | None) -> tuple[Backend, ...]:
    found = [b for b in BACKENDS if (with_cuda or b not in ON_GPU or b in EMULATED) and not b.unavailable()]
    return tuple(sorted(found, key=lambda backend: device_type not in (None, backend.device_type)))


def candidates(device_type: int | None = None) -> tuple[Backend, ...]:
    """The backends that can run here, best first, and before all others those for this type of device; exactly the
    forced one where one is forced."""
    if forced is None:
        return _runnable(cuda_in_use(), device_type)
    for backend in BACKENDS:
        if backend.name == forced:
            if reason := backend.unavailable():
                raise BackendUnavailableError(f"FASTCLIP_BACKEND={forced} can't run here: {reason}")
            return (backend,)
    known = ", ".join(backend.name for backend in BACKENDS)
    raise BackendUnavailableError(f"FASTCLIP_BACKEND={forced}: no such backend; known are {known}")


class Plan(NamedTuple):
    """Who works on which of the gradients; every write goes through here, after its checks."""

    grads: Grads
    parts: list[Part]

    @property
    def wide(self) -> bool:
        """Whether a gradient is float64 or complex128."""
        wide: bool = self.parts[0].table.wide
        return wide or any(part.table.wide for part in self.parts[1:])

    @property
    def size_bytes(self) -> int:
        """Of all gradients together."""
        return sum(part.table.size_bytes for part in self.parts)

    @property
    def returns_early(self) -> bool:
        """Whether scaling by 1 costs nothing, also where only a device knows that it is 1."""
        return all(part.backend.returns_early for part in self.parts)

    @property
    def finish(self) -> Callable[[Tensor, Request, Tensor, Tensor | None], None]:
        """Of the one backend where there is one."""
        return self.parts[0].backend.finish if len(self.parts) == 1 else reference.finish

    @property
    def tally(self) -> Callable[[Tensor, float | Tensor, float | Tensor, float | Tensor, Tensor], None]:
        """Of the one backend where there is one."""
        return self.parts[0].backend.tally if len(self.parts) == 1 else reference.tally

    def check_writable(self) -> None:
        """Raises ``UnsupportedGradientError`` if a gradient can be read but not written."""
        for part in self.parts:
            for place, why in part.table.readonly.items():
                column = part.table.positions.index(place) if part.table.refused else place
                raise UnsupportedGradientError(
                    f"the gradient of {self.grads.describe(part.to_list(column))} can't be written: {why}; "
                    "nothing was written"
                )

    def read_penalised_(
        self,
        weights: list[Tensor],
        strengths: Tensor,
        request: Request,
        rows: list[Tensor],
        weight_rows: list[Tensor],
    ) -> None:
        """Adds the penalty to every gradient in place and reads what that gives; ``rows`` part by part."""
        for part, own_rows, own_weight_rows in zip(self.parts, rows, weight_rows, strict=True):
            own = weights if part.positions is None else [weights[i] for i in part.positions]
            columns = moved(part.own(strengths), own_rows.device, own_rows.dtype).contiguous()
            part.backend.read_penalised_(part.table, own, columns, request, own_rows, own_weight_rows)

    def scale_(self, factor: float | Tensor, skip: Tensor | None = None) -> None:
        """Multiplies every gradient in place by a number, a 0-d tensor, or one factor per tensor; here and below only
        if ``skip``, of one element on any device, is 0."""
        for part in self.parts:
            own = factor
            if isinstance(factor, Tensor) and factor.dim() == 1:
                own = part.factors(part.own(factor))
            part.backend.scale_(part.table, own, part.flag(skip))

    def scale_units_(
        self, dims: list[tuple[int, ...]], counts: list[int], factors: Tensor, skip: Tensor | None = None
    ) -> None:
        """Multiplies each unit in place; ``factors`` in the order of the gradients, ``counts[i]`` for each."""
        for part in self.parts:
            if part.positions is None:
                part.backend.scale_units_(part.table, dims, part.factors(factors), part.flag(skip))
                continue
            each = torch.split(factors, counts)
            own = part.factors(torch.cat([each[i] for i in part.positions]))
            part.backend.scale_units_(part.table, [dims[i] for i in part.positions], own, part.flag(skip))

    def clamp_(self, bound: float, skip: Tensor | None = None) -> None:
        for part in self.parts:
            part.backend.clamp_(part.table, bound, part.flag(skip))

    def zero_nonfinite_(self) -> None:
        for part in self.parts:
            part.backend.zero_nonfinite_(part.table)


def plan(grads: Grads) -> Plan:
    """Shares ``grads`` out among the backends.

    Raises:
        UnsupportedGradientError: no backend serves one of them; names it, and each backend's reason.
    """
    parts: list[Part] = []
    rest, positions, native = grads.tensors, None, grads.native
    reasons: dict[int, list[str]] = {}
    able = candidates(native.device_type if native is not None else None)
    for backend in able if rest else (reference,):  # nothing lies on no device
        served = True
        while served:  # a table holds the tensors of one device: there may be more of them
            table = backend.table_of(rest, native)
            refused = table.refused
            if not refused:
                parts.append(Part(backend, table, positions))
                return Plan(grads, parts)
            whole = positions if positions is not None else list(range(len(rest)))
            served = len(table) > 0
            if served:
                parts.append(Part(backend, table, [whole[i] for i in table.positions]))
            positions = [whole[i] for i in refused]
            rest, native = [rest[i] for i in refused], None
        for i, reason in zip(positions or [], refused.values(), strict=True):
            reasons.setdefault(i, []).append(f"{backend.name}: {reason}")
    worst = min(reasons, key=lambda i: (i not in (positions or []), i))
    raise UnsupportedGradientError(
        f"no backend can serve the gradient of {grads.describe(worst)}; " + "; ".join(reasons[worst])
    )


def explain(params: torch.nn.Module | TensorOrTensors | None = None) -> str:
    """Says for each backend whether it runs here and, given parameters or gradients, what it would serve.

    Args:
        params: a module, parameters, or gradients; None asks about the machine alone.

    Returns:
        One line per backend, best first; before them why ``FASTCLIP_BACKEND`` can't be obeyed, if so.
    """
    grads = grads_or_parameters(params) if params is not None else Grads([], None)
    lines = []
    try:
        candidates()
    except BackendUnavailableError as error:
        lines.append(str(error))
    for backend in BACKENDS:
        reason = backend.unavailable()
        if reason:
            lines.append(f"{backend.name}: not available: {reason}")
            continue
        line = f"{backend.name}: available"
        if forced is not None:
            line += ", forced by FASTCLIP_BACKEND" if backend.name == forced else f", but FASTCLIP_BACKEND={forced}"
        if grads.tensors:
            table = backend.table_of(grads.tensors)
            line += f"; serves {len(table)} of {len(grads.tensors)} gradients"
            counts: dict[str, int] = {}
            for why in table.refused.values():
                counts[why] = counts.get(why, 0) + 1
            line += "".join(f"; {count} not: {why}" for why, count in counts.items())
        lines.append(line)
    return "\n".join(lines)
