"""``python -m fastclip``: what runs here and why; ``demo``, ``example``, ``check``, ``grid-search``, ``bench``,
``report`` and ``watch``."""

from __future__ import annotations

import argparse
import platform
import sys

import torch

from fastclip import backends
from fastclip._native import C
from fastclip.version import __version__


def describe() -> str:
    """Version, torch, threads, CPU capability, and each backend with available or why not."""
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    lines = [
        f"fastclip {__version__}, torch {torch.__version__} ({cuda}), Python {platform.python_version()}",
        f"threads: {torch.get_num_threads()}",
    ]
    if C is not None:
        lines.append(f"CPU capability: {C.cpu_capability()} (this machine has {', '.join(C.cpu_capabilities())})")
        if not C.openmp:
            lines.append("the extension was built without OpenMP: it runs on one thread")
    return "\n".join([*lines, "backends, best first:", *(f"  {line}" for line in backends.explain().splitlines())])


def main(argv: list[str] | None = None) -> int:
    """The console script ``fastclip``."""
    parser = argparse.ArgumentParser(prog="fastclip", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("info", help="versions, threads, and each backend with available or why not (the default)")
    commands.add_parser("demo", help="train a network that explodes without fastclip, on real weather", add_help=False)
    commands.add_parser("example", help="small studies on real data; without a name: what there is", add_help=False)
    commands.add_parser("grid-search", help="where training is stable, over lr and max_norm", add_help=False)
    commands.add_parser("bench", help="a quick table of torch's and fastclip's times here", add_help=False)
    commands.add_parser("report", help="a run that a GradMonitor recorded, as one page", add_help=False)
    commands.add_parser("watch", help="follow such a run in the terminal", add_help=False)
    commands.add_parser("check", help="what keeps a model of yours from training: module:factory", add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "demo":
        from fastclip.examples import weather

        return int(weather.main(rest))
    if arguments.command == "example":
        from fastclip.examples import __main__ as examples

        return examples.example(rest)
    if arguments.command == "grid-search":
        from fastclip.examples import grid_search

        return int(grid_search.main(rest))
    if arguments.command == "bench":
        from fastclip.bench import compare

        return int(compare.main(["--quick", *rest], program="fastclip bench"))
    if arguments.command in ("report", "watch"):
        from fastclip.report import command

        return command.report(rest) if arguments.command == "report" else command.watch(rest)
    if arguments.command == "check":
        from fastclip.doctor import command as doctor

        return doctor.main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    print(describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
