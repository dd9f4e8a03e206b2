"""What is checked, in one form: a model and a loss that can be asked for again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastclip.doctor.diagnosis import DoctorError
from fastclip.doctor.moments import is_plain
from fastclip.optim import ClippedOptimizer
from fastclip.tensors import is_sharded

INPUTS = "the inputs"
# Modules of torch that do something else in training mode
MODAL = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.RNNBase, nn.MultiheadAttention, nn.RReLU)


@dataclass(frozen=True)
class Subject:
    """A model and its loss.

    Attributes:
        model: what is watched; where the user's is compiled or distributed, the module inside.
        step: runs it once and returns the loss.
        others: modules besides the model that a pass may change: the loss, where it is one.
        parameters: name -> parameter, of those that are trained.
        optimizer: the user's, or None.
        batch: inputs and targets; None where only the user's step knows.
        loss_of: the loss of another batch.
    """

    model: nn.Module
    step: Callable[[], Any]
    others: tuple[nn.Module, ...]
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer | None
    batch: Any = None
    loss_of: Callable[[Any, Any], Any] | None = None

    @property
    def strangers(self) -> tuple[str, ...]:
        """Names of the trained parameters that the optimizer doesn't have."""
        if self.optimizer is None:
            return ()
        known = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        return tuple(name for name, parameter in self.parameters.items() if id(parameter) not in known)

    @property
    def has_copies(self) -> bool:
        """Whether the optimizer has others of the same shapes, and the model's are of 16 bits: copies in float32."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        theirs = [parameter.shape for group in groups for parameter in group["params"]]
        own = self.parameters.values()
        return all(parameter.itemsize < 4 for parameter in own) and theirs == [parameter.shape for parameter in own]

    @property
    def unregistered(self) -> dict[int, str]:
        """The id of each parameter that a module keeps in a plain list, tuple or dict -> where."""
        known = {id(parameter) for parameter in self.model.parameters()}
        found = {}
        for name, module in self.model.named_modules():
            for attribute, value in vars(module).items():
                for place, parameter in _kept_in(value, attribute):
                    if id(parameter) not in known:
                        found[id(parameter)] = f"{name}{'.' if name else ''}{place}"
        return found

    def around(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that a pass uses and doesn't make, by what they are called."""
        yield from ((f"the buffer {name}", buffer) for name, buffer in self.model.named_buffers())
        for module in self.others:
            yield from ((f"{name} of {type(module).__name__}", buffer) for name, buffer in module.named_buffers())
        if self.batch is not None:
            yield from ((INPUTS, tensor) for tensor in tensors_in(self.batch[0]))

    def with_filled_targets(self) -> Subject | None:
        """The same, with 0 where a target isn't finite; None where all are, or only the user's step knows them."""
        if self.loss_of is None:
            return None
        loss_of, (inputs, targets) = self.loss_of, self.batch
        if all(bool(t.isfinite().all()) for t in tensors_in(targets) if is_plain(t)):
            return None
        filled = _filled(targets)
        return replace(self, step=lambda: loss_of(inputs, filled), batch=(inputs, filled))

    def prepare(self) -> None:
        """A model that is in evaluation mode as a whole goes into training mode; else each module keeps its own.

        A new ``Linear`` on a pretrained model says nothing: it is in training mode because it was made so.
        """
        model = self.model
        if not model.training and not any(module.training for module in model.modules() if _minds_its_mode(module)):
            model.train()

    def loss(self) -> Tensor:
        """Runs one forward pass.

        Raises:
            DoctorError: the model or the loss failed, or what came back is not one number.
        """
        torch.clear_autocast_cache()  # around the check it would keep the first pass's weights
        with during("the forward pass"):
            loss = self.step()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
            got = f"shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
            raise DoctorError(f"the loss has to be a tensor of one real number, got {got}; take its mean()")
        return loss.reshape(())


def _minds_its_mode(module: nn.Module) -> bool:
    """Whether it may do something else in training; of other people's classes nobody knows."""
    return isinstance(module, MODAL) or not type(module).__module__.startswith("torch.nn.")


class during:
    """Says in which phase of a check the model failed."""

    def __init__(self, phase: str) -> None:
        self._phase = phase

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, DoctorError):
            said = f"{type(error).__name__}: {error}".strip().rstrip(":")
            raise DoctorError(f"{self._phase} failed: {said}\nThe model was left as it was.") from error


def subject_of(
    model: Any,
    batch: Any,
    loss_fn: Any,
    optimizer: Any,
    step: Any,
) -> Subject:
    """Checks the arguments of :func:`fastclip.check`, before anything runs.

    Raises:
        TypeError: neither form, both, or something that can't be called.
        DoctorError: a model without parameters that are trained, or one that isn't ready.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    model = _inside(model)
    if step is not None:
        if batch is not None or loss_fn is not None:
            raise TypeError("pass either batch and loss_fn, or step; not both")
        if not callable(step):
            raise TypeError(f"step: expected a function loss = step(model), got {type(step).__name__}")

        def run() -> Any:
            return step(model)

    else:
        if batch is None or loss_fn is None:
            raise TypeError("pass batch=(inputs, targets) and loss_fn, or a function step, with loss = step(model)")
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            got = (
                f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__
            )
            raise TypeError(
                f"batch: expected (inputs, targets), got a {got}; for several inputs or other losses pass "
                "step=lambda model: ..., which returns the loss"
            )
        if not callable(loss_fn):
            raise TypeError(f"loss_fn: expected a function of (outputs, targets), got {type(loss_fn).__name__}")

        def loss_of(inputs: Any, targets: Any) -> Any:
            return loss_fn(model(inputs), targets)

        def run() -> Any:
            return loss_of(*batch)

    return Subject(
        model=model,
        step=run,
        others=(loss_fn,) if isinstance(loss_fn, nn.Module) else (),
        parameters=_trained(model),
        optimizer=optimizer,
        batch=batch,
        loss_of=loss_of if step is None else None,
    )


def _inside(model: nn.Module) -> nn.Module:
    """The module that a compiled or distributed one runs: hooks fire there."""
    while True:
        compiled = getattr(model, "_orig_mod", None)
        if isinstance(compiled, nn.Module):
            model = compiled
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise DoctorError(f"{name or 'the model'} is compiled by torch.jit: check the module that it was made of")
        if type(module).__name__ == "FullyShardedDataParallel":
            raise DoctorError(f"{name or 'the model'} is sharded (FSDP): check the module before it is")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise DoctorError(f"{name} has no shape yet: run model(inputs) once, then check it")
        if tensor.is_meta:
            raise DoctorError(f"{name} has no values (device meta): load or initialise the model, then check it")
        if is_sharded(tensor):
            raise DoctorError(f"{name} is sharded over ranks (DTensor): check the model before it is")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise DoctorError("no parameter of the model requires a gradient, so there is nothing to train")
    return trained


def _filled(value: Any) -> Any:
    """``value`` with 0 where a number isn't finite."""
    if isinstance(value, Tensor):
        return torch.where(value.isfinite(), value, 0.0) if is_plain(value) else value
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items()}
    return type(value)(map(_filled, value)) if type(value) in (tuple, list) else value


def _kept_in(value: Any, place: str, depth: int = 3) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters in containers, which may hold containers, and where."""
    if depth == 0 or not isinstance(value, (list, tuple, dict)):
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        here = f"{place}[{key!r}]"
        if isinstance(item, nn.Parameter):
            yield here, item
        elif isinstance(item, nn.Module):
            yield from ((f"{here}.{name}", parameter) for name, parameter in item.named_parameters())
        else:
            yield from _kept_in(item, here, depth - 1)


def inner(optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer | None:
    """The one that makes the steps."""
    return optimizer.inner if isinstance(optimizer, ClippedOptimizer) else optimizer


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, dicts and packed sequences."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.utils.rnn.PackedSequence):
        yield value.data
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
