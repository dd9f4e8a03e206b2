"""What the examples need beyond fastclip."""

from __future__ import annotations

import importlib
from typing import Any


def extra(module: str, extras: str = "examples") -> Any:
    """Imports an optional dependency, and says how to get it where it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this example needs {error.name}: pip install 'torch-fastclip[{extras}]'", name=error.name
        ) from error
