"""All examples one after the other: ``python -m fastclip.examples FOLDER`` keeps what came of each."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastclip.examples import EXAMPLES, command
from fastclip.examples.study import Study, save_picture
from fastclip.version import __version__


def module_of(name: str) -> Any:
    """The example of that name."""
    return importlib.import_module(f"fastclip.examples.{name}")


def listing() -> str:
    """One line for each example, from its docstring."""
    width = max(map(len, EXAMPLES))
    return "\n".join(f"{name:{width}}  {command.summary(module_of(name).__doc__)}" for name in EXAMPLES)


def example(argv: list[str]) -> int:
    """``fastclip example``: lists the examples, or runs the one that is named; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="fastclip example",
        description=f"Run an example; without a name: list them. What there is:\n\n{listing()}",
        epilog="fastclip example NAME --help tells the options of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", choices=EXAMPLES, metavar="NAME")
    chosen = parser.parse_args(argv[:1]).name
    if chosen is None:
        print(listing())
        return 0
    return int(module_of(chosen).main(argv[1:]))


def facts(study: Study, settings: Any) -> dict[str, Any]:
    """What is kept of a study: all but the curves."""
    return {
        "settings": dataclasses.asdict(settings),
        "measure": study.measure,
        "baseline": study.baseline,
        "runs": {
            variant: [
                {"score": run.score if run.died_at is None else None, "died_at": run.died_at, "skipped": run.skipped}
                for run in runs
            ]
            for variant, runs in study.runs.items()
        },
        "details": study.details.splitlines(),
        "claims": list(study.claims),
    }


def markdown(folder: Path) -> str:
    """The README's table: a row for each example whose results are kept there."""
    rows = ["| example | what it shows | what came of it |", "| --- | --- | --- |"]
    for name in EXAMPLES:
        if (kept := folder / f"{name}.json").exists():
            claims = " ".join(json.loads(kept.read_text())["claims"])
            rows.append(f"| `{name}` | {command.summary(module_of(name).__doc__)} | {claims} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    """Runs those that are named, or all; prints the README's table of all whose results are kept."""
    parser = argparse.ArgumentParser(prog="python -m fastclip.examples", description=__doc__)
    parser.add_argument("folder", type=Path, help="gets or has a JSON file for each example")
    parser.add_argument("--only", nargs="+", choices=EXAMPLES, default=EXAMPLES, metavar="NAME", help="default: all")
    parser.add_argument("--pictures", type=Path, help="a folder that gets the picture of each")
    parser.add_argument("--quick", action="store_true", help="the short form of each")
    args = parser.parse_args(argv)
    for folder in (args.folder, args.pictures):
        if folder is not None and not folder.is_dir():
            parser.error(f"there is no folder {folder}")
    modules = {name: module_of(name) for name in args.only}
    if not command.ready(["matplotlib", "tqdm", *(needed for module in modules.values() for needed in module.NEEDS)]):
        return 1
    for name, module in modules.items():
        settings = module.Settings.quick() if args.quick else module.Settings()
        start = time.process_time()
        study = module.run(settings, not args.quick)
        seconds = round(time.process_time() - start, 1)
        made_with = {"fastclip": __version__, "torch": torch.__version__, "python": platform.python_version()}
        kept = facts(study, settings) | {"cpu_seconds": seconds, "made_with": made_with}
        (args.folder / f"{name}.json").write_text(
            json.dumps(kept, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        )
        if args.pictures is not None:
            save_picture(study, args.pictures / f"{name}.png")
        print(f"{name}: {seconds} s of CPU time", file=sys.stderr)
    print(markdown(args.folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
