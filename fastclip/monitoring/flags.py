"""Which gradients explode, vanish, are dead or not finite: each tensor is judged by its own history."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastclip.checks import fraction, positive, whole
from fastclip.ladder import Event
from fastclip.monitoring.records import Floats

Bools = NDArray[np.bool_]
NONFINITE, EXPLODING, VANISHING, DEAD = "non-finite", "exploding", "vanishing", "dead"
BACK = math.log(10.0)  # what vanished is back when its norm is ten times what made it vanish, or it would come and go
BLOCK = 16  # records that are judged by the same history


@dataclass(frozen=True)
class FlagRules:
    """From when on a gradient is flagged. ``m`` and ``s`` are running mean and deviation of the logarithm of its norm.

    Args:
        sigmas: exploding if ``log(norm) > m + sigmas * max(s, floor)``.
        floor: the deviation is never taken for less.
        alpha: decay of ``m`` and ``s`` per record; before that matters they are plain mean and deviation.
        warmup: records of a tensor that are only learned from; the history is renewed every 16 records.
        fraction: vanishing if the norm lies below this share of ``exp(m)`` at its highest, or if the root mean square
            of the elements lies below this share of what is usual, by ``m``, for its neighbours in depth: the tensor
            before and the one after it with the same last part of the name and the same number of dimensions.
        nonzero: vanishing if the share of elements that aren't 0 falls below this share of its running mean.
        subnormal: vanishing if this share of the elements is subnormal in the gradient's dtype.
        dead_after: dead if the norm was 0 in so many records in a row.
    """

    sigmas: float = 6.0
    floor: float = 0.1
    alpha: float = 0.98
    warmup: int = 32
    fraction: float = 1e-3
    nonzero: float = 0.1
    subnormal: float = 0.1
    dead_after: int = 50

    def __post_init__(self) -> None:
        for name in ("sigmas", "floor"):
            positive(name, getattr(self, name))
        for name in ("alpha", "fraction", "nonzero", "subnormal"):
            fraction(name, getattr(self, name))
        for name in ("warmup", "dead_after"):
            whole(name, getattr(self, name), least=1)


class Census(NamedTuple):
    """Shares of each gradient's elements."""

    nonzero: Floats
    subnormal: Floats


class History:
    """What the flags know of each tensor; one column for each."""

    # name -> what a tensor starts with
    START: ClassVar[dict[str, float]] = {
        "count": 0.0,
        "mean": 0.0,
        "var": 0.0,
        "highest": -math.inf,
        "zeros": 0.0,  # records in a row with norm 0
        "nonzero": math.nan,  # running mean of the share of elements that aren't 0
        "vanishing": 0.0,  # whether its norm is small
        "sum": 0.0,  # of the block that has begun: logarithms,
        "squares": 0.0,  # their squares,
        "found": 0.0,  # and how many
        "thin": 0.0,  # whether too many of its elements are 0 or subnormal
    }

    def __init__(self) -> None:
        self._columns: dict[str, Floats] = {name: np.empty(0) for name in self.START}
        self.in_block = 0  # records since the last block ended

    def __getitem__(self, name: str) -> Floats:
        return self._columns[name]

    def grow(self, size: int) -> None:
        for name, start in self.START.items():
            known = self._columns[name]
            if len(known) < size:
                self._columns[name] = np.concatenate([known, np.full(size - len(known), start)])

    def gather(self, logs: Floats, valid: Bools) -> None:
        """Takes in logarithms of norms, ``[records, tensors]``."""
        logs = logs if valid.all() else np.where(valid, logs, 0.0)
        for name, values in (("sum", logs), ("squares", np.square(logs))):
            # one after the other, so that it doesn't matter how many come at once
            self[name][:] = np.add.accumulate(np.concatenate([self[name][None], values]))[-1]
        self["found"][:] += valid.sum(axis=0)
        self.in_block += len(logs)

    def learn(self, rules: FlagRules) -> None:
        """Ends a block: a tensor's mean and variance move to those of the block, as far as ``alpha`` says."""
        found = self["found"]
        some, many = found > 0, np.maximum(found, 1.0)
        mean, count = self["sum"] / many, self["count"] + found
        spread = np.maximum(self["squares"] / many - mean * mean, 0.0)
        rate = np.maximum(1.0 - rules.alpha**found, found / np.maximum(count, 1.0))
        delta = mean - self["mean"]
        self["var"][:] = (1.0 - rate) * (self["var"] + rate * delta * delta) + rate * spread
        self["mean"][:] += rate * delta
        self["count"][:] = count
        highest = np.maximum(self["highest"], self["mean"])
        np.copyto(self["highest"], highest, where=some & (count >= rules.warmup))
        for name in ("sum", "squares", "found"):
            self[name][:] = 0.0
        self.in_block = 0

    def state_dict(self) -> dict[str, torch.Tensor]:
        known = {name: torch.from_numpy(values.copy()) for name, values in self._columns.items()}
        return {**known, "in_block": torch.tensor(self.in_block, device="cpu")}

    @classmethod
    def check_state_dict(cls, state_dict: dict[str, torch.Tensor], size: int) -> None:
        """Raises ``ValueError`` or ``TypeError`` if it isn't that of a history of ``size`` tensors."""
        if not isinstance(state_dict, dict):
            raise TypeError(f"flags: expected a dict, got {type(state_dict).__name__}")
        if missing := {*cls.START, "in_block"} - state_dict.keys():
            raise ValueError(f"flags: {', '.join(sorted(missing))} missing")
        for name in cls.START:
            if not isinstance(values := state_dict[name], torch.Tensor) or values.shape != (size,):
                raise ValueError(f"flags: {name} is no tensor with {size} elements")
        whole("flags: in_block", state_dict["in_block"])

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        self._columns = {name: state_dict[name].cpu().numpy().copy() for name in self.START}
        self.in_block = int(state_dict["in_block"])


class Neighbours:
    """The tensors before and after each in depth that are of its kind; the order of the list is taken for the depth."""

    def __init__(self, names: Sequence[str], dims: Sequence[int]) -> None:
        count = len(names)
        self.before, self.after = np.full(count, -1), np.full(count, -1)
        latest: dict[tuple[str, int], int] = {}
        for i, (name, dim) in enumerate(zip(names, dims, strict=True)):
            kind = (name.rpartition(".")[2] if "." in name else "", dim)
            if kind in latest:
                self.before[i], self.after[latest[kind]] = latest[kind], i
            latest[kind] = i

    def mean(self, logs: Floats) -> Floats:
        """Mean of the neighbours' values, of those that aren't NaN."""
        before = np.where(self.before < 0, np.nan, logs[self.before])
        after = np.where(self.after < 0, np.nan, logs[self.after])
        return np.fmin(np.fmax(before, after), 0.5 * (before + after))  # fmin and fmax take the one that isn't NaN


class Flags:
    """Looks at records in their order.

    A record is judged by what was known when its block of ``BLOCK`` records began, so that a block can be judged at
    once; how many records arrive together makes no difference.

    Args:
        rules: from when on a gradient is flagged.
    """

    def __init__(self, rules: FlagRules) -> None:
        self.rules = rules
        self.history = History()
        self._names: Sequence[str] = ()
        self._half_logs: Floats = np.empty(0)  # of the sizes

    def know(self, names: Sequence[str], sizes: Sequence[int], dims: Sequence[int]) -> None:
        """Of which tensors the records are, from now on: those known before come first."""
        self._names = names
        self._half_logs = 0.5 * np.log(np.maximum(np.asarray(sizes, dtype=np.float64), 1.0))
        self._neighbours = Neighbours(names, dims)
        self.history.grow(len(names))

    def reset(self) -> None:
        """Forgets the past."""
        self.history = History()
        self.history.grow(len(self._names))

    def look(
        self, steps: Sequence[int], norms: Floats, bad: dict[int, Bools], censuses: dict[int, Census]
    ) -> list[list[Event]]:
        """What is to be said of each record; they are learned from.

        Args:
            norms: ``[records, tensors]``, negative where a tensor had no gradient.
            bad: for a record which of the tensors held NaN or Inf, if any did.
            censuses: for a record the shares of elements, if they were counted.
        """
        events: list[list[Event]] = []
        while len(events) < len(steps):
            begin = len(events)
            end = min(len(steps), begin + BLOCK - self.history.in_block)
            of_block = (
                steps[begin:end],
                norms[begin:end],
                {record - begin: which for record, which in bad.items() if begin <= record < end},
                {record - begin: census for record, census in censuses.items() if begin <= record < end},
            )
            events += self._look_at_block(*of_block)
        return events

    def _look_at_block(
        self, steps: Sequence[int], norms: Floats, bad: dict[int, Bools], censuses: dict[int, Census]
    ) -> list[list[Event]]:
        rules, h = self.rules, self.history
        alive = (norms > 0) & (norms < np.inf)
        for record, which in bad.items():
            alive[record] &= ~which
        all_alive = bool(alive.all())
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(norms) if all_alive else np.log(np.where(alive, norms, np.nan))
        warm = h["count"] >= rules.warmup
        deviation = np.maximum(np.sqrt(h["var"]), rules.floor)
        above = (logs - h["mean"]) / deviation
        exploding = (above > rules.sigmas) & warm
        fallen, aside = logs - h["highest"], self._aside(logs)
        least = math.log(rules.fraction) if rules.fraction > 0 else -math.inf
        release = least + BACK
        low = ((fallen < release) | (aside < release)) & warm
        events: list[list[Event]] = [[] for _ in steps]
        for record, which in bad.items():
            events[record].append(self._event(steps[record], NONFINITE, "NaN or Inf in the gradient", which, None))
        for record in np.flatnonzero(exploding.any(axis=1)).tolist():

            def spike(i: int, record: int = record) -> str:
                usual = math.exp(min(h["mean"][i], 700.0))
                return f"norm {norms[record, i]:.3g}, {above[record, i]:.1f} deviations above its usual {usual:.3g}"

            events[record].append(self._event(steps[record], EXPLODING, spike, exploding[record], above[record]))
        if low.any() or censuses or h["vanishing"].any():
            for record, step in enumerate(steps):
                events[record] += self._vanishing(
                    step, norms[record], alive[record], warm, fallen[record], aside[record], censuses.get(record)
                )
        if not all_alive or h["zeros"].any():
            for record, step in enumerate(steps):
                events[record] += self._dead(step, norms[record])
        reach = np.where(warm, rules.sigmas * deviation, np.inf)
        # a spike is learned as if it had been at the bound, so that it doesn't hide the next one
        h.gather(np.clip(logs, h["mean"] - reach, h["mean"] + reach), alive)
        if h.in_block == BLOCK:
            h.learn(rules)
        return events

    def _aside(self, logs: Floats) -> Floats:
        """Logarithm of the share that each element's root mean square is of what is usual for the neighbours'."""
        usual = np.where(self.history["count"] >= self.rules.warmup, self.history["mean"], np.nan)
        return logs - self._half_logs - self._neighbours.mean(usual - self._half_logs)

    def _vanishing(
        self, step: int, norms: Floats, alive: Bools, warm: Bools, fallen: Floats, aside: Floats, census: Census | None
    ) -> list[Event]:
        """Of each tensor only the beginning is told."""
        rules, h = self.rules, self.history
        least = math.log(rules.fraction) if rules.fraction > 0 else -math.inf
        was = h["vanishing"] > 0
        bound = np.where(was, least + BACK, least)
        own, beside = warm & (fallen < bound), warm & (aside < bound)
        small = own | beside
        new = small & ~was
        h["vanishing"][:] = np.where(alive, small, was)
        if census is not None:
            fewer, subnormal = self._thin(alive, census)
            new |= (fewer | subnormal) & ~(h["thin"] > 0)
            h["thin"][:] = np.where(alive, fewer | subnormal, h["thin"])
        if not new.any():
            return []

        def why(i: int) -> str:
            if own[i]:
                return f"norm {norms[i]:.3g}, {math.exp(fallen[i]):.1g} of what it was"
            if beside[i]:
                return f"norm {norms[i]:.3g}, per element {math.exp(aside[i]):.1g} of its neighbours'"
            assert census is not None
            if fewer[i]:
                return f"{census.nonzero[i]:.2%} of its elements aren't 0, usually {h['nonzero'][i]:.2%}"
            return f"{census.subnormal[i]:.1%} of its elements are subnormal"

        return [self._event(step, VANISHING, why, new, -np.fmin(fallen, aside))]

    def _thin(self, alive: Bools, census: Census) -> tuple[Bools, Bools]:
        """Where too few elements are left that aren't 0, and where too many are subnormal."""
        usual = self.history["nonzero"]
        fewer = alive & (census.nonzero < self.rules.nonzero * usual)
        mixed = self.rules.alpha * usual + (1.0 - self.rules.alpha) * census.nonzero
        usual[:] = np.where(alive & ~fewer, np.where(np.isnan(usual), census.nonzero, mixed), usual)
        return fewer, alive & (census.subnormal > self.rules.subnormal)

    def _dead(self, step: int, norms: Floats) -> list[Event]:
        zeros = self.history["zeros"]
        zero = norms == 0
        zeros[:] = np.where(zero, zeros + 1, np.where(norms < 0, zeros, 0.0))
        dead = zero & (zeros == self.rules.dead_after)
        if not dead.any():
            return []
        return [self._event(step, DEAD, f"norm 0 in {self.rules.dead_after} records in a row", dead, None)]

    def _event(
        self, step: int, kind: str, why: str | Callable[[int], str], which: Bools, order: Floats | None
    ) -> Event:
        """The gravest tensor first; the reason is told of that one."""
        found = np.flatnonzero(which)
        if order is not None:
            found = found[np.argsort(-order[found], kind="stable")]
        reason = why if isinstance(why, str) else why(int(found[0]))
        return Event(step, kind, reason, tuple(self._names[i] for i in found.tolist()))


def settings(rules: FlagRules) -> dict[str, Any]:
    """For a file's header."""
    return {each.name: getattr(rules, each.name) for each in fields(rules)}
