"""Where records go. A sink that fails is warned of once, and what it lost is counted: training goes on."""

from __future__ import annotations

import csv
import errno
import io
import json
import mmap
import os
import stat
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastclip.ladder import Event
from fastclip.monitoring import records
from fastclip.monitoring.records import SCALARS, StepRecord, spelled

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PREFIX = "fastclip/"  # of what goes to TensorBoard and wandb
CHARTED = ("total_norm", "clipped_norm", "max_norm", "clip_coef", "clipped", "skipped", "rolled_back", "nans", "infs")
CHARTED_WHERE_KNOWN = ("max_abs", "zeros", "subnormals", "loss")


class Sink:
    """One place where records go.

    Attributes:
        lost: records that didn't get there.
        step: the last step that it holds already; 0 if none.
    """

    step = 0

    def __init__(self, name: str) -> None:
        self.name = name
        self.lost = 0
        self._warned = False

    def start(self, header: dict[str, Any], names: Sequence[str], sizes: Sequence[int]) -> None:
        """What holds for all records to come, until the next call."""

    def fold(self, step: int, fold: str) -> None:
        """A fold begins after ``step``."""

    def write(self, batch: list[StepRecord]) -> None:
        """Takes in records; what it raises is dealt with by :meth:`take`."""
        raise NotImplementedError

    def forget(self, step: int) -> None:
        """Drops what came after ``step``: training goes on from there."""

    def close(self) -> None:
        """No record comes any more."""

    def take(self, batch: list[StepRecord]) -> None:
        """Writes what it can."""
        try:
            self.write(batch)
        except Exception as error:  # whatever a network, a disk or a user's function raises: training must go on
            self.give_up(len(batch), error)

    def end(self) -> None:
        """Closes it, as far as it lets itself be closed."""
        try:
            self.close()
        except Exception as error:  # as above: what comes after the training is not to fail either
            self.give_up(0, error)

    def give_up(self, count: int, error: Exception) -> None:
        self.lost += count
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.name}: {type(error).__name__}: {error}. Training goes on; records that are lost here are "
                "counted in monitor.lost, and this warning is not repeated",
                RuntimeWarning,
                stacklevel=2,
            )


_OPEN: weakref.WeakValueDictionary[tuple[int, int], File] = weakref.WeakValueDictionary()  # by device and inode
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # of file systems that have none


class File(Sink):
    """Lines appended to a file, each batch in one write: a killed process leaves one of them at most unfinished.

    Attributes:
        BEGINNING: with what each such file begins.
    """

    BEGINNING = b""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._is_regular = stat.S_ISREG(os.fstat(self._descriptor).st_mode)
        try:
            self._claim()
            self.step = self._last_step()
            self._cut_unfinished_line()
        except BaseException:
            self._close()
            raise

    def _claim(self) -> None:
        """Raises ``ValueError`` if another one writes into the file: lines of two runs would stand in it, mixed."""
        if not self._is_regular:
            return
        status = os.fstat(self._descriptor)
        other = _OPEN.get(place := (status.st_dev, status.st_ino))
        if other is not None and other._close.alive:
            raise ValueError(
                f"{self.name}: another GradMonitor of this process writes there; close() it first, or choose another "
                "file. Nothing was written"
            )
        self._lock()
        _OPEN[place] = self

    def _lock(self) -> None:
        """Holds for as long as the descriptor is open in any process: a program that starts has no copy of it, and a
        forked child closes its own."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self.name}: another process writes there; give each process, as each rank, a file of its own. "
                "Nothing was written"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise

    def leave_to_parent(self) -> None:
        """In a forked child: its copy would hold the lock for as long as it lives, though the parent were gone."""
        self._close()
        self._descriptor = -1

    @property
    def _size(self) -> int:
        if self._descriptor < 0:
            raise OSError("only the process writes there from which this one was forked")
        return os.fstat(self._descriptor).st_size if self._is_regular else 0

    def _lines_backwards(self) -> Iterator[tuple[int, bytes]]:
        """Offset and content of each line, the last one first."""
        if not self._size:
            return
        with mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ) as content:
            end = len(content)
            while end > 0:
                begin = content.rfind(b"\n", 0, end - 1) + 1
                yield begin, content[begin:end]
                end = begin

    def _cut_unfinished_line(self) -> None:
        last = next(self._lines_backwards(), None)
        if last is not None and not last[1].endswith(b"\n"):
            os.ftruncate(self._descriptor, last[0])

    def _step_of(self, line: bytes) -> int | None:
        """The step that a line is about; None if about none. Raises ``ValueError`` if it isn't of this format."""
        raise NotImplementedError

    def _last_step(self) -> int:
        """Raises ``ValueError`` if the file isn't one to go on with."""
        try:
            if self._size:
                first, end, _ = os.pread(self._descriptor, 1 << 16, 0).partition(b"\n")
                if not end and self._size == len(first) and _agree(first, self.BEGINNING):
                    return 0  # nothing but an unfinished first line: as if the file were empty
                self._check_beginning(first)
            for _, line in self._lines_backwards():
                step = self._step_of(line) if line.endswith(b"\n") else None
                if step is not None:
                    return step
        except ValueError as error:
            raise ValueError(
                f"{self.name} holds something else than a monitor's records ({error}); choose another file. "
                "Nothing was written"
            ) from None
        return 0

    def _check_beginning(self, line: bytes) -> None:
        """Raises ``ValueError`` for a first line that a file of this format doesn't begin with."""
        raise NotImplementedError

    def forget(self, step: int) -> None:
        try:
            self._cut_after(step)
        except (OSError, ValueError) as error:  # a full disk; a line that a power cut has damaged
            self.give_up(0, error)
        self.step = min(self.step, step)

    def _cut_after(self, step: int) -> None:
        """Cuts the file so that the record of ``step``, or the latest before it, is the last one."""
        end = None
        for begin, line in self._lines_backwards():
            own = self._step_of(line)
            if own is not None and own <= step:
                break
            if own is not None:
                end = begin
        if end is not None:
            os.ftruncate(self._descriptor, end)

    def append(self, content: bytes) -> None:
        """Writes all of it or, as far as the file can be cut, nothing."""
        before = self._size
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            if self._is_regular:
                os.ftruncate(self._descriptor, before)
            raise

    def close(self) -> None:
        self._close()


def _agree(line: bytes, beginning: bytes) -> bool:
    return line.startswith(beginning) or beginning.startswith(line)


def _leave_files_to_parent() -> None:
    for file in list(_OPEN.values()):
        file.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_files_to_parent)


class JsonLines(File):
    """A file of the documented format."""

    BEGINNING = records.line(records.HEADER, format=records.FORMAT, version=records.VERSION).rstrip(b"}\n") + b","

    def __init__(self, path: Path) -> None:
        self._beginning, self._folds = b"", b""  # lines that must come before the next record
        self._untold = 0  # of the lost records, those that the file doesn't tell of yet
        super().__init__(path)

    def start(self, header: dict[str, Any], names: Sequence[str], sizes: Sequence[int]) -> None:
        if header:
            self._beginning += records.line(records.HEADER, **header)
        self._beginning += records.line(records.TENSORS, names=list(names), sizes=list(sizes))

    def fold(self, step: int, fold: str) -> None:
        self._folds += records.line(records.FOLD, step=step, fold=fold)

    def write(self, batch: list[StepRecord]) -> None:
        content = b"".join(map(records.step_line, batch))
        if self._untold:
            content = records.line(records.LOST, records=self._untold) + content
        self.append(self._beginning + self._folds + content)
        self._beginning, self._folds, self._untold = b"", b"", 0

    def give_up(self, count: int, error: Exception) -> None:
        self._untold += count
        super().give_up(count, error)

    def _check_beginning(self, line: bytes) -> None:
        content = _json(line)
        if content.get("kind") != records.HEADER or content.get("format") != records.FORMAT:
            raise ValueError("its first line is not a header")
        if content.get("version") != records.VERSION:
            raise ValueError(f"version {content.get('version')} of the format; this is version {records.VERSION}")

    def _step_of(self, line: bytes) -> int | None:
        content = _json(line)
        if content.get("kind") != records.STEP:
            return None
        if not isinstance(step := content.get("step"), int):
            raise ValueError("a record without its step")
        return step


def _json(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError:
        raise ValueError("a line that is not JSON") from None
    if not isinstance(content, dict):
        raise ValueError("a line that is not an object")
    return content


class Csv(File):
    """A table of everything but the norms of single tensors; NaN and Inf are spelled as in the other format."""

    COLUMNS = (*SCALARS, "events")
    BEGINNING = ",".join(COLUMNS).encode()

    def write(self, batch: list[StepRecord]) -> None:
        text = io.StringIO(newline="")
        table = csv.writer(text, lineterminator="\n")
        if not self._size:
            table.writerow(self.COLUMNS)
        for record in batch:
            cells = [getattr(record, name) for name in SCALARS]
            cells = [" ".join(map(str, spelled(cell))) if isinstance(cell, list) else spelled(cell) for cell in cells]
            cells = [int(cell) if isinstance(cell, bool) else cell for cell in cells]
            events = " ".join(f"{event.kind}:{len(event.tensors)}" for event in record.events)
            table.writerow([_as_text(cell) for cell in [*cells, events]])
        self.append(text.getvalue().encode())

    def _check_beginning(self, line: bytes) -> None:
        if line.strip() != self.BEGINNING:
            raise ValueError("its first line has other columns")

    def _step_of(self, line: bytes) -> int | None:
        step = line.partition(b",")[0]
        return None if step == SCALARS[0].encode() else int(step)


def _as_text(cell: Any) -> Any:
    """A spreadsheet takes text that begins like a formula for one, and a line break for the end of a line."""
    if not isinstance(cell, str):
        return cell
    flat = " ".join(cell.splitlines())
    return f"'{flat}" if flat.startswith(("=", "+", "@", "-")) and flat != "-Infinity" else flat


def _charts(record: StepRecord) -> Iterator[tuple[str, float]]:
    """What charts are drawn of; norms of single tensors only where the elements were counted, too."""
    for name in CHARTED:
        value = getattr(record, name)
        if value is not None:
            yield name, float(value)
    for name in CHARTED_WHERE_KNOWN:
        value = getattr(record, name)
        if value is not None:
            yield name, value
    for i, lr in enumerate(record.lr):
        yield f"lr/{i}", lr
    if record.zeros is not None:
        for name, norm in record.norms().items():
            yield f"tensor_norms/{name}", norm


class TensorBoard(Sink):
    """A ``torch.utils.tensorboard.SummaryWriter``; its owner closes it."""

    def __init__(self, writer: Any) -> None:
        super().__init__("TensorBoard")
        self._writer = writer

    def write(self, batch: list[StepRecord]) -> None:
        for record in batch:
            for name, value in _charts(record):
                self._writer.add_scalar(PREFIX + name, value, record.step, walltime=record.time)
            for event in record.events:
                self._writer.add_text(PREFIX + "events", str(event), record.step, walltime=record.time)

    def close(self) -> None:
        self._writer.flush()


class Wandb(Sink):
    """A run of wandb, online or offline; its owner finishes it. The step is a metric of its own, so that it doesn't
    get in the way of what else the run logs."""

    def __init__(self, run: Any) -> None:
        super().__init__("wandb")
        self._run = run
        run.define_metric(PREFIX + "step")
        run.define_metric(PREFIX + "*", step_metric=PREFIX + "step")

    def write(self, batch: list[StepRecord]) -> None:
        for record in batch:
            self._run.log({PREFIX + "step": record.step, **{PREFIX + name: value for name, value in _charts(record)}})


class Call(Sink):
    """A function that gets each record."""

    def __init__(self, function: Callable[[StepRecord], object]) -> None:
        super().__init__(getattr(function, "__qualname__", type(function).__name__))
        self._function = function

    def take(self, batch: list[StepRecord]) -> None:
        for record in batch:  # one that it can't digest doesn't cost the others
            super().take([record])

    def write(self, batch: list[StepRecord]) -> None:
        for record in batch:
            self._function(record)


class Events(Sink):
    """A function that gets each event."""

    def __init__(self, function: Callable[[Event], object]) -> None:
        super().__init__("on_event")
        self._function = function

    def take(self, batch: list[StepRecord]) -> None:
        for record in batch:
            for event in record.events:
                try:
                    self._function(event)
                except Exception as error:  # a user's function: training must go on
                    self.give_up(1, error)


def tell_apart(sinks: Sequence[Sink]) -> None:
    """Of those of one name the second ends in 2, and so on."""
    names: set[str] = set()
    for sink in sinks:
        own, count = sink.name, 1
        while sink.name in names:
            count += 1
            sink.name = f"{own} {count}"
        names.add(sink.name)


def sink_of(given: Any) -> Sink:
    """The sink that is meant; raises ``ValueError`` or ``TypeError`` if none is, ``OSError`` if it can't be opened."""
    if isinstance(given, Sink):
        return given
    if isinstance(given, (str, os.PathLike)):
        path = Path(given)
        kinds: dict[str, type[File]] = {".jsonl": JsonLines, ".csv": Csv}
        if path.suffix not in kinds:
            raise ValueError(f"sinks: {path} ends neither in .jsonl nor in .csv")
        return kinds[path.suffix](path)
    if hasattr(given, "add_scalar"):
        return TensorBoard(given)
    if hasattr(given, "log") and hasattr(given, "define_metric"):
        return Wandb(given)
    if callable(given):
        return Call(given)
    raise TypeError(f"sinks: expected a path, a SummaryWriter, a wandb run or a function, got {type(given).__name__}")
