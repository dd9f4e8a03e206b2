"""fastclip in Lightning's own Trainer, against its ``gradient_clip_val``."""

import logging
import math
from pathlib import Path

import lightning
import pandas
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision

import fastclip
from fastclip import policies
from fastclip.integrations.facts import facts, reports_of
from fastclip.integrations.lightning import Clip

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",  # Lightning asks torch in the old way
    ),
    pytest.mark.filterwarnings(
        # said of every training on a few small batches
        "ignore:The '.*' does not have many workers:UserWarning",
        "ignore:The number of training batches .* is smaller than the logging interval:UserWarning",
    ),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

MAX_NORM = 0.5
INPUTS = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


class Module(lightning.LightningModule):
    """Learns to give back what it got. ``own`` are the settings of AdamW, ``wrap`` of fastclip's wrapper."""

    def __init__(self, wrap=None, schedule=False, bad_batch=None, **own):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 6))
        self.wrap, self.schedule, self.bad_batch, self.own = wrap, schedule, bad_batch, own
        self.seen = []

    def training_step(self, batch, index):
        loss = (self.layers(batch) - 3 * batch).pow(2).mean() * 10
        return loss * math.nan if (self.current_epoch, index) == self.bad_batch else loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05, **self.own)
        if self.wrap is not None:
            optimizer = fastclip.ClippedOptimizer(optimizer, **self.wrap)
        if not self.schedule:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def on_before_optimizer_step(self, optimizer):
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        self.seen.append(float(torch.nn.utils.get_total_norm(grads)))


def trained(folder, module=None, callbacks=(), resume=None, **own):
    torch.manual_seed(0)
    module = module or Module()
    torch.manual_seed(0)
    for layer in module.layers[::2]:
        layer.reset_parameters()
    settings = {"accelerator": "cpu", "max_epochs": 3, "logger": False, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    trainer = lightning.Trainer(**settings | own, callbacks=list(callbacks))
    trainer.fit(module, torch.utils.data.DataLoader(INPUTS, batch_size=8), ckpt_path=resume)
    return trainer


def weights(trainer):
    return [parameter.detach() for parameter in trainer.model.parameters()]


def assert_alike(ours, theirs):
    torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-6, rtol=0)


WAYS = {
    "wrapper": lambda **own: {"module": Module(wrap={"max_norm": MAX_NORM}, **own)},
    "callback": lambda **own: {"module": Module(**own), "callbacks": [Clip(max_norm=MAX_NORM)]},
    "both": lambda **own: {"module": Module(wrap={"max_norm": MAX_NORM}, **own), "callbacks": [Clip()]},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    "own", [{}, {"fused": True}, {"schedule": True}, {"accumulate_grad_batches": 2}], ids=lambda own: ", ".join(own)
)
def test_it_equals_gradient_clip_val(tmp_path, way, own):
    accumulation = {"accumulate_grad_batches": own["accumulate_grad_batches"]} if "accumulate" in str(own) else {}
    own = {} if accumulation else own
    theirs = trained(tmp_path, Module(**own), gradient_clip_val=MAX_NORM, **accumulation)
    ours = trained(tmp_path, **way(**own), **accumulation)
    assert_alike(ours, theirs)
    assert not torch.allclose(
        weights(trained(tmp_path, Module(**own), **accumulation))[0], weights(theirs)[0], atol=1e-3
    )


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_resumed_from_a_checkpoint(tmp_path, way):
    theirs = trained(tmp_path, Module(schedule=True), gradient_clip_val=MAX_NORM)
    first = trained(tmp_path, **way(schedule=True), max_epochs=1)
    first.save_checkpoint(tmp_path / "first.ckpt")
    assert_alike(trained(tmp_path, **way(schedule=True), resume=tmp_path / "first.ckpt"), theirs)


def test_what_a_policy_has_learned_is_in_the_checkpoint(tmp_path):
    whole = trained(tmp_path, callbacks=[Clip(policy=policies.ZScore(warmup=3))])
    first = trained(tmp_path, callbacks=[Clip(policy=policies.ZScore(warmup=3))], max_epochs=1)
    first.save_checkpoint(tmp_path / "first.ckpt")
    resumed = Clip(policy=policies.ZScore(warmup=3))
    assert_alike(trained(tmp_path, callbacks=[resumed], resume=tmp_path / "first.ckpt"), whole)
    learned = whole.callbacks[0].guards[0].policy.state_dict()
    assert learned.pop("policy") == "ZScore"
    torch.testing.assert_close({name: resumed.guards[0].policy.state_dict()[name] for name in learned}, learned)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create:UserWarning")
@pytest.mark.parametrize("saved", ["during", "after"])
def test_a_groups_own_policy_goes_on_from_a_checkpoint(tmp_path, saved):
    class Grouped(Module):
        def configure_optimizers(self):
            first, last = self.layers[0].parameters(), self.layers[2].parameters()
            groups = [{"params": first}, {"params": last, "policy": policies.ZScore(warmup=3)}]
            return torch.optim.AdamW(groups, lr=0.05)

    whole = trained(tmp_path, Grouped(), callbacks=[Clip(max_norm=MAX_NORM)])
    saves = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "first")
    first = trained(tmp_path, Grouped(), [Clip(max_norm=MAX_NORM), saves], max_epochs=1, enable_checkpointing=True)
    if saved == "after":
        first.save_checkpoint(tmp_path / "first.ckpt")
    resumed = trained(tmp_path, Grouped(), callbacks=[Clip(max_norm=MAX_NORM)], resume=tmp_path / "first.ckpt")
    assert_alike(resumed, whole)
    ours, theirs = (trainer.optimizers[0].param_groups[1]["policy"] for trainer in (resumed, whole))
    assert int(ours.count) == int(theirs.count) > 3
    torch.testing.assert_close(ours.mean, theirs.mean)


def test_what_was_learned_comes_back_from_the_callbacks_state_alone(tmp_path):
    """Some strategies save optimizers in a way of their own, which leaves it out."""
    path = tmp_path / "first.ckpt"
    trained(tmp_path, callbacks=[Clip(policy=policies.ZScore(warmup=3))], max_epochs=1).save_checkpoint(path)
    checkpoint = torch.load(path)
    for state in checkpoint["optimizer_states"]:
        del state["fastclip"]
    torch.save(checkpoint, path)
    clip = Clip(policy=policies.ZScore(warmup=3))
    trained(tmp_path, callbacks=[clip], resume=path)
    assert int(clip.guards[0].policy.count) == 15


def test_an_optimizer_without_a_state_gets_none(tmp_path):
    """As on all ranks but one, where a strategy gathers what is saved."""
    clip = Clip(policy=policies.ZScore(warmup=3))
    trainer = trained(tmp_path, callbacks=[clip], max_epochs=1)
    checkpoint = {"optimizer_states": [{}]}
    clip.on_save_checkpoint(trainer, trainer.lightning_module, checkpoint)
    assert checkpoint == {"optimizer_states": [{}]}


def test_another_rule_for_a_checkpoint(tmp_path):
    """The error says what to leave out of the checkpoint; then it resumes."""
    path = tmp_path / "first.ckpt"
    first = trained(tmp_path, callbacks=[Clip(policy=policies.ZScore(warmup=3))], max_epochs=1)
    first.save_checkpoint(path)
    with pytest.raises(ValueError, match=r"saved by another policy.*checkpoint\['callbacks'\]\.pop\('Clip'\)"):
        trained(tmp_path, callbacks=[Clip(max_norm=MAX_NORM)], resume=path)
    checkpoint = torch.load(path)
    checkpoint["callbacks"].pop("Clip")
    for state in checkpoint["optimizer_states"]:
        state.pop("fastclip", None)
    torch.save(checkpoint, path)
    clip = Clip(max_norm=MAX_NORM)
    trained(tmp_path, callbacks=[clip], resume=path)
    assert clip.guards[0].steps == 10


def test_a_validated_checkpoint_is_not_trained_on(tmp_path):
    class Validated(Module):
        def validation_step(self, batch, index):
            pass

    first = trained(tmp_path, callbacks=[Clip(policy=policies.ZScore(warmup=3))], max_epochs=1)
    first.save_checkpoint(tmp_path / "first.ckpt")
    clip = Clip(policy=policies.ZScore(warmup=3))
    settings = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    trainer = lightning.Trainer(**settings, callbacks=[clip])
    data = torch.utils.data.DataLoader(INPUTS, batch_size=8)
    trainer.validate(Validated(), data, ckpt_path=tmp_path / "first.ckpt", verbose=False)
    trainer.fit(Module(), data)
    assert int(clip.guards[0].policy.count) == 5
    trainer.validate(Validated(), data, verbose=False)  # with the guards gone already


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_16_mixed(tmp_path, way, fused):
    """Lightning clips no fused optimizer under a loss scale; against the unfused one, which it does clip."""

    def short():
        # "16-mixed" by name would become bf16 on a CPU. A fused step rounds in another way, and after some steps a
        # weight that is cast to 16 bits goes up instead of down. Adam's first step shows its gradient if eps is large.
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], "max_steps": 1 if fused else 15}

    theirs = trained(tmp_path, Module(eps=1.0), gradient_clip_val=MAX_NORM, **short())
    ours = trained(tmp_path, **way(fused=fused, eps=1.0), **short())
    assert_alike(ours, theirs)
    unclipped = trained(tmp_path, Module(fused=fused, eps=1.0), **short())
    assert not torch.allclose(weights(unclipped)[0], weights(theirs)[0], atol=1e-3)
    if fused:
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            trained(tmp_path, Module(fused=True), gradient_clip_val=MAX_NORM, **short())


def test_a_bad_step_is_skipped(tmp_path):
    clip = Clip(max_norm=MAX_NORM)
    ours = trained(tmp_path, Module(bad_batch=(1, 2)), [clip])
    assert all(bool(weight.isfinite().all()) for weight in weights(ours))
    assert clip.guards[0].skipped_steps == 1
    names = [name for name, _ in ours.lightning_module.named_parameters()]
    assert clip.guards[0].events[0].tensors == tuple(names)


def test_names_may_be_given(tmp_path):
    module = Module(bad_batch=(1, 2))
    pairs = [(f"mine.{name}", parameter) for name, parameter in module.named_parameters()]
    clip = Clip(max_norm=MAX_NORM, names=pairs)
    trained(tmp_path, module, [clip])
    assert clip.guards[0].events[0].tensors == tuple(name for name, _ in pairs)


def test_the_log_has_the_norm_before_clipping(tmp_path):
    module = Module(bad_batch=(2, 4))
    logger = CSVLogger(tmp_path)
    trained(tmp_path, module, [Clip(max_norm=MAX_NORM)], logger=logger, log_every_n_steps=1)
    lines = pandas.read_csv(Path(logger.log_dir) / "metrics.csv")
    assert lines["grad_norm"].tolist() == pytest.approx(module.seen, rel=1e-5, nan_ok=True)
    assert module.seen[0] > MAX_NORM
    assert lines["skipped_steps"].tolist() == [0.0] * 14 + [1.0]
    assert lines["clip_rate"].iloc[-1] > 0.5


def test_the_optimizer_is_its_own_again_after_training(tmp_path):
    clip = Clip()
    trainer = trained(tmp_path, callbacks=[clip])
    assert reports_of(trainer.optimizers[0]) is None
    assert clip.guards[0].steps == 15


@pytest.mark.parametrize("kind", ["tensor", "method"])
def test_a_bound_may_change_while_it_trains(tmp_path, kind):
    class Halving(Module):
        bound = torch.tensor(MAX_NORM)

        def bound_now(self, step):
            return self.bound

        def on_train_batch_start(self, batch, index):
            self.bound = self.bound.mul_(0.5)
            norms.append(float(self.bound))

        def on_train_batch_end(self, *batch):
            clipped.append(float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])))

    norms, clipped, module = [], [], Halving()
    module.bound = torch.tensor(MAX_NORM)
    trained(tmp_path, module, [Clip(max_norm=module.bound if kind == "tensor" else module.bound_now)], max_epochs=1)
    assert clipped == pytest.approx(norms, rel=1e-4)


class Two(Module):
    """With an optimizer for each layer; the second one is made by ``last``."""

    automatic_optimization = False

    def __init__(self, last=torch.optim.SGD):
        super().__init__()
        self.makers = torch.optim.SGD, last

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [make(layer.parameters(), lr=0.01) for make, layer in zip(self.makers, self.layers[::2], strict=True)]


def test_two_optimizers_learn_apart(tmp_path):
    clip = Clip(policy=policies.ZScore(warmup=3))
    trained(tmp_path, Two(), [clip], max_epochs=1)
    assert [int(guard.policy.count) for guard in clip.guards] == [5, 5]


def test_settings_that_one_of_two_optimizers_does_not_get_are_told(tmp_path):
    clip = Clip(max_norm=0.25)
    with pytest.warns(RuntimeWarning, match="Clip: 1 of the optimizers are wrapped by fastclip already, and stay"):
        trainer = trained(tmp_path, Two(fastclip.clipped(torch.optim.SGD, max_norm=MAX_NORM)), [clip], max_epochs=1)
    assert [guard.max_norm for guard in clip.guards] == [0.25]
    assert trainer.optimizers[1].max_norm == MAX_NORM


def test_two_optimizers_are_logged_apart(tmp_path):
    trainer = trained(tmp_path, Two(), [Clip(max_norm=MAX_NORM, policy=None)])
    names = {f"{name}/{index}" for name in ("grad_norm", "clip_rate", "skipped_steps") for index in (0, 1)}
    assert names <= trainer.logged_metrics.keys()
    assert trainer.logged_metrics["grad_norm/0"] != trainer.logged_metrics["grad_norm/1"]


def test_gradient_clip_val_beside_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Trainer\(gradient_clip_val=1.0\) would clip before fastclip looks"):
        trained(tmp_path, callbacks=[Clip()], gradient_clip_val=1.0)


def test_lightnings_wrapper_cannot_be_wrapped(tmp_path):
    class Wrong(Module):
        def on_train_start(self):
            fastclip.ClippedOptimizer(self.optimizers())

    with pytest.raises(TypeError, match="configure_optimizers"):
        trained(tmp_path, Wrong())


def test_facts_look_into_lightnings_wrapper(tmp_path):
    found = []

    class Asks(Module):
        def on_train_end(self):
            found.append(facts(self.optimizers()))

    trained(tmp_path, Asks(wrap={"max_norm": MAX_NORM}))
    trained(tmp_path, Asks(), [Clip(max_norm=MAX_NORM)])
    assert found[0] == pytest.approx(found[1])


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_patch_reaches_trainer(tmp_path, monkeypatch, algorithm):
    own = {"gradient_clip_val": MAX_NORM / 10, "gradient_clip_algorithm": algorithm}
    theirs = trained(tmp_path, **own)
    calls = []
    name = f"clip_grad_{algorithm}_"
    real = getattr(fastclip.functional, name)
    monkeypatch.setattr(fastclip.functional, name, lambda *a, **k: (calls.append(a), real(*a, **k))[1])
    with fastclip.patch():
        ours = trained(tmp_path, **own)
    assert len(calls) == 15
    assert_alike(ours, theirs)


def test_a_patch_reaches_fabric(monkeypatch):
    calls = []
    real = fastclip.functional.clip_grad_norm_
    monkeypatch.setattr(fastclip.functional, "clip_grad_norm_", lambda *a, **k: (calls.append(a), real(*a, **k))[1])
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = torch.nn.Linear(6, 1)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    fabric.backward(model(INPUTS).pow(2).sum())
    with fastclip.patch():
        fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM)
    assert len(calls) == 1
    assert float(fastclip.get_total_norm([p.grad for p in model.parameters()])) == pytest.approx(MAX_NORM, rel=1e-5)


def test_the_wrapper_in_fabric():
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    finals = []
    for wrap in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = fastclip.ClippedOptimizer(optimizer, max_norm=MAX_NORM) if wrap else optimizer
        model, optimizer = fabric.setup(model, optimizer)
        for batch in INPUTS.split(8):
            optimizer.zero_grad()
            fabric.backward(model(batch).pow(2).sum())
            if not wrap:
                fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM)
            optimizer.step()
        finals.append(model.weight.detach().clone())
    torch.testing.assert_close(*finals, atol=1e-6, rtol=0)
    assert facts(optimizer)["clip_rate"] == 1.0
