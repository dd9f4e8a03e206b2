"""fastclip in place of torch's clipping functions, for code that looks them up when it calls them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

import torch
import torch.nn.utils.clip_grad
from torch import Tensor

from fastclip import functional
from fastclip.checks import nonfinite_rule

THEIRS: dict[str, Callable[..., Any]] = {
    "clip_grad_norm_": torch.nn.utils.clip_grad_norm_,
    "clip_grad_value_": torch.nn.utils.clip_grad_value_,
}
# Where the names are looked up: frameworks ask torch.nn.utils, torch's older clip_grad_norm its own file.
PLACES: tuple[ModuleType, ...] = (torch.nn.utils, torch.nn.utils.clip_grad)

_lock = threading.Lock()
_active: list[Patch] = []
_before: dict[tuple[str, str], Callable[..., Any]] = {}  # what stood in each place before the first patch


class Patch:
    """What :func:`patch` returns: in force until ``undo()``, or until the end of a ``with`` block.

    Attributes:
        nonfinite: what NaN and Inf do in ``clip_grad_norm_`` meanwhile.
    """

    def __init__(self, nonfinite: str) -> None:
        self.nonfinite = nonfinite

    def undo(self) -> None:
        """Ends this patch; torch's functions are back once no other one is in force. A second call does nothing."""
        with _lock:
            if self not in _active:
                return
            _active.remove(self)
            if _active:
                return
            for place in PLACES:
                for name in THEIRS:
                    # what someone else has put there since then stays; ours, which may be inside it, goes on to torch's
                    if getattr(place, name) is _OURS[name]:
                        setattr(place, name, _before[place.__name__, name])

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.undo()


def patch(nonfinite: str = "propagate") -> Patch:
    """Puts fastclip's ``clip_grad_norm_`` and ``clip_grad_value_`` in the place of torch's, in the whole process.

    It reaches code that looks ``torch.nn.utils.clip_grad_norm_`` up when it calls it: accelerate, Lightning, Fabric,
    transformers, timm, ultralytics, and most training loops. Code that has imported the name before keeps torch's.

    Args:
        nonfinite: what NaN and Inf elements do, as in :func:`fastclip.clip_grad_norm_`: ``"propagate"`` as in torch.
            The caller steps afterwards whatever is found, so to hold a step back wrap the optimizer instead.

    Writes: ``torch.nn.utils`` and ``torch.nn.utils.clip_grad``, in all threads, until it is undone. Patches nest: the
        latest one that is in force counts.

    Returns:
        A :class:`Patch`: ``undo()`` it, or use it as a context manager.

    Raises:
        ValueError: an unknown ``nonfinite``.

    Example:
        >>> import torch, fastclip
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3e20, 4e20])
        >>> with fastclip.patch():
        ...     torch.nn.utils.clip_grad_norm_([p], max_norm=1.0)
        tensor(5.0000e+20)
        >>> p.grad
        tensor([0.6000, 0.8000])
    """
    made = Patch(nonfinite_rule(nonfinite))
    with _lock:
        if not _active:
            for place in PLACES:
                for name in THEIRS:
                    _before[place.__name__, name] = getattr(place, name)
                    setattr(place, name, _OURS[name])
        _active.append(made)
    return made


@functools.wraps(THEIRS["clip_grad_norm_"])
def _clip_grad_norm_(*args: Any, **kwargs: Any) -> Tensor:
    if not _active:  # undone, but someone has imported it meanwhile
        norm: Tensor = THEIRS["clip_grad_norm_"](*args, **kwargs)
        return norm
    return functional.clip_grad_norm_(*args, nonfinite=_active[-1].nonfinite, **kwargs)


@functools.wraps(THEIRS["clip_grad_value_"])
def _clip_grad_value_(*args: Any, **kwargs: Any) -> None:
    clip = functional.clip_grad_value_ if _active else THEIRS["clip_grad_value_"]
    clip(*args, **kwargs)


_OURS = {"clip_grad_norm_": _clip_grad_norm_, "clip_grad_value_": _clip_grad_value_}
