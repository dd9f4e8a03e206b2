"""fastclip: gradient norms, clipping and NaN detection in one read of the gradients."""

from fastclip.amp import GradScaler
from fastclip.functional import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm, grad_stats
from fastclip.guard import Guard
from fastclip.optim import ClippedOptimizer, attach, clipped
from fastclip.stats import GradStats
from fastclip.types import (
    BackendUnavailableError,
    FastclipError,
    NonFiniteGradientError,
    SkipLimitError,
    UnsupportedGradientError,
)
from fastclip.version import __version__

__all__ = [
    "BackendUnavailableError",
    "ClippedOptimizer",
    "FastclipError",
    "GradScaler",
    "GradStats",
    "Guard",
    "NonFiniteGradientError",
    "SkipLimitError",
    "UnsupportedGradientError",
    "__version__",
    "attach",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "clipped",
    "get_total_norm",
    "grad_stats",
]
