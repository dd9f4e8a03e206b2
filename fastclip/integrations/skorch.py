"""skorch: a callback that clips and records, and scorers of stability for grid search."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from skorch import NeuralNet
from skorch.callbacks import Callback
from torch import Tensor

from fastclip.guard import Guard
from fastclip.integrations.facts import facts, reports_of
from fastclip.ladder import Rollback, SpikeBackoff
from fastclip.optim import attach, own_settings
from fastclip.policies import Bound, Policy

SPIKE_FACTOR = 10.0
SPIKE_WINDOW = 50


class Clip(Callback):  # type: ignore[misc]
    """``NeuralNetClassifier(..., callbacks=[("clip", Clip(max_norm=1.0))])`` instead of ``GradientNormClipping``.

    It attaches to the net's optimizers, and records ``grad_norm`` (before clipping) of each training batch, and after
    each epoch ``clip_rate`` and ``skipped_steps``, in ``net.history``. An optimizer of the class form,
    ``optimizer=fastclip.clipped(torch.optim.SGD)``, clips by itself, and the callback only records. Its parameters can
    be cloned and searched over: ``callbacks__clip__max_norm``. With several optimizers those of the first are recorded.
    Further training (``partial_fit``) goes on with what was learned and counted, but starts anew with both where
    ``set_params`` has given another rule meanwhile. While the net trains ``set_params`` counts from the next batch on.

    What a policy has learned is in ``save_params(f_optimizer=...)``. To get it back let the callback stand before
    ``LoadInitState``: it attaches when training begins, and an optimizer without fastclip loads only what is its own.
    ``load_params`` before the first training comes too early for the callback; the class form takes it at any time.

    Args:
        max_norm, policy, nonfinite, skip_limit, backoff, rollback: as in :class:`fastclip.ClippedOptimizer`; each
            optimizer gets copies of the objects that learn.
    """

    rule_: list[Any] | None = None  # of the latest training; skorch takes names without _ at the end for parameters

    def __init__(
        self,
        max_norm: Bound | None = None,
        policy: Policy | str | None = None,
        nonfinite: str = "skip",
        skip_limit: int | None = 100,
        backoff: SpikeBackoff | None = None,
        rollback: Rollback | None = None,
    ) -> None:
        self.max_norm = max_norm
        self.policy = policy
        self.nonfinite = nonfinite
        self.skip_limit = skip_limit
        self.backoff = backoff
        self.rollback = rollback

    def on_train_begin(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        self._attach(net)

    def on_batch_begin(self, net: Any, batch: Any = None, training: bool | None = None, **kwargs: Any) -> None:
        if training:  # set_params may have given another rule, or another optimizer, since the last one
            self._attach(net)

    def _attach(self, net: Any) -> None:
        rule = [self.max_norm, self.policy, self.backoff, self.rollback]
        is_the_same = self.rule_ is not None and all(map(_is_same, rule, self.rule_))
        for name in net._optimizers:
            optimizer = getattr(net, f"{name}_")
            guard = reports_of(optimizer)
            if isinstance(guard, Guard) and not is_the_same:
                guard.remove()
                guard = None
            if guard is None:
                attach(optimizer, **own_settings(self.get_params(deep=False)), names=_named_parameters(net))
            elif isinstance(guard, Guard):
                guard.nonfinite, guard.skip_limit = self.nonfinite, self.skip_limit
        self.rule_ = rule

    def on_batch_end(self, net: Any, batch: Any = None, training: bool | None = None, **kwargs: Any) -> None:
        if training:
            norm = reports_of(_first_optimizer(net)).last_norm  # type: ignore[union-attr]
            net.history.record_batch("grad_norm", math.nan if norm is None else float(norm))

    def on_epoch_end(self, net: Any, dataset_train: Any = None, dataset_valid: Any = None, **kwargs: Any) -> None:
        known = facts(_first_optimizer(net))
        net.history.record("clip_rate", known["clip_rate"])
        net.history.record("skipped_steps", int(known["skipped_steps"]))


def spike_rate(norms: Sequence[float], factor: float = SPIKE_FACTOR, window: int = SPIKE_WINDOW) -> float:
    """Share of the steps whose norm was not finite, or more than ``factor`` times the median of the steps before it.

    Args:
        norms: total norms before clipping, in order.
        factor: from which on it counts.
        window: how many finite norms before it make the median; the very first step has none, and counts only if it
            isn't finite.

    Returns:
        From 0 to 1; 0 for no steps.

    Example:
        >>> from fastclip.integrations.skorch import spike_rate
        >>> spike_rate([1.0, 1.2, 0.9, 30.0])
        0.25
    """
    before: list[float] = []
    spikes = 0
    for norm in norms:
        if not math.isfinite(norm):
            spikes += 1
            continue
        spikes += bool(before) and norm > factor * statistics.median(before[-window:])
        before.append(norm)
    return spikes / len(norms) if norms else 0.0


def _is_same(setting: Any, before: Any) -> bool:
    """Objects that learn are equal to none but themselves; tensors of one value may change apart."""
    if isinstance(setting, Tensor) or isinstance(before, Tensor):
        return setting is before
    return bool(setting == before)


def _first_optimizer(net: Any) -> Any:
    """A net may call its optimizers as it likes."""
    return getattr(net, f"{net._optimizers[0]}_")


def _named_parameters(net: Any) -> list[tuple[str, Any]]:
    """Of all modules of a net; those of ``module_`` without a prefix."""
    modules = {"" if name == "module" else f"{name}.": getattr(net, f"{name}_") for name in net._modules}
    return [(f"{prefix}{name}", p) for prefix, module in modules.items() for name, p in module.named_parameters()]


def _net(estimator: Any) -> Any:
    """The fitted net, which may be the last step of pipelines, or what a search has found to be best."""
    while not isinstance(estimator, NeuralNet):
        if hasattr(estimator, "steps"):
            estimator = estimator.steps[-1][1]
        elif hasattr(estimator, "best_estimator_"):
            estimator = estimator.best_estimator_
        else:
            raise TypeError(f"expected a fitted skorch net, or a pipeline or search around one; got {estimator!r}")
    if not getattr(estimator, "initialized_", False):
        raise TypeError(f"this {type(estimator).__name__} has not been fitted")
    return estimator


def neg_spike_rate(estimator: Any, X: Any = None, y: Any = None) -> float:
    """Scorer for scikit-learn: minus the :func:`spike_rate` of the training that made ``estimator``.

    Args:
        estimator: a fitted skorch net with the callback :class:`Clip`, a pipeline that ends with one, or a search.
        X, y: not looked at: how a network was trained is no matter of the fold that it is judged on.

    Raises:
        TypeError: there is no fitted net.
        ValueError: nothing has recorded the norms.
    """
    net = _net(estimator)
    steps = [batch for epoch in net.history for batch in epoch["batches"] if "train_loss" in batch]
    if any("grad_norm" not in batch for batch in steps):
        raise ValueError(f"{type(net).__name__} has no norms in its history: give it callbacks=[('clip', Clip())]")
    return -spike_rate([batch["grad_norm"] for batch in steps])


def neg_skipped_steps(estimator: Any, X: Any = None, y: Any = None) -> float:
    """Scorer for scikit-learn: minus the number of steps that did not happen while ``estimator`` was trained.

    Args:
        estimator: a fitted skorch net with fastclip in its optimizer, a pipeline that ends with one, or a search.
        X, y: not looked at.

    Raises:
        TypeError: there is no fitted net, or no fastclip in its optimizer.
    """
    return -facts(_first_optimizer(_net(estimator)))["skipped_steps"]
