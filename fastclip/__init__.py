"""fastclip: gradient norms, clipping and NaN detection in one read of the gradients."""

from fastclip.functional import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm, grad_stats
from fastclip.optim import ClippedOptimizer
from fastclip.stats import GradStats
from fastclip.types import (
    BackendUnavailableError,
    FastclipError,
    NonFiniteGradientError,
    UnsupportedGradientError,
)
from fastclip.version import __version__

__all__ = [
    "BackendUnavailableError",
    "ClippedOptimizer",
    "FastclipError",
    "GradStats",
    "NonFiniteGradientError",
    "UnsupportedGradientError",
    "__version__",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
    "grad_stats",
]
