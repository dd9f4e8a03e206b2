"""fastclip in Keras's optimizers, on torch, against their own ``global_clipnorm``."""

import math

import keras
import numpy
import pytest
import torch

import fastclip
from fastclip import policies
from fastclip.integrations.keras import clip

INPUTS = numpy.random.default_rng(0).normal(size=(32, 6)).astype("float32")
TARGETS = (INPUTS[:, :1] * 3 - INPUTS[:, 1:2] ** 2).astype("float32")
BAD = 4  # of the inputs; in the second of the batches


def model_with(optimizer):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(16, "tanh"), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    return model


def fit(optimizer, inputs=INPUTS, epochs=2):
    model = model_with(optimizer)
    model.fit(inputs, TARGETS, batch_size=4, epochs=epochs, shuffle=False, verbose=0)
    return model


def weights(model):
    return [variable.value.detach().clone() for variable in model.weights]


OPTIMIZERS = {
    "SGD": lambda **own: keras.optimizers.SGD(0.1, momentum=0.9, **own),
    "Adam": lambda **own: keras.optimizers.Adam(0.01, **own),
    "AdamW, EMA": lambda **own: keras.optimizers.AdamW(0.01, weight_decay=0.1, use_ema=True, **own),
    "Adam, accumulation": lambda **own: keras.optimizers.Adam(0.01, gradient_accumulation_steps=4, **own),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("max_norm", [0.3, 1e3])
def test_it_equals_global_clipnorm(make, max_norm):
    theirs = fit(make(global_clipnorm=max_norm))
    optimizer = make()
    guard = clip(optimizer, max_norm=max_norm)
    ours = fit(optimizer)
    torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        [v.value for v in ours.optimizer.variables], [v.value for v in theirs.optimizer.variables], atol=1e-6, rtol=0
    )
    assert (guard.clip_rate > 0) == (max_norm < 1)


def test_clipping_is_needed_for_that():
    assert not torch.allclose(weights(fit(keras.optimizers.SGD(0.1)))[0], weights(fit(clipped_sgd()[0]))[0], atol=1e-3)


def clipped_sgd():
    optimizer = keras.optimizers.SGD(0.1)
    return optimizer, clip(optimizer, max_norm=0.3)


def test_it_equals_global_clipnorm_under_a_loss_scale():
    theirs = fit(keras.optimizers.LossScaleOptimizer(OPTIMIZERS["Adam"](global_clipnorm=0.3), initial_scale=1024.0))
    optimizer = keras.optimizers.LossScaleOptimizer(OPTIMIZERS["Adam"](), initial_scale=1024.0)
    guard = clip(optimizer, max_norm=0.3)
    ours = fit(optimizer)
    torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-6, rtol=0)
    assert guard.steps == 16
    assert 0.1 < float(guard.last_norm) < 50.0  # of the unscaled gradients


def test_last_norm_is_that_before_clipping():
    optimizer, guard = clipped_sgd()
    model = model_with(optimizer)
    loss = torch.nn.functional.mse_loss(model(INPUTS[:4]), torch.from_numpy(TARGETS[:4]))
    loss.backward()
    grads = [variable.value.grad.double() for variable in model.trainable_weights]
    expected = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
    model.zero_grad()
    model.train_on_batch(INPUTS[:4], TARGETS[:4])
    assert float(guard.last_norm) == pytest.approx(expected, rel=1e-6)
    assert guard.last_stats.names == [variable.path for variable in model.trainable_weights]


@pytest.mark.parametrize(
    "make",
    [
        OPTIMIZERS["SGD"],
        OPTIMIZERS["AdamW, EMA"],
        lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=4),
    ],
    ids=["SGD", "AdamW, EMA", "EMA written back"],
)
def test_a_bad_batch_leaves_no_trace(make):
    """Weights, moments, averages and the count of steps are those of a run without it."""
    poisoned = INPUTS.copy()
    poisoned[12:16] = math.nan
    optimizer = make()
    guard = clip(optimizer, max_norm=0.3)
    model = model_with(optimizer)
    reference = make()
    clip(reference, max_norm=0.3)
    other = model_with(reference)
    for first in range(0, 32, 4):
        batch = slice(first, first + 4)
        model.train_on_batch(poisoned[batch], TARGETS[batch])
        if first != 12:
            other.train_on_batch(INPUTS[batch], TARGETS[batch])
    assert guard.skipped_steps == 1
    assert all(map(torch.equal, weights(model), weights(other)))
    both = zip(model.optimizer.variables, other.optimizer.variables, strict=True)
    assert all(torch.equal(ours.value, theirs.value) for ours, theirs in both)


def test_a_bad_last_batch_does_not_keep_the_average_from_being_taken():
    """``fit`` ends by writing the average into the weights."""
    poisoned = INPUTS.copy()
    poisoned[-1] = math.nan
    optimizer = keras.optimizers.SGD(0.1, use_ema=True)
    guard = clip(optimizer, max_norm=0.3)
    model = fit(optimizer, poisoned, epochs=1)
    assert guard.skipped_steps == 1
    averages = [average.value for average in optimizer._model_variables_moving_average]
    assert all(map(torch.equal, weights(model), averages))


def test_a_bad_batch_costs_an_accumulated_step_and_no_more():
    """Keras would multiply the gathered NaN by 0, and never step well again."""
    poisoned = INPUTS.copy()
    poisoned[BAD] = math.nan
    optimizer = OPTIMIZERS["Adam, accumulation"]()
    guard = clip(optimizer, max_norm=0.3)
    model = fit(optimizer, poisoned, epochs=1)
    assert (guard.steps, guard.skipped_steps) == (2, 1)
    assert all(bool(weight.isfinite().all()) for weight in weights(model))
    assert int(optimizer._iterations) == 8


def test_what_became_zero_is_counted():
    inputs = INPUTS.copy()
    inputs[BAD] = numpy.nan
    optimizer = keras.optimizers.SGD(0.1)
    guard = clip(optimizer, nonfinite="zero")
    fit(optimizer, inputs, epochs=1)
    assert (guard.skipped_steps, guard.nonfinite_steps) == (0, 1)


def test_skips_are_told_by_events():
    optimizer, guard = clipped_sgd()
    inputs = INPUTS.copy()
    inputs[BAD] = numpy.nan
    fit(optimizer, inputs, epochs=1)
    (event,) = guard.events
    assert (event.step, event.kind, event.reason) == (2, "skip", "NaN or Inf in the gradients")
    assert event.tensors[0].endswith("/kernel")


def test_skipping_for_ever_is_an_error():
    optimizer = keras.optimizers.SGD(0.1)
    clip(optimizer, skip_limit=3)
    with pytest.raises(fastclip.SkipLimitError, match="3 steps in a row were skipped"):
        fit(optimizer, numpy.full_like(INPUTS, math.nan))


def test_raise_names_the_variable():
    optimizer = keras.optimizers.SGD(0.1)
    clip(optimizer, nonfinite="raise")
    with pytest.raises(fastclip.NonFiniteGradientError, match=r"sequential.*/dense.*/kernel"):
        fit(optimizer, numpy.full_like(INPUTS, math.nan))


@pytest.mark.parametrize(
    ("policy", "own"),
    [(policies.PerTensorNorm(0.1), {"clipnorm": 0.1}), (policies.Value(0.01), {"clipvalue": 0.01})],
    ids=["clipnorm", "clipvalue"],
)
def test_other_rules_equal_keras_own(policy, own):
    optimizer = keras.optimizers.SGD(0.1)
    clip(optimizer, policy=policy)
    torch.testing.assert_close(
        weights(fit(optimizer)), weights(fit(keras.optimizers.SGD(0.1, **own))), atol=1e-6, rtol=0
    )


def test_a_rule_over_weights_gets_them():
    optimizer = keras.optimizers.SGD(0.1)
    guard = clip(optimizer, policy=policies.Unitwise(0.01, units="tensor"))
    model = fit(optimizer)
    assert guard.clipped_steps > 0
    assert all(bool(weight.isfinite().all()) for weight in weights(model))


@pytest.mark.parametrize(
    ("optimizer", "arguments", "error", "message"),
    [
        (keras.optimizers.SGD(global_clipnorm=1.0), {}, ValueError, "has global_clipnorm=1.0: leave it out"),
        (keras.optimizers.SGD(clipvalue=1.0), {}, ValueError, "has clipvalue=1.0: leave it out"),
        (keras.optimizers.SGD(), {"max_norm": 1.0, "policy": "ZScore"}, ValueError, "brings its own bound"),
        (keras.optimizers.SGD(), {"nonfinite": "ignore"}, ValueError, "nonfinite must be one of"),
        (torch.optim.SGD([torch.zeros(1)]), {}, TypeError, "expected a keras.optimizers.Optimizer, got SGD"),
    ],
)
def test_what_it_refuses(optimizer, arguments, error, message):
    with pytest.raises(error, match=message):
        clip(optimizer, **arguments)
    assert "_clip_gradients" not in vars(optimizer)


def test_it_is_not_put_in_twice():
    optimizer, _ = clipped_sgd()
    with pytest.raises(ValueError, match="fastclip is in this optimizer already"):
        clip(optimizer)


def test_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(RuntimeError, match="Keras runs on jax; set KERAS_BACKEND=torch"):
        clip(keras.optimizers.SGD())
