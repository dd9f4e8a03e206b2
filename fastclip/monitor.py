"""Watching the gradients of a guarded optimizer: one record a step, flags, and sinks; no step waits for it."""

from __future__ import annotations

import atexit
import os
import re
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import torch

from fastclip.amp import GUARD
from fastclip.checks import whole
from fastclip.guard import Guard
from fastclip.ladder import Event
from fastclip.monitoring.flags import Census, FlagRules, Flags, History, settings
from fastclip.monitoring.found import Found
from fastclip.monitoring.places import Tensors
from fastclip.monitoring.records import FORMAT, VERSION, StepRecord, packed, spelled
from fastclip.monitoring.shipping import Shipment, Sighting, sighting
from fastclip.monitoring.sinks import Events, Sink, sink_of, tell_apart
from fastclip.record import Outcome, Record, Reports
from fastclip.tensors import GroupNames, Names, check_named, named
from fastclip.version import __version__

SECONDS = 1.0  # after which the next step sends what has been gathered, however little it is
SKIP_REASONS = {
    "nonfinite": "NaN or Inf in the gradients",
    "loss": "the loss that was observed",
    "policy": "decided by the policy",
    "scaler": "a GradScaler found Inf",
    "rank": "seen by this or another rank",
}
BY_GRADIENTS = {"nonfinite", "scaler", "rank"}  # those that NaN and Inf in the gradients lead to


class GradMonitor:
    """Records what every step of a guarded optimizer saw and did, flags gradients, and passes it all on.

    The numbers are those of the optimizer's one read. They stay on the gradients' device for some steps and then come
    to the host in one copy; no step waits for it. What a step left behind is sent ``buffer`` records later at most, or
    with the first step after a second.

    Args:
        opt: a :class:`fastclip.ClippedOptimizer`, or what :func:`fastclip.attach` returned.
        every: record each so many-th step.
        include: a regular expression: only tensors whose names it is found in have their own norms recorded.
        sinks: one or a list of: a path ending in ``.jsonl`` or ``.csv``, which is appended to; a TensorBoard
            ``SummaryWriter``; a wandb run; a function that gets each :class:`fastclip.monitoring.StepRecord`.
        on_event: a function that gets each :class:`fastclip.Event`: flags, skips, roll backs, cut and restored learning
            rates.
        names: a module, or (name, parameter) pairs, where the optimizer wasn't given named parameters.
        flags: when a gradient is flagged: a :class:`fastclip.monitoring.FlagRules`.
        census_every: in each so many-th record the gradients are read once more, for their largest magnitudes and for
            the shares of zeros and of subnormal numbers; 1 for every record, None for never.
        buffer: how many records are gathered before they are sent to the host.

    Attributes:
        step: how many steps it has seen, those before a resume included.

    Raises:
        TypeError: an ``opt`` or a sink of the wrong kind.
        ValueError: a path with another ending, or a file there that is not a monitor's.
        OSError: a path that can't be opened.

    Example:
        >>> import torch, fastclip
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = fastclip.ClippedOptimizer(torch.optim.AdamW(model.parameters()), max_norm=1.0)
        >>> with fastclip.GradMonitor(opt, sinks=lambda r: print(r.step, round(r.total_norm, 3)), names=model):
        ...     model(torch.ones(2, 3)).sum().backward()
        ...     opt.step()
        1 4.0
    """

    def __init__(
        self,
        opt: Reports,
        *,
        every: int = 1,
        include: str | None = None,
        sinks: Any = (),
        on_event: Callable[[Event], object] | None = None,
        names: Names = None,
        flags: FlagRules | None = None,
        census_every: int | None = 100,
        buffer: int = 64,
    ) -> None:
        self._every, self._buffer = whole("every", every, least=1), whole("buffer", buffer, least=1)
        self._census_every = None if census_every is None else whole("census_every", census_every, least=1)
        if include is not None and not isinstance(include, str):
            raise TypeError(f"include: expected a regular expression, got {type(include).__name__}")
        try:
            self._include = None if include is None else re.compile(include)
        except re.error as error:
            raise ValueError(f"include: {include!r} is no regular expression: {error}") from error
        if on_event is not None and not callable(on_event):
            raise TypeError(f"on_event: expected a function, got {type(on_event).__name__}")
        if flags is not None and not isinstance(flags, FlagRules):
            raise TypeError(f"flags: expected a fastclip.monitoring.FlagRules, got {type(flags).__name__}")
        self._flags = Flags(flags or FlagRules())
        self.step = 0
        self._fold: str | None = None
        self._waiting: list[Sighting] = []
        self._under_way: deque[Shipment] = deque()
        self._sent_at = time.monotonic()
        self._resumed_at: int | None = None
        self._announced = -1  # tensors that the sinks know of; -1: not even the header
        self._told: dict[str, Any] = {}  # by the latest header, of the optimizer
        self._record: Record | None = None  # of what is watched
        self._sinks: list[Sink] = []
        try:
            for each in sinks if isinstance(sinks, (list, tuple)) else [sinks]:
                self._sinks.append(sink_of(each))
            self._watch(opt, names)
        except BaseException:
            for sink in self._sinks:
                sink.close()
            raise
        if on_event is not None:
            self._sinks.append(Events(on_event))
        tell_apart(self._sinks)
        self.step = max((sink.step for sink in self._sinks), default=0)
        self._is_open, self._pid = True, os.getpid()
        self._at_exit = _at_the_end_of(self)

    def _watch(self, opt: Any, names: Names) -> None:
        """From now on it, instead of what was watched before."""
        guard = opt if isinstance(opt, Guard) else vars(opt).get(GUARD) if isinstance(opt, Reports) else None
        if not isinstance(guard, Guard):
            raise TypeError(
                f"opt: expected a fastclip.ClippedOptimizer or what fastclip.attach returned, got {type(opt).__name__}"
            )
        own = named(names)
        known = GroupNames(list(enumerate(guard.optimizer.param_groups)), guard.names)
        check_named(own, known.parameters)
        self._unwatch()
        self._guarded = opt
        self._flags = Flags(self._flags.rules)
        self._tensors = Tensors(self._include, own)
        self._tensors.add(known.parameters, known)
        self._know_tensors()
        if self._include is not None and self._tensors.names and not self._names:
            warnings.warn(
                f"include: {self._include.pattern!r} is found in no tensor's name, so no norm of a single tensor is "
                f"recorded or flagged; the names are {', '.join(self._tensors.names[:3])}, ...",
                RuntimeWarning,
                stacklevel=2,
            )
        self._policy = repr(self._guarded.policy)  # now: a bound that is a tensor would have to be waited for
        self._record = opt._record
        self._record.listeners.append(self._listen)

    def _unwatch(self) -> None:
        if self._record is not None and self._listen in self._record.listeners:
            self._record.listeners.remove(self._listen)

    def _know_tensors(self) -> None:
        tensors = self._tensors
        self._all_included = len(tensors.included) == len(tensors.names)
        self._included = np.array(tensors.included, dtype=np.intp)
        self._sizes = np.array(tensors.sizes, dtype=np.float64)
        self._names = [tensors.names[i] for i in tensors.included]
        sizes, dims = ([of[i] for i in tensors.included] for of in (tensors.sizes, tensors.dims))
        self._flags.know(self._names, sizes, dims)

    def _check_open(self) -> None:
        if not self._is_open:
            raise RuntimeError("this GradMonitor is closed: make another one")

    @property
    def lost(self) -> dict[str, int]:
        """For each sink how many records, or events, did not get there; of sinks of one name the second ends in 2."""
        return {sink.name: sink.lost for sink in self._sinks}

    def _listen(self, outcome: Outcome) -> None:
        """Takes in one step; called by the optimizer in the middle of it."""
        self.step += 1
        if self.step % self._every == 0:
            is_census = self._census_every is not None and (self.step // self._every - 1) % self._census_every == 0
            self._waiting.append(sighting(outcome, self.step, time.time(), self._fold, is_census))
        now = time.monotonic()
        if len(self._waiting) >= self._buffer or (self._waiting and now - self._sent_at >= SECONDS):
            self._send(now)
        self._collect(wait=False)

    def _send(self, now: float) -> None:
        self._under_way.append(Shipment(self._waiting.copy()))
        self._waiting.clear()
        self._sent_at = now

    def _collect(self, wait: bool) -> None:
        """Records what has arrived, or waits for all of it."""
        while self._under_way and (wait or self._under_way[0].has_arrived):
            shipment = self._under_way.popleft()
            batch = self._records_of(shipment)
            self._announce()
            for sink in self._sinks:
                sink.take(batch)

    @property
    def _rules(self) -> dict[str, Any]:
        """What a header tells of the optimizer."""
        return {
            "policy": self._policy,
            "nonfinite": self._guarded.nonfinite,
            "norm_type": spelled(float(self._guarded.policy.norm_type)),
        }

    def _announce(self) -> None:
        """Tells the sinks of tensors that they don't know yet."""
        if self._announced == len(self._names):
            return
        header: dict[str, Any] = {}
        if self._announced < 0:
            self._told = self._rules
            header = {
                "format": FORMAT,
                "version": VERSION,
                "fastclip": __version__,
                "torch": torch.__version__,
                "time": round(time.time(), 3),
                **self._told,
                "every": self._every,
                "flags": {name: spelled(value) for name, value in settings(self._flags.rules).items()},
            }
            if self._resumed_at is not None:
                header["resumed_at"], self._resumed_at = self._resumed_at, None
        sizes = [self._tensors.sizes[i] for i in self._tensors.included]
        for sink in self._sinks:
            sink.start(header, self._names, sizes)
        self._announced = len(self._names)

    def _records_of(self, shipment: Shipment) -> list[StepRecord]:
        sightings = shipment.sightings
        placed = [[self._tensors.places(seen) for seen in each.seen] for each in sightings]
        if len(self._tensors.names) > len(self._sizes):
            self._know_tensors()
        norms = np.full((len(sightings), len(self._sizes)), -1.0)  # where there was no gradient
        found = [
            Found(each, own_norms, places, leaves)
            for each, own_norms, places, leaves in zip(sightings, norms, placed, shipment.unpack(), strict=True)
        ]
        bad = {i: each.bad for i, each in enumerate(found) if each.bad is not None}
        censuses = {i: each.census() for i, each in enumerate(found) if each.zeros is not None}
        if not self._all_included:
            bad = {i: own for i, which in bad.items() if (own := which[self._included]).any()}
            censuses = {i: Census(*(part[self._included] for part in census)) for i, census in censuses.items()}
            norms = norms[:, self._included]
        events = self._flags.look([each.step for each in sightings], norms, bad, censuses)
        narrow = packed(norms)
        absent = norms < 0
        gaps = absent.any()
        batch = []
        for i, each in enumerate(found):
            record = self._record_of(each)
            record.events = events[i] + record.events
            record.tensor_norms = narrow[i]
            if gaps and absent[i].any():
                record.columns = np.flatnonzero(~absent[i]).tolist()
                record.tensor_norms = narrow[i][~absent[i]]
            batch.append(record)
        return batch

    def _record_of(self, found: Found) -> StepRecord:
        """All but the norms of the tensors and what the flags say."""
        sighting, skipped = found.sighting, found.skipped
        clipped = found.clipped and not skipped
        total = found.total_norm
        happened = not skipped and not sighting.rolled_back
        clipped_norm = (found.clipped_norm if clipped else total) if happened else None
        zeros, subnormals = found.shares(self._sizes)
        names = self._tensors.names
        events = []
        if skipped:
            why = ", ".join(SKIP_REASONS[name] for name in found.reasons)
            if "loss" in found.reasons:
                why += f" ({found.loss:.4g})"
            is_why = found.bad is not None and not BY_GRADIENTS.isdisjoint(found.reasons)
            bad = np.flatnonzero(found.bad).tolist() if is_why else ()  # type: ignore[arg-type]
            events.append(Event(sighting.step, "skip", why, tuple(names[i] for i in bad)))
        events += [Event(sighting.step, each.kind, each.reason) for each in sighting.rungs]
        return StepRecord(
            step=sighting.step,
            time=round(sighting.time, 3),
            total_norm=total,
            clipped_norm=clipped_norm,
            max_norm=clipped_norm if found.max_norm is None and clipped and found.is_one_number else found.max_norm,
            clip_coef=found.clip_coef if clipped else 1.0,
            clipped=clipped,
            skipped=skipped,
            reason="+".join(found.reasons) if skipped else "",
            rolled_back=sighting.rolled_back,
            nans=found.nans,
            infs=found.infs,
            worst=None if found.worst is None else names[found.worst],
            max_abs=found.max_abs,
            zeros=zeros,
            subnormals=subnormals,
            loss=found.loss,
            lr=found.lrs,
            fold=sighting.fold,
            events=events,
            names=self._names,
        )

    def flush(self) -> None:
        """Brings everything so far to the sinks. Waits for the device."""
        if self._waiting:
            self._send(time.monotonic())
        self._collect(wait=True)

    def reset(self, fold: object = None, opt: Reports | None = None, names: Names = None) -> None:
        """Begins another fold: the flags forget the past; steps are counted on. Waits for the device.

        Args:
            fold: name of the fold, by which the report tells them apart.
            opt: the optimizer of the new fold, if it is another one.
            names: as for the monitor; of ``opt``.
        """
        self._check_open()
        self.flush()
        if opt is not None:
            self._watch(opt, names)
            self._announced = min(self._announced, 0) if self._rules == self._told else -1
        self._fold = None if fold is None else str(fold)
        self._flags.reset()
        for sink in self._sinks:
            sink.fold(self.step, self._fold or "")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the step, the fold, and what the flags know. Waits for the device."""
        self.flush()
        return {
            "step": self.step,
            "fold": self._fold,
            "names": list(self._names),
            "flags": self._flags.history.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on after the step of ``state_dict``: records of later steps, which will be made again, leave the files.

        What the flags know is taken over only for the same tensors.

        Raises:
            ValueError: it isn't what ``state_dict`` of a monitor gave. Nothing was changed.
            RuntimeError: the monitor is closed.
        """
        self._check_open()
        if wrong := _what_is_wrong(state_dict):
            raise ValueError(f"this is no state of a GradMonitor: {wrong}. Nothing was changed")
        self.flush()
        if state_dict["names"] == self._names:
            self._flags.history.load_state_dict(state_dict["flags"])
        self.step, self._fold = int(state_dict["step"]), state_dict["fold"]
        self._resumed_at, self._announced = self.step, -1
        for sink in self._sinks:
            sink.forget(self.step)

    def close(self) -> None:
        """Flushes, closes the files, and leaves the optimizer alone. Waits for the device."""
        if not self._is_open:
            return
        self._is_open = False
        atexit.unregister(self._at_exit)
        self._unwatch()
        self.flush()
        for sink in self._sinks:
            sink.end()

    def __enter__(self) -> GradMonitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _what_is_wrong(state_dict: dict[str, Any]) -> str:
    """Of what should be the state of a monitor; "" if nothing is."""
    if missing := {"step", "fold", "names", "flags"} - state_dict.keys():
        return f"{', '.join(sorted(missing))} missing"
    try:
        whole("step", state_dict["step"])
        History.check_state_dict(state_dict["flags"], len(state_dict["names"]))
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def _at_the_end_of(monitor: GradMonitor) -> Callable[[], None]:
    """Has it closed when the process that made it ends, a forked child has a copy; returns what atexit will call.

    One that nobody holds before that only tells of its loss: a destructor may run in any thread, in the middle of
    anything, which is no place to write to sinks.
    """
    waiting, under_way = monitor._waiting, monitor._under_way

    def at_exit() -> None:
        here = this()
        if here is not None and os.getpid() == here._pid:
            here.close()

    def when_collected(_: object) -> None:
        atexit.unregister(at_exit)
        if waiting or under_way:
            warnings.warn(
                "a GradMonitor that nobody had closed is gone, with its latest records: use a `with` block, or close()",
                RuntimeWarning,
                stacklevel=2,
            )

    this = weakref.ref(monitor, when_collected)
    return atexit.register(at_exit)
