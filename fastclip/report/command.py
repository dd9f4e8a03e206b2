"""``fastclip report`` and ``fastclip watch``."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from fastclip.report.digest import digest_of
from fastclip.report.page import page_of


def report(argv: list[str]) -> int:
    """The command ``fastclip report``; 0 if there was anything to report."""
    parser = argparse.ArgumentParser(
        prog="fastclip report", description="A run that a fastclip.GradMonitor recorded, as one page."
    )
    parser.add_argument("run", type=Path, help="a .jsonl file of a monitor")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="PAGE", help="the page; default: RUN with .html for .jsonl"
    )
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="also the figures as PNG there; needs matplotlib")
    arguments = parser.parse_args(argv)
    _print_anything()
    if arguments.run.is_dir() or not arguments.run.name:
        parser.error(f"{arguments.run}: expected the .jsonl file of a monitor")
    output: Path = arguments.output or arguments.run.with_suffix(".html")
    if output.exists() and arguments.run.exists() and output.samefile(arguments.run):
        parser.error(f"{output} is the recording itself: name another page with -o. Nothing was written")
    try:
        digest = digest_of(arguments.run)
        for problem in digest.reader.problems():
            print(f"{arguments.run}: {problem}", file=sys.stderr)
        if not digest.records:
            print(f"{arguments.run}: no record of a monitor is in it; no page was written", file=sys.stderr)
            return 1
        output.write_text(page_of(digest), encoding="utf-8", errors="replace")
    except OSError as error:
        parser.error(str(error))
    print(f"{output}: {digest.records:,} records of {len(digest.reader.names):,} tensors")
    if arguments.png is not None:
        try:
            from fastclip.report import figures
        except ModuleNotFoundError as error:
            return _lacks(error, "plots")
        try:
            paths = figures.save(digest, arguments.png)
        except OSError as error:
            parser.error(f"--png: {error}")
        for path in paths:
            print(path)
    return 0


def watch(argv: list[str]) -> int:
    """The command ``fastclip watch``."""
    parser = argparse.ArgumentParser(prog="fastclip watch", description="Follows a run while it is recorded.")
    parser.add_argument("run", type=Path, help="a .jsonl file of a monitor; waited for until it is there")
    parser.add_argument("--once", action="store_true", help="show what there is, once")
    arguments = parser.parse_args(argv)
    _print_anything()
    if arguments.run.is_dir() or arguments.run.suffix == ".csv":
        parser.error(f"{arguments.run}: expected the .jsonl file of a monitor")
    try:
        from fastclip.report import terminal
    except ModuleNotFoundError as error:
        return _lacks(error, "watch")
    return terminal.follow(arguments.run, once=arguments.once)


def _print_anything() -> None:
    """Names may hold what the terminal's encoding does not."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _lacks(error: ModuleNotFoundError, extra: str) -> int:
    print(f"{error}; needs pip install 'torch-fastclip[{extra}]'", file=sys.stderr)
    return 1
