"""Hooks on every module while one pass runs; whoever listens hears of each call in the order of execution."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn


def is_transformed() -> bool:
    """Whether this runs inside of torch.func.vmap, grad or the like."""
    return bool(torch._C._functorch.peek_interpreter_stack() is not None)


class Listener:
    """Hears of the calls of modules."""

    def entered(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a module runs. Returns (args, kwargs) to run it with other ones, else None."""

    def left(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After it ran."""


class Watch:
    """Removes its hooks on leaving.

    Args:
        model: whose modules are watched, itself included.
        listeners: are told of each call in this order.

    Attributes:
        within: names of the modules that run at this moment, the innermost last.
        listening: whether a listener is at work; what it computes is no part of the model.
        hidden: whether a module ran inside of a transform of torch.func, where its tensors have no values of their own.
    """

    def __init__(self, model: nn.Module, listeners: Sequence[Listener]) -> None:
        self._model, self._listeners = model, listeners
        self._handles: list[Any] = []
        self.within: list[str] = []
        self.listening = self.hidden = False

    @property
    def where(self) -> str:
        """Name of the module that runs at this moment."""
        return (self.within[-1] or "the model") if self.within else "the loss"

    def __enter__(self) -> Watch:
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leaving(name), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _entering(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.within.append(name)
            if is_transformed():
                self.hidden = True
                return None
            self.listening = True
            for listener in self._listeners:
                args, kwargs = listener.entered(name, module, args, kwargs) or (args, kwargs)
            self.listening = False
            return args, kwargs

        return hook

    def _leaving(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.listening = True
            for listener in () if is_transformed() else self._listeners:
                listener.left(name, module, args, kwargs, output)
            self.listening = False
            self.within.pop()

        return hook
