"""The native core, or the reason why there is none. Imported after torch, so that both share one OpenMP."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


def build_facts() -> dict[str, Any]:
    """What the build of the extension recorded; empty without a build."""
    record = HERE / "_build.json"
    facts: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    return facts


def _why_missing(error: ImportError) -> str:
    if any(HERE.glob("_C.*")) and "No module named" not in str(error):
        return f"the extension in {HERE} could not be loaded: {error}"
    facts = build_facts()
    if facts and not facts["extension"]:
        return f"{facts['why']}; install a C++ compiler and reinstall fastclip"
    if (HERE.parent / "csrc").is_dir():
        return (
            f"fastclip was imported from the source folder {HERE.parent}, where the extension is not built; "
            "run `pip install -e .` there, or start Python from another folder to use an installed fastclip"
        )
    return f"the extension is missing from {HERE}: {error}"


def _load() -> tuple[Any, str]:
    try:
        _C = importlib.import_module("fastclip._C")
        if Path(_C.__file__ or "").parent != HERE:  # an editable install lends its own to any copy of the package
            raise ImportError(f"No module named 'fastclip._C' in {HERE}, only in {_C.__file__}")
    except ImportError as error:
        return None, _why_missing(error)
    try:
        _C.bind(torch.Tensor, torch.nn.Parameter)
    except (AttributeError, RuntimeError) as error:  # older than 2.10, or with another DLPack
        return None, f"the extension doesn't fit torch {torch.__version__}: {error}"
    return _C, ""


C, why_missing = _load()
