"""Whatever runs inside leaves no trace: the model, its gradients and every random generator are as they were.

The model itself runs, not a copy: not every module can be copied, and a ``step`` of the user's may hold the very model.
For that time its parameters and buffers point to copies of their memory, so nothing is ever written to the original,
and going back is a change of pointers that can't round or fail half-way.
"""

from __future__ import annotations

import functools
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import compress
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastclip.types import cuda_in_use

CONTAINERS = (dict, OrderedDict, list, set, deque)


class Untouched:
    """The state of modules, of the random generators and of the default dtype; put back on leaving.

    Args:
        modules: whose parameters, buffers, plain attributes, hooks and modes are kept.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(dict.fromkeys(inner for module in modules for inner in module.modules()))

    def __enter__(self) -> Untouched:
        self._dtype = torch.get_default_dtype()
        self._generators = list(_generators())
        self._states = [get() for get, _ in self._generators]
        self._attributes = [(module.__dict__, _kept(module.__dict__)) for module in self._modules]
        self._leaves = {
            id(p): (p, p.requires_grad, p.grad) for m in self._modules for p in m._parameters.values() if p is not None
        }
        self._tensors = _tensors(self._modules)
        self._originals = [tensor.data for tensor in self._tensors]
        self._stack = ExitStack()
        # in-place writes to a copy would count as writes to the tensor, and break a graph that the user still holds
        self._stack.enter_context(torch.autograd.grad_mode._unsafe_preserve_version_counter(tuple(self._tensors)))
        self._stack.callback(self._point_back)
        try:
            self.rewind()
        except BaseException:  # no memory for the copies, or the user has had enough
            self.__exit__(None, None, None)
            raise
        return self

    def rewind(self) -> None:
        """Everything as it was on entering, in fresh copies: the next pass sees what the first one saw."""
        self._put_attributes()
        for tensor, copy in zip(self._tensors, _copies(self._originals), strict=True):
            tensor.data = copy
        for parameter, requires_grad, _ in self._leaves.values():
            parameter.grad = None
            parameter.requires_grad_(requires_grad)
        self._put_generators()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._put_attributes()
        self._stack.close()
        self._put_generators()
        torch.set_default_dtype(self._dtype)

    def _point_back(self) -> None:
        for tensor, original in zip(self._tensors, self._originals, strict=True):
            tensor.data = original
        for parameter, requires_grad, grad in self._leaves.values():
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad

    def _put_attributes(self) -> None:
        for attributes, kept in self._attributes:
            for name in attributes.keys() - kept.keys():
                del attributes[name]
            for name, (value, content) in kept.items():
                attributes[name] = value
                if content is not None:
                    _refill(value, content)

    def _put_generators(self) -> None:
        for (_, put), state in zip(self._generators, self._states, strict=True):
            put(state)


def _kept(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each value, and where it is a plain container what it holds."""
    return {name: (value, value.copy() if type(value) in CONTAINERS else None) for name, value in attributes.items()}


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, (list, deque)) else container.update(content)


def _tensors(modules: list[nn.Module]) -> list[Tensor]:
    """Parameters, buffers and tensors that are plain attributes, each once."""
    found: dict[int, Tensor] = {}
    for module in modules:
        for held in (module._parameters, module._buffers, module.__dict__):
            found.update((id(value), value) for value in held.values() if isinstance(value, Tensor))
    return list(found.values())


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """Copies that share memory with each other exactly where the tensors do."""
    whole: dict[int, torch.UntypedStorage] = {}  # of those that begin at one address, as numpy's may, the largest
    plain = [type(tensor) is Tensor and tensor.layout == torch.strided for tensor in tensors]
    for tensor in compress(tensors, plain):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in whole or storage.nbytes() > whole[storage.data_ptr()].nbytes():
            whole[storage.data_ptr()] = storage
    cloned = {address: storage.clone() for address, storage in whole.items()}  # type: ignore[no-untyped-call]
    copies = []
    for tensor, is_strided in zip(tensors, plain, strict=True):
        if not is_strided:
            copies.append(tensor.clone())
            continue
        storage = cloned[tensor.untyped_storage().data_ptr()]
        copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        copies.append(copy.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride()))
    return copies


def _generators() -> Iterator[tuple[Callable[[], Any], Callable[[Any], None]]]:
    """How to read and to set each random generator that a model may draw from."""
    yield random.getstate, random.setstate
    yield np.random.get_state, np.random.set_state
    yield torch.get_rng_state, torch.set_rng_state
    accelerator = torch.accelerator.current_accelerator()
    if (
        accelerator is None
        or (accelerator.type == "cuda" and not cuda_in_use())
        or not torch.accelerator.is_available()
    ):
        return
    device_module = torch.get_device_module(accelerator.type)
    if accelerator.type == "mps":
        yield device_module.get_rng_state, device_module.set_rng_state
        return
    for index in range(torch.accelerator.device_count()):
        yield (
            functools.partial(device_module.get_rng_state, device=index),
            functools.partial(device_module.set_rng_state, device=index),
        )
