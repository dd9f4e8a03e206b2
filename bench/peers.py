"""Other packages' implementations of the same rules, where they are installed: contestants, never a dependency."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def timm_agc() -> Callable[..., None]:
    """``timm.utils.agc.adaptive_clip_grad``, without importing timm, which wants torchvision."""
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    assert spec.origin is not None
    return _module("timm_utils_agc", Path(spec.origin).parent / "utils" / "agc.py").adaptive_clip_grad


def zclip_step(params: list[nn.Parameter]) -> Callable[[], float]:
    """One call of ``zclip.ZClip.step`` on a model of these parameters."""
    from zclip import ZClip

    model = nn.Module()
    for index, parameter in enumerate(params):
        model.register_parameter(f"p{index}", parameter)
    policy = ZClip(max_grad_norm=None)
    return lambda: policy.step(model)


def autoclip_step(params: list[nn.Parameter], window: int) -> Callable[[], Any]:
    """One call of ``autoclip.torch.QuantileClip.step`` with the 10th percentile of the joint norm."""
    from autoclip.torch import QuantileClip

    return QuantileClip(params, quantile=0.1, history_length=window, global_threshold=True).step


def _module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def agc_oracle(grad: Tensor, weight: Tensor, clip_factor: float, eps: float) -> Tensor:
    """Adaptive gradient clipping of one tensor in float64, unit = index of the first dimension."""
    g, w = (t.detach().double().reshape(t.shape[0] if t.dim() > 1 else 1, -1) for t in (grad, weight))
    norms, bounds = g.norm(dim=1), clip_factor * w.norm(dim=1).clamp(min=eps)
    factors = (bounds / norms.clamp(min=1e-6)).where(norms >= bounds, norms.new_ones(()))
    return (g * factors[:, None]).reshape(grad.shape)
