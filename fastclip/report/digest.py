"""A run of any length -> a page's worth of numbers: memory is bounded, and no spike is lost."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fastclip.report.reading import Event, Reader, Row, lines_of

BINS = 1024  # of records, at least, once there are so many; at most twice that
CELLS = 1_500_000  # of the heat map
BLOCK = 256  # records that are joined at a time
EVENTS = 500  # that are kept from the beginning, and as many from the end
MISSING, ZERO, LOWEST, HIGHEST, INF, NAN = 0, 1, 2, 250, 254, 255  # codes of the heat map: the larger one is the graver

Floats = NDArray[np.float64]
Codes = NDArray[np.uint8]


class Bins:
    """Neighbouring records joined to bins, all of ``width`` records but the last; where their number reaches twice
    ``BINS``, each two become one.

    Attributes:
        width: records in a bin.
        values: name -> one number a bin.
        heat: ``[bins, tensors]`` float32: largest norm of each tensor; -1 where it had no gradient. NaN and Inf win.
    """

    # name -> (what a bin starts with, how two are joined)
    FIELDS: ClassVar[dict[str, tuple[float, Any]]] = {
        "first": (math.inf, np.minimum),
        "last": (-math.inf, np.maximum),
        "records": (0.0, np.add),
        "lowest": (math.inf, np.minimum),  # of the finite total norms
        "highest": (-math.inf, np.maximum),
        "logs": (0.0, np.add),  # of those above 0
        "positive": (0.0, np.add),
        "bound": (math.inf, np.minimum),
        "clipped": (0.0, np.add),
        "skipped": (0.0, np.add),
        "rolled_back": (0.0, np.add),
        "nonfinite": (0.0, np.add),
        "spikes": (0.0, np.add),
        "loss": (-math.inf, np.maximum),
    }

    def __init__(self) -> None:
        self.width, self.used, self._in_last = 1, 0, 0
        self.values = {name: np.full(2 * BINS, start) for name, (start, _) in self.FIELDS.items()}
        self.heat = np.full((2 * BINS, 0), -1.0, dtype=np.float32)

    def add(self, values: dict[str, Floats], heat: NDArray[np.float32]) -> None:
        """Takes in records: of each value one number a record; ``heat`` ``[records, tensors]``."""
        missing = heat.shape[1] - self.heat.shape[1]
        if missing:
            self.heat = np.pad(self.heat, ((0, 0), (0, missing)), constant_values=-1.0)
        at, count = 0, len(heat)
        while at < count:
            if self._in_last in (0, self.width):
                if self.used == 2 * BINS:
                    self.halve()
                    continue
                self.used, self._in_last = self.used + 1, 0
            # the records that fill up the last bin, or as many whole bins as there is room for
            free = 2 * BINS - self.used + 1
            whole = min((count - at) // self.width, free) if self._in_last == 0 else 0
            bins = max(whole, 1)
            taken = bins * self.width if whole else min(self.width - self._in_last, count - at)
            part = slice(at, at + taken)
            target = slice(self.used - 1, self.used - 1 + bins)
            for name, (_, join) in self.FIELDS.items():
                own = join.reduce(values[name][part].reshape(bins, -1), axis=1)
                self.values[name][target] = join(self.values[name][target], own)
            with np.errstate(invalid="ignore"):
                own_heat = np.maximum.reduce(heat[part].reshape(bins, taken // bins, heat.shape[1]), axis=1)
                self.heat[target] = np.maximum(self.heat[target], own_heat)
            self.used += bins - 1
            self._in_last = self.width if whole else self._in_last + taken
            at += taken

    def halve(self) -> None:
        """Joins each two neighbours."""
        pairs, rest = divmod(self.used, 2)
        for name, (start, join) in self.FIELDS.items():
            own = self.values[name]
            joined = join(own[0 : 2 * pairs : 2], own[1 : 2 * pairs : 2])
            own[:pairs], own[pairs : pairs + rest], own[pairs + rest :] = (
                joined,
                own[self.used - rest : self.used],
                start,
            )
        with np.errstate(invalid="ignore"):
            joined = np.maximum(self.heat[0 : 2 * pairs : 2], self.heat[1 : 2 * pairs : 2])
        self.heat[:pairs], self.heat[pairs : pairs + rest] = joined, self.heat[self.used - rest : self.used]
        self.heat[pairs + rest :] = -1.0
        self._in_last += 0 if rest else self.width
        self.used, self.width = pairs + rest, 2 * self.width


@dataclass
class Fold:
    """What there is to say of one fold."""

    steps: int = 0
    clipped: int = 0
    skipped: int = 0
    nonfinite: int = 0
    spikes: int = 0
    flagged: Counter[str] = field(default_factory=Counter)
    largest: Counter[str] = field(default_factory=Counter)

    @property
    def worst(self) -> str:
        """The tensor that was flagged most often as exploding or not finite; else the one most often the largest."""
        for counted in (self.flagged, self.largest):
            if counted:
                return counted.most_common(1)[0][0]
        return ""


@dataclass
class Tensor:
    """What there is to say of one tensor over the whole run."""

    name: str
    size: int
    largest: float  # finite norm
    largest_at: int
    typical: float  # geometric mean of the norms
    share: float | None  # mean of its part of the total norm to the power p; None where the parts have no such sum
    nonfinite: int  # records in which it held NaN or Inf, also where they became 0
    flags: Counter[str]

    @property
    def gravity(self) -> tuple[float, ...]:
        flags = self.flags
        return self.nonfinite, flags["exploding"], flags["vanishing"] + flags["dead"], self.share or 0.0, self.typical


class Digest:
    """What a report tells of a run.

    Attributes:
        reader: names, header, and what could not be read.
        records: how many there are.
        counts: kind of event -> how many; of all, also those that aren't kept.
        folds: by name, in order; one that is called "" without folds.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.reader = Reader()
        self.bins = Bins()
        self.records = 0
        self.counts: Counter[str] = Counter()
        self.folds: dict[str, Fold] = {}
        self._first_events: list[Event] = []
        self._last_events: deque[Event] = deque(maxlen=EVENTS)
        self._flags: dict[str, Counter[str]] = {}
        self._block: list[Row] = []
        self._sums: dict[str, Floats] = {
            name: np.empty(0) for name in ("largest", "at", "logs", "found", "share", "bad")
        }
        self._shared = 0  # records whose total norm can be shared out

    def read(self, lines: Iterable[bytes]) -> None:
        """Takes in lines of a file."""
        for row in self.reader.rows(lines):
            if len(self._block) == BLOCK or (self._block and row.norm_type != self._block[0].norm_type):
                self._join_block()
            self._block.append(row)
        self._join_block()

    @property
    def events(self) -> list[Event]:
        """Those that are kept: the first and the last ones."""
        return [*self._first_events, *self._last_events]

    @property
    def totals(self) -> Fold:
        total = Fold()
        for fold in self.folds.values():
            for name in ("steps", "clipped", "skipped", "nonfinite", "spikes"):
                setattr(total, name, getattr(total, name) + getattr(fold, name))
            total.flagged.update(fold.flagged)
            total.largest.update(fold.largest)
        return total

    def _join_block(self) -> None:
        rows, self._block = self._block, []
        if not rows:
            return
        norms = np.full((len(rows), len(self.reader.names)), -1.0, dtype=np.float32)
        for own, row in zip(norms, rows, strict=True):
            if row.places is None:
                own[: len(row.norms)] = row.norms
            else:
                own[row.places] = row.norms
        spikes = [any(event.kind == "exploding" for event in row.events) for row in rows]
        for row, spike in zip(rows, spikes, strict=True):
            self._take(row, spike)
        steps = np.array([row.step for row in rows], dtype=np.float64)
        totals = np.array([row.total_norm for row in rows])
        finite, positive = np.isfinite(totals), np.isfinite(totals) & (totals > 0)
        logs = np.log(totals, where=positive, out=np.zeros(len(rows)))
        bounds = [row.max_norm if row.max_norm is not None else math.nan for row in rows]
        losses = np.array([row.loss if row.loss is not None else math.nan for row in rows])
        values = {
            "first": steps,
            "last": steps,
            "records": np.ones(len(rows)),
            "lowest": np.where(finite, totals, math.inf),
            "highest": np.where(finite, totals, -math.inf),
            "logs": logs,
            "positive": positive.astype(np.float64),
            "bound": np.where(np.isfinite(bounds), bounds, math.inf),
            "clipped": np.array([float(row.clipped) for row in rows]),
            "skipped": np.array([float(row.skipped) for row in rows]),
            "rolled_back": np.array([float(row.rolled_back) for row in rows]),
            "nonfinite": np.array([float(row.nans + row.infs > 0) for row in rows]),
            "spikes": np.array(spikes, dtype=np.float64),
            "loss": np.where(np.isfinite(losses), losses, -math.inf),
        }
        self.bins.add(values, norms)
        self._sum_up(steps, totals, norms, rows[0].norm_type)

    def _take(self, row: Row, spike: bool) -> None:
        self.records += 1
        fold = self.folds.setdefault(row.fold, Fold())
        fold.steps += 1
        fold.clipped += row.clipped
        fold.skipped += row.skipped
        fold.nonfinite += row.nans + row.infs > 0
        fold.spikes += spike
        if row.worst:
            fold.largest[row.worst] += 1
        for event in row.events:
            self.counts[event.kind] += 1
            if len(self._first_events) < EVENTS:
                self._first_events.append(event)
            else:
                self._last_events.append(event)
            if event.kind in ("skip", "roll back"):
                continue
            for name in event.tensors:
                self._flags.setdefault(name, Counter())[event.kind] += 1
                if event.kind in ("exploding", "non-finite"):
                    fold.flagged[name] += 1

    def _sum_up(self, steps: Floats, totals: Floats, norms: NDArray[np.float32], norm_type: float) -> None:
        """Of each tensor over the whole run."""
        # the maximum of an inf-norm is no sum; a tensor of norm 0 or without gradient has its part, which is 0
        can_share = np.isfinite(totals) & (totals > 0) & (0 < norm_type < math.inf)
        self._shared += int(can_share.sum())
        sums = self._sums
        for name, known in sums.items():
            missing = norms.shape[1] - len(known)
            if missing:
                sums[name] = np.pad(known, (0, missing), constant_values=-1.0 if name == "largest" else 0.0)
        if not norms.shape[1]:
            return
        finite = np.isfinite(norms)
        known = np.where(finite, norms, -1.0)
        rows = known.argmax(axis=0)
        largest = known[rows, np.arange(norms.shape[1])]
        higher = largest > sums["largest"]
        sums["at"][higher] = steps[rows[higher]]
        sums["largest"][higher] = largest[higher]
        positive = known > 0
        with np.errstate(divide="ignore", invalid="ignore"):
            sums["logs"] += np.where(positive, np.log(known, dtype=np.float64), 0.0).sum(axis=0)
        if can_share.any():
            with np.errstate(over="ignore"):
                parts = (np.maximum(known, 0.0)[can_share] / totals[can_share, None]) ** norm_type
            sums["share"] += np.where(np.isfinite(parts), parts, 0.0).sum(axis=0)
        sums["found"] += positive.sum(axis=0)
        sums["bad"] += (~finite).sum(axis=0)

    def tensors(self) -> list[Tensor]:
        """All of them, in their order."""
        s, reader = self._sums, self.reader
        flags = {name: self._flags.get(name, Counter()) for name in reader.names}
        return [
            Tensor(
                name=name,
                size=reader.sizes[i],
                largest=max(s["largest"][i], 0.0),
                largest_at=int(s["at"][i]),
                typical=math.exp(s["logs"][i] / s["found"][i]) if s["found"][i] else 0.0,
                share=s["share"][i] / self._shared if self._shared else None,
                nonfinite=max(int(s["bad"][i]), flags[name]["non-finite"]),
                flags=flags[name],
            )
            for i, name in enumerate(reader.names[: len(s["largest"])])
        ]

    def fit(self) -> None:
        """Joins bins until the heat map is small enough for a page."""
        while self.bins.used * self.bins.heat.shape[1] > CELLS and self.bins.used > 1:
            self.bins.halve()

    def series(self) -> dict[str, Floats]:
        """One number a bin; NaN where there is none. ``middle``: of the norms above 0, or else 0."""
        used, values = self.bins.used, self.bins.values
        own = {name: values[name][:used] for name in Bins.FIELDS}
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            middle = np.exp(own["logs"] / own["positive"])
        # rounded, it could lie above the largest of its norms, and that be the largest number
        own["middle"] = np.where(own["positive"] > 0, np.minimum(middle, own["highest"]), own["highest"])
        return {name: np.where(np.isfinite(values), values, math.nan) for name, values in own.items()}

    def heat_map(self) -> tuple[Codes, float, float]:
        """``[tensors, bins]`` codes, and the decimal logarithms of the norms for which LOWEST and HIGHEST stand."""
        heat = self.bins.heat[: self.bins.used].T
        some = np.isfinite(heat) & (heat > 0)
        logs = np.log10(heat, where=some, out=np.zeros_like(heat))
        low, high = (float(logs[some].min()), float(logs[some].max())) if some.any() else (0.0, 1.0)
        if high - low < 1.0:
            low, high = (low + high) / 2 - 0.5, (low + high) / 2 + 0.5
        levels = np.rint((logs - low) / (high - low) * (HIGHEST - LOWEST)) + LOWEST
        codes = np.where(some, levels, np.where(heat == 0, ZERO, MISSING))
        codes = np.where(np.isposinf(heat), INF, np.where(np.isnan(heat), NAN, codes))
        return codes.astype(np.uint8), low, high


def digest_of(path: str | Path) -> Digest:
    """Reads a whole file."""
    path = Path(path)
    digest = Digest(path.name)
    with path.open("rb") as file:
        digest.read(lines_of(file))
    digest.fit()
    return digest
