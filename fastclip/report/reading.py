"""Lines of a file -> records; what can't be read is told, not raised."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from fastclip.monitoring import records
from fastclip.monitoring.records import Packed, decoded, number

LONGEST = 1 << 26  # bytes of a line; the norms of ten million tensors
GRAVE = {  # kinds of events
    "non-finite": "bad",
    "skip": "bad",
    "roll back": "bad",
    "lr cut": "warn",
    "exploding": "warn",
    "vanishing": "warn",
    "dead": "warn",
}


class Event(NamedTuple):
    """One event as the file has it.

    Attributes:
        of: how many tensors it is about; ``tensors`` may name only the first of them.
    """

    step: int
    fold: str
    kind: str
    reason: str
    tensors: list[str]
    of: int


@dataclass(slots=True)
class Row:
    """One record as the report needs it; ``places`` are those of its norms in ``Reader.names``, None for 0, 1, ..."""

    step: int
    fold: str
    total_norm: float
    max_norm: float | None
    clipped: bool
    skipped: bool
    rolled_back: bool
    nans: int
    infs: int
    loss: float | None
    worst: str
    norm_type: float
    events: list[Event]
    norms: Packed
    places: list[int] | None


@dataclass
class Reader:
    """Reads lines and remembers what was wrong with them.

    Attributes:
        names, sizes: of all tensors so far; a tensor of the same name after a resume is the same.
        header: the latest.
        norm_type: p of the norms; what the latest header says, or else 2.
        lost: records that the monitor itself couldn't write.
    """

    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    header: dict[str, Any] = field(default_factory=dict)
    norm_type: float = 2.0
    lost: int = 0
    _places: list[int] | None = None  # of the latest list of tensors; None where that is ``names`` itself
    _known: dict[str, int] = field(default_factory=dict)
    _listed: int = 0
    _latest: int = 0
    _lines: int = 0
    _wrong: Counter[str] = field(default_factory=Counter)
    _where: dict[str, int] = field(default_factory=dict)  # the first line of each

    def rows(self, lines: Iterable[bytes]) -> Iterator[Row]:
        """The records among the lines."""
        for text in lines:
            self._lines += 1
            if text.isspace() or not text:
                continue
            try:
                row = self._row(json.loads(text))
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
                self._note(_why(text, error))
                continue
            if row is not None:
                yield row

    def problems(self) -> list[str]:
        """What was not readable, in words."""
        told = []
        for what, count in self._wrong.items():
            where = self._where[what]
            lines = f"line {where:,}" if count == 1 else f"{count:,} lines, the first of them {where:,}"
            told.append(f"{what} ({lines})")
        if self.lost:
            told.append(f"the monitor could not write {self.lost:,} records (a full disk?); they are missing here")
        if not self.header and self._lines:
            told.append("there is no header: this may not be a file of a fastclip monitor")
        return told

    def _note(self, what: str) -> None:
        self._wrong[what] += 1
        self._where.setdefault(what, self._lines)

    def _row(self, content: Any) -> Row | None:
        if not isinstance(content, dict):
            raise TypeError("not an object")
        kind = content.get("kind")
        if kind == records.STEP:
            return self._step(content)
        if kind == records.HEADER:
            self._take_header(content)
        elif kind == records.TENSORS:
            self._take_tensors(content)
        elif kind == records.LOST:
            self.lost += int(number(content["records"]))
        elif kind != records.FOLD:  # which the records tell themselves
            self._note("lines of a kind that is not known here")
        return None

    def _take_header(self, header: dict[str, Any]) -> None:
        if header.get("format") != records.FORMAT:
            self._note("a header of another format")
            return
        self.header = header
        version = header.get("version")
        if version != records.VERSION:
            self._note(
                f"version {repr(version)[:20]} of the format, where this program knows {records.VERSION}: shown is "
                "what they have in common; a newer fastclip may read more"
            )
        self.norm_type = number(header.get("norm_type", 2.0))

    def _take_tensors(self, content: dict[str, Any]) -> None:
        names, sizes = content["names"], content["sizes"]
        if not isinstance(names, list) or not isinstance(sizes, list) or len(names) != len(sizes):
            raise ValueError("a list of tensors that is none")
        sizes = [int(number(size)) for size in sizes]
        names = [str(name) for name in names]
        for name, size in zip(names, sizes, strict=True):
            if name not in self._known:
                self._known[name] = len(self.names)
                self.names.append(name)
                self.sizes.append(size)
        places = [self._known[name] for name in names]
        self._places = None if places == list(range(len(places))) else places
        self._listed = len(places)

    def _step(self, content: dict[str, Any]) -> Row | None:
        norms = decoded(content["tensor_norms"])
        columns = content.get("columns")
        if columns is None:
            if len(norms) > self._listed:
                raise ValueError("more norms than tensors")
            places = None if self._places is None else self._places[: len(norms)]
        else:
            fits = all(type(column) is int and 0 <= column < self._listed for column in columns)
            if len(columns) != len(norms) or not fits:
                raise ValueError("columns that don't fit the norms")
            places = [column if self._places is None else self._places[column] for column in columns]
        step, fold = int(number(content["step"])), str(content.get("fold", ""))
        max_norm, loss = content.get("max_norm"), content.get("loss")
        row = Row(
            step=step,
            fold=fold,
            total_norm=number(content["total_norm"]),
            max_norm=None if max_norm is None else number(max_norm),
            clipped=content.get("clipped", False) is True,
            skipped=content.get("skipped", False) is True,
            rolled_back=content.get("rolled_back", False) is True,
            nans=int(number(content.get("nans", 0))),
            infs=int(number(content.get("infs", 0))),
            loss=None if loss is None else number(loss),
            worst=str(content.get("worst", "")),
            norm_type=self.norm_type,
            events=[_event(step, fold, each) for each in content.get("events", ())],
            norms=norms,
            places=places,
        )
        if step <= self._latest:
            self._note("steps that the file has told of before; the first of each is shown")
            return None
        self._latest = step
        return row


def _event(step: int, fold: str, content: Any) -> Event:
    if not isinstance(content, dict):
        raise TypeError("not an object")
    tensors = [str(name) for name in content.get("tensors", ())]
    count = int(number(content.get("count", len(tensors))))
    return Event(step, fold, str(content["kind"]), str(content.get("reason", "")), tensors, count)


def _why(text: bytes, error: Exception) -> str:
    if len(text) >= LONGEST:
        return "lines that are too long"
    if not text.endswith(b"\n"):
        return "the last line is unfinished: the run was stopped while it was written, or is being written now"
    return "lines that are not JSON" if isinstance(error, json.JSONDecodeError) else "records that are damaged"


def lines_of(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, none longer than ``LONGEST``; the rest of a longer one is left out."""
    while text := file.readline(LONGEST):
        yield text
        while len(text) == LONGEST and not text.endswith(b"\n"):
            text = file.readline(LONGEST)
