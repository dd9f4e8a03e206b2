"""fastclip in skorch: the class form and the callback against its own clipping, grid search, scorers."""

import math
import pickle

import numpy
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from skorch import NeuralNetClassifier, NeuralNetRegressor
from skorch.callbacks import Callback, Checkpoint, GradientNormClipping, LoadInitState

import fastclip
from fastclip import policies
from fastclip.integrations.facts import reports_of
from fastclip.integrations.skorch import Clip, neg_skipped_steps, neg_spike_rate, spike_rate

RANDOM = numpy.random.default_rng(0)
INPUTS = RANDOM.normal(size=(48, 6)).astype("float32")
LABELS = (INPUTS.sum(1) > 0).astype("int64")
MAX_NORM = 0.05


class Net(torch.nn.Module):
    def __init__(self, between=torch.nn.Tanh):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 8), between(), torch.nn.Linear(8, 2))

    def forward(self, x):
        return self.layers(x)


def net(cls=NeuralNetClassifier, **own):
    settings = {"criterion": torch.nn.CrossEntropyLoss, "lr": 0.5, "max_epochs": 3, "batch_size": 8, "verbose": 0}
    return cls(Net, **{**settings, "iterator_train__shuffle": False, **own})


def fitted(estimator, inputs=INPUTS):
    torch.manual_seed(0)
    return estimator.fit(inputs, LABELS)


def weights(estimator):
    return [p.detach() for p in estimator.module_.parameters()]


@pytest.fixture(scope="module")
def theirs():
    return fitted(net(callbacks=[GradientNormClipping(MAX_NORM)]))


@pytest.mark.parametrize(
    "own",
    [
        {"optimizer": fastclip.clipped(torch.optim.SGD), "optimizer__max_norm": MAX_NORM},
        {"optimizer": fastclip.clipped(torch.optim.SGD, max_norm=MAX_NORM)},
        {"callbacks": [("clip", Clip(max_norm=MAX_NORM))]},
        {"optimizer": fastclip.clipped(torch.optim.SGD, max_norm=MAX_NORM), "callbacks": [("clip", Clip())]},
    ],
    ids=["class, parameter", "class", "callback", "both"],
)
def test_it_equals_skorchs_own(own, theirs):
    ours = fitted(net(**own))
    torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-6, rtol=0)
    assert not torch.allclose(weights(fitted(net()))[0], weights(theirs)[0], atol=1e-3)


@pytest.mark.parametrize("name", ["optimizer__max_norm", "callbacks__clip__max_norm"])
def test_set_params_takes_effect_on_a_trained_net(name):
    ours = net(optimizer=fastclip.clipped(torch.optim.SGD, max_norm=1.0))
    if name.startswith("callbacks"):
        ours = net(callbacks=[("clip", Clip(max_norm=1.0))])
    fitted(ours)
    before = [weight.clone() for weight in weights(ours)]
    ours.set_params(**{name: 0.0})
    ours.partial_fit(INPUTS, LABELS)
    assert all(map(torch.equal, weights(ours), before))


def test_a_fit_again_starts_anew():
    estimator = net(callbacks=[("clip", Clip(policy=policies.Percentile(50)))])
    first = [weight.clone() for weight in weights(fitted(estimator))]
    steps = len(estimator.history) * 5
    assert all(map(torch.equal, weights(fitted(estimator)), first))
    assert fastclip.integrations.facts.reports_of(estimator.optimizer_).steps == steps


def test_further_training_goes_on_with_what_is_known():
    estimator = fitted(net(callbacks=[("clip", Clip(max_norm=MAX_NORM))]))
    guard = fastclip.integrations.facts.reports_of(estimator.optimizer_)
    before = int(guard.steps)
    estimator.partial_fit(INPUTS, LABELS)
    assert fastclip.integrations.facts.reports_of(estimator.optimizer_) is guard
    assert guard.steps == 2 * before


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"policy": policies.ZScore()}, {"policy": policies.GlobalNorm(0.0)}),
        ({"policy": policies.ZScore()}, {"policy": None, "max_norm": 0.0}),
        ({"max_norm": 1.0}, {"max_norm": None, "policy": policies.GlobalNorm(0.0)}),
        ({"max_norm": 1.0, "backoff": fastclip.SpikeBackoff()}, {"max_norm": 0.0, "backoff": None}),
    ],
)
def test_further_training_takes_another_rule(first, then):
    estimator = fitted(net(callbacks=[("clip", Clip(**first))]))
    before = [weight.clone() for weight in weights(estimator)]
    estimator.set_params(**{f"callbacks__clip__{name}": value for name, value in then.items()})
    estimator.partial_fit(INPUTS, LABELS)
    assert all(map(torch.equal, weights(estimator), before))
    estimator.set_params(callbacks__clip__skip_limit=7)
    estimator.partial_fit(INPUTS, LABELS)
    assert (reports_of(estimator.optimizer_).skip_limit, int(reports_of(estimator.optimizer_).steps)) == (7, 30)


def test_a_tensor_as_the_bound_may_change():
    bound = torch.tensor(1.0)
    estimator = fitted(net(callbacks=[("clip", Clip(bound))]))
    before = [weight.clone() for weight in weights(estimator)]
    for now in (bound.fill_(0.0), torch.tensor(0.0)):  # itself, and another one of the same value
        estimator.set_params(callbacks__clip__max_norm=now)
        estimator.partial_fit(INPUTS, LABELS)
        assert all(map(torch.equal, weights(estimator), before))
    now.fill_(1.0)
    estimator.partial_fit(INPUTS, LABELS)
    assert not torch.equal(weights(estimator)[0], before[0])


class Sets(Callback):
    """Calls ``set_params`` after the first epoch."""

    def __init__(self, **values):
        self.values = values

    def on_epoch_end(self, net, **kwargs):
        if len(net.history) == 1:
            net.set_params(**self.values)


def test_set_params_takes_effect_while_it_trains():
    estimator = fitted(net(callbacks=[("clip", Clip(1.0)), ("sets", Sets(callbacks__clip__max_norm=1e-3))]))
    assert float(torch.nn.utils.get_total_norm([p.grad for p in estimator.module_.parameters()])) <= 1.001e-3
    estimator = fitted(net(callbacks=[("clip", Clip(1.0)), ("sets", Sets(callbacks__clip__skip_limit=7))]))
    assert (reports_of(estimator.optimizer_).skip_limit, int(reports_of(estimator.optimizer_).steps)) == (7, 15)


def test_a_new_optimizer_while_it_trains_is_clipped_too():
    estimator = fitted(net(callbacks=[("clip", Clip(1.0)), ("sets", Sets(module__between=torch.nn.ReLU))]))
    assert isinstance(estimator.module_.layers[1], torch.nn.ReLU)
    assert reports_of(estimator.optimizer_).steps == 10


@pytest.mark.parametrize("own", [
    {"optimizer": fastclip.clipped(torch.optim.SGD, policy=policies.ZScore(warmup=3))},
    {"callbacks": [("clip", Clip(policy=policies.ZScore(warmup=3)))]},
], ids=["class", "callback"])  # fmt: skip
def test_what_was_learned_comes_back_with_the_initial_state(own, tmp_path):
    """Where the callback stands before the one that loads."""
    checkpoint = Checkpoint(dirname=tmp_path, monitor=None)
    callbacks = own.get("callbacks", [])
    fitted(net(**own | {"callbacks": [*callbacks, ("saves", checkpoint)]}))
    resumed = net(**own | {"callbacks": [*callbacks, ("loads", LoadInitState(checkpoint))]}, max_epochs=1)
    assert int(reports_of(fitted(resumed).optimizer_).policy.count) == 20


def test_the_history_tells():
    estimator = fitted(net(callbacks=[("clip", Clip(max_norm=MAX_NORM))]))
    batches = [batch for epoch in estimator.history for batch in epoch["batches"]]
    assert all(batch["grad_norm"] > 0 for batch in batches if "train_loss" in batch)
    assert ["grad_norm" in batch for batch in batches] == ["train_loss" in batch for batch in batches]
    assert estimator.history[-1, "clip_rate"] > 0.5
    assert estimator.history[-1, "skipped_steps"] == 0


@pytest.mark.parametrize(
    "callback",
    [
        Clip(),
        Clip(0.5, nonfinite="zero", skip_limit=None),
        Clip(policy="ZScore"),
        Clip(policy=policies.ZScore(warmup=3)),
    ],
    ids=["defaults", "settings", "by name", "object"],
)
def test_the_callback_clones_and_pickles(callback):
    expected = {name: repr(value) for name, value in callback.get_params().items()}
    for copy in (clone(callback), pickle.loads(pickle.dumps(callback))):
        assert {name: repr(value) for name, value in copy.get_params().items()} == expected
    estimator = fitted(clone(net(callbacks=[("clip", callback)])))
    assert {name: repr(value) for name, value in callback.get_params().items()} == expected
    assert fitted(clone(estimator)).module_ is not estimator.module_


@pytest.mark.parametrize(
    "own",
    [{"optimizer": fastclip.clipped(torch.optim.SGD, max_norm=MAX_NORM)}, {"callbacks": [("clip", Clip(MAX_NORM))]}],
    ids=["class", "callback"],
)
def test_a_pickled_net_goes_on_clipping(own):
    estimator = fitted(net(**own))
    copy = pickle.loads(pickle.dumps(estimator))
    for each in (estimator, copy):
        each.partial_fit(INPUTS, LABELS)
    assert all(map(torch.equal, weights(copy), weights(estimator)))


def test_a_bad_batch_is_skipped_and_counted():
    poisoned = INPUTS.copy()
    poisoned[9] = math.nan
    estimator = net(callbacks=[("clip", Clip(MAX_NORM))], train_split=None)
    fitted(estimator, poisoned)
    assert all(bool(weight.isfinite().all()) for weight in weights(estimator))
    assert neg_skipped_steps(estimator) == -3.0  # one in each epoch
    assert neg_spike_rate(estimator) == pytest.approx(-3 / 18)
    names = tuple(name for name, _ in estimator.module_.named_parameters())
    assert {event.tensors for event in reports_of(estimator.optimizer_).events} == {names}


class Generator(NeuralNetClassifier):
    """A net whose only module has another name."""

    def initialize_module(self):
        self.gen_ = self.initialized_instance(self.module, {})
        return self

    def initialize_optimizer(self, *args, **kwargs):
        self.optimizer_ = torch.optim.SGD(self.gen_.parameters(), lr=0.1)
        return self

    def infer(self, x, **kwargs):
        return self.gen_(x)


def test_a_net_without_module_has_names_too():
    estimator = fitted(net(cls=Generator, callbacks=[("clip", Clip(MAX_NORM))], train_split=None))
    guard = reports_of(estimator.optimizer_)
    assert guard.last_stats.names == [f"gen.{name}" for name, _ in estimator.gen_.named_parameters()]


class Two(Generator):
    """A net with two optimizers, neither of them with the usual name."""

    def initialize_module(self):
        super().initialize_module()
        self.disc_ = self.initialized_instance(self.module, {})
        return self

    def initialize_optimizer(self, *args, **kwargs):
        self.gen_optimizer_ = torch.optim.SGD(self.gen_.parameters(), lr=0.1)
        self.disc_optimizer_ = torch.optim.SGD(self.disc_.parameters(), lr=0.1)
        return self

    def infer(self, x, **kwargs):
        return self.gen_(x) + self.disc_(x)


def test_optimizers_of_other_names():
    poisoned = INPUTS.copy()
    poisoned[9] = math.nan
    estimator = fitted(net(cls=Two, callbacks=[("clip", Clip(MAX_NORM))], train_split=None), poisoned)
    first, second = reports_of(estimator.gen_optimizer_), reports_of(estimator.disc_optimizer_)
    assert (int(first.steps), int(second.steps)) == (18, 18)
    assert estimator.history[-1, "batches", -1, "grad_norm"] == float(first.last_norm) != float(second.last_norm)
    assert estimator.history[-1, "skipped_steps"] == 3
    assert neg_skipped_steps(estimator) == -3.0


def test_the_spike_rate():
    assert spike_rate([]) == 0.0
    assert spike_rate([5.0]) == 0.0
    assert spike_rate([math.nan]) == 1.0
    assert spike_rate([1.0, 1.0, 10.0, 10.1, 1.0]) == 0.2  # at the bound is not over it
    assert spike_rate([1.0, math.inf, 1.0, 1.0]) == 0.25
    assert spike_rate([0.0, 1.0, 1.0]) == pytest.approx(1 / 3)
    assert spike_rate([10.0**i for i in range(8)]) == pytest.approx(6 / 8)  # an explosion is no new normal
    assert spike_rate([1.0] * 5 + [100.0] * 5, window=3) == pytest.approx(2 / 10)


def test_scorers_look_into_pipelines_and_say_what_is_missing():
    pipeline = make_pipeline(MinMaxScaler(), make_pipeline(net(callbacks=[("clip", Clip(MAX_NORM))])))
    fitted(pipeline)
    assert neg_spike_rate(pipeline) == 0.0
    with pytest.raises(ValueError, match="no norms in its history: give it callbacks"):
        neg_spike_rate(fitted(net()))
    with pytest.raises(TypeError, match="no fastclip in this SGD"):
        neg_skipped_steps(fitted(net()))
    for scorer in (neg_spike_rate, neg_skipped_steps):
        with pytest.raises(TypeError, match="has not been fitted"):
            scorer(net())
        with pytest.raises(TypeError, match=r"expected a fitted skorch net.*MinMaxScaler"):
            scorer(MinMaxScaler())
    search = fitted(GridSearchCV(net(callbacks=[("clip", Clip(MAX_NORM))]), {"lr": [0.01]}, cv=2))
    assert (neg_spike_rate(search), neg_skipped_steps(search)) == (0.0, 0.0)


@pytest.mark.parametrize("search", [GridSearchCV, RandomizedSearchCV])
def test_search_over_lr_and_max_norm_has_stability_in_its_results(search):
    exploding = net(callbacks=[("clip", Clip())], train_split=None, module__between=torch.nn.Identity, max_epochs=5)
    pipeline = make_pipeline(MinMaxScaler(), exploding)
    values = {
        "neuralnetclassifier__lr": [0.1, 1e4],
        "neuralnetclassifier__callbacks__clip__max_norm": [0.1, math.inf],
    }
    own = {"n_iter": 3, "random_state": 0} if search is RandomizedSearchCV else {}
    found = search(
        pipeline,
        values,
        scoring={"accuracy": "accuracy", "spikes": neg_spike_rate, "skipped": neg_skipped_steps},
        refit="accuracy",
        cv=StratifiedKFold(2),
        error_score="raise",
        **own,
    ).fit(INPUTS, LABELS)
    results = found.cv_results_
    assert len(results["mean_test_spikes"]) == (3 if own else 4)
    for parameters, skipped in zip(results["params"], results["mean_test_skipped"], strict=True):
        unbound = math.inf in parameters.values() and 1e4 in parameters.values()
        assert (skipped < 0) == unbound, parameters
    assert found.best_params_["neuralnetclassifier__lr"] == 0.1


def test_search_over_the_class_forms_bound():
    net_ = net(optimizer=fastclip.clipped(torch.optim.SGD), max_epochs=1)
    found = GridSearchCV(net_, {"optimizer__max_norm": [0.0, 1.0]}, scoring=neg_skipped_steps, cv=2, refit=False)
    assert found.fit(INPUTS, LABELS).cv_results_["mean_test_score"].tolist() == [0.0, 0.0]


def test_every_fold_gets_a_network_of_its_own():
    """What the tutorials get wrong: one network that has seen every fold."""
    seen = []

    def scorer(estimator, X, y):
        seen.append((id(estimator), int(fastclip.integrations.facts.reports_of(estimator.optimizer_).steps)))
        return 0.0

    kept = []  # so that no id is used again
    GridSearchCV(
        net(callbacks=[("clip", Clip())], max_epochs=1, train_split=None),
        {"lr": [0.1, 0.2]},
        scoring=lambda *args: (kept.append(args[0]), scorer(*args))[1],
        cv=3,
        refit=False,
    ).fit(INPUTS, LABELS)
    assert len({which for which, _ in seen}) == 6
    assert {steps for _, steps in seen} == {4}


def test_a_regressor_with_lbfgs_is_clipped_at_every_evaluation():
    class Line(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 1)

        def forward(self, x):
            return self.layer(x)

    estimator = NeuralNetRegressor(
        Line, optimizer=torch.optim.LBFGS, lr=0.1, max_epochs=2, batch_size=-1, verbose=0, train_split=None,
        callbacks=[("clip", Clip(max_norm=0.01))],
    )  # fmt: skip
    estimator.fit(INPUTS, INPUTS[:, :1])
    assert fastclip.integrations.facts.reports_of(estimator.optimizer_).clipped_steps > 2
