"""The launchers: derive, then launch. Nothing here waits for the device."""

from __future__ import annotations

import functools
import struct
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime import driver

from . import write
from .blocks import NVIDIA_OPTIONS, OPTIONS
from .read import finish_kernel, join_kernel, read_kernel
from .table import DeviceCache, Work, to_device, works_of
from .tally import tally_kernel

LEAST = 1 << 13  # float64 numbers of a workspace: the chunks of 170 MB of float32

_FLOAT64, _INT64 = struct.Struct("<d"), struct.Struct("<q")

_cache = DeviceCache()
_compiled: dict[Any, Any] = {}
_partials: dict[tuple[torch.device, int], Tensor] = {}
_done: dict[tuple[torch.device, int], Tensor] = {}


@functools.lru_cache(1024)
def bits_of(number: float) -> int:
    """A float64 as an integer, -0.0 as 0.0: Triton would pass it on as float32. The same few come again and again."""
    return int(_INT64.unpack(_FLOAT64.pack(number + 0.0))[0])


class Where:
    """The device and stream that a call works on, and whether a graph is being captured there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream, self.capturing = 0, False
        self.interpreted = device.type == "cpu"
        if not self.interpreted:
            self.stream = driver.active.get_current_stream(device.index)
            self.capturing = torch.cuda.is_current_stream_capturing()

    def works(self, facts: bytes, counts: list[int] | None = None, weights: bytes | None = None) -> list[Work]:
        """The table of these tensors, on the device; ``facts`` as table.works_of takes them."""

        def make() -> list[Work]:
            of_weights = None if weights is None else np.frombuffer(weights, np.int64).reshape(-1, 3)
            works = works_of(np.frombuffer(facts, np.int64).reshape(-1, 3), counts, of_weights)
            return [
                replace(w, words=to_device(w.words, self.device), owners=to_device(w.owners, self.device))
                for w in works
            ]

        key = facts, weights, None if counts is None else tuple(counts), self.device
        found: list[Work] = _cache.get(self.stream, key, make, self.capturing)
        return found

    def offsets(self, counts: list[int]) -> Tensor:
        """int64 ``[n + 1]``: where each of so many things begins."""

        def make() -> Tensor:
            return to_device(np.cumsum([0, *counts], dtype=np.int64), self.device)

        found: Tensor = _cache.get(self.stream, (tuple(counts), self.device), make, self.capturing)
        return found

    def workspace(self, kept: dict[tuple[torch.device, int], Tensor], size: int, dtype: torch.dtype) -> Tensor:
        """Memory for one read. One for each device and stream; counters are 0, and each read leaves them so. A graph
        gets its own, from the graph's pool: it may run at the same time as another that was captured on this stream."""
        if self.capturing:
            return torch.zeros(size, dtype=dtype, device=self.device)
        key = (self.device, self.stream)
        found = kept.get(key)
        if found is None or found.numel() < size:
            found = kept[key] = torch.zeros(max(2 * size, LEAST), dtype=dtype, device=self.device)
        return found

    def launch(
        self, kernel: Any, programs: int, *arguments: Any, varying: tuple[Tensor | None, ...] = (), **constants: Any
    ) -> None:
        """As ``kernel[(programs,)](*arguments, **constants)``; from the second time on without Triton's dispatcher,
        which looks at each argument's type and at each constant again: here they follow from the constants and from
        those arguments that may be None or of another dtype, which ``varying`` lists."""
        kinds = [None if argument is None else argument.dtype for argument in varying]
        key = (self.device, id(kernel), *kinds, *constants.values())  # its own hash would be that of its source
        known = _compiled.get(key)
        # Interpreted, numpy would warn of what the kernels do on purpose.
        here = not self.interpreted and torch.cuda.current_device() == self.device.index
        with (
            np.errstate(all="ignore") if self.interpreted else nullcontext() if here else torch.cuda.device(self.device)
        ):
            if known is None:
                _compiled[key] = kernel[(programs,)](
                    *arguments, **constants, **(OPTIONS if torch.version.hip else NVIDIA_OPTIONS)
                )
            else:
                known[(programs, 1, 1)](*arguments, *constants.values(), stream=self.stream)


def read(
    facts: bytes,
    counts: list[int] | None,
    p: float,
    extras: bool,
    rows: Tensor,
    divisor: Tensor | None = None,
    totals: Tensor | None = None,
    heads: Tensor | None = None,
    max_norm: float = 0.0,
    eps: float = 0.0,
    weights: bytes | None = None,
    strengths: Tensor | None = None,
    weight_rows: Tensor | None = None,
) -> None:
    """Fills ``rows``, float64 ``[3 or 6, units]``; with ``totals`` the totals too, in the same launch.

    Args:
        facts: int64 (address, elements, dtype) of each tensor.
        counts: units of each tensor; None for one each.
        divisor: one float32 or float64 on the device, by which norms and magnitudes are divided.
        weights: ``facts`` of the weights, of other sizes where there is none: adds a penalty to the gradients first.
        strengths: in, float64 ``[2, n]``, of that penalty.
        weight_rows: out, float64 ``[3, n]``, of the weights.
    """
    where = Where(rows.device)
    fields, count = rows.shape
    works = where.works(facts, counts, weights)
    joined_here, heads_here = (totals, heads) if len(works) == 1 and works[0].units == 1 else (None, None)
    for work in works:
        partials, own_weights = rows, weight_rows
        done = where.workspace(_done, count + 1, torch.int32)
        if work.cut:
            with_weights = fields + (3 if strengths is not None else 0)
            partials = where.workspace(_partials, work.chunks * with_weights, torch.float64)
            own_weights = partials[work.chunks * fields :] if strengths is not None else None
        where.launch(
            read_kernel,
            work.chunks,
            work.words,
            work.owners,
            rows,
            count,
            partials,
            work.chunks,
            done,
            count,
            bits_of(p),
            divisor,
            joined_here,
            heads_here,
            bits_of(max_norm),
            bits_of(eps),
            strengths,
            weight_rows,
            own_weights,
            varying=(divisor, joined_here, heads_here, strengths),
            PRESENT=work.present,
            ALL=extras or p != 2.0,
            EXTRAS=extras,
            UNITS=work.units,
        )
    if totals is not None and joined_here is None:
        finish(rows, p, max_norm, eps, totals, heads)


def finish(rows: Tensor, p: float, max_norm: float, eps: float, totals: Tensor, heads: Tensor | None) -> None:
    """Joins ``rows``, float64 ``[>= 3, n]``, into ``totals``, float64 ``[4]``, and ``heads``, float32 ``[2]``."""
    arguments = rows, rows.shape[1], bits_of(p), totals, heads, bits_of(max_norm), bits_of(eps)
    Where(rows.device).launch(finish_kernel, 1, *arguments, varying=(heads,))


def join(unit_rows: Tensor, counts: list[int], p: float, rows: Tensor) -> None:
    """Joins ``unit_rows``, float64 ``[3, sum of counts]``, into ``rows``, ``[3, len(counts)]``."""
    if not counts:
        return
    where = Where(rows.device)
    first_units = where.offsets(counts)
    where.launch(join_kernel, len(counts), unit_rows, unit_rows.shape[1], first_units, rows, len(counts), bits_of(p))


def tally(before: Tensor, factor: float | Tensor, skip: float | Tensor, found: float | Tensor, after: Tensor) -> None:
    """Counts a step, see tally_kernel; numbers, or one float32 or float64 on the device."""
    told = [(value, 0) if isinstance(value, Tensor) else (None, bits_of(value)) for value in (factor, skip, found)]
    at = tuple(tensor for tensor, _ in told)
    Where(before.device).launch(tally_kernel, 1, before, *(part for pair in told for part in pair), after, varying=at)


def _write(
    facts: bytes,
    device: torch.device,
    change: Any,
    skip: Tensor | None = None,
    factors: Tensor | None = None,
    counts: list[int] | None = None,
    bound: float = 0.0,
) -> None:
    where = Where(device)
    for work in where.works(facts, counts):
        arguments = work.words, work.owners, factors, bits_of(bound), skip
        constants = {"PRESENT": work.present, "CHANGE": change, "UNITS": work.units}
        where.launch(write.write_kernel, work.chunks, *arguments, varying=(factors, skip), **constants)


def scale(facts: bytes, device: torch.device, factor: Tensor, skip: Tensor | None = None) -> None:
    """By one number on the device, float32 or float64; returns at once where that is 1, or where ``skip``, one float32
    there, is not 0. So do the others."""
    _write(facts, device, write.SCALE.value, skip, factor)


def scale_each(
    facts: bytes, device: torch.device, factors: Tensor, counts: list[int] | None = None, skip: Tensor | None = None
) -> None:
    """By one float64 for each unit; one whose factor is 1 is not written."""
    _write(facts, device, write.SCALE_EACH.value, skip, factors, counts)


def clamp(facts: bytes, device: torch.device, bound: float, skip: Tensor | None = None) -> None:
    _write(facts, device, write.CLAMP.value, skip, bound=bound)


def zero_nonfinite(facts: bytes, device: torch.device) -> None:
    _write(facts, device, write.ZERO_NONFINITE.value)
