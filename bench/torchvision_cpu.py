"""torchvision beside a CPU build of torch, for what imports it and calls little of it.

Its wheel on PyPI has a C++ library that loads only beside the CUDA build of torch. Without that, ``import torchvision``
fails: it describes operators to torch that nobody has defined. It also stops others from being imported, which use
torchvision wherever it is installed; so ``make`` installs it into a folder apart, and only :func:`admit` lets it in.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor

APART = Path(sys.prefix) / "torchvision"

_library: list[torch.library.Library] = []  # its definitions live as long as it does


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes, ``[n, 4]`` as x1, y1, x2, y2, that no kept box of a higher score overlaps by more."""
    left = scores.argsort(descending=True, stable=True)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    while left.numel() > 0:
        best, left = left[0], left[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[left, :2])
        high = torch.minimum(boxes[best, 2:], boxes[left, 2:])
        shared = (high - low).clamp(min=0).prod(1)
        left = left[shared <= iou_threshold * (areas[best] + areas[left] - shared)]
    return torch.stack(kept) if kept else left


def admit() -> None:
    """Makes torchvision importable, with ``nms`` as its only operator, unless it is already."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    sys.path.append(str(APART))
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", nms, "CPU")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # described, never called
    _library.append(library)
    import torchvision.extension

    torchvision.extension._has_ops = lambda: True
