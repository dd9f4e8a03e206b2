"""Runs the python blocks of a page, one after the other in one namespace: as a program on its own, or on each rank."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import json
import sys
import warnings
from collections.abc import Iterator
from typing import Any

NEEDS_GPU = "# needs a GPU"  # the first line of a block that runs only where there is one
ANSWER = "PRINTED "


def run(blocks: list[str]) -> list[str | None]:
    """What each block prints; None for one that would need a GPU, whose names are checked instead."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed: list[str | None] = []
    for number, code in enumerate(blocks, 1):
        program = compile(code, f"block {number}", "exec")
        if code.startswith(NEEDS_GPU) and not _has_gpu():
            missing = list(wrong_names(code, namespace))
            assert not missing, missing
            printed.append(None)
            continue
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(program, namespace)
        printed.append(out.getvalue())
    return printed


def wrong_names(code: str, namespace: dict[str, Any]) -> Iterator[str]:
    """Names and arguments in ``code`` that are not those of the modules and objects it would find."""
    known = dict(namespace)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            known |= {alias.name.partition(".")[0]: __import__(alias.name) for alias in node.names}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Attribute, ast.Call)):
            what = node.func if isinstance(node, ast.Call) else node
            try:
                found = _resolve(what, known)
                if isinstance(node, ast.Call) and found is not None:
                    _bind(found, node)
            except (AttributeError, TypeError) as error:
                yield f"{ast.unparse(node)}: {error}"


def _resolve(node: ast.AST, known: dict[str, Any]) -> Any:
    """The object that a dotted name stands for; None if it begins with what only the block itself would make."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _resolve(node.value, known)
        return None if owner is None else getattr(owner, node.attr)
    return None


def _bind(function: Any, call: ast.Call) -> None:
    """Raises ``TypeError`` if the function doesn't take what it is called with."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return  # a builtin, which doesn't tell
    if not any(isinstance(argument, ast.Starred) for argument in call.args):
        signature.bind(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords if keyword.arg})


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    if asked["torchvision"]:  # ultralytics wants it, and its wheel the CUDA build of torch
        from fastclip.bench import torchvision_cpu

        torchvision_cpu.admit()
    if asked["strict"]:
        import torch  # noqa: F401  # what torch warns of while it is imported is not the page's

        warnings.simplefilter("error")
    print(ANSWER + json.dumps(run(asked["blocks"])))
