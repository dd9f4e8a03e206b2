"""torchvision on a CPU build of torch, for what needs it installed and calls little of it.

The wheel's C++ library loads only beside the CUDA build of torch, and without it ``import torchvision`` fails: it
describes operators to torch that nobody has defined. Defined here first, they let it in.
"""

from __future__ import annotations

import importlib.metadata

import torch
from torch import Tensor

# ultralytics calls nms; the others need only be there.
DESCRIBED = (
    *("qnms", "roi_align", "_roi_align_backward", "qroi_align", "roi_pool", "_roi_pool_backward"),
    *("ps_roi_align", "_ps_roi_align_backward", "ps_roi_pool", "_ps_roi_pool_backward"),
    *("deform_conv2d", "_deform_conv2d_backward"),
)

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
    """Call it before anything imports torchvision. Where its own library loads, it leaves all to that one."""
    if _library or torch.version.cuda is not None or importlib.metadata.version("torchvision").endswith("+cpu"):
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", nms, "CPU")
    for name in DESCRIBED:
        library.define(f"{name}(Tensor input) -> Tensor")
    _library.append(library)
