"""fastclip: gradient norms, clipping and NaN detection in one read of the gradients."""

from fastclip.amp import GradScaler
from fastclip.boundary import clip_boundary
from fastclip.doctor import Diagnosis, DoctorError, check
from fastclip.functional import (
    adaptive_clip_grad_,
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_,
    clip_grads_with_norm_,
    get_total_norm,
    grad_stats,
)
from fastclip.guard import Guard
from fastclip.ladder import Event, LossWatch, Rollback, SpikeBackoff
from fastclip.monitor import GradMonitor
from fastclip.optim import ClipGroup, ClippedOptimizer, attach, clipped
from fastclip.patching import patch
from fastclip.stats import GradStats
from fastclip.ties import mark_sharded
from fastclip.types import (
    BackendUnavailableError,
    FastclipError,
    NonFiniteGradientError,
    RankError,
    SkipLimitError,
    UnsupportedGradientError,
)
from fastclip.version import __version__

__all__ = [
    "BackendUnavailableError",
    "ClipGroup",
    "ClippedOptimizer",
    "Diagnosis",
    "DoctorError",
    "Event",
    "FastclipError",
    "GradMonitor",
    "GradScaler",
    "GradStats",
    "Guard",
    "LossWatch",
    "NonFiniteGradientError",
    "RankError",
    "Rollback",
    "SkipLimitError",
    "SpikeBackoff",
    "UnsupportedGradientError",
    "__version__",
    "adaptive_clip_grad_",
    "attach",
    "check",
    "clip_boundary",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_",
    "clip_grads_with_norm_",
    "clipped",
    "get_total_norm",
    "grad_stats",
    "mark_sharded",
    "patch",
]
