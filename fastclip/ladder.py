"""What happens after skipped steps: a smaller learning rate, a way back, an error; and a log of it all."""

from __future__ import annotations

import copy
import operator
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastclip.checks import number, positive, real, whole
from fastclip.policies.moments import Learner
from fastclip.tensors import local

EVENTS = 1000  # that are kept


class Event(NamedTuple):
    """One line of the log.

    Attributes:
        step: how many steps had been asked for, this one included.
        kind: ``"skip"``, ``"lr cut"``, ``"lr restored"``, ``"roll back"``; a monitor also tells of ``"non-finite"``,
            ``"exploding"``, ``"vanishing"`` and ``"dead"`` gradients.
        reason: why, in words.
        tensors: names of the gradients that held NaN or Inf, if that was the reason and the host knew it at once; of
            those that a monitor has flagged.
    """

    step: int
    kind: str
    reason: str
    tensors: tuple[str, ...] = ()

    def __str__(self) -> str:
        which = f" ({', '.join(self.tensors[:3])}{', ...' if len(self.tensors) > 3 else ''})" if self.tensors else ""
        return f"step {self.step}: {self.kind}: {self.reason}{which}"


class SpikeBackoff:
    """Cuts the learning rate of every group after bad steps, and brings it back after good ones.

    It lives beside any LR scheduler: the groups' ``lr`` is multiplied during the step, and only then.

    Args:
        factor: of the learning rate at each cut, between 0 and 1.
        patience: skipped steps in a row that lead to a cut.
        recover: good steps in a row after which one cut is taken back.
        least: the learning rate is never multiplied by less than this.

    Attributes:
        lr_factor: what the learning rates are multiplied by now.
    """

    def __init__(self, factor: float = 0.5, *, patience: int = 3, recover: int = 100, least: float = 1e-3) -> None:
        self.factor, self.least = real("factor", factor), real("least", least)
        if not 0.0 < self.factor < 1.0 or not 0.0 < self.least < 1.0:
            raise ValueError(f"factor and least must lie between 0 and 1, got {factor} and {least}")
        self.patience, self.recover = whole("patience", patience, 1), whole("recover", recover, 1)
        self._cuts, self._bad, self._good = 0, 0, 0

    @property
    def lr_factor(self) -> float:
        return self.factor**self._cuts

    def bad(self) -> bool:
        """A step was skipped; is that a cut?"""
        self._good, self._bad = 0, self._bad + 1
        if self._bad < self.patience or self.lr_factor * self.factor < self.least:
            return False
        self._cuts, self._bad = self._cuts + 1, 0
        return True

    def good(self) -> bool:
        """A step was made; does that take a cut back?"""
        self._bad = 0
        if self._cuts == 0:
            return False
        self._good += 1
        if self._good < self.recover:
            return False
        self._cuts, self._good = self._cuts - 1, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"cuts": self._cuts, "bad": self._bad, "good": self._good}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._cuts, self._bad, self._good = (int(state_dict[key]) for key in ("cuts", "bad", "good"))


class reduced_lr:
    """During the ``with`` block every group's ``lr`` is multiplied; afterwards it is what it was."""

    def __init__(self, groups: list[dict[str, Any]], factor: float) -> None:
        self._groups, self._factor = [group for group in groups if "lr" in group], factor

    def __enter__(self) -> None:
        self._before = [group["lr"] for group in self._groups]
        for group in self._groups:
            group["lr"] = group["lr"] * self._factor

    def __exit__(self, *exception: Any) -> None:
        for group, lr in zip(self._groups, self._before, strict=True):
            group["lr"] = lr


class Snapshot:
    """Parameters and optimizer state as they were, in one flat buffer per device and dtype."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._rest: dict[Tensor, dict[str, Any]] = {}
        self._shape: list[tuple[Any, ...]] = []
        self._parameters: list[Tensor] = []  # held, so that no other one has its id
        self.taken_at: int | None = None

    @property
    def nbytes(self) -> int:
        """Memory it holds, in bytes."""
        return sum(buffer.nbytes for buffer in self._buffers.values()) + _nbytes(list(self._rest.values()))

    def fits(self, optimizer: Optimizer) -> bool:
        """Whether it is of the parameters that the optimizer has by now."""
        now = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return len(now) == len(self._parameters) and all(map(operator.is_, now, self._parameters))

    def take(self, optimizer: Optimizer, step: int) -> None:
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        sources = dict(_tensors(optimizer))
        shape = [(key, t.device, t.dtype, t.shape) for key, t in sources.items()]
        if shape != self._shape:
            sizes: dict[tuple[torch.device, torch.dtype], int] = {}
            for t in sources.values():
                sizes[t.device, t.dtype] = sizes.get((t.device, t.dtype), 0) + t.numel()
            self._buffers = {kind: torch.empty(n, dtype=kind[1], device=kind[0]) for kind, n in sizes.items()}
            self._shape = shape
        for view, source in zip(self._views(), sources.values(), strict=True):
            view.copy_(source)
        # what isn't a tensor: numbers, and the lists in which LBFGS keeps its history and which it changes in place
        self._rest = {
            p: {name: copy.deepcopy(value) for name, value in state.items() if not isinstance(value, Tensor)}
            for p, state in optimizer.state.items()
        }
        self.taken_at = step

    def restore(self, optimizer: Optimizer) -> None:
        """Writes everything back in place; state that didn't exist then goes. Parameters that weren't there then, and
        their state, stay as they are."""
        saved = dict(zip((key for key, *_ in self._shape), self._views(), strict=True))
        for key, tensor in _tensors(optimizer):
            if key in saved:
                tensor.copy_(saved[key])
        for parameter in list(optimizer.state):
            if isinstance(parameter, Tensor) and (id(parameter), "") not in saved:
                continue
            if parameter not in self._rest:
                del optimizer.state[parameter]
                continue
            state = optimizer.state[parameter]
            for name in [name for name, value in state.items() if isinstance(value, Tensor)]:
                if (id(parameter), name) not in saved:
                    del state[name]
            state.update(copy.deepcopy(self._rest[parameter]))

    def _views(self) -> Iterator[Tensor]:
        used = dict.fromkeys(self._buffers, 0)
        for _, device, dtype, shape in self._shape:
            begin = used[device, dtype]
            used[device, dtype] += shape.numel()
            yield self._buffers[device, dtype][begin : used[device, dtype]].view(shape)


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_nbytes, value)) if isinstance(value, (list, tuple)) else 0


def _tensors(optimizer: Optimizer) -> Iterator[tuple[Any, Tensor]]:
    """Everything a step moves, by identity of the parameter and name: the parameters, then their state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield (id(parameter), ""), local(parameter.detach())
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                yield (id(parameter), name), local(value)


class Rollback:
    """Goes back to an in-memory snapshot of parameters and optimizer state when skipping doesn't help.

    Args:
        every: good steps between two snapshots. Other steps cost nothing.
        after: skipped steps in a row that lead back.

    A snapshot is taken between two steps, of parameters that are finite as far as the host knows; state that an
    optimizer keeps in its param groups (schedule-free ones) is not in it. It is not saved with the optimizer: a resumed
    run takes its own at its first step. On an accelerator skips are answered two steps late.

    Attributes:
        snapshot: the latest one; ``snapshot.nbytes`` says its memory: parameters plus optimizer state.
    """

    def __init__(self, every: int = 100, *, after: int = 10) -> None:
        self.every, self.after = whole("every", every, 1), whole("after", after, 1)
        self.forget()

    def forget(self) -> None:
        """Without a snapshot, until the next one is taken."""
        self.snapshot = Snapshot()
        self._good, self._bad = 0, 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "snapshot": Snapshot(), "_good": 0, "_bad": 0}  # a copy takes its own

    def wants_snapshot(self, optimizer: Optimizer) -> bool:
        if self._bad:
            return False
        return self.snapshot.taken_at is None or self._good >= self.every or not self.snapshot.fits(optimizer)

    def take(self, optimizer: Optimizer, step: int) -> None:
        self.snapshot.take(optimizer, step)
        self._good = 0

    def good(self) -> None:
        self._good, self._bad = self._good + 1, 0

    def bad(self) -> bool:
        """A step was skipped; is it time to go back?"""
        self._bad += 1
        if self._bad < self.after or self.snapshot.taken_at is None:
            return False
        self._bad = 0
        return True


class LossWatch(Learner):
    """Looks at the loss: one that isn't finite, or lies far above the usual, is a reason to skip the step.

    Args:
        k: deviations above the running mean from which on a loss is a spike; None minds only NaN and Inf.
        alpha: decay of mean and variance.
        warmup: losses that are only learned from; at least the first is.
        floor: the deviation is never taken for less than this share of the mean's magnitude.
    """

    def __init__(self, k: float | None = None, *, alpha: float = 0.97, warmup: int = 25, floor: float = 0.01) -> None:
        super().__init__(alpha, warmup)
        self.k, self.floor = None if k is None else positive("k", k), number("floor", floor)

    def is_bad(self, loss: Tensor) -> Tensor:
        """0-d bool, on the loss's device."""
        self.to(loss.device)
        value = loss.detach().reshape(()).to(self.mean)
        finite = torch.isfinite(value)
        if self.k is None:
            return ~finite
        warm = self.is_warm
        deviation = torch.maximum(self.var.sqrt(), self.floor * self.mean.abs())
        largest = torch.where(warm, self.mean + self.k * deviation, torch.inf)
        self.learn(torch.minimum(value, largest), finite, warm)
        return ~finite | (value > largest)


class Ladder:
    """Feeds what the host learns of skipped steps to the rungs, in order, and logs what they do."""

    def __init__(self, backoff: SpikeBackoff | None, rollback: Rollback | None) -> None:
        self.backoff, self.rollback = backoff, rollback
        self.events: deque[Event] = deque(maxlen=EVENTS)
        self.latest: list[Event] = []  # what the latest climb did, but for the skips
        self._steps, self._skipped = 0, 0

    @property
    def lr_factor(self) -> float:
        return 1.0 if self.backoff is None else self.backoff.lr_factor

    def climb(
        self,
        optimizer: Optimizer,
        steps: int,
        skipped: int,
        in_a_row: int,
        reason: Callable[[], tuple[str, tuple[str, ...]]],
    ) -> bool:
        """Takes in the counts as the host knows them now. True if it went back: this step must not happen.

        ``reason`` is asked only when a step was skipped. Of steps that became known together the ``in_a_row`` bad
        ones came last; of the others the bad ones are taken to have come first.
        """
        self.latest = []
        bad = skipped - self._skipped
        good = steps - self._steps - bad
        last = min(in_a_row, bad)
        self._steps, self._skipped = steps, skipped
        went_back = self._bad(optimizer, steps, bad - last, reason)
        self._good(steps, good)
        return self._bad(optimizer, steps, last, reason) or went_back

    def _good(self, steps: int, count: int) -> None:
        for _ in range(count):
            if self.rollback is not None:
                self.rollback.good()
            if self.backoff is not None and self.backoff.good():
                self._log(steps, "lr restored", f"{self.backoff.recover} good steps; factor {self.backoff.lr_factor:g}")

    def _bad(
        self, optimizer: Optimizer, steps: int, count: int, reason: Callable[[], tuple[str, tuple[str, ...]]]
    ) -> bool:
        went_back = False
        for _ in range(count):
            self.events.append(Event(steps, "skip", *reason()))
            if self.backoff is not None and self.backoff.bad():
                self._log(steps, "lr cut", f"{self.backoff.patience} bad steps; factor {self.backoff.lr_factor:g}")
            if self.rollback is not None and self.rollback.bad():
                self.rollback.snapshot.restore(optimizer)
                went_back = True
                at = self.rollback.snapshot.taken_at
                self._log(steps, "roll back", f"{self.rollback.after} bad steps; back to the snapshot of step {at}")
        return went_back

    def wants_snapshot(self, optimizer: Optimizer) -> bool:
        return self.rollback is not None and self.rollback.wants_snapshot(optimizer)

    def take_snapshot(self, optimizer: Optimizer) -> None:
        assert self.rollback is not None
        self.rollback.take(optimizer, self._steps)

    def _log(self, step: int, kind: str, reason: str) -> None:
        self.latest.append(Event(step, kind, reason))
        self.events.append(self.latest[-1])
