"""What a guarded optimizer has seen and done: on the gradients' device, waited for only when someone looks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastclip.backends import reference
from fastclip.backends.reference import narrowed
from fastclip.checks import nonfinite_rule, whole
from fastclip.clipping import Verdict
from fastclip.ladder import Event, Ladder
from fastclip.reading import Peers, Reading, penalties
from fastclip.stats import GradStats, stats_from
from fastclip.tensors import GroupNames
from fastclip.types import (
    BAD,
    CLIPPED,
    COUNTS,
    IN_A_ROW,
    INFS,
    NANS,
    NORM,
    SKIPPED,
    STEPS,
    TOTAL_NORM,
    SkipLimitError,
    on_device,
    wide_dtype,
)


class Seen:
    """One reading without its gradients, which must not be kept alive until the next step."""

    def __init__(self, reading: Reading) -> None:
        grads = reading.plan.grads
        assert isinstance(grads.names, GroupNames)
        self.rows, self.totals, self.request, self.dtype = (
            reading.rows,
            reading.totals,
            reading.request,
            reading.norm_dtype,
        )
        self.weight_rows, self.strengths = reading.weight_rows, reading.strengths
        self.peers = reading.peers
        self._names, self._positions = grads.names, grads.positions

    @property
    def _columns(self) -> Iterable[int]:
        """The parameter that each column of ``rows`` is about."""
        return range(self.rows.shape[1]) if self._positions is None else self._positions

    @property
    def listed(self) -> list[Tensor]:
        """The parameters, with and without a gradient."""
        return self._names.parameters

    @property
    def positions(self) -> list[int] | None:
        """Which of them each column of ``rows`` is about; None for 0, 1, 2, ..."""
        return self._positions

    @property
    def names(self) -> list[str]:
        return [self._names[i] for i in self._columns]

    @property
    def sizes(self) -> list[int]:
        return [self._names.parameters[i].numel() for i in self._columns]

    @property
    def penalty(self) -> Tensor | None:
        """What the penalty adds to the loss, 0-d, in the dtype of ``rows``; None without one."""
        if self.peers is not None:
            return self.peers.penalty
        if self.weight_rows is None or self.strengths is None:
            return None
        return penalties(self.weight_rows, self.strengths).sum()

    def bad(self) -> list[str]:
        """Names of the gradients that hold NaN or Inf. Synchronises."""
        found = (self.rows[NANS] + self.rows[INFS] > 0).tolist()
        names = [name for name, is_bad in zip(self.names, found, strict=True) if is_bad]
        if self.peers is None or float(self.peers.rows[NANS : INFS + 1].sum()) == 0.0:
            return names
        worst, rank = self.peers.worst_of_all(self._names.__getitem__)
        return [f"{worst} on rank {rank}", *(name for name in names if name != worst)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one step, for those who listen; 0-d tensors stand where the host would have to wait.

    Attributes:
        seen: one reading for each rule.
        verdicts: what each rule decided. They hold the gradients, not clipped yet: keep none after the call.
        reasons: reason -> whether it holds the step back.
        clipped, skipped: whether it is.
        rolled_back: whether the optimizer went back to a snapshot instead.
        rungs: what was done about skips by now: learning rates cut and restored, a roll back.
        loss: as it was observed for this step, 0-d; None if it wasn't.
        lrs: learning rate of each param group in this step.
        grad_scale: what the gradients are multiplied by; None for 1.
    """

    seen: list[Seen]
    verdicts: list[Verdict]
    reasons: dict[str, bool | Tensor]
    clipped: bool | Tensor
    skipped: bool | Tensor
    rolled_back: bool
    rungs: list[Event]
    loss: Tensor | None
    lrs: list[float | Tensor]
    grad_scale: float | Tensor | None


LAG = 2  # steps


class Sent:
    """Values on their way to the host: copied to pinned memory, and an event after that. Those of the CPU are there."""

    def __init__(self, values: Tensor) -> None:
        self._copy = values
        self._event: Any = None
        if values.device.type == "cpu":
            return
        self._copy = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
        self._event = torch.Event(values.device)
        # by itself it would be on the stream of whichever device is the current one
        self._event.record(torch.accelerator.current_stream(values.device))

    @property
    def has_arrived(self) -> bool:
        return self._event is None or bool(self._event.query())

    def values(self) -> Tensor:
        """Them, on the CPU. Waits until they have arrived."""
        if not self.has_arrived:
            self._event.synchronize()
        return self._copy


class Echo:
    """What a device has counted, as the host acts on it: as it was LAG steps ago, so that neither depends on how fast
    either of them is. All ranks of a group then do the same in the same step, and so does a run that is made again. The
    host waits only where it is further than that ahead of the device; what the CPU counted it has at once."""

    def __init__(self) -> None:
        self._sent: deque[Sent] = deque()
        self._is_far = False

    def send(self, counts: Tensor) -> None:
        """Those of one more step."""
        self._is_far = counts.device.type != "cpu"
        self._sent.append(Sent(counts))

    def latest(self) -> list[int] | None:
        """The counts, after each step once; None where those are not due yet."""
        due = len(self._sent) - (LAG if self._is_far else 0)
        for _ in range(due):  # several after a change of device
            sent = self._sent.popleft()
        return [int(count) for count in sent.values().tolist()] if due > 0 else None


class Record:
    """Counts of steps and the latest readings."""

    def __init__(self) -> None:
        self.skip_limit: int | None = None
        # Numbers as long as the host has known every outcome, then a tensor on the gradients' device.
        self._counts: list[int] | Tensor = [0] * len(COUNTS)
        self.seen: list[Seen] = []
        self._norm: Tensor | None = None  # of ``seen``, once someone has asked
        self._echo = Echo()
        self.listeners: list[Callable[[Outcome], None]] = []  # each is told of every step

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_echo": Echo(), "listeners": []}  # events and open files can't be copied

    def note(
        self, readings: list[Reading], factor: float | Tensor, skipped: bool | Tensor, found_inf: bool | Tensor
    ) -> None:
        """Takes in one step: its readings, at least one, and what became of it.

        ``factor`` is 1 where nothing was clipped. It, ``skipped`` and ``found_inf``, one element that isn't 0 for yes,
        are tensors where the host would have to wait for them.
        """
        self.seen, self._norm = [Seen(reading) for reading in readings], None
        counts = self._counts
        if isinstance(counts, list) and not (
            isinstance(factor, Tensor) or isinstance(skipped, Tensor) or isinstance(found_inf, Tensor)
        ):
            counts[STEPS] += 1
            counts[BAD] += bool(found_inf)
            counts[CLIPPED] += factor != 1.0 and not skipped
            counts[SKIPPED] += skipped
            counts[IN_A_ROW] = counts[IN_A_ROW] + 1 if skipped else 0
            return
        totals, dtype = readings[0].totals, wide_dtype(readings[0].totals.device)
        before = (
            on_device(counts, dtype, totals.device) if isinstance(counts, list) else counts.to(totals.device, dtype)
        )
        self._counts = after = torch.empty_like(before)
        readings[0].plan.tally(before, factor, skipped, found_inf, after)
        self._echo.send(after)

    @property
    def counts(self) -> Tensor:
        """``[len(COUNTS)]``, int64, for whoever looks."""
        if isinstance(self._counts, Tensor):
            return self._counts.to(torch.int64)
        device = self.seen[0].totals.device if self.seen else "cpu"
        return on_device(self._counts, torch.int64, torch.device(device))

    def news(self) -> list[int] | None:
        """The counts as the host knows them by now, if there is something new."""
        return self._counts if isinstance(self._counts, list) else self._echo.latest()

    def bad(self) -> list[str]:
        """Names of the latest gradients that hold NaN or Inf. Synchronises."""
        return [name for seen in self.seen for name in seen.bad()]

    def check_streak(self, in_a_row: int) -> None:
        """Raises ``SkipLimitError`` when too many steps in a row were skipped."""
        if self.skip_limit is not None and in_a_row >= self.skip_limit:
            bad = self.bad()
            names = f"{', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''}"
            which = f"; in the latest one {names} held NaN or Inf" if bad else ""
            raise SkipLimitError(
                f"{in_a_row} steps in a row were skipped{which}. No step was made since. fastclip.check(model, batch, "
                "loss_fn, optimizer) looks for the reason; last_stats, of the wrapper or of what attach returned, "
                "shows each gradient; skip_limit=None would go on skipping"
            )

    @property
    def norm(self) -> Tensor | None:
        if self._norm is None and self.seen:
            totals = [seen.totals[TOTAL_NORM] for seen in self.seen]
            joined = totals[0]
            if len(totals) > 1:
                joined = reference.norm_of_norms(
                    torch.stack([t.to(joined) for t in totals]), self.seen[0].request.norm_type
                )
            wide = any(seen.dtype == torch.float64 for seen in self.seen)
            self._norm = narrowed(joined, torch.float64 if wide else torch.float32)
        return self._norm

    @property
    def stats(self) -> GradStats | None:
        if self.norm is None:
            return None
        request = min((seen.request for seen in self.seen), key=lambda request: request.fields)
        rows = torch.cat([seen.rows[: request.fields].to(self.seen[0].rows) for seen in self.seen], dim=1)
        sizes = [size for seen in self.seen for size in seen.sizes]
        names = [name for seen in self.seen for name in seen.names]
        weight_rows = [seen.weight_rows.to(rows) for seen in self.seen if seen.weight_rows is not None]
        joined = torch.cat(weight_rows, dim=1) if len(weight_rows) == len(self.seen) else None  # of all, or of none
        peers, name_at = self._peers()
        return stats_from(rows, self.norm.clone(), request, sizes, names, joined, peers, name_at)

    def _peers(self) -> tuple[Peers | None, Callable[[int], str] | None]:
        """What other ranks said: of several readings all counts, and the one that looks worst."""
        own = [(seen.peers, seen._names.__getitem__) for seen in self.seen if seen.peers is not None]
        if len(own) < 2:
            return own[0] if own else (None, None)
        rows = torch.stack([peers.rows.to(own[0][0].rows) for peers, _ in own])
        each = [peers.tensors_worst for peers, _ in own]
        bad = [float(peers.rows[NANS, 0]) * 2 + float(peers.rows[INFS, 0]) for peers, _ in own]
        peers, name_at = own[bad.index(max(bad))]
        whole = None if any(worst is None for worst in each) else torch.cat([w for w in each if w is not None])
        counted = rows.sum(dim=0)
        counted[NORM] = reference.norm_of_norms(rows[:, NORM].T, self.seen[0].request.norm_type)
        return replace(peers, rows=counted, tensors_worst=whole), name_at

    @property
    def penalty(self) -> Tensor | None:
        shares = [share for seen in self.seen if (share := seen.penalty) is not None]
        if not shares:
            return None
        wide = any(seen.dtype == torch.float64 for seen in self.seen)
        value = torch.stack([share.to(shares[0]) for share in shares]).sum()
        return narrowed(value, torch.float64 if wide else torch.float32)


class Reports:
    """What a guarded optimizer tells of its steps.

    Every value is a tensor on the device of the gradients; nothing is waited for until it is looked at.
    A step without any gradient leaves all of them alone. With an optimizer that evaluates its closure
    several times a step (LBFGS), every evaluation counts as a step.
    """

    _record: Record
    _ladder: Ladder

    @property
    def events(self) -> list[Event]:
        """The latest skips, learning rates cut and restored, and roll backs, oldest first."""
        return list(self._ladder.events)

    @property
    def lr_factor(self) -> float:
        """What :class:`SpikeBackoff` multiplies the learning rates by now; 1 without one."""
        return self._ladder.lr_factor

    @property
    def last_norm(self) -> Tensor | None:
        """Total norm of the latest step's gradients before clipping, unscaled; 0-d float32 (float64 for float64
        gradients). None before the first step."""
        norm = self._record.norm
        return None if norm is None else norm.clone()

    @property
    def last_stats(self) -> GradStats | None:
        """Norm, NaN and Inf counts of each gradient of the latest step, from the same read, and with a penalty norms of
        their weights; None before the first. With ``nonfinite="zero"`` norms of what is left, and the counts of what
        became 0."""
        return self._record.stats

    @property
    def penalty(self) -> Tensor | None:
        """What ``l1`` and ``l2`` add to the loss, at the weights from which the latest step started: the sum of
        ``l1 * |w| + l2 / 2 * w^2`` over the parameters that had a gradient, ``l1 * |w| + l2 * w^2`` with
        ``convention="keras"``. 0-d, dtype of ``last_norm``. None before the first step, or if it had no penalty."""
        return self._record.penalty

    @property
    def steps(self) -> Tensor:
        """How many steps were asked for, 0-d int64."""
        return self._record.counts[STEPS].clone()

    @property
    def clipped_steps(self) -> Tensor:
        """How many of them were clipped, 0-d int64."""
        return self._record.counts[CLIPPED].clone()

    @property
    def skipped_steps(self) -> Tensor:
        """How many of them did not happen, 0-d int64."""
        return self._record.counts[SKIPPED].clone()

    @property
    def nonfinite_steps(self) -> Tensor:
        """How many of them had NaN or Inf in their gradients, whatever ``nonfinite`` made of it, 0-d int64."""
        return self._record.counts[BAD].clone()

    @property
    def skipped_in_a_row(self) -> Tensor:
        """How many did not happen since the latest that did, 0-d int64."""
        return self._record.counts[IN_A_ROW].clone()

    @property
    def clip_rate(self) -> Tensor:
        """Share of the steps that were clipped, 0-d float32; 0 before the first."""
        counts = self._record.counts
        return (counts[CLIPPED] / counts[STEPS].clamp(min=1)).to(torch.float32)


class Adjustable(Reports):
    """The same of what guards steps by itself: two of its rules may be set at any time."""

    @property
    def nonfinite(self) -> str:
        return self._nonfinite

    @nonfinite.setter
    def nonfinite(self, value: str) -> None:
        self._nonfinite = nonfinite_rule(value)

    @property
    def skip_limit(self) -> int | None:
        return self._record.skip_limit

    @skip_limit.setter
    def skip_limit(self, value: int | None) -> None:
        self._record.skip_limit = None if value is None else whole("skip_limit", value, least=1)
