"""fastclip inside what ``accelerator.prepare`` gives back, against accelerate's own clipping."""

import accelerate
import pytest
import torch
from accelerate.tracking import GeneralTracker

import fastclip
from fastclip.integrations.accelerate import log_clipping
from fastclip.integrations.facts import facts, fresh, reports_of

MAX_NORM = 0.5
INPUTS = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def forget():
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Run:
    """A training under accelerate; ``wrap`` puts fastclip inside, else accelerate clips."""

    def __init__(self, wrap, accumulation=1, fused=False, log_with=None):
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation, log_with=log_with)
        self.clips = not wrap
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 6))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
        if wrap:
            optimizer = fastclip.ClippedOptimizer(optimizer, max_norm=MAX_NORM)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        loader = torch.utils.data.DataLoader(INPUTS, batch_size=4)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            model, optimizer, scheduler, loader
        )

    def steps(self, first=0, last=12):
        for index, batch in enumerate(self.loader):
            if not first <= index < last:
                continue
            with self.accelerator.accumulate(self.model):
                loss = (self.model(batch) - 3 * batch).pow(2).mean() * 10
                self.accelerator.backward(loss)
                if self.clips and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), MAX_NORM)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        return self

    @property
    def weights(self):
        return [parameter.detach() for parameter in self.model.parameters()]


@pytest.mark.parametrize("own", [{}, {"accumulation": 3}, {"fused": True}], ids=repr)
def test_it_equals_accelerates_own(own):
    theirs, ours = Run(wrap=False, **own).steps(), Run(wrap=True, **own).steps()
    torch.testing.assert_close(ours.weights, theirs.weights, atol=1e-6, rtol=0)
    assert ours.scheduler.get_last_lr() == theirs.scheduler.get_last_lr()
    assert reports_of(ours.optimizer).steps == 12 // own.get("accumulation", 1)
    assert facts(ours.optimizer)["clip_rate"] > 0.5


def test_save_and_load_state(tmp_path):
    theirs, ours = Run(wrap=False).steps(), Run(wrap=True).steps(last=5)
    ours.accelerator.save_state(tmp_path)
    fresh = Run(wrap=True)
    fresh.accelerator.load_state(tmp_path)
    fresh.steps(first=5)
    torch.testing.assert_close(fresh.weights, theirs.weights, atol=1e-6, rtol=0)
    assert fresh.scheduler.get_last_lr() == theirs.scheduler.get_last_lr()


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_are_dropped_or_zeroed(to_none):
    run = Run(wrap=True)
    run.accelerator.backward(run.model(INPUTS).sum())
    run.optimizer.zero_grad(set_to_none=to_none)
    assert all(p.grad is None if to_none else bool((p.grad == 0).all()) for p in run.model.parameters())


def test_the_prepared_optimizer_cannot_be_wrapped():
    with pytest.raises(TypeError, match=r"Put fastclip inside: accelerator.prepare\(fastclip.ClippedOptimizer"):
        fastclip.ClippedOptimizer(Run(wrap=False).optimizer)


class Kept(GeneralTracker):
    name = "kept"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.lines = []

    @property
    def tracker(self):
        return self.lines

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **kwargs):
        self.lines.append((step, values))


def test_what_is_logged():
    tracker = Kept()
    run = Run(wrap=True, log_with=tracker)
    run.accelerator.init_trackers("any")
    run.steps(last=1)
    sent = log_clipping(run.accelerator, run.optimizer, step=7)
    norm = float(reports_of(run.optimizer).last_norm)
    assert norm > MAX_NORM
    assert sent == {"grad_norm": norm, "clip_rate": 1.0, "skipped_steps": 0.0}
    assert tracker.lines == [(7, sent)]


def test_without_fastclip_there_is_nothing_to_log():
    run = Run(wrap=False)
    with pytest.raises(TypeError, match="no fastclip in this AcceleratedOptimizer"):
        log_clipping(run.accelerator, run.optimizer)


@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_"])
def test_a_patch_reaches_accelerate(monkeypatch, name):
    calls = []
    real = getattr(fastclip.functional, name)
    monkeypatch.setattr(fastclip.functional, name, lambda *a, **k: (calls.append(a), real(*a, **k))[1])
    run = Run(wrap=False)
    run.model(INPUTS).sum().backward()
    with fastclip.patch():
        getattr(run.accelerator, name)(run.model.parameters(), MAX_NORM)
    assert len(calls) == 1


def test_settings_for_one_optimizer_share_what_does_not_learn():
    class Group:
        def __deepcopy__(self, memo):
            raise TypeError("a process group can't be copied")

    model, shared = torch.nn.Linear(2, 1), {"group": Group(), "max_norm": torch.tensor(1.0)}
    learning = {"policy": fastclip.policies.ZScore(), "backoff": fastclip.SpikeBackoff()}
    own = fresh({**shared, **learning}, model)
    assert own["names"] is model
    assert all(own[name] is value for name, value in shared.items())
    assert all(type(own[name]) is type(value) and own[name] is not value for name, value in learning.items())
    assert fresh({"names": None}, model) == {"names": None}


def test_facts_find_what_is_attached_at_any_depth():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    assert reports_of(optimizer) is None
    guard = fastclip.attach(optimizer)
    assert reports_of(optimizer) is guard
    assert facts(optimizer) == {"clip_rate": 0.0, "skipped_steps": 0.0}
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)
    assert reports_of(prepared) is guard
    outer = fastclip.ClippedOptimizer(torch.optim.SGD([torch.zeros(1, requires_grad=True)]))
    assert reports_of(outer) is outer
