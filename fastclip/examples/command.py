"""The command line of an example: what all have, checked before the first step of training."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fastclip.examples.extras import extra


def parser_of(prog: str, doc: str | None, picture: str) -> argparse.ArgumentParser:
    """A parser with ``--output`` and ``--quick``, whose help begins with the first line of ``doc``."""
    parser = argparse.ArgumentParser(prog=prog, description=summary(doc))
    parser.add_argument("--output", type=Path, default=Path(picture), help="the picture, a PNG; default %(default)s")
    parser.add_argument("--quick", action="store_true", help="a few seconds, for a first look")
    return parser


def seed(text: str) -> int:
    """What torch, numpy and scikit-learn all take."""
    if not 0 <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and {2**32 - 1}")
    return int(text)


def summary(doc: str | None) -> str:
    """The first line of a docstring."""
    return (doc or "").partition("\n")[0]


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, *counts: str) -> argparse.Namespace:
    """The arguments; those named in ``counts`` are at least 1 where they were given, and the picture can be written."""
    args = parser.parse_args(argv)
    for name in counts:
        if (given := getattr(args, name)) is not None and given < 1:
            parser.error(f"--{name} must be at least 1")
    output: Path = args.output
    if not (folder := output.resolve().parent).is_dir():
        parser.error(f"--output: there is no folder {folder}")
    if output.suffix.lower() != ".png" or output.is_dir():
        parser.error(f"--output: {output} is not the name of a PNG; take one like {output.stem or 'picture'}.png")
    if not os.access(output if output.exists() else folder, os.W_OK):
        parser.error(f"--output: {output} can't be written")
    return args


def ready(modules: Sequence[str], extras: str = "examples") -> bool:
    """Whether all of these can be imported; says how to get the first that can't."""
    try:
        for module in modules:
            extra(module, extras)
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        return False
    return True
