"""A run in the terminal while it is recorded; needs rich."""

from __future__ import annotations

import math
import re
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
ASCII_BARS = "_.-=+*#@"  # for a terminal that has no others
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # what would command the terminal, or can't be encoded
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

    def look(self, seconds: float = math.inf) -> bool:
        """Takes in what has come, for about so long; returns whether that was all."""
        end = time.monotonic() + seconds
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
            if time.monotonic() >= end:
                return False
        return True

    def render(self, width: int, bars: str = BARS) -> Group:
        """What is shown, for a terminal of ``width`` characters."""
        problems = [_text(problem, "dim") for problem in self.reader.problems()]
        if not self.rows:
            what = "no record yet" if self.path.exists() else "no such file yet"
            return Group(_text(f"{self.path}: {what}"), *problems)
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
            facts.add_row(_text(name, "dim"), _text(value))
        parts: list[RenderableType] = [
            facts,
            Text(sparkline([row.total_norm for row in self.rows], max(width - 6, 10), bars), style="cyan"),
        ]
        for event in self.events:
            which = f" ({', '.join(event.tensors[:2])}{', ...' if event.of > 2 else ''})" if event.tensors else ""
            text = _text(f"{event.step:>9,}  ", "dim")
            text.append_text(_text(f"{event.kind:<10}", COLOURS[GRAVE.get(event.kind, "")]))
            text.append_text(_text(f"  {event.reason}{which}"))
            parts.append(text)
        return Group(Panel(Group(*parts, *problems), title=_text(str(self.path)), expand=True))


def _text(words: str, style: str = "") -> Text:
    """Words of a file, which may hold anything."""
    return Text(CONTROL.sub("\N{REPLACEMENT CHARACTER}", words), style)


def sparkline(values: list[float], width: int, bars: str = BARS) -> str:
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
            line += bars[min(int(share * len(bars)), len(bars) - 1)]
    return line


def follow(path: Path, once: bool = False, console: Console | None = None) -> int:
    """Shows the run until the user interrupts; 1 if there is nothing to show ``once``."""
    console = console or Console()
    bars = ASCII_BARS if console.options.ascii_only else BARS
    view = View(path)
    if once:
        view.look()
        console.print(view.render(console.width, bars))
        return 0 if view.records else 1
    try:
        is_all = view.look(SECONDS)
        with Live(view.render(console.width, bars), console=console, auto_refresh=False) as live:
            while True:
                if is_all:
                    time.sleep(SECONDS)
                is_all = view.look(SECONDS)
                live.update(view.render(console.width, bars), refresh=True)
    except KeyboardInterrupt:
        return 0
