"""fastclip in Keras's optimizers, on torch, against their own ``global_clipnorm``."""

import math
import pickle

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


class Skips(policies.GlobalNorm):
    """Lets no step happen."""

    def decide(self, reading):
        return super().decide(reading)._replace(skip=True)


@pytest.mark.parametrize("size", [1.0, math.nan])
@pytest.mark.parametrize("nonfinite", ["skip", "zero", "propagate"])
def test_a_rule_skips_too_and_the_event_tells_of_it(nonfinite, size):
    (a,) = variables(1.0)
    optimizer = keras.optimizers.SGD(1.0)
    guard = clip(optimizer, policy=Skips(), nonfinite=nonfinite)
    optimizer.apply([torch.full((3,), size)], [a])
    assert a.value.tolist() == [1.0] * 3
    (event,) = guard.events
    found = nonfinite == "skip" and math.isnan(size)
    assert event.reason == ("NaN or Inf in the gradients" if found else f"decided by {guard.policy!r}")
    assert event.tensors == (("a",) if found else ())


def test_skipping_for_ever_is_an_error():
    optimizer = keras.optimizers.SGD(0.1)
    clip(optimizer, skip_limit=3)
    with pytest.raises(fastclip.SkipLimitError, match="3 steps in a row were skipped"):
        fit(optimizer, numpy.full_like(INPUTS, math.nan))


def test_after_that_error_the_average_can_still_be_taken():
    (a,) = variables(1.0)
    optimizer = keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.5)
    clip(optimizer, skip_limit=1)
    for _ in range(2):
        optimizer.apply([torch.tensor([0.0, 1.0, 0.0])], [a])
    with pytest.raises(fastclip.SkipLimitError):
        optimizer.apply([torch.full((3,), math.nan)], [a])
    optimizer.finalize_variable_values([a])
    (average,) = optimizer._model_variables_moving_average
    assert torch.equal(a.value, average.value)


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
        (keras.optimizers.SGD(clipnorm=1.0), {}, ValueError, "has clipnorm=1.0: leave it out"),
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


def variables(*values):
    return [
        keras.Variable(numpy.full(3, value, "float32"), name=name) for name, value in zip("abc", values, strict=False)
    ]


def test_what_a_rule_has_learned_stays_with_its_variable():
    """Keras lists only the variables that have a gradient."""
    a, b = variables(0.0, 0.0)
    optimizer = keras.optimizers.SGD(1e-9)
    guard = clip(optimizer, policy=policies.AdaGC(warmup=2, lam_abs=1e9))
    optimizer.build([a, b])
    ones, hundreds = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 100.0, 0.0])
    for _ in range(3):
        optimizer.apply([hundreds.clone(), ones.clone()], [b, a])  # in any order
    alone = hundreds.clone()
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([None, alone], [a, b])
    assert torch.equal(alone, hundreds)
    assert guard.policy.averages.tolist() == pytest.approx([1.0, 100.0])
    assert guard.last_stats.names == ["b"]


def test_what_a_rule_has_learned_survives_a_frozen_layer():
    optimizer = keras.optimizers.SGD(0.01)
    guard = clip(optimizer, policy=policies.AdaGC(warmup=2))
    model = fit(optimizer, epochs=1)
    learned = guard.policy.averages.tolist()
    model.layers[0].trainable = False
    model.compile(optimizer, "mse")
    model.train_on_batch(INPUTS[:4], TARGETS[:4])
    averages = guard.policy.averages.tolist()
    assert averages[:2] == learned[:2]
    assert averages[2] != learned[2]
    assert guard.last_stats.names == [variable.path for variable in model.trainable_weights]


def test_a_variable_that_is_listed_twice_is_refused():
    (a,) = variables(1.0)
    optimizer, _ = clipped_sgd()
    with pytest.raises(ValueError, match="a is listed twice: add its gradients"):
        optimizer.apply([torch.ones(3), torch.ones(3)], [a, a])
    assert a.value.tolist() == [1.0] * 3


def test_what_is_no_tensor_is_refused():
    (a,) = variables(1.0)
    optimizer, _ = clipped_sgd()
    with pytest.raises(TypeError, match="the gradient of a is a ndarray"):
        optimizer.apply([numpy.ones(3, "float32")], [a])


GRADS = {
    "one tensor": lambda a, b: [shared := torch.full((3,), 2.0), shared],
    "two views": lambda a, b: [shared := torch.full((3,), 2.0), shared.view(3)],
    "overlapping": lambda a, b: [(shared := torch.full((4,), 2.0))[:3], shared[1:]],
    "expanded": lambda a, b: [torch.tensor(2.0).expand(3), torch.full((3,), 2.0)],
    "of autograd": lambda a, b: torch.autograd.grad(((a.value + b.value) ** 2).sum(), [a.value, b.value]),
    "a weight": lambda a, b: [a.value.detach(), torch.full((3,), 2.0)],
}


@pytest.mark.parametrize("make", GRADS.values(), ids=GRADS)
def test_gradients_that_share_memory_count_once_each(make):
    a, b = variables(1.0, 1.0)
    optimizer = keras.optimizers.SGD(1.0)
    guard = clip(optimizer, max_norm=0.5)
    grads = make(a, b)
    before = [grad.double() for grad in grads]
    norm = float(torch.stack(before).norm())
    expected = [1.0 - grad * 0.5 / norm for grad in before]
    optimizer.apply(grads, [a, b])
    assert float(guard.last_norm) == pytest.approx(norm)
    torch.testing.assert_close([a.value.detach().double(), b.value.detach().double()], expected, atol=1e-6, rtol=0)
    if grads[0].data_ptr() != a.value.data_ptr():
        assert torch.equal(grads[0].double(), before[0])  # nobody wrote through what is shared


def test_gradients_with_memory_of_their_own_are_clipped_where_they_are():
    a, b = variables(1.0, 1.0)
    optimizer = keras.optimizers.SGD(1.0)
    clip(optimizer, max_norm=0.5)
    grads = [torch.ones(3), torch.ones(6)[::2]]
    optimizer.apply(grads, [a, b])
    assert float(torch.stack(grads).norm()) == pytest.approx(0.5)


def test_sparse_gradients_are_clipped_in_a_copy():
    (a,) = variables(1.0)
    optimizer = keras.optimizers.SGD(1.0)
    clip(optimizer, max_norm=0.5)
    grad = torch.sparse_coo_tensor([[1]], [4.0], (3,))
    optimizer.apply([grad], [a])
    assert a.value.tolist() == pytest.approx([1.0, 0.5, 1.0])
    assert grad.to_dense().tolist() == [0.0, 4.0, 0.0]


@pytest.mark.parametrize("bad", [4, 8, 12], ids=["first of its batches", "second", "last"])
def test_what_became_zero_is_not_kept_by_accumulation(bad):
    """Keras would multiply the gathered NaN by 0."""
    inputs = INPUTS.copy()
    inputs[bad] = numpy.nan
    optimizer = OPTIMIZERS["Adam, accumulation"]()
    guard = clip(optimizer, nonfinite="zero")
    model = fit(optimizer, inputs, epochs=1)
    assert (guard.steps, guard.nonfinite_steps) == (2, 1)
    assert not any(bool(gathered.value.any()) for gathered in optimizer._accumulated_gradients)
    assert all(bool(weight.isfinite().all()) for weight in weights(model))


@pytest.mark.parametrize(
    ("options", "error"),
    [({"nonfinite": "raise"}, fastclip.NonFiniteGradientError), ({"skip_limit": 1}, fastclip.SkipLimitError)],
    ids=["raise", "skip_limit"],
)
@pytest.mark.parametrize("bad", [0, 15], ids=["first of its batches", "last"])
def test_accumulation_begins_anew_after_an_error(options, error, bad):
    """As after a skip. And Keras makes a new error of the message, which is one of ours all the same."""
    inputs = INPUTS[:16].copy()
    inputs[bad] = numpy.nan
    optimizer, reference = [keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=4) for _ in range(2)]
    guard = clip(optimizer, max_norm=0.3, **options)
    clip(reference, max_norm=0.3)
    model, other = model_with(optimizer), model_with(reference)
    with pytest.raises(error):
        model.fit(inputs, TARGETS[:16], batch_size=4, shuffle=False, verbose=0)
    guard.skip_limit = None
    for one in (model, other):
        one.fit(INPUTS, TARGETS, batch_size=4, shuffle=False, verbose=0)
    assert all(map(torch.equal, weights(model), weights(other)))
    assert int(optimizer._iterations) == int(reference._iterations) + 4


def test_the_error_can_be_pickled_and_made_of_its_message():
    error = fastclip.NonFiniteGradientError("bad", "kernel", (1, 2), math.inf)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.tensor, copy.index, copy.value) == ("bad", "kernel", (1, 2), math.inf)
    bare = fastclip.NonFiniteGradientError("bad")
    assert (str(bare), bare.tensor, bare.index) == ("bad", "", ())
    assert math.isnan(bare.value)


@pytest.mark.parametrize("wrap", [lambda inner: inner, keras.optimizers.LossScaleOptimizer], ids=["", "scaled"])
def test_several_optimizers_in_one_are_clipped_each(wrap):
    inner = keras.optimizers.SGD(0.1)
    optimizer = wrap(keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(inner)))
    with pytest.raises(TypeError, match=r"clip each of its optimizers, which are in \.optimizers once it is built"):
        clip(optimizer)
    assert "_clip_gradients" not in vars(inner)
    guard = clip(inner, max_norm=0.3)
    fit(optimizer)
    assert guard.clipped_steps > 0


def test_the_guard_can_be_set():
    (a,) = variables(0.0)
    optimizer = keras.optimizers.SGD(1.0)
    guard = clip(optimizer, max_norm=1.0)
    assert (guard.max_norm, guard.skip_limit, guard.nonfinite) == (1.0, 100, "skip")
    assert clip(keras.optimizers.SGD()).max_norm == 1.0
    guard.max_norm = 0.25
    optimizer.apply([torch.tensor([0.0, 4.0, 0.0])], [a])
    assert a.value.tolist() == pytest.approx([0.0, -0.25, 0.0])
    guard.skip_limit = 1
    with pytest.raises(fastclip.SkipLimitError):
        optimizer.apply([torch.full((3,), math.nan)], [a])
    guard.nonfinite = "raise"
    with pytest.raises(fastclip.NonFiniteGradientError):
        optimizer.apply([torch.full((3,), math.nan)], [a])
    with pytest.raises(ValueError, match="skip_limit"):
        guard.skip_limit = 0
    with pytest.raises(ValueError, match="nonfinite must be one of"):
        guard.nonfinite = "ignore"


def test_a_rule_without_a_bound_has_none_to_set():
    guard = clip(keras.optimizers.SGD(), policy="ZScore")
    with pytest.raises(ValueError, match="has no max_norm"):
        guard.max_norm = 1.0


def test_a_skipped_step_applies_no_constraint():
    (a,) = variables(1.0)
    a.constraint = lambda weight: weight * 0.5
    optimizer = keras.optimizers.SGD(1.0)
    clip(optimizer)
    optimizer.apply([torch.full((3,), math.nan)], [a])
    assert a.value.tolist() == [1.0] * 3
    optimizer.apply([torch.zeros(3)], [a])
    assert a.value.tolist() == [0.5] * 3
