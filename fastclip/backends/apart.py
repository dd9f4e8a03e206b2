"""What kernels can't take as it lies, and the reference serves apart.

Units that aren't each in one piece of memory, and weights that lie otherwise than their gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastclip.backends import reference, tables
from fastclip.types import Request, known_to_host

Counts = list[int]  # in how many pieces each tensor of a table is cut; 0: its units are no pieces


def counts_of(table: Any, dims: list[tuple[int, ...]]) -> Counts:
    """For each tensor in how many equal pieces of memory its units lie; 0 if they don't lie so."""
    masks = {over: sum(1 << d for d in over) for over in set(dims)}
    return tables.pieces(table, [masks[over] for over in dims])


def read_penalised_(
    table: Any, weights: list[Tensor], strengths: Tensor, weight_rows: Tensor, read: Callable[[Any], None]
) -> None:
    """``read`` takes a table of the weights, in which those that are served apart have no elements."""
    partners = tables.partners(table, weights)
    for i in partners.refused:
        reference.penalise_(table.grads[i].detach(), weights[i], strengths[:, i])
    read(partners)
    for i in partners.refused:
        weight_rows[:, i] = reference.weight_stats(weights[i])


def read_units(
    table: Any,
    dims: list[tuple[int, ...]],
    request: Request,
    unit_rows: Tensor,
    read: Callable[[Counts, Tensor], None],
) -> None:
    """``read`` fills ``[ALWAYS_FIELDS, sum of counts]`` with the rows of the pieces."""
    counts = counts_of(table, dims)
    if all(counts):
        read(counts, unit_rows)
        return
    own = unit_rows.new_empty((len(unit_rows), sum(counts)))
    read(counts, own)
    at = from_own = 0
    for grad, reduced, count in zip(table.grads, dims, counts, strict=True):
        found = own[:, from_own : from_own + count] if count else reference.unit_stats(grad.detach(), reduced, request)
        unit_rows[:, at : at + found.shape[1]] = found
        at, from_own = at + found.shape[1], from_own + count


def scale_units_(
    table: Any,
    dims: list[tuple[int, ...]],
    factors: Tensor,
    skip: Tensor | None,
    scale: Callable[[Counts, Tensor], None],
) -> None:
    """``scale`` multiplies the pieces, by one factor each, and sees to the version counters of their tensors, and to
    ``skip``."""
    counts = counts_of(table, dims)
    if all(counts):
        scale(counts, factors)
        return
    own, at = [], 0
    for grad, reduced, count in zip(table.grads, dims, counts, strict=True):
        units = count or reference.count_units(grad, reduced)
        each = factors[at : at + units]
        at += units
        if count:
            own.append(each)
        elif not (known_to_host(each) and bool((each == 1.0).all())):
            reference.scale_units_of(grad.detach(), reduced, each, skip)
    if own:
        scale(counts, torch.cat(own))
