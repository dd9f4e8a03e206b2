"""What callers see of a reading: facts about one step's gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip.backends.reference import narrowed
from fastclip.reading import PLACES, Peers, Reading
from fastclip.types import (
    INFS,
    MAX_ABS,
    NANS,
    NORM,
    WEIGHT_MAX_ABS,
    WEIGHT_NORM,
    WEIGHT_SUM_ABS,
    ZEROS,
    Request,
    wide_dtype,
)


class Worst(NamedTuple):
    """One line of :meth:`GradStats.worst`, in Python numbers."""

    name: str
    norm: float
    max_abs: float | None
    nans: int
    infs: int
    rank: int | None = None


@dataclass(frozen=True)
class GradStats:
    """Facts about one step's gradients: tensors on the gradients' device, nothing waited for.

    ``to_dict()``, ``worst()`` and ``print()`` copy them to the host, once per call.

    Attributes:
        total_norm: 0-d, float32 (float64 if a gradient is): p-norm of all gradients as one vector.
        tensor_norms: ``[n]``, same dtype: p-norm of each gradient.
        found_inf: 0-d float32, 1.0 if any element is NaN or Inf.
        nans, infs: ``[n]`` int64, number of such elements in each gradient.
        tensor_max_abs: ``[n]``, largest magnitude of each gradient, NaN if it holds one; None without extras.
        zeros: ``[n]`` int64, number of elements equal to 0, those that a sparse gradient doesn't list included; None
            without extras.
        sizes: elements in each gradient.
        names: the caller's names, or ``parameters[i]`` / ``grads[i]``.
        norm_type: the p of the norms.
        weight_norms, weight_max_abs, weight_sum_abs: ``[n]``, dtype of ``total_norm``: 2-norm, largest magnitude and
            sum of magnitudes of each gradient's weight, NaN if it holds one; None where they were not asked for.
        ranks: ``[n]`` int64: where gradients lie on several ranks, the one whose share of each looks worst; else None.
            :func:`fastclip.grad_stats` tells of whole gradients, a wrapper's ``last_stats`` of this rank's shares,
            beside the ``total_norm`` and ``found_inf`` of all.
        peers: what other ranks added; None if nothing lies on other ranks.
        name_at: place in the caller's list -> name, for what other ranks say.
    """

    total_norm: Tensor
    tensor_norms: Tensor
    found_inf: Tensor
    nans: Tensor
    infs: Tensor
    tensor_max_abs: Tensor | None
    zeros: Tensor | None
    sizes: list[int]
    names: list[str]
    norm_type: float
    weight_norms: Tensor | None = None
    weight_max_abs: Tensor | None = None
    weight_sum_abs: Tensor | None = None
    ranks: Tensor | None = None
    peers: Peers | None = None
    name_at: Callable[[int], str] | None = None

    @property
    def max_abs(self) -> Tensor | None:
        """0-d, largest magnitude of all gradients, NaN if there is one; None without extras."""
        if self.tensor_max_abs is None or not self.names:
            return self.tensor_max_abs if self.tensor_max_abs is None else self.total_norm.new_zeros(())
        return self.tensor_max_abs.amax()

    def _host(self) -> dict[str, list[float]]:
        """Every per-tensor row and the total, as Python numbers, in one copy."""
        rows = {
            "norms": self.tensor_norms,
            "nans": self.nans,
            "infs": self.infs,
            "max_abs": self.tensor_max_abs,
            "zeros": self.zeros,
            "weight_norm": self.weight_norms,
            "weight_max_abs": self.weight_max_abs,
            "weight_sum_abs": self.weight_sum_abs,
            "rank": self.ranks,
        }
        given = {name: row for name, row in rows.items() if row is not None}
        columns = torch.stack([row.to(wide_dtype(row.device)) for row in given.values()])
        total = self.total_norm.to(columns.dtype).expand(len(given), 1)
        table = torch.cat([columns, total], dim=1).tolist()
        host = dict(zip(given, (row[:-1] for row in table), strict=True))
        of_all = [sum(host["nans"]), sum(host["infs"])]
        if self.peers is not None:
            of_all = self.peers.rows[NANS : INFS + 1, 0].tolist()
        return {**host, "total_norm": [table[0][-1]], "of_all": of_all}

    def to_dict(self) -> dict[str, Any]:
        """Everything as Python numbers. Synchronises once.

        Returns:
            ``total_norm``, ``found_inf``, ``nans``, ``infs`` (sums), ``max_abs`` and ``zeros`` with extras, and
            ``tensors``: name -> the same of each gradient, with its ``size``; with weights also ``weight_norm``,
            ``weight_max_abs`` and ``weight_sum_abs``, and of sharded ones ``rank``, as in ``ranks``.
        """
        host = self._host()
        extras = "max_abs" in host
        per_tensor = {}
        for i, name in enumerate(self.names):
            facts: dict[str, Any] = {"norm": host["norms"][i], "size": self.sizes[i]}
            facts |= {key: int(host[key][i]) for key in ("nans", "infs")}
            if extras:
                facts |= {"max_abs": host["max_abs"][i], "zeros": int(host["zeros"][i])}
            facts |= {key: values[i] for key, values in host.items() if key.startswith("weight_")}
            facts |= {key: int(host[key][i]) for key in ("rank",) if key in host}
            per_tensor[name] = facts
        nans, infs = map(int, host["of_all"])
        total: dict[str, Any] = {
            "total_norm": host["total_norm"][0],
            "norm_type": self.norm_type,
            "found_inf": nans + infs > 0,
            "nans": nans,
            "infs": infs,
        }
        if extras:
            largest = host["max_abs"]
            has_nan = any(value != value for value in largest)
            total |= {"max_abs": math.nan if has_nan else max(largest, default=0.0), "zeros": int(sum(host["zeros"]))}
        return {**total, "tensors": per_tensor}

    def worst(self, k: int = 5) -> list[Worst]:
        """The ``k`` gradients to look at first: those with NaN, then with Inf, then by norm. Synchronises once.

        Where gradients lie on several ranks each comes with the rank whose share looks worst. If the rows tell of this
        rank's shares alone and the worst of all is elsewhere, it comes first, with the counts of all ranks.
        """
        return self._worst(self._host(), k)

    def _worst(self, host: dict[str, list[float]], k: int) -> list[Worst]:
        largest, ranks = host.get("max_abs"), host.get("rank")
        lines = [
            Worst(
                name,
                norm,
                None if largest is None else largest[i],
                int(host["nans"][i]),
                int(host["infs"][i]),
                None if ranks is None else int(ranks[i]),
            )
            for i, (name, norm) in enumerate(zip(self.names, host["norms"], strict=True))
        ]
        lines += self._elsewhere(host)
        lines.sort(key=lambda w: (w.nans > 0, w.infs > 0, -math.inf if w.norm != w.norm else w.norm), reverse=True)
        return lines[:k]

    def _elsewhere(self, host: dict[str, list[float]]) -> list[Worst]:
        """A gradient with NaN or Inf of which only another rank's rows tell."""
        nans, infs = map(int, host["of_all"])
        if self.peers is None or self.name_at is None or self.peers.tensors_worst is not None or nans + infs == 0:
            return []
        name, rank = self.peers.worst_of_all(self.name_at)
        return [] if rank == self.peers.rank else [Worst(name, math.nan if nans else math.inf, None, nans, infs, rank)]

    def __str__(self) -> str:
        host = self._host()
        nans, infs = map(int, host["of_all"])
        state = f"{nans} NaN, {infs} Inf" if nans + infs else "all finite"
        lines = [
            f"{len(self.names)} gradients, {sum(self.sizes):,} elements: "
            f"total {self.norm_type:g}-norm {host['total_norm'][0]:.6g}, {state}"
        ]
        worst = self._worst(host, 5)
        width = max((len(w.name) for w in worst), default=0)
        weights = dict(zip(self.names, host.get("weight_norm", ()), strict=False))
        for w in worst:
            line = f"  {w.name:<{width}}  norm {w.norm:<12.6g}"
            if w.max_abs is not None:
                line += f"  max|g| {w.max_abs:<12.6g}"
            if w.name in weights:
                line += f"  weight norm {weights[w.name]:<12.6g}"
            if w.nans or w.infs:
                line += f"  {w.nans} NaN, {w.infs} Inf"
            if w.rank is not None:
                line += f"  on rank {w.rank}"
            lines.append(line.rstrip())
        if len(self.names) > len(worst):
            lines.append(f"  ... and {len(self.names) - len(worst)} more")
        return "\n".join(lines)


def stats_of(reading: Reading) -> GradStats:
    """What callers see of a reading."""
    grads = reading.plan.grads
    names = [grads.label(i) for i in range(len(grads.tensors))]
    return stats_from(
        reading.rows,
        reading.total_norm,
        reading.request,
        reading.sizes,
        names,
        reading.weight_rows,
        reading.peers,
        grads.name_at,
    )


def stats_from(
    rows: Tensor,
    total_norm: Tensor,
    request: Request,
    sizes: list[int],
    names: list[str],
    weight_rows: Tensor | None,
    peers: Peers | None = None,
    name_at: Callable[[int], str] | None = None,
) -> GradStats:
    """The same of a reading whose gradients are gone."""
    dtype, extras = total_norm.dtype, request.extras
    nans, infs = rows[NANS].to(torch.int64), rows[INFS].to(torch.int64)
    found = nans.sum() + infs.sum() if peers is None else peers.rows[NANS : INFS + 1].sum()
    ranks = None
    if peers is not None:
        ranks = torch.full_like(nans, peers.rank)
        if peers.tensors_worst is not None:
            ranks = peers.tensors_worst.to(torch.int64) % PLACES
    return GradStats(
        total_norm=total_norm,
        tensor_norms=narrowed(rows[NORM], dtype),
        found_inf=(found > 0).to(torch.float32),
        nans=nans,
        infs=infs,
        tensor_max_abs=rows[MAX_ABS].to(dtype, copy=True) if extras else None,
        zeros=rows[ZEROS].to(torch.int64) if extras else None,
        sizes=sizes,
        names=names,
        norm_type=request.norm_type,
        weight_norms=narrowed(weight_rows[WEIGHT_NORM], dtype) if weight_rows is not None else None,
        weight_max_abs=narrowed(weight_rows[WEIGHT_MAX_ABS], dtype) if weight_rows is not None else None,
        weight_sum_abs=narrowed(weight_rows[WEIGHT_SUM_ABS], dtype) if weight_rows is not None else None,
        ranks=ranks,
        peers=peers,
        name_at=name_at,
    )
