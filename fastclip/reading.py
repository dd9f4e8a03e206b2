"""The one read of the gradients and what it says of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastclip.backends import Part, Plan, reference
from fastclip.backends import plan as plan_of
from fastclip.backends.reference import FLOAT32_MAX, narrowed
from fastclip.tensors import first_nonfinite, grads_among, local
from fastclip.types import (
    ALWAYS_FIELDS,
    CLIP_COEF,
    HEAD_INF,
    HEAD_NORM,
    HEADS,
    INFS,
    MAX_ABS,
    NANS,
    NORM,
    SUM_ABS,
    TOTAL_INFS,
    TOTAL_NANS,
    TOTAL_NORM,
    TOTALS,
    WEIGHT_FIELDS,
    WEIGHT_NORM,
    WEIGHT_SUM_ABS,
    NonFiniteGradientError,
    RankError,
    Request,
    Strengths,
    is_capturing,
    known_to_host,
    map_magnitudes,
    moved,
    on_device,
    wide_dtype,
)
from fastclip.units import unit_dims


@dataclass(frozen=True, slots=True)
class Units:
    """What one read says of the units of the gradients: those of the first one, then of the second, ...

    Attributes:
        dims: for each gradient the dimensions over which a unit extends.
        counts: how many units each has.
        rows: ``[ALWAYS_FIELDS, u]``: norm, NaN and Inf of each unit.
        weight_norms: ``[u]``, norm of the same unit of the parameter.
    """

    dims: list[tuple[int, ...]]
    counts: list[int]
    rows: Tensor
    weight_norms: Tensor

    @property
    def norms(self) -> Tensor:
        return self.rows[NORM]


PLACES = 1 << 20  # a place in a list and a rank are one number: place * PLACES + rank, exact in float64


@dataclass(frozen=True, slots=True)
class Peers:
    """What other ranks had to do with a reading.

    Attributes:
        rank: this one's, among all.
        alike: the ranks that were given the same list.
        rows: ``[ALWAYS_FIELDS, 1]``: of all ranks together, what the totals came from.
        worst: 0-d: the gradient that looks worst on any rank, ``place * PLACES + rank``; -1 if no rank has one.
        tensors_worst: ``[n]``: the same of each gradient; None where the rows are of this rank's shares alone.
        penalty: 0-d: what a penalty adds to the loss on all ranks; None without one.
        beyond: ranks with other lists count in the totals.
        joint: joins ``[n]`` norms of whole tensors, of which other ranks may have others, to that of all; every rank
            has to call it. None where the rows are of this rank's shares alone.
    """

    rank: int
    alike: frozenset[int]
    rows: Tensor
    worst: Tensor
    tensors_worst: Tensor | None
    penalty: Tensor | None
    beyond: bool
    joint: Callable[[Tensor], Tensor] | None

    def worst_of_all(self, name_at: Callable[[int], str]) -> tuple[str, int]:
        """Name of the gradient that looks worst, and the rank where it does. Synchronises."""
        place, rank = divmod(int(self.worst), PLACES)
        return name_at(place) if rank in self.alike else f"gradient {place} of rank {rank}'s list", rank


class Reading(NamedTuple):
    """One read of a list of gradients.

    Attributes:
        plan: what was read, and by whom.
        request: what was asked for.
        rows: ``[request.fields, n]``, per tensor, on the first gradient's device in its widest dtype.
        totals: ``[len(TOTALS)]``, of all tensors, same device and dtype.
        on_host: ``totals`` as numbers, where looking at them waits for nothing (plain CPU memory); else None.
        heads: ``[len(HEADS)]`` float32, where the host doesn't know ``totals``; else None.
        units: the same of each unit, if the request asks for units.
        weight_rows: ``[len(WEIGHT_FIELDS), n]``, of the gradients' weights, same device and dtype, if the request asks
            for them or a penalty was added; else None.
        strengths: of the penalty that was added to the gradients before they were read, unscaled; None without one.
        peers: what other ranks added to ``totals``, and to ``rows`` where whole tensors were asked for; None if nothing
            lies on other ranks.
    """

    plan: Plan
    request: Request
    rows: Tensor
    totals: Tensor
    on_host: list[float] | None
    heads: Tensor | None
    units: Units | None = None
    weight_rows: Tensor | None = None
    strengths: Strengths | None = None
    peers: Peers | None = None

    @property
    def columns(self) -> Tensor | None:
        """``[n]`` int64: the place of each gradient's parameter among all that were listed; None if each has one."""
        if self.plan.grads.positions is None and self.parameters == self.rows.shape[1]:
            return None
        return on_device(self.plan.grads.columns, torch.int64, self.rows.device)

    @property
    def parameters(self) -> int:
        """How many parameters were listed, with and without a gradient."""
        listed = self.plan.grads.parameters
        return len(self.plan.grads.tensors) if listed is None else len(listed)

    @property
    def sizes(self) -> list[int]:
        """Elements in each gradient."""
        return self.plan.grads.sizes

    @property
    def penalties(self) -> Tensor | None:
        """``[n]``: what the penalty of each gradient adds to the loss; None without one."""
        if self.weight_rows is None or self.strengths is None:
            return None
        return penalties(self.weight_rows, self.strengths)

    def after(self, clip_coef: float | Tensor, unit_coefs: Tensor | None, request: Request) -> Reading:
        """What another read would give after a multiplication, for a request of the same norm type."""
        if self.peers is not None:
            return self._after_on_all_ranks(clip_coef, unit_coefs, request)
        rows, units = self.rows.clone(), self.units
        if unit_coefs is not None and units is not None:
            unit_rows = units.rows.clone()
            unit_rows[NORM] *= unit_coefs
            units = Units(units.dims, units.counts, unit_rows, units.weight_norms)
            reference.join_units(unit_rows, units.counts, request, rows)
            rows[MAX_ABS : SUM_ABS + 1] = math.nan  # only another read would tell
        elif isinstance(clip_coef, Tensor) or clip_coef != 1.0:
            map_magnitudes(rows, request, lambda magnitudes: magnitudes * clip_coef)
        return _finished(self.plan, request, rows, units, self.weight_rows, self.strengths)

    def _after_on_all_ranks(self, clip_coef: float | Tensor, unit_coefs: Tensor | None, request: Request) -> Reading:
        assert self.peers is not None
        rows, of_all = self.rows.clone(), self.peers.rows.clone()
        of_each = isinstance(clip_coef, Tensor) and clip_coef.dim() > 0
        joint = self.peers.joint
        if unit_coefs is not None or (of_each and (self.peers.beyond or joint is None)):
            raise RankError(
                "Chain: what is left after clipping units, or single tensors while other ranks hold others, is known "
                "only after another read. Put a rule that looks at the total norm first. Nothing was written"
            )
        for of in (rows, of_all):
            if not of_each or of is rows:
                map_magnitudes(of, request, lambda magnitudes: magnitudes * clip_coef)
        if of_each and joint is not None:
            of_all[NORM] = joint(rows[NORM])
        peers = replace(self.peers, rows=of_all)
        return refinished(self._replace(request=request, rows=rows, peers=peers), of_all)

    def with_what_was_there(self, first: Reading) -> Reading:
        """The same, read anew after NaN and Inf had become 0, with what only the first read could tell: how many there
        were, and where, and the penalty that it added."""
        counts = slice(NANS, INFS + 1)
        rows = torch.cat([self.rows[:NANS], first.rows[counts], self.rows[INFS + 1 :]])
        totals = torch.cat([self.totals[:TOTAL_NANS], first.totals[TOTAL_NANS:]])
        heads, on_host, peers = self.heads, self.on_host, self.peers
        if heads is not None and first.heads is not None:
            heads = torch.cat([heads[:HEAD_INF], first.heads[HEAD_INF:]])
        if on_host is not None and first.on_host is not None:
            on_host = [*on_host[:TOTAL_NANS], *first.on_host[TOTAL_NANS:]]
        if peers is not None and first.peers is not None:
            of_all = torch.cat([peers.rows[:NANS], first.peers.rows[counts], peers.rows[INFS + 1 :]])
            peers = replace(first.peers, rows=of_all)
        return self._replace(
            rows=rows,
            totals=totals,
            on_host=on_host,
            heads=heads,
            weight_rows=first.weight_rows,
            strengths=first.strengths,
            peers=peers,
        )

    @property
    def norm_dtype(self) -> torch.dtype:
        """Dtype of the norms that callers get: float32, or float64 if a gradient is that wide."""
        return torch.float64 if self.plan.wide else torch.float32

    @property
    def total_norm(self) -> Tensor:
        if self.heads is not None and not self.plan.wide:
            return self.heads[HEAD_NORM]
        if self.on_host is None or self.on_host[TOTAL_NORM] > FLOAT32_MAX:
            return narrowed(self.totals[TOTAL_NORM], self.norm_dtype)
        return torch.tensor(self.on_host[TOTAL_NORM], dtype=self.norm_dtype, device="cpu")

    @property
    def clip_coef(self) -> float | Tensor:
        """What the request's bound asks for; a 0-d tensor where the host would have to wait for it."""
        if self.request.max_norm == math.inf:
            return 1.0
        return self.totals[CLIP_COEF] if self.on_host is None else self.on_host[CLIP_COEF]

    @property
    def found_inf(self) -> bool | Tensor:
        """Whether a gradient is not finite; a 0-d tensor, 1.0 for yes, where the host would have to wait for it."""
        if self.on_host is not None:
            return self.on_host[TOTAL_NANS] + self.on_host[TOTAL_INFS] > 0
        assert self.heads is not None
        return self.heads[HEAD_INF]

    def check_finite(self) -> None:
        """Raises ``NonFiniteGradientError`` naming the first bad element. Synchronises."""
        grads = self.plan.grads
        written = "nothing was written" if self.strengths is None else "the weight penalty is in it already"
        if self.peers is not None:
            self._check_finite_on_all_ranks(self.peers, written)
            return
        bad = ((self.rows[NANS] + self.rows[INFS]) > 0).nonzero()
        if not len(bad):
            return
        first = int(bad[0])
        index, value = first_nonfinite(grads.tensors[first])
        kind = "NaN" if value != value else "Inf"
        where = f"index {index}" if index else "its only element"
        raise NonFiniteGradientError(
            f"the gradient of {grads.describe(first)} holds {kind} at {where} "
            f"({len(bad)} of {len(grads.tensors)} gradients are not finite); {written}",
            grads.label(first),
            index,
            value,
        )

    def _check_finite_on_all_ranks(self, peers: Peers, written: str) -> None:
        """Every rank names the same gradient and rank; the element only the rank that has it."""
        nans, infs = peers.rows[NANS : INFS + 1, 0].tolist()
        if nans + infs == 0:
            return
        name, rank = peers.worst_of_all(self.plan.grads.name_at)
        index: tuple[int, ...] = ()
        value: complex = math.nan if nans else math.inf
        where = ""
        if rank == peers.rank:
            place = int(peers.worst) // PLACES
            own = list(self.plan.grads.columns).index(place)
            index, value = first_nonfinite(self.plan.grads.tensors[own])
            where = f" at index {index} of that rank's share"
        kind = "NaN" if value != value else "Inf"
        raise NonFiniteGradientError(
            f"the gradient of {name} holds {kind} on rank {rank}{where} ({nans:.0f} NaN and {infs:.0f} Inf on all "
            f"ranks); {written}",
            name,
            index,
            value,
        )


def check_not_captured(why_not: str, instead: str) -> None:
    """Raises ``RuntimeError`` while a CUDA graph is captured: it replays kernels, and nothing of what the host does."""
    if is_capturing():
        raise RuntimeError(f"{why_not}, and a CUDA graph is being captured; {instead}. Nothing was written")


def flag(value: Tensor) -> Tensor:
    """One element, true unless it is 0, as a 0-d bool: what is one already costs no operation on its device."""
    return _number(value).bool()  # in half the time of != 0


def _number(value: Tensor) -> Tensor:
    return value.detach().reshape(()) if value.dim() or value.requires_grad else value


def any_of(reasons: Iterable[bool | Tensor]) -> bool | Tensor:
    """Whether one of them holds: bools, or tensors of one element that isn't 0. Where the host would have to wait a
    tensor: the only one there is, or of several whether one holds."""
    tensors = []
    for reason in reasons:
        if reason is False:
            continue
        if isinstance(reason, Tensor) and not known_to_host(reason):
            tensors.append(reason)
        elif reason:
            return True
    if not tensors:
        return False
    if len(tensors) == 1:
        return tensors[0]
    home = tensors[0].device
    return functools.reduce(torch.logical_or, [_number(tensor).to(home) for tensor in tensors])  # NaN holds, too


def read(
    plan: Plan,
    request: Request,
    grad_scale: float | Tensor | None = None,
    strengths: Strengths | None = None,
) -> Reading:
    """Reads every gradient element once, without waiting for the device.

    With ``grad_scale`` the norms are those of the gradients divided by it; NaN and Inf are counted as they stand.
    With ``strengths``, one pair for each gradient, a weight penalty is added to the gradients in the same pass, times
    ``grad_scale``; what is read is what was written.

    Raises:
        ValueError: ``request.units`` doesn't fit a gradient, or the gradients' parameters are not known.
    """
    weight_rows = None
    if strengths is not None:
        rows, weight_rows = _read_penalised(plan, request, grad_scale, strengths)
    elif request.weights:
        weight_rows = _read_weights(plan)
    if strengths is None and request.units is None and len(plan.parts) == 1:  # the whole list, up to its totals
        (part,) = plan.parts
        rows = _empty_rows(part, request.fields)
        totals, heads = _empty_totals(rows)
        part.backend.read(part.table, request, rows, grad_scale, totals, heads)
        return Reading(plan, request, rows, totals, _on_host(totals), heads, None, weight_rows)
    units = _read_units(plan, request) if request.units is not None else None
    if strengths is None:
        if units is None or request.extras:
            rows = _gathered(plan, [_read_part(part, request) for part in plan.parts])
        else:
            rows = units.rows.new_empty((request.fields, len(units.counts)))
            (plan.parts[0].backend if len(plan.parts) == 1 else reference).join_units(
                units.rows, units.counts, request, rows
            )
    if grad_scale is not None:
        divisor = grad_scale.detach().reshape(()).to(rows) if isinstance(grad_scale, Tensor) else grad_scale
        map_magnitudes(rows, request, lambda magnitudes: magnitudes / divisor)
        if units is not None:
            map_magnitudes(units.rows, request, lambda magnitudes: magnitudes / divisor)
    return _finished(plan, request, rows, units, weight_rows, strengths)


def _finished(
    plan: Plan,
    request: Request,
    rows: Tensor,
    units: Units | None,
    weight_rows: Tensor | None,
    strengths: Strengths | None,
) -> Reading:
    totals, heads = _empty_totals(rows)
    plan.finish(rows, request, totals, heads)
    return Reading(plan, request, rows, totals, _on_host(totals), heads, units, weight_rows, strengths)


def refinished(reading: Reading, rows: Tensor) -> Reading:
    """The same with totals that come from other rows."""
    totals, heads = _empty_totals(rows)
    reading.plan.finish(rows, reading.request, totals, heads)
    return reading._replace(totals=totals, on_host=_on_host(totals), heads=heads)


def penalties(weight_rows: Tensor, strengths: Strengths) -> Tensor:
    """``[n]``: what the penalty of each gradient adds to the loss, in the dtype of ``weight_rows``."""
    # their derivatives are sign(w) and w
    sums = torch.stack([weight_rows[WEIGHT_SUM_ABS], weight_rows[WEIGHT_NORM].square() / 2])
    of_each = on_device(strengths, sums.dtype, sums.device).reshape(-1, 2).T
    return torch.where(of_each != 0.0, of_each * sums, 0.0).sum(dim=0)


def _empty_totals(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    totals = rows.new_empty(len(TOTALS))
    return totals, None if known_to_host(totals) else rows.new_empty(len(HEADS), dtype=torch.float32)


def _on_host(totals: Tensor) -> list[float] | None:
    return totals.tolist() if known_to_host(totals) else None


def _gathered(plan: Plan, own: list[Tensor]) -> Tensor:
    """The columns of all parts in the order of the gradients, on the first one's device."""
    if len(plan.parts) == 1 and plan.parts[0].positions is None:
        return own[0]
    home = next(rows for rows, part in zip(own, plan.parts, strict=True) if part.to_list(0) == 0)
    pieces: dict[int, Tensor] = {}
    for rows, part in zip(own, plan.parts, strict=True):
        here = moved(rows, home.device, home.dtype)
        pieces.update((first, here.narrow(1, at, count)) for first, at, count in part.runs)
    return torch.cat([pieces[first] for first in sorted(pieces)], dim=1)


def _weights_of(plan: Plan) -> list[Tensor]:
    """Of each gradient the parameter that has it; the first, if several have."""
    parameters = plan.grads.parameters
    if parameters is None:
        raise ValueError("the weights of gradients are not known: pass parameters, not gradients")
    return [local(parameters[i]) for i in plan.grads.columns]


def _read_weights(plan: Plan) -> Tensor:
    weights = plan_of(grads_among(_weights_of(plan), noun="parameters"))
    rows = read(weights, Request(extras=True)).rows
    return torch.stack([rows[NORM], rows[MAX_ABS], rows[SUM_ABS]])


def _read_penalised(
    plan: Plan, request: Request, grad_scale: float | Tensor | None, strengths: Strengths
) -> tuple[Tensor, Tensor]:
    """Adds the penalty to the gradients: rows of what that gives, and of the weights."""
    scaled = torch.tensor([[of[k] for of in strengths] for k in (0, 1)], dtype=torch.float64, device="cpu")
    if isinstance(grad_scale, Tensor):
        device = grad_scale.device
        scaled = scaled.to(device, wide_dtype(device), non_blocking=True) * grad_scale.detach().reshape(())
    elif grad_scale is not None:
        scaled *= grad_scale
    rows = [_empty_rows(part, request.fields) for part in plan.parts]
    weight_rows = [_empty_rows(part, len(WEIGHT_FIELDS)) for part in plan.parts]
    plan.read_penalised_(_weights_of(plan), scaled, request, rows, weight_rows)
    return _gathered(plan, rows), _gathered(plan, weight_rows)


def _read_units(plan: Plan, request: Request) -> Units:
    assert request.units is not None
    grads = plan.grads
    dims = unit_dims(grads, request.units)
    weights = plan_of(grads_among(_weights_of(plan), noun="parameters"))
    counts = [reference.count_units(grad, over) for grad, over in zip(grads.tensors, dims, strict=True)]
    rows, weight_rows = (_unit_rows(of, dims, counts, request) for of in (plan, weights))
    return Units(dims, counts, rows, weight_rows[NORM].to(rows))


def _unit_rows(plan: Plan, dims: list[tuple[int, ...]], counts: list[int], request: Request) -> Tensor:
    own = []
    for part in plan.parts:
        of_part = (dims, counts)
        if part.positions is not None:
            of_part = [dims[i] for i in part.positions], [counts[i] for i in part.positions]
        like = part.table.grads[0] if len(part.table) else torch.empty(0)
        rows = like.new_empty((ALWAYS_FIELDS, sum(of_part[1])), dtype=wide_dtype(like.device))
        part.backend.read_units(part.table, of_part[0], request, rows)
        own.append(rows)
    if len(own) == 1 and plan.parts[0].positions is None:
        return own[0]
    each: dict[int, Tensor] = {}
    for rows, part in zip(own, plan.parts, strict=True):
        positions = part.positions or []
        each.update(zip(positions, torch.split(rows, [counts[i] for i in positions], dim=1), strict=True))
    return torch.cat([each[i].to(each[0]) for i in range(len(dims))], dim=1)


def _read_part(part: Part, request: Request) -> Tensor:
    rows = _empty_rows(part, request.fields)
    part.backend.read(part.table, request, rows)
    return rows


def _empty_rows(part: Part, fields: int) -> Tensor:
    grads = part.table.grads
    like = grads[0] if grads else torch.empty(0)
    return like.new_empty((fields, len(grads)), dtype=wide_dtype(like.device))
