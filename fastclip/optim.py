"""The optimizer wrapper and its two other forms: a class, and an attachment to the very same object."""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fastclip import checkpoint
from fastclip.amp import GUARD, scalers_marks
from fastclip.checks import norm_type_number
from fastclip.guard import Guard
from fastclip.ladder import LossWatch, Rollback, SpikeBackoff
from fastclip.policies import Bound, GlobalNorm, Policy, policy_of
from fastclip.record import Reports
from fastclip.regularisation import Penalty
from fastclip.riding import RIDERS
from fastclip.several import Several
from fastclip.step_arguments import step_arguments_of
from fastclip.tensors import Names

# Frameworks' own wrappers: stepping one from outside would clip gradients that it hasn't unscaled, synchronised
# or accumulated yet.
FOREIGN = {
    "AcceleratedOptimizer": "accelerator.prepare(fastclip.ClippedOptimizer(optimizer, ...))",
    "LightningOptimizer": "return fastclip.ClippedOptimizer(optimizer, ...) from configure_optimizers",
    "_FabricOptimizer": "fabric.setup(model, fastclip.ClippedOptimizer(optimizer, ...))",
}
FRAMEWORKS = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")


def _check_optimizer(optimizer: Any) -> None:
    for cls in type(optimizer).__mro__:
        if cls.__name__ in FOREIGN and cls.__module__.split(".")[0] in FRAMEWORKS:
            raise TypeError(
                f"optimizer: {cls.__name__} of {cls.__module__.split('.')[0]} is around it already, and decides when "
                f"it steps. Put fastclip inside: {FOREIGN[cls.__name__]}"
            )
    if type(optimizer).__module__.split(".")[0] == "deepspeed" and hasattr(optimizer, "optimizer"):
        raise TypeError(
            f"optimizer: {type(optimizer).__name__} of deepspeed scales, shards and clips the gradients by itself: set "
            "gradient_clipping in its own configuration"
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")


def _policy(max_norm: Bound | None, norm_type: float, policy: Policy | str | None) -> Policy:
    if policy is None:
        return GlobalNorm(1.0 if max_norm is None else max_norm, norm_type=norm_type)
    if max_norm is not None or norm_type_number(norm_type) != 2.0:
        raise ValueError(f"policy={policy!r} brings its own bound and norm_type; leave max_norm and norm_type out")
    return policy_of(policy)


def _inners(name: str) -> Any:
    """An attribute that belongs to the wrapped optimizer, which may rebind it: looked up anew each time."""
    return property(lambda self: getattr(self._inner, name), lambda self, value: setattr(self._inner, name, value))


class ClippedOptimizer(Reports, Optimizer):
    """An optimizer whose every step clips the gradients first, and does not happen when one is not finite.

    It is a ``torch.optim.Optimizer`` and owns nothing: ``param_groups``, ``state`` and ``defaults`` are the
    wrapped optimizer's own, so LR schedulers, ``state_dict``, ``zero_grad`` and ``torch.amp.GradScaler`` work as
    before; unknown attributes are the wrapped optimizer's too. ``step(closure)`` clips inside, after the
    backward of the closure. With ``fused=True`` torch's Adam, AdamW, SGD and Adagrad clip while they step
    (on a GPU: under a loss scale, or from 1 GiB of gradients on).

    Args:
        optimizer: the optimizer to wrap. The gradients of all its parameters are clipped by one joint norm,
            but for param groups with a ``group_max_norm`` (a bound) or a ``policy`` of their own: they are
            clipped by their own norm, and don't count in the joint one.
        max_norm: bound of the joint norm, >= 0 (default 1.0): a number, a one-element tensor, or a callable of
            the number of the step, from 0; ``inf`` only guards against NaN and Inf. A ``max_norm`` in the param
            groups is this bound, and comes first.
        norm_type: p of the p-norm.
        nonfinite: ``"skip"`` (default): a step whose gradients hold NaN or Inf does not happen, parameters and
            optimizer state stay bitwise unchanged, and ``skipped_steps`` counts it. ``"zero"``, ``"raise"``
            and ``"propagate"`` as in :func:`fastclip.clip_grad_norm_`. Under a GradScaler such a step is skipped.
            ``nonfinite_steps`` counts such steps, and ``last_stats`` tells how much of which gradient was NaN or Inf.
        policy: a rule of :mod:`fastclip.policies` (or its name, with its defaults) instead of ``max_norm`` and
            ``norm_type``.
        l1, l2, convention: weight penalties, added to the gradients in the pass that reads them: l1 * sign(w) + l2 * w,
            or 2 * l2 * w with ``convention="keras"``. A param group's own ``l1`` and ``l2`` come first. A skipped step
            may leave them in its gradients; ``nonfinite="raise"`` reads these once more, before they are added.
        backoff: a :class:`fastclip.SpikeBackoff`: cuts the learning rate after skipped steps, and brings it back.
        rollback: a :class:`fastclip.Rollback`: goes back to a snapshot of parameters and state.
        loss_watch: a :class:`fastclip.LossWatch` for :meth:`observe`; without one it minds only NaN and Inf.
        skip_limit: after so many skipped steps in a row ``SkipLimitError`` is raised; None never does. (On an
            accelerator, where nothing is waited for, it comes two steps late.)
        group: a process group, or a mesh of one dimension, whose other ranks step other parameters that count in the
            norm, as with pipeline stages. Sharded parameters (FSDP2, tensor parallel) and a
            ``ZeroRedundancyOptimizer`` around this one need none; FSDP1 needs ``model.process_group``.
        names: the model, or (name, parameter) pairs, for events and errors to tell which tensor went bad. Without them
            the names that the optimizer was given with its parameters, else places in its param groups.

    Raises:
        TypeError: ``optimizer`` is not a ``torch.optim.Optimizer``, or accelerate's or Lightning's wrapper of one.
        ValueError: a negative or NaN ``max_norm``, an unknown ``nonfinite``, a parameter in two groups.

    Example:
        >>> import torch, fastclip
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = fastclip.ClippedOptimizer(torch.optim.AdamW(model.parameters()), max_norm=1.0)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> opt.step()
        >>> opt.last_norm, opt.skipped_steps
        (tensor(4.), tensor(0))
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_norm: Bound | None = None,
        *,
        norm_type: float = 2.0,
        nonfinite: str = "skip",
        policy: Policy | str | None = None,
        skip_limit: int | None = 100,
        l1: float = 0.0,
        l2: float = 0.0,
        convention: str = "torch",
        backoff: SpikeBackoff | None = None,
        rollback: Rollback | None = None,
        loss_watch: LossWatch | None = None,
        group: Any = None,
        names: Names = None,
    ) -> None:
        # Optimizer.__init__ is not called: it would build param_groups and state of its own.
        _check_optimizer(optimizer)
        self._inner = optimizer
        penalty = Penalty(l1, l2, convention)
        chosen = _policy(max_norm, norm_type, policy)
        self._fastclip = Guard(
            optimizer, chosen, nonfinite, skip_limit, penalty, backoff, rollback, loss_watch, group, names
        )
        self._start()

    def _start(self) -> None:
        self._record, self._ladder = self._fastclip._record, self._fastclip._ladder  # what Reports tells of
        self._optimizer_step_pre_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self._optimizer_step_post_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self._patch_step_function()

    param_groups = _inners("param_groups")
    state = _inners("state")
    defaults = _inners("defaults")
    zero_grad = _inners("zero_grad")  # with its own signature, which accelerate looks at
    _optimizer_state_dict_pre_hooks = _inners("_optimizer_state_dict_pre_hooks")
    _optimizer_state_dict_post_hooks = _inners("_optimizer_state_dict_post_hooks")
    _optimizer_load_state_dict_pre_hooks = _inners("_optimizer_load_state_dict_pre_hooks")
    _optimizer_load_state_dict_post_hooks = _inners("_optimizer_load_state_dict_post_hooks")

    @property
    def inner(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._inner

    @property
    def policy(self) -> Policy:
        """The rule for all gradients but those of groups with their own."""
        return self._fastclip.policy

    @property
    def max_norm(self) -> Any:
        """The bound of the joint norm, as it was given; may be set at any time."""
        return self._fastclip.max_norm

    @max_norm.setter
    def max_norm(self, value: Bound) -> None:
        self._fastclip.max_norm = value

    @property
    def nonfinite(self) -> str:
        """What NaN and Inf do; may be set at any time."""
        return self._fastclip.nonfinite

    @nonfinite.setter
    def nonfinite(self, value: str) -> None:
        self._fastclip.nonfinite = value

    @property
    def skip_limit(self) -> int | None:
        """After how many skipped steps in a row an error is raised; may be set at any time."""
        return self._fastclip.skip_limit

    @skip_limit.setter
    def skip_limit(self, value: int | None) -> None:
        self._fastclip.skip_limit = value

    def observe(self, loss: Tensor | float) -> None:
        """Looks at the loss of the coming step: one that isn't finite, or a spike for ``loss_watch``, skips the step.

        Args:
            loss: 0-d, as it is before a GradScaler scales it. Nothing is waited for.
        """
        self._fastclip.observe(loss)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Read by GradScalers, before each step."""
        return self._fastclip.can_unscale

    def __getattr__(self, name: str) -> Any:
        # "optimizer" would have frameworks look inside; riders on the wrapped optimizer are not the wrapper's.
        if name not in ("optimizer", "_inner", *RIDERS) and not name.startswith("__"):
            try:
                return getattr(self._inner, name)
            except AttributeError:
                pass
        inner = type(vars(self).get("_inner")).__name__
        raise AttributeError(f"neither {type(self).__name__} nor the {inner} in it has an attribute {name!r}")

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's own state dict: it loads into the bare optimizer, and the other way round.

        What has been learned (by a policy, a schedule of the bound, ``backoff``, ``loss_watch``) stands under one key
        more, ``"fastclip"``, which the bare optimizer ignores.
        """
        return checkpoint.saved_with(self._fastclip, self._inner.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state dict of this or of the bare optimizer.

        What it doesn't tell stays: the bounds and policies of param groups, and what policies know.
        """
        checkpoint.load_with(self._fastclip, self._inner.load_state_dict, state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._inner.add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        # What others put on the object, hooks and a scheduler's counting `step`, stays behind, as in torch.
        return {key: self.__dict__[key] for key in ("_inner", "_fastclip")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._fastclip!r}) of {self._inner!r}"

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Clips the gradients and steps; skips the step when a gradient is not finite.

        Args:
            closure: re-evaluates the model and returns the loss; zero_grad and backward belong inside. The
                gradients are clipped after it, each time the optimizer evaluates it.
            kwargs: what else the wrapped optimizer's ``step`` takes.

        Writes: parameters and optimizer state, as the wrapped optimizer does; each ``p.grad`` that is clipped or has a
        penalty, so that it holds the gradient that was stepped with. If there is neither, no gradient is written.

        Returns:
            The closure's loss, also of a skipped step; without a closure what the optimizer returns.

        Raises:
            NonFiniteGradientError: with ``nonfinite="raise"``, before anything is written; and with ``"skip"``
                when an optimizer that evaluates the closure again (LBFGS) has already moved the parameters.
            SkipLimitError: ``skip_limit`` steps in a row were skipped.
            TypeError: arguments that the wrapped optimizer's ``step`` doesn't take, or lacks; nothing was done.
            RuntimeError: ``scaler.unscale_`` was called with the wrapped optimizer, ``scaler.step`` with this one.
        """
        args = () if closure is None else (closure,)
        if not any(name in vars(self) for name in RIDERS):  # the usual case; a graph can't break inside a `with`
            return self._step(args, kwargs)
        with scalers_marks(self):
            return self._step(args, kwargs)

    def _step(self, closure: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args = (self, *closure)
        for pre_hook in self._optimizer_step_pre_hooks.values():
            result = pre_hook(self, args, kwargs)
            if result is None:
                continue
            if not isinstance(result, tuple) or len(result) != 2:
                raise RuntimeError(f"a step pre-hook must return None or (args, kwargs), got {result!r}")
            args, kwargs = result
        out = self._fastclip.step(self, self._inner.step, args[1:], kwargs)
        for post_hook in self._optimizer_step_post_hooks.values():
            post_hook(self, args, kwargs)
        return out

    step.hooked = True  # type: ignore[attr-defined]  # global hooks run in the wrapped optimizer's step, once


class ClipGroup(ClippedOptimizer):
    """Several optimizers that are clipped by one norm over all their parameters, and step together or not at all.

    For models whose parameters are spread over optimizers, as torchtitan does it, or the stages of a pipeline on one
    rank. With ``group`` the optimizers of other ranks join in. It is a :class:`ClippedOptimizer` over all their param
    groups; its ``state_dict`` holds ``{"optimizers": [...]}``, the state dict of each. A rule that learns for each
    tensor knows them by their places in a row: give a group that joins later to the last optimizer, or make a new one.

    Args:
        optimizers: ``torch.optim.Optimizer``, bare ones, with different parameters; a stage without any passes none.
        settings: those of :class:`ClippedOptimizer`.

    Raises:
        TypeError, ValueError: as :class:`ClippedOptimizer`, and for one that fastclip clips already.

    Example:
        >>> import torch, fastclip
        >>> a, b = torch.nn.Linear(3, 1), torch.nn.Linear(1, 1)
        >>> opts = [torch.optim.SGD(a.parameters(), lr=0.1), torch.optim.AdamW(b.parameters(), lr=0.1)]
        >>> opt = fastclip.ClipGroup(opts, max_norm=1.0)
        >>> b(a(torch.ones(2, 3))).sum().backward()
        >>> opt.step()
        >>> opt.steps
        tensor(1)
    """

    def __init__(self, optimizers: Iterable[Optimizer], max_norm: Bound | None = None, **settings: Any) -> None:
        if isinstance(optimizers, Optimizer) or not isinstance(optimizers, Iterable):
            raise TypeError(f"optimizers: expected several of them, got {type(optimizers).__name__}")
        parts = list(optimizers)
        for part in parts:
            _check_optimizer(part)
            if GUARD in vars(part):
                raise TypeError(
                    f"optimizers: {type(part).__name__} is clipped by fastclip already; pass what is inside"
                )
            if step_arguments_of(part).closure_required:
                raise TypeError(f"optimizers: {type(part).__name__} needs a closure in each step; wrap it by itself")
        super().__init__(Several(parts), max_norm, **settings)


class _ClippedClass(type):
    """The class of the classes that :func:`clipped` makes: they pickle by what they were made of."""

    made_of: tuple[type[Optimizer], tuple[tuple[str, Any], ...]]


def clipped(optimizer_class: type[Optimizer], **settings: Any) -> type[ClippedOptimizer]:
    """A class whose objects are ``optimizer_class`` wrapped in :class:`ClippedOptimizer`, for code that wants a class.

    Args:
        optimizer_class: e.g. ``torch.optim.AdamW``.
        settings: those of :class:`ClippedOptimizer` but ``names``; each object gets a copy of what learns.

    Returns:
        A class called with the arguments of ``optimizer_class``; a setting given there goes before the one given here.
        It pickles, as do its objects.

    Raises:
        TypeError: not an optimizer class, or an unknown setting.

    Example:
        >>> import torch, fastclip
        >>> ClippedAdamW = fastclip.clipped(torch.optim.AdamW, max_norm=1.0)
        >>> opt = ClippedAdamW(torch.nn.Linear(3, 1).parameters(), lr=0.1, max_norm=0.5)
        >>> opt.max_norm, opt.param_groups[0]["lr"]
        (0.5, 0.1)
    """
    if not isinstance(optimizer_class, type) or not issubclass(optimizer_class, Optimizer):
        raise TypeError(f"optimizer_class: expected a subclass of torch.optim.Optimizer, got {optimizer_class!r}")
    unknown = sorted(settings.keys() - SETTINGS_OF_CLASS)
    if unknown:
        raise TypeError(f"unknown setting {', '.join(unknown)}; known are {', '.join(sorted(SETTINGS_OF_CLASS))}")
    made_of: Any = (optimizer_class, tuple(sorted(settings.items())))
    made: type[ClippedOptimizer] = _clipped(*made_of)
    return made


PER_OBJECT = frozenset({"policy", "backoff", "rollback", "loss_watch"})  # they learn: each optimizer has its own
SETTINGS = frozenset(inspect.signature(ClippedOptimizer.__init__).parameters) - {"self", "optimizer"}
SETTINGS_OF_CLASS = SETTINGS - {"names"}  # each object has its own parameters


def own_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for one optimizer: copies of what learns. The rest may be held on to, such as a tensor as the bound."""
    return {name: copy.deepcopy(value) if name in PER_OBJECT else value for name, value in settings.items()}


@functools.cache
def _clipped(optimizer_class: Any, settings: tuple[tuple[str, Any], ...]) -> Any:
    def __init__(self: ClippedOptimizer, params: Any, *args: Any, **kwargs: Any) -> None:
        given = {**dict(settings), **{name: kwargs.pop(name) for name in SETTINGS & kwargs.keys()}}
        ClippedOptimizer.__init__(self, optimizer_class(params, *args, **kwargs), **own_settings(given))

    body = {"__init__": __init__, "__module__": __name__, "__doc__": f"{optimizer_class.__name__}, clipped."}
    made = _ClippedClass(f"Clipped{optimizer_class.__name__}", (ClippedOptimizer,), body)
    made.made_of = (optimizer_class, settings)
    return made


copyreg.pickle(_ClippedClass, lambda cls: (_clipped, cls.made_of))


def attach(
    optimizer: Optimizer,
    max_norm: Bound | None = None,
    *,
    norm_type: float = 2.0,
    nonfinite: str = "skip",
    policy: Policy | str | None = None,
    skip_limit: int | None = 100,
    l1: float = 0.0,
    l2: float = 0.0,
    convention: str = "torch",
    backoff: SpikeBackoff | None = None,
    rollback: Rollback | None = None,
    loss_watch: LossWatch | None = None,
    group: Any = None,
    names: Names = None,
) -> Guard:
    """Clips inside every ``optimizer.step`` of this very object, for code that checks ``type(optimizer)``.

    Otherwise as :class:`ClippedOptimizer`, with its arguments; ``optimizer.state_dict()`` is the wrapper's, too, where
    the optimizer runs torch's hooks for it. torch leaves such additions out when it pickles or deep-copies an
    optimizer: attach again to the copy.

    Returns:
        A :class:`Guard`: ``last_norm``, ``skipped_steps`` and so on, ``max_norm``, and ``remove()``.

    Raises:
        ValueError: fastclip is in ``optimizer.step`` already.
        TypeError, ValueError: as :class:`ClippedOptimizer`.

    Example:
        >>> import torch, fastclip
        >>> opt = torch.optim.SGD(torch.nn.Linear(3, 1).parameters(), lr=0.1)
        >>> guard = fastclip.attach(opt, max_norm=1.0)
        >>> opt.step()
        >>> type(opt).__name__, guard.steps
        ('SGD', tensor(0))
    """
    _check_optimizer(optimizer)
    if GUARD in vars(optimizer):
        raise ValueError("fastclip is in this optimizer's step already; remove() that guard first, or use it")
    penalty = Penalty(l1, l2, convention)
    chosen = _policy(max_norm, norm_type, policy)
    guard = Guard(optimizer, chosen, nonfinite, skip_limit, penalty, backoff, rollback, loss_watch, group, names)
    guard.attach()
    return guard
