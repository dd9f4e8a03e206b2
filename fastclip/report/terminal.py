"""A run in the terminal while it is recorded; needs rich."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fastclip.report.reading import GRAVE, Event, Reader, Row

SECONDS = 0.5  # between two looks at the file
WINDOW = 512  # records that the view tells of
BARS = "▁▂▃▄▅▆▇█"
COLOURS = {"bad": "red", "warn": "yellow", "": ""}


class Tail:
    """What is appended to a file, line by line; an unfinished line waits for its end.

    Attributes:
        cuts: how often the file was found to be another one: cut by a run that was resumed, or begun anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at, self._last = 0, b""
        self.cuts = 0

    def lines(self) -> Iterator[bytes]:
        """The lines that have come since the last call; from the start after a cut."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._at - len(self._last))
            if file.read(len(self._last)) != self._last:
                self._at, self._last = file.seek(0), b""
                self.cuts += 1
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._at, self._last = self._at + len(line), line
                yield line


class View:
    """The latest records."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tail = Tail(path)
        self._begin()

    def _begin(self) -> None:
        self.reader = Reader()
        self.rows: deque[Row] = deque(maxlen=WINDOW)
        self.events: deque[Event] = deque(maxlen=8)
        self.records = self.clipped = self.skipped = self.nonfinite = 0

    def look(self) -> None:
        """Takes in what has come."""
        cuts = self._tail.cuts
        lines = self._tail.lines()
        first = next(lines, None)
        if self._tail.cuts > cuts:
            self._begin()
        for row in self.reader.rows(lines if first is None else chain([first], lines)):
            self.rows.append(row)
            self.events.extend(row.events)
            self.records += 1
            self.clipped += row.clipped
            self.skipped += row.skipped
            self.nonfinite += row.nans + row.infs > 0

    def render(self, width: int) -> Group:
        """What is shown, for a terminal of ``width`` characters."""
        if not self.rows:
            what = "no record yet" if self.path.exists() else "no such file yet"
            return Group(
                Text(f"{self.path}: {what}"), *(Text(problem, style="dim") for problem in self.reader.problems())
            )
        last = self.rows[-1]
        facts = Table.grid(padding=(0, 2))
        for name, value in (
            ("step", f"{last.step:,}" + (f", fold {last.fold}" if last.fold else "")),
            ("norm", f"{last.total_norm:.4g}" + (f" (bound {last.max_norm:.4g})" if last.max_norm is not None else "")),
            ("loss", "-" if last.loss is None else f"{last.loss:.4g}"),
            ("worst", last.worst),
            ("clipped", f"{self.clipped:,} of {self.records:,} ({self.clipped / self.records:.1%})"),
            ("skipped", f"{self.skipped:,}; NaN or Inf in {self.nonfinite:,}"),
        ):
            facts.add_row(Text(name, style="dim"), Text(value))
        parts: list[RenderableType] = [
            facts,
            Text(sparkline([row.total_norm for row in self.rows], max(width - 6, 10)), style="cyan"),
        ]
        for event in self.events:
            which = f" ({', '.join(event.tensors[:2])}{', ...' if event.of > 2 else ''})" if event.tensors else ""
            text = Text(f"{event.step:>9,}  ", style="dim")
            text.append(f"{event.kind:<10}", style=COLOURS[GRAVE.get(event.kind, "")])
            text.append(f"  {event.reason}{which}")
            parts.append(text)
        parts += [Text(problem, style="dim") for problem in self.reader.problems()]
        return Group(Panel(Group(*parts), title=Text(str(self.path)), expand=True))


def sparkline(values: list[float], width: int) -> str:
    """One character for each few values: the largest of them, on a logarithmic scale; "!" where one is not finite."""
    each = -(-len(values) // width)
    pieces = [values[i : i + each] for i in range(0, len(values), each)]
    logs = [math.log(v) for v in values if 0 < v < math.inf]
    low, high = min(logs, default=0.0), max(logs, default=1.0)
    line = ""
    for piece in pieces:
        if not all(map(math.isfinite, piece)):
            line += "!"
        elif max(piece) <= 0:
            line += " "
        else:
            share = (math.log(max(piece)) - low) / max(high - low, 1e-9)
            line += BARS[min(int(share * len(BARS)), len(BARS) - 1)]
    return line


def follow(path: Path, once: bool = False, console: Console | None = None) -> int:
    """Shows the run until the user interrupts; 1 if there is nothing to show ``once``."""
    console = console or Console()
    view = View(path)
    if once:
        view.look()
        console.print(view.render(console.width))
        return 0 if view.records else 1
    try:
        with Live(view.render(console.width), console=console, auto_refresh=False) as live:
            while True:
                view.look()
                live.update(view.render(console.width), refresh=True)
                time.sleep(SECONDS)
    except KeyboardInterrupt:
        return 0
