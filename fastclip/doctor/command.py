"""``fastclip check``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from typing import Any

from fastclip.doctor.checking import check
from fastclip.doctor.diagnosis import DoctorError

FOUND, USAGE = 1, 2  # exit statuses beside 0
PICTURES = (".png", ".svg", ".pdf")
ARGUMENTS = ("model", "batch", "loss_fn", "optimizer", "step", "max_seconds")
RETURNS = "(model, batch, loss_fn), the same with an optimizer, or a dict of fastclip.check's arguments"


def main(argv: list[str]) -> int:
    """The command line; returns its exit status: 0 if nothing worse than an info was found, 1 if it was, 2 if there was
    nothing to check."""
    parser = argparse.ArgumentParser(
        prog="fastclip check",
        description="Looks for what keeps a model from training; see docs/doctor.md.",
        epilog="Exit status: 0 nothing worse than an info was found, 1 something was, 2 nothing was checked.",
    )
    parser.add_argument(
        "factory",
        metavar="MODULE:FACTORY",
        help=f"a function without arguments, also as FILE.py:FACTORY, that returns {RETURNS}",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table and the sentences")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw it, as .png, .svg or .pdf")
    parser.add_argument("--seed", type=_seed, metavar="N", help="torch.manual_seed(N) before the factory is called")
    parser.add_argument("--max-seconds", type=float, metavar="S", help="try learning rates for so long; 0: don't")
    arguments = parser.parse_args(argv)
    if arguments.picture is not None:
        _check_picture(parser, arguments.picture)
    try:
        asked = _asked(arguments.factory, arguments.seed)
    except DoctorError as error:
        print(f"fastclip check: {error}", file=sys.stderr)
        return USAGE
    except (Exception, SystemExit):  # of the user's own code, for which its traceback is what helps
        traceback.print_exc()
        return USAGE
    try:
        if arguments.max_seconds is not None:
            asked["max_seconds"] = arguments.max_seconds
        diagnosis = check(**asked)
    except (DoctorError, TypeError, ValueError) as error:
        print(f"fastclip check: {error}", file=sys.stderr)
        return USAGE
    except (Exception, SystemExit):  # as above; nothing was checked
        traceback.print_exc()
        return USAGE
    print(diagnosis.to_json(indent=2) if arguments.json else diagnosis)
    if arguments.picture is not None:
        try:
            diagnosis.save_picture(arguments.picture)
        except OSError as error:
            print(f"fastclip check: --picture: {error}", file=sys.stderr)
            return USAGE
    return 0 if diagnosis.healthy else FOUND


def _seed(text: str) -> int:
    """What ``torch.manual_seed`` takes."""
    if not -(2**63) <= int(text) < 2**64:
        raise argparse.ArgumentTypeError(f"{text} doesn't fit into 64 bits")
    return int(text)


def _check_picture(parser: argparse.ArgumentParser, picture: Path) -> None:
    """Before a minute is spent on what can't be drawn."""
    if not picture.resolve().parent.is_dir():
        parser.error(f"--picture: there is no folder {picture.resolve().parent}")
    if picture.suffix.lower() not in PICTURES:
        parser.error(f"--picture: expected a file that ends in {', '.join(PICTURES)}, got {picture}")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib: pip install 'torch-fastclip[plots]'")


def _asked(path: str, seed: int | None) -> dict[str, Any]:
    """The arguments of ``check`` that the factory gives."""
    place, colon, name = path.rpartition(":")
    if not colon or not place or not name:
        raise DoctorError(f"expected MODULE:FACTORY or FILE.py:FACTORY, got {path!r}")
    module = _module(place)
    factory: Any = module
    for part in name.split("."):
        if not hasattr(factory, part):
            own = {n: value for n, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
            known = [n for n, value in own.items() if inspect.isfunction(value) and not n.startswith("_")]
            raise DoctorError(f"{place} has no {name!r}; its functions are {', '.join(known) or 'none'}")
        factory = getattr(factory, part)
    if not callable(factory):
        raise DoctorError(f"{path} is a {type(factory).__name__}, not a function that returns {RETURNS}")
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    return _arguments(path, factory())


def _module(place: str) -> Any:
    sys.path.insert(0, str(Path.cwd()))
    if place.endswith(".py"):
        file = Path(place)
        if not file.is_file():
            raise DoctorError(f"there is no file {place}")
        sys.path.insert(0, str(file.resolve().parent))  # its own imports are found as when it is run
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module
        spec.loader.exec_module(module)
        return module
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not (place == error.name or place.startswith(f"{error.name}.")):
            raise  # the module is there, and imports something that isn't
        raise DoctorError(f"there is no module {place!r} on the path, nor in {Path.cwd()}") from error


def _arguments(path: str, made: Any) -> dict[str, Any]:
    if isinstance(made, dict):
        unknown = [key for key in made if key not in ARGUMENTS]
        if unknown or "model" not in made:
            wrong = f"unknown {', '.join(map(repr, unknown))}" if unknown else "no 'model'"
            raise DoctorError(f"{path} returned a dict with {wrong}; known are {', '.join(ARGUMENTS)}")
        return dict(made)
    if isinstance(made, (tuple, list)) and len(made) in (3, 4):
        return dict(zip(ARGUMENTS, made, strict=False))
    got = f"{type(made).__name__} of {len(made)}" if isinstance(made, (tuple, list)) else type(made).__name__
    raise DoctorError(f"{path} returned a {got}; expected {RETURNS}")
