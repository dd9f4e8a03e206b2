"""Joins what the ranks of a job have read of their shares: one small all-reduce per process group and step.

Each rank reads the elements it has, once. What it then knows of a list fits into some float64 numbers: the norm, how
many NaN and Inf, and which tensor looks worst. They travel in slots: a vector has room for every rank of the group,
each rank fills its own slot and leaves the others 0, and the sum of these vectors holds every slot bit by bit (x + 0 is
x, also for NaN, Inf and 1e300). So one all-reduce by SUM does for every norm type, inf included, where MAX would lose
NaN; nothing overflows or underflows on the way, as sums of squares of 1e200 or 1e-200 would; the result doesn't depend
on the order in which a backend adds; every rank gets the same bits and works out the same norm, by the rule that joins
chunks into tensors and tensors into a total: a norm of norms. An all-gather would give the same, but walks a ring where
an all-reduce takes a tree.

A slot has 48 bytes where all tensors of the list are sharded alike: norm, NaN, Inf, worst tensor, a mark of the list
and a flag; 32 more for each further way of sharding that the list holds. A rule that looks at single tensors needs its
rows joined: then it is 32 bytes and more for each tensor. bench/NOTES.md has what that comes to on 16,384 ranks.

Ranks that were given different lists see each other's marks, and all raise alike. Where the length of the vector
depends on the list, the ranks compare marks in an all-reduce of its own the first time they meet a list, before they
send it. (One rank that later passes another list than the one they have agreed upon may send another length: then the
backend has to notice.)

What counts how often, for each process group in turn:

* sharded over it (any placement but Replicate): the shares are different elements, each counts;
* replicated over it (Replicate, or a plain tensor beside sharded ones): one rank's copy counts, the one of the first
  rank with NaN or Inf if there is such a rank, else the first that there is. So all ranks act alike also where copies
  differ;
* neither, as for the tensors of another mesh: left as it is. But where its ranks have copies of what other groups
  joined (a layer outside of the tensor-parallel plan, sharded over the data-parallel dimension alone) they agree on one
  of them after that, in an all-reduce more.

Meshes on which something is sharded are joined over all their dimensions, one group after the other. Where nothing is
sharded, as in DistributedDataParallel, nothing travels.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip.backends import reference
from fastclip.reading import PLACES, Peers, Reading, refinished
from fastclip.tensors import Grads, is_sharded, local, mesh_of, placements_of
from fastclip.ties import APART, COPIED, MARKS, REPLICATED, SHARDED, Role, Ties, groups_of, listed_in
from fastclip.types import (
    ALWAYS_FIELDS,
    INFS,
    NANS,
    NORM,
    TOTAL_NORM,
    WEIGHT_FIELDS,
    RankError,
    Request,
    known_to_host,
    on_device,
)
from fastclip.units import unit_dims

FINE, SKIPS, FAILED, DIFFERS = range(4)  # what a rank has to say before the join; the gravest counts

_met: set[tuple[str, int]] = set()  # groups, and marks of lists on which their ranks have agreed


class Joined(NamedTuple):
    """What all ranks know after the join.

    Attributes:
        readings: as they were given, with the norms, counts and totals of all ranks.
        skips: whether a rank had a reason of its own to skip the step; a 0-d tensor where the host would have to wait.
        nobody: for each reading, whether the host knows that no rank has a gradient in it.
    """

    readings: list[Reading]
    skips: bool | Tensor
    nobody: list[bool]


@dataclass(slots=True)
class _Table:
    """What is known of one list: ``values``, ``[len(kinds), c]``, and the role of each column."""

    values: Tensor
    roles: list[Role]
    kinds: list[float | str]  # how a row joins: the p of a norm, "sum", "max", "penalty" or "worst"


def _kinds_of_rows(request: Request, weights: bool, penalised: bool, whole: bool) -> list[float | str]:
    kinds: list[float | str] = [request.norm_type, "sum", "sum"]
    if whole:
        if request.extras:
            kinds += ["max", "sum", "sum"]
        if weights:
            kinds += [2.0, "max", "sum"]
    if penalised:
        kinds.append("penalty")
    return [*kinds, "worst"]


def _unfilled(kinds: list[float | str], roles: list[Role], like: Tensor) -> _Table:
    """A list of which this rank has nothing: what leaves every join unchanged."""
    empty = {"sum": 0.0, "max": 0.0, "penalty": 0.0, "worst": -1.0}
    column = [empty[kind] if isinstance(kind, str) else float("inf") if kind < 0 else 0.0 for kind in kinds]
    values = on_device(column, like.dtype, like.device).unsqueeze(1).repeat(1, len(roles))
    return _Table(values, roles, kinds)


def _badness(rows: Tensor) -> Tensor:
    """By which to find the worst along the last dimension: NaN before Inf before the largest norm."""
    largest = torch.finfo(rows.dtype).max
    score = torch.where(rows[..., INFS, :] > 0, largest, rows[..., NORM, :].clamp(max=largest / 2))
    return torch.where(rows[..., NANS, :] > 0, torch.inf, score)


def _buckets(roles: list[Role], groups: int) -> dict[Role, int]:
    """Different roles and their columns; one column at least."""
    different = dict.fromkeys(roles) or {(APART,) * groups: None}
    return {role: column for column, role in enumerate(different)}


def _table_of(reading: Reading, roles: list[Role], kinds: list[float | str], whole: bool, groups: int) -> _Table:
    """One column per tensor if ``whole``, else one for all tensors of the same role."""
    grads, rows, rank = reading.plan.grads, reading.rows, torch.distributed.get_rank()
    codes = on_device([place * PLACES + rank for place in grads.columns], rows.dtype, rows.device)
    penalties = reading.penalties
    if whole:
        table = _unfilled(kinds, roles, rows)
        of_weights = [] if reading.weight_rows is None else [reading.weight_rows.to(rows)]
        of_penalty = [] if penalties is None else [penalties.unsqueeze(0)]
        places = on_device(list(grads.columns), torch.int64, rows.device)
        table.values[:, places] = torch.cat([rows, *of_weights, *of_penalty, codes.unsqueeze(0)])
        return table
    buckets = _buckets(roles, groups)
    table = _unfilled(kinds, list(buckets), rows)
    for role, bucket in buckets.items():
        chosen = [i for i, place in enumerate(grads.columns) if roles[place] == role]
        if not chosen:
            continue
        columns: slice | Tensor = (
            slice(None) if len(chosen) == rows.shape[1] else on_device(chosen, torch.int64, rows.device)
        )
        of_bucket = rows[:ALWAYS_FIELDS, columns]
        counts = of_bucket[NORM + 1 :].sum(dim=1)
        of_all = len(buckets) == 1
        norm = (
            reading.totals[TOTAL_NORM]
            if of_all
            else reference.norm_of_norms(of_bucket[NORM], reading.request.norm_type)
        )
        worst = _at(codes[columns], _badness(of_bucket).argmax())
        penalty = [] if penalties is None else [penalties[columns].sum()]
        table.values[:, bucket] = torch.stack([norm, *counts, *penalty, worst])
    return table


@dataclass(frozen=True, slots=True)
class _CutUnits:
    """The units of one list that have elements on several ranks, such as rows of a tensor cut by columns.

    Attributes:
        of_list: which list.
        places: of each tensor with such units, its place in the list.
        counts: how many each has on this rank.
        roles: of each unit.
    """

    of_list: int
    places: list[int]
    counts: list[int]
    roles: list[Role]


def _cut_units(ties: Ties, requests: list[Request]) -> list[_CutUnits]:
    """What units the ranks have to join, from what they were asked to list alone: the same on all of a group."""
    names = [group.group_name for group in ties.groups]
    found = []
    for i, (grads, request) in enumerate(zip(ties.lists, requests, strict=True)):
        if request.units is None:
            continue
        own = _CutUnits(i, [], [], [])
        listed = list(listed_in(grads))
        all_dims = unit_dims(Grads(listed, None, grads.names, grads.noun), request.units)
        for place, (tensor, dims) in enumerate(zip(listed, all_dims, strict=True)):
            if not is_sharded(tensor) or mesh_of(tensor).get_coordinate() is None:
                continue
            cut = {
                group.group_name
                for group, p in zip(groups_of(mesh_of(tensor)), placements_of(tensor), strict=True)
                if not p.is_replicate() and p.dim in dims
            }
            if cut & set(names):
                own.places.append(place)
                own.counts.append(reference.count_units(local(tensor), dims))
                own.roles.extend([tuple(SHARDED if name in cut else APART for name in names)] * own.counts[-1])
        if own.places:
            found.append(own)
    return found


def _table_of_units(reading: Reading, cut: _CutUnits, kinds: list[float | str]) -> _Table:
    assert reading.units is not None
    table = _unfilled(kinds, cut.roles, reading.units.rows)
    for theirs, ours in _spans(reading, cut):
        table.values[:ALWAYS_FIELDS, theirs] = reading.units.rows[:, ours]
        table.values[ALWAYS_FIELDS, theirs] = reading.units.weight_norms[ours]
    return table


def _with_units(reading: Reading, cut: _CutUnits, table: _Table) -> Reading:
    assert reading.units is not None
    rows, weight_norms = reading.units.rows.clone(), reading.units.weight_norms.clone()
    for theirs, ours in _spans(reading, cut):
        rows[:, ours] = table.values[:ALWAYS_FIELDS, theirs]
        weight_norms[ours] = table.values[ALWAYS_FIELDS, theirs]
    return reading._replace(units=replace(reading.units, rows=rows, weight_norms=weight_norms))


def _spans(reading: Reading, cut: _CutUnits) -> Iterator[tuple[slice, slice]]:
    """Of each tensor with cut units and a gradient here: its columns in the table, and among the reading's units."""
    assert reading.units is not None
    ends = list(itertools.accumulate(reading.units.counts))
    columns = {place: i for i, place in enumerate(reading.plan.grads.columns)}
    for place, count, end in zip(cut.places, cut.counts, itertools.accumulate(cut.counts), strict=True):
        if place in columns:
            own = ends[columns[place]]
            yield slice(end - count, end), slice(own - count, own)


def _joined(slots: Tensor, kinds: list[float | str], sharded: Tensor) -> Tensor:
    """``[len(kinds), c]`` from what every rank had, ``[ranks, len(kinds), c]``."""
    bad = slots[:, NANS] + slots[:, INFS] > 0
    worst = _badness(slots).argmax(dim=0)
    rows = []
    for row, kind in enumerate(kinds):
        values = slots[:, row]
        if kind in ("sum", "penalty"):
            rows.append(values.sum(dim=0))
        elif kind == "max":
            rows.append(values.amax(dim=0))
        elif isinstance(kind, str):
            # a rank that has none of it is never the worst of those that have
            known = torch.where(values >= 0, _badness(slots), -1.0).argmax(dim=0)
            rows.append(values.gather(0, known.unsqueeze(0))[0])
        else:
            rows.append(reference.norm_of_norms(values.T, kind))
    # the copy that counts: one with NaN or Inf if there is one, else the first there is
    filled = slots[:, -1] >= 0 if kinds[-1] == "worst" else torch.ones_like(bad)
    copy = torch.where(bad.any(dim=0), worst, filled.to(slots.dtype).argmax(dim=0))
    copied = slots.gather(0, copy.expand(1, slots.shape[1], -1))[0]
    return torch.where(sharded, torch.stack(rows), copied)


def _exchange(own: Tensor, group: Any) -> Tensor:
    """``[ranks, k]``: what each rank of the group has in ``own``, ``[k]``, the same bits everywhere."""
    slots = own.new_zeros((group.size(), len(own)))
    slots[group.rank()] = own
    device = _device_for(group, slots.device)
    sent = slots.to(device)
    torch.distributed.all_reduce(sent, group=group)
    return sent.to(own.device)


def _device_for(group: Any, device: torch.device) -> torch.device:
    """Where the group can work: norms of shards that were offloaded to the CPU go through the GPU with NCCL."""
    types = [own.type for own in group._device_types]
    if device.type in types or not types:
        return device
    # A build of torch for a GPU names one, and asked for its index raises, where there is none.
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device(types[0], torch.accelerator.current_device_index()) if accelerator else torch.device(types[0])


def _stage(
    tables: list[_Table],
    at: int,
    group: Any,
    mark: int,
    flag: Tensor,
    of_role: tuple[int, ...] = (SHARDED, REPLICATED),
) -> Tensor:
    """Joins, over one group, all columns that are to it what ``of_role`` says; returns the gravest flag."""
    home = tables[0].values
    chosen = [[c for c, role in enumerate(table.roles) if role[at] in of_role] for table in tables]
    places = [on_device(columns, torch.int64, home.device) for columns in chosen]
    own = [table.values[:, columns].reshape(-1).to(home) for table, columns in zip(tables, places, strict=True)]
    slots = _exchange(torch.cat([*own, _number(mark, home), flag.reshape(1).to(home)]), group)
    sizes = [len(part) for part in own]
    parts = torch.split(slots[:, :-2], sizes, dim=1)
    for table, columns, place, part in zip(tables, chosen, places, parts, strict=True):
        if columns:
            sharded = on_device([table.roles[c][at] == SHARDED for c in columns], torch.bool, home.device)
            part = part.reshape(len(slots), len(table.kinds), len(columns))
            table.values[:, place] = _joined(part, table.kinds, sharded).to(table.values)
    differs = (slots[:, -2] != mark).any()
    return torch.where(differs, float(DIFFERS), slots[:, -1].amax())


def join(
    ties: Ties | None,
    requests: list[Request],
    whole: list[bool],
    read: Callable[[], list[Reading]],
    penalised: bool = False,
    skips: bool | Tensor = False,
) -> Joined:
    """Reads, and joins that with what all other ranks read: they have to call it in the same order.

    Args:
        ties: None for nothing to join.
        requests: what is asked for, one for each list.
        whole: for each list whether its rows, too, shall be those of whole tensors.
        read: this rank's own read, one reading for each list. If it raises, the others are told before they go on.
        penalised: whether it adds a penalty.
        skips: a reason of this rank to skip the step.

    Raises:
        RankError: the ranks were given different lists, or one of them failed. On every rank alike.
    """
    if ties is None:
        readings = read()
        return Joined(readings, skips, [False] * len(readings))
    kinds = [_kinds_of_rows(r, r.weights or penalised, penalised, w) for r, w in zip(requests, whole, strict=True)]
    cut, groups = _cut_units(ties, requests), len(ties.groups)
    kinds_of_units: list[list[float | str]] = [[requests[c.of_list].norm_type, "sum", "sum"] for c in cut]
    for rows in kinds_of_units:
        rows.append(rows[NORM])
    try:
        readings = read()
    except (RuntimeError, TypeError, ValueError):
        columns = [roles if w else list(_buckets(roles, groups)) for roles, w in zip(ties.roles, whole, strict=True)]
        home = torch.zeros(1, dtype=torch.float64)
        nothing = [_unfilled(*of, home) for of in zip(kinds, columns, strict=True)]
        nothing += [_unfilled(k, c.roles, home) for k, c in zip(kinds_of_units, cut, strict=True)]
        _joined_tables(ties, requests, whole, nothing, home + FAILED)
        raise
    tables = [_table_of(*of, groups) for of in zip(readings, ties.roles, kinds, whole, strict=True)]
    units = [_table_of_units(readings[c.of_list], c, k) for c, k in zip(cut, kinds_of_units, strict=True)]
    home = tables[0].values
    flag = (skips.to(home).ne(0) if isinstance(skips, Tensor) else _number(skips, home)).to(home) * SKIPS
    tops, flag = _joined_tables(ties, requests, whole, [*tables, *units], flag)
    for c, table in zip(cut, units, strict=True):
        readings[c.of_list] = _with_units(readings[c.of_list], c, table)
    if known_to_host(flag):
        _check(flag, penalised)
    return Joined(
        [_spread(*of, ties) for of in zip(readings, tables, tops, whole, strict=True)],
        bool(flag > 0) if known_to_host(flag) else flag > 0,
        [known_to_host(top.values) and float(top.values[-1, 0]) < 0 for top in tops],
    )


def _joined_tables(
    ties: Ties, requests: list[Request], whole: list[bool], tables: list[_Table], flag: Tensor
) -> tuple[list[_Table], Tensor]:
    """Joins ``tables`` in place, those of the lists and after them those of cut units.

    Returns:
        The total of each list, and the gravest flag of all ranks.
    """
    failed_here = known_to_host(flag) and int(flag) == FAILED
    mark = hash((ties.mark, tuple(whole), tuple(request.norm_type for request in requests))) % MARKS
    everyone = [*ties.groups, *([] if ties.group is None else [ties.group])]
    is_new = any((group.group_name, mark) not in _met for group in everyone)
    agreed = True
    if is_new and (any(whole) or len(tables) > 1 or len(tables[0].roles) > 1):
        flag = _greet(ties.groups, mark, flag)
        agreed = int(flag) != DIFFERS
    if agreed:
        for at, group in enumerate(ties.groups):
            flag = _stage(tables, at, group, mark, flag)
        for at, group in enumerate(ties.groups):
            if any(role[at] == COPIED for table in tables for role in table.roles):
                flag = _stage(tables, at, group, mark, flag, (COPIED,))
    tops = [_top(table, request) for table, request in zip(tables, requests, strict=False)]
    if ties.group is not None:
        of_stages = _mark_of_stages(requests, tops)
        # A stage with one plain list sends as much as a greeting: so all know of a longer vector before it is sent.
        if len(tops) > 1 or len(tops[0].kinds) > ALWAYS_FIELDS + 1:
            flag = _greet([ties.group], of_stages, flag)
            agreed = not (is_new or known_to_host(flag)) or int(flag) != DIFFERS
        else:
            agreed = True
        if agreed:
            tops = [_Table(top.values, [(SHARDED,)], top.kinds) for top in tops]
            flag = _stage(tops, 0, ties.group, of_stages, flag)
    if is_new and not failed_here:
        _check(flag, "penalty" in tops[0].kinds)
        _met.update((group.group_name, mark) for group in everyone)
    return tops, flag


def _mark_of_stages(requests: list[Request], tops: list[_Table]) -> int:
    """Of lists that differ by design only what was asked of them has to agree, and how many there are."""
    return hash((*(request.norm_type for request in requests), *(len(top.kinds) for top in tops))) % MARKS


def _greet(groups: list[Any], mark: int, flag: Tensor) -> Tensor:
    """Before vectors whose lengths depend on the lists: whether these agree. Of the size of the shortest join."""
    padding = flag.new_zeros(ALWAYS_FIELDS + 1)
    for group in groups:
        slots = _exchange(torch.cat([padding, _number(mark, flag), flag.reshape(1)]), group)
        flag = torch.where((slots[:, -2] != mark).any(), float(DIFFERS), slots[:, -1].amax())
    return flag


def _number(value: float, like: Tensor) -> Tensor:
    """``[1]``, on the device and in the dtype of ``like``."""
    return on_device([float(value)], like.dtype, like.device)


def _check(flag: Tensor, penalised: bool) -> None:
    gravest = int(flag)
    written = "The weight penalty is in the gradients already" if penalised else "Nothing was written"
    if gravest == DIFFERS:
        raise RankError(
            "the ranks were given different lists of parameters: another number, other shapes or placements, or other "
            "norms were asked for. Pass the same list in the same order on every rank; pipeline stages, which differ "
            f"by design, take group=, and the same number of bounds of their own and penalties on each. {written}"
        )
    if gravest == FAILED:
        raise RankError(f"another rank could not read its gradients, and says why there. {written}")


def _top(table: _Table, request: Request) -> _Table:
    """One column for a whole list, in the rows that a total has."""
    norm = reference.norm_of_norms(table.values[NORM], request.norm_type)
    counts = table.values[NORM + 1 : ALWAYS_FIELDS].sum(dim=1)
    kinds: list[float | str] = [request.norm_type, "sum", "sum"]
    rows = [norm, *counts]
    if "penalty" in table.kinds:
        kinds.append("penalty")
        rows.append(table.values[table.kinds.index("penalty")].sum())
    codes = table.values[-1]
    worst = _at(codes, torch.where(codes >= 0, _badness(table.values), -1.0).argmax())
    return _Table(torch.stack([*rows, worst]).unsqueeze(1), [()], [*kinds, "worst"])


def _at(values: Tensor, index: Tensor) -> Tensor:
    """One of ``values``, 0-d, where only the device knows which."""
    return values.gather(0, index.reshape(1)).reshape(())


def _joint_norm(norms: Tensor, columns: Tensor, norm_type: float, ties: Ties, parameters: int) -> Tensor:
    """Of whole tensors, from ``[n]`` norms of those that have a gradient here: other ranks may have one of others."""
    kinds: list[float | str] = [norm_type, "sum", "sum", "worst"]
    table = _unfilled(kinds, [(COPIED,) * len(ties.groups)] * parameters, norms)
    table.values[NORM, columns] = norms
    table.values[-1, columns] = 0.0
    flag = norms.new_zeros(1)
    for at, group in enumerate(ties.groups):
        flag = _stage([table], at, group, ties.mark, flag, (COPIED,))
    return reference.norm_of_norms(table.values[NORM], norm_type)


def _spread(reading: Reading, table: _Table, top: _Table, whole: bool, ties: Ties) -> Reading:
    """What this rank gets to see: the totals of all ranks, and where it was asked for the rows of whole tensors."""
    columns = on_device(list(reading.plan.grads.columns), torch.int64, table.values.device)
    own = table.values[:, columns] if whole else None
    peers = Peers(
        rank=torch.distributed.get_rank(),
        alike=ties.alike,
        rows=top.values[:ALWAYS_FIELDS].contiguous(),
        worst=top.values[-1, 0],
        tensors_worst=None if own is None else own[-1],
        penalty=top.values[top.kinds.index("penalty"), 0] if "penalty" in top.kinds else None,
        beyond=ties.group is not None,
        joint=functools.partial(
            _joint_norm,
            columns=columns,
            norm_type=reading.request.norm_type,
            ties=ties,
            parameters=len(table.roles),
        )
        if whole
        else None,
    )
    rows, weight_rows = reading.rows, reading.weight_rows
    if own is not None:
        rows = own[: len(rows)].to(rows).contiguous()
        if weight_rows is not None:
            weight_rows = own[len(rows) : len(rows) + len(WEIGHT_FIELDS)].to(weight_rows)
    return refinished(reading._replace(rows=rows, weight_rows=weight_rows, peers=peers), peers.rows.to(reading.rows))
