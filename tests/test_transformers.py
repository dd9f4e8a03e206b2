"""fastclip in transformers' Trainer, on a model built from its configuration, against the trainer's own clipping."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import fastclip
from fastclip import policies
from fastclip.integrations.facts import reports_of
from fastclip.integrations.transformers import TAKEN_OVER, ClippedTrainer

pytestmark = pytest.mark.filterwarnings(
    # the trainer asks for pinned memory whatever the machine has
    "ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning",
)
MAX_NORM = 0.5
VOCABULARY, LENGTH = 32, 8
EPS = 1e-3  # the keys' biases in an attention have no gradient but rounding errors; torch's 1e-8 would blow these up


class Tokens(torch.utils.data.Dataset):
    def __init__(self, count=24):
        tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(0))
        self.rows = [{"input_ids": row, "labels": row} for row in tokens]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Clipped(ClippedTrainer, Trainer):
    pass


def model():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def arguments(folder, **own):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "adam_epsilon": EPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_grad_norm": MAX_NORM,
        "seed": 0,
    }
    return TrainingArguments(**settings | own)


def trained(folder, cls=Trainer, optimizer=None, resume=None, made=None, **own):
    made = made or model()
    optimizers = (None, None) if optimizer is None else (optimizer(made), None)
    trainer = cls(model=made, args=arguments(folder, **own), train_dataset=Tokens(), optimizers=optimizers)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return [parameter.detach().cpu() for parameter in trainer.model.parameters()]


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


def wrapped_adamw(made):
    return fastclip.ClippedOptimizer(torch.optim.AdamW(made.parameters(), lr=0.01, eps=EPS), max_norm=MAX_NORM)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("theirs"))


def test_the_mixin_equals_the_trainers_own(theirs, tmp_path):
    """Its bound is ``max_grad_norm``; what it logs is the norm before clipping."""
    ours = trained(tmp_path, Clipped)
    torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-6, rtol=0)
    assert logged(ours, "grad_norm") == pytest.approx(logged(theirs, "grad_norm"), rel=1e-4)
    assert max(logged(ours, "grad_norm")) > 2 * MAX_NORM
    assert logged(ours, "clip_rate")[-1] > 0.5
    assert logged(ours, "skipped_steps") == [0.0] * len(logged(ours, "loss"))


@pytest.mark.parametrize("own", [{}, {"gradient_accumulation_steps": 2}, {"lr_scheduler_type": "cosine"}], ids=repr)
def test_a_given_optimizer_equals_the_trainers_own(tmp_path, own):
    theirs = trained(tmp_path, optimizer=lambda made: torch.optim.AdamW(made.parameters(), lr=0.01, eps=EPS), **own)
    for cls, bound in ((Trainer, 0.0), (Clipped, MAX_NORM)):
        ours = trained(tmp_path, cls, wrapped_adamw, max_grad_norm=bound, **own)
        torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-6, rtol=0)
        assert logged(ours, "grad_norm") == pytest.approx(logged(theirs, "grad_norm"), rel=1e-4)
        assert type(reports_of(ours.optimizer).inner) is torch.optim.AdamW  # not wrapped again


def test_the_optimizer_may_be_made_for_another_model(tmp_path):
    """As where a strategy wraps the model first: names are that one's."""
    other = torch.nn.Sequential(model())
    trainer = Clipped(model=model(), args=arguments(tmp_path), train_dataset=Tokens())
    optimizer = trainer.create_optimizer(other)
    assert optimizer is trainer.optimizer
    other[0](**{name: row[None] for name, row in Tokens()[0].items()}).loss.backward()
    optimizer.step()
    assert {*optimizer.last_stats.names} == {name for name, _ in other.named_parameters()}


def test_the_mixin_reads_the_gradients_once(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the trainer clips by itself")

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", never)
    ours = trained(tmp_path, Clipped)
    assert len(logged(ours, "grad_norm")) == 12
    ours.log({"loss": 1.0})  # one's own, afterwards
    assert len(logged(ours, "grad_norm")) == 13
    with pytest.raises(AssertionError, match="by itself"):
        trained(tmp_path)


def test_a_bound_of_zero_means_none(tmp_path, monkeypatch):
    ours = trained(tmp_path, Clipped, max_grad_norm=0.0)
    assert reports_of(ours.optimizer).max_norm == math.inf
    assert logged(ours, "clip_rate") == [0.0] * 12


def test_a_negative_bound_means_none(tmp_path):
    ours = trained(tmp_path, Clipped, max_grad_norm=-1.0)
    torch.testing.assert_close(weights(ours), weights(trained(tmp_path, max_grad_norm=-1.0)), atol=1e-6, rtol=0)
    assert reports_of(ours.optimizer).max_norm == math.inf


@pytest.mark.parametrize("optimizer", [None, lambda made: torch.optim.SGD(made.parameters(), lr=0.1)])
def test_a_log_before_training(tmp_path, optimizer):
    made = model()
    optimizers = (None, None) if optimizer is None else (optimizer(made), None)
    trainer = Clipped(model=made, args=arguments(tmp_path), train_dataset=Tokens(), optimizers=optimizers)
    trainer.log({"loss": 1.0})
    assert "grad_norm" not in trainer.state.log_history[0]


def test_without_a_wrapper_training_says_so(tmp_path):
    class Bare(Clipped):
        def create_optimizer(self, model=None):
            super().create_optimizer(model)
            self.optimizer = self.optimizer.inner
            return self.optimizer

    with pytest.raises(TypeError, match="no fastclip in this AcceleratedOptimizer"):
        trained(tmp_path, Bare)


def test_settings_of_the_class(tmp_path):
    class Guarded(ClippedTrainer, Trainer):
        clipping = {"policy": policies.ZScore(warmup=2), "skip_limit": 7}  # noqa: RUF012

    ours = trained(tmp_path, Guarded)
    wrapper = reports_of(ours.optimizer)
    assert isinstance(wrapper.policy, policies.ZScore)
    assert wrapper.skip_limit == 7
    assert wrapper.policy is not Guarded.clipping["policy"]


def test_a_tensor_as_the_bound_may_change_while_it_trains(tmp_path):
    bound = torch.tensor(MAX_NORM)

    class Bounded(ClippedTrainer, Trainer):
        clipping = {"max_norm": bound}  # noqa: RUF012

    assert reports_of(trained(tmp_path, Bounded).optimizer).max_norm is bound


def test_a_bad_step_is_skipped_and_logged(tmp_path):
    made = model()
    calls = []

    def poison(grad):
        calls.append(grad)
        return grad * math.nan if len(calls) == 3 else grad

    made.transformer.ln_f.weight.register_hook(poison)
    ours = trained(tmp_path, Clipped, made=made)
    assert all(bool(weight.isfinite().all()) for weight in weights(ours))
    assert logged(ours, "skipped_steps") == [0.0, 0.0] + [1.0] * 10
    assert math.isnan(logged(ours, "grad_norm")[2])
    assert ours.optimizer.optimizer.events[0].tensors == ("transformer.ln_f.weight",)


@pytest.mark.parametrize(("cls", "optimizer"), [(Clipped, None), (Trainer, wrapped_adamw)], ids=["mixin", "given"])
def test_save_and_resume(tmp_path, cls, optimizer):
    saving = {"save_strategy": "steps", "save_steps": 7, "max_grad_norm": MAX_NORM}
    whole = trained(tmp_path / "whole", cls, optimizer, **saving)
    resumed = trained(tmp_path / "resumed", cls, optimizer, resume=str(tmp_path / "whole" / "checkpoint-7"), **saving)
    torch.testing.assert_close(weights(resumed), weights(whole), atol=1e-6, rtol=0)
    assert logged(resumed, "grad_norm") == pytest.approx(logged(whole, "grad_norm"), rel=1e-4)
    assert reports_of(resumed.optimizer).steps == 5


def test_a_patch_reaches_the_trainer(theirs, tmp_path, monkeypatch):
    calls = []
    real = fastclip.functional.clip_grad_norm_
    monkeypatch.setattr(fastclip.functional, "clip_grad_norm_", lambda *a, **k: (calls.append(a), real(*a, **k))[1])
    with fastclip.patch():
        ours = trained(tmp_path)
    assert len(calls) == 12
    torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", TAKEN_OVER)
def test_the_mixin_wants_a_trainer_that_clips_as_this_one(monkeypatch, name):
    """One whose loop calls something else would clip beside the wrapper."""
    monkeypatch.delattr(Trainer, name)
    with pytest.raises(TypeError, match="expected ClippedTrainer before a Trainer with _clip_grad_norm and _get_grad"):

        class Other(ClippedTrainer, Trainer):
            pass


def test_the_mixin_wants_a_trainer():
    with pytest.raises(TypeError, match="Alone: expected ClippedTrainer before a Trainer"):

        class Alone(ClippedTrainer):
            pass

    with pytest.raises(TypeError, match="Behind: expected ClippedTrainer before a Trainer"):

        class Behind(Trainer, ClippedTrainer):
            pass
