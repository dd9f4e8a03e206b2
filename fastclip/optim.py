"""The optimizer wrapper: clip, guard, step."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastclip import clipping
from fastclip.functional import nonfinite_rule, norm_type_number, number
from fastclip.tensors import grads_of
from fastclip.types import Request


class ClippedOptimizer(Optimizer):
    """An optimizer whose every step clips the gradients first, and does not happen when one is not finite.

    It is a ``torch.optim.Optimizer`` and owns nothing: ``param_groups``, ``state`` and ``defaults`` are the
    wrapped optimizer's own, read anew each time, so LR schedulers, ``state_dict`` and ``zero_grad`` work as
    before. ``step(closure)`` clips inside, after the backward of the closure.

    Args:
        optimizer: the optimizer to wrap; its parameters' gradients are clipped together, by one joint norm.
        max_norm: bound of the joint norm, >= 0; ``inf`` only guards against NaN and Inf.
        norm_type: p of the p-norm.
        nonfinite: ``"skip"`` (default): a step whose gradients hold NaN or Inf does not happen, parameters and
            optimizer state stay bitwise unchanged, and ``skipped_steps`` counts it. ``"zero"``, ``"raise"``
            and ``"propagate"`` as in :func:`fastclip.clip_grad_norm_`.

    Attributes:
        max_norm: the bound; may be set at any time.
        last_norm: total norm of the latest step before clipping, 0-d tensor; None before the first.
        steps, clipped_steps, skipped_steps: how many steps were asked for, clipped, and skipped. With an
            optimizer that evaluates its closure several times a step (LBFGS), every evaluation counts.

    Raises:
        TypeError: ``optimizer`` is not a ``torch.optim.Optimizer``.
        ValueError: a negative or NaN ``max_norm``, an unknown ``nonfinite``.

    Example:
        >>> import torch, fastclip
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = fastclip.ClippedOptimizer(torch.optim.AdamW(model.parameters()), max_norm=1.0)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> opt.step()
        >>> opt.skipped_steps
        0
    """

    def __init__(
        self, optimizer: Optimizer, max_norm: float = 1.0, *, norm_type: float = 2.0, nonfinite: str = "skip"
    ) -> None:
        # Optimizer.__init__ is not called: it would build param_groups and state of its own.
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self._inner = optimizer
        self._request = Request(norm_type_number(norm_type), number("max_norm", max_norm))
        self._nonfinite = nonfinite_rule(nonfinite)
        self._optimizer_step_pre_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self._optimizer_step_post_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self.last_norm: Tensor | None = None
        self.steps = 0
        self.clipped_steps = 0
        self.skipped_steps = 0
        self._patch_step_function()

    # ---- owned by the wrapped optimizer, which may rebind them: never kept here ------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self._inner.param_groups = value

    @property
    def state(self) -> Any:
        return self._inner.state

    @state.setter
    def state(self, value: Any) -> None:
        self._inner.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        return self._inner.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self._inner.defaults = value

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's own state dict: it loads into the bare optimizer, and the other way round."""
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._inner.load_state_dict(state_dict)

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self._inner.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self._inner.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self._inner.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self._inner.register_load_state_dict_post_hook(hook, prepend)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._inner.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._inner.zero_grad(set_to_none)

    def __getstate__(self) -> dict[str, Any]:
        # LR schedulers put a counting `step` on the instance, which can't be pickled; the next one does it again.
        return {key: value for key, value in self.__dict__.items() if key != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._patch_step_function()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(max_norm={self.max_norm:g}, nonfinite={self._nonfinite!r}) of {self._inner!r}"

    # ---- clip, guard, step -----------------------------------------------------------------------------

    @property
    def max_norm(self) -> float:
        return self._request.max_norm

    @max_norm.setter
    def max_norm(self, value: float) -> None:
        self._request = Request(self._request.norm_type, number("max_norm", value))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clips the gradients in place and steps; skips the step when a gradient is not finite.

        Args:
            closure: re-evaluates the model and returns the loss; zero_grad and backward belong inside. The
                gradients are clipped after it.

        Returns:
            The closure's loss, also of a skipped step; without a closure what the optimizer returns.

        Raises:
            NonFiniteGradientError: with ``nonfinite="raise"``, before anything is written; and with ``"skip"``
                when an optimizer that evaluates the closure itself (LBFGS) has already moved the parameters.
        """
        args: tuple[Any, ...] = () if closure is None else (closure,)
        kwargs: dict[str, Any] = {}
        for pre_hook in self._optimizer_step_pre_hooks.values():
            result = pre_hook(self, args, kwargs)
            if result is not None:
                args, kwargs = result
        closure = args[0] if args else kwargs.get("closure")
        out = self._guarded_step(closure)
        for post_hook in self._optimizer_step_post_hooks.values():
            post_hook(self, args, kwargs)
        return out

    step.hooked = True  # type: ignore[attr-defined]  # global hooks run in the wrapped optimizer's step, once

    def _guarded_step(self, closure: Callable[[], Any] | None) -> Any:
        if closure is None:
            return self._inner.step() if self._clip() else None
        with torch.enable_grad():
            loss = closure()
        if not self._clip():
            return loss
        if not _evaluates_closure(self._inner):
            self._inner.step()
            return loss
        first: list[Any] = [loss]  # the evaluation that has just been clipped; the optimizer asks for it again

        def clipped_closure() -> Any:
            if first:
                return first.pop()
            with torch.enable_grad():
                again = closure()
            with torch.no_grad():
                self._clip("raise" if self._nonfinite == "skip" else self._nonfinite)
            return again

        return self._inner.step(clipped_closure)

    def _clip(self, nonfinite: str | None = None) -> bool:
        """Clips in place; False when the step must not happen."""
        nonfinite = nonfinite or self._nonfinite
        parameters = [p for group in self.param_groups for p in group["params"]]
        outcome = clipping.clip_(grads_of(parameters), self._request, nonfinite)
        self.last_norm = outcome.total_norm
        self.steps += 1
        if nonfinite == "skip" and bool(outcome.found_inf):
            self.skipped_steps += 1
            return False
        self.clipped_steps += float(outcome.clip_coef) != 1.0
        return True


def _evaluates_closure(optimizer: Optimizer) -> bool:
    """Whether the optimizer's step can't do without a closure, because it evaluates it several times."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
