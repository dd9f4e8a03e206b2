"""fastclip in ultralytics' own trainer, a YOLOv8n on generated images, against the clipping of its own."""

import csv
import math
from typing import ClassVar

import numpy
import offline
import pytest
import torch
from fastclip.bench import torchvision_cpu

offline.font_for_ultralytics()
torchvision_cpu.admit()

import cv2  # noqa: E402
import timm.utils  # noqa: E402
import torchvision  # noqa: E402
from ultralytics import YOLO  # noqa: E402
from ultralytics.models.yolo.detect import DetectionTrainer  # noqa: E402

import fastclip  # noqa: E402
from fastclip import policies  # noqa: E402
from fastclip.integrations.facts import reports_of  # noqa: E402
from fastclip.integrations.ultralytics import ClippedTrainer  # noqa: E402

IMAGES, BATCH, EPOCHS = 8, 4, 2
LR = 1e-3  # batch norm over four images blows a rounding error up with every step


class Clipped(ClippedTrainer, DetectionTrainer):
    pass


class Unclipped(Clipped):
    clipping = {"max_norm": math.inf}  # noqa: RUF012


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Bright squares on noise, and where they are."""
    folder = tmp_path_factory.mktemp("squares")
    random = numpy.random.default_rng(0)
    for part in ("images", "labels"):
        (folder / part).mkdir()
    for index in range(IMAGES):
        image = random.integers(0, 80, (64, 64, 3), dtype=numpy.uint8)
        left, top = random.integers(4, 30, 2)
        image[top : top + 24, left : left + 24] = (40 * (index % 4) + 100, 200, 255)
        cv2.imwrite(str(folder / "images" / f"{index}.png"), image)
        box = ((left + 12) / 64, (top + 12) / 64, 24 / 64, 24 / 64)
        (folder / "labels" / f"{index}.txt").write_text("0 " + " ".join(f"{x:.6f}" for x in box))
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: images\nval: images\nnames: [square]\n")
    return folder / "data.yaml"


def trained(data, folder, trainer, **own):
    settings = {
        "epochs": EPOCHS,
        "imgsz": 64,
        "batch": BATCH,
        "nbs": BATCH,
        "workers": 0,
        "device": "cpu",
        "amp": False,
    }
    settings |= {"plots": False, "verbose": False, "optimizer": "SGD", "lr0": LR, "warmup_epochs": 0, "exist_ok": True}
    model = YOLO("yolov8n.yaml", verbose=False)
    model.train(data=str(data), project=str(folder), name="run", trainer=trainer, **settings | own)
    return model.trainer


def weights(trainer):
    return [parameter.detach() for parameter in trainer.model.parameters()]


def averages(trainer):
    return [parameter.detach() for parameter in trainer.ema.ema.parameters()]


def results(trainer):
    with trainer.csv.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def theirs(data, tmp_path_factory):
    torch.set_num_threads(1)
    return trained(data, tmp_path_factory.mktemp("theirs"), DetectionTrainer)


def test_it_equals_ultralytics_own(data, tmp_path, theirs):
    ours = trained(data, tmp_path, Clipped)
    torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-6, rtol=0)
    torch.testing.assert_close(averages(ours), averages(theirs), atol=1e-6, rtol=0)
    assert reports_of(ours.optimizer).steps == EPOCHS * IMAGES // BATCH
    unclipped = trained(data, tmp_path / "unclipped", Unclipped)
    assert max(float((a - b).abs().max()) for a, b in zip(weights(unclipped), weights(theirs), strict=True)) > 1e-4
    assert float(results(ours)[-1]["clip/clip_rate"]) > 0.5
    assert float(results(ours)[-1]["clip/grad_norm"]) > 10.0
    assert results(ours)[-1]["clip/skipped_steps"] == "0"
    assert "metrics/mAP50(B)" in results(ours)[-1]


def test_a_loss_scale_is_updated_and_an_average_may_be_missing():
    """As under AMP, on a rank that keeps none."""
    trainer = object.__new__(Clipped)
    p = torch.nn.Parameter(torch.zeros(2))
    trainer.optimizer, trainer.ema = fastclip.ClippedOptimizer(torch.optim.SGD([p], lr=1.0)), None
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    trainer.scaler.scale((p * torch.tensor([3.0, 4.0])).sum()).backward()
    trainer.optimizer_step()
    assert p.tolist() == pytest.approx([-0.6, -0.8])
    assert trainer.scaler.get_scale() == 8.0
    assert p.grad is None


def test_a_subclass_may_build_its_optimizer_and_one_that_is_wrapped_stays_so():
    class Wraps(DetectionTrainer):
        def build_optimizer(self, *args, **kwargs):
            return fastclip.ClippedOptimizer(super().build_optimizer(*args, **kwargs), max_norm=1.0)

    class Around(ClippedTrainer, Wraps):
        def build_optimizer(self, *args, **kwargs):
            return super().build_optimizer(*args, **kwargs)

    optimizer = object.__new__(Around).build_optimizer(torch.nn.Linear(2, 1), name="SGD")
    assert optimizer.max_norm == 1.0
    assert type(optimizer.inner) is torch.optim.SGD


def poisoned(base, at):
    """A trainer whose loss is NaN at one batch."""

    class Poisoned(base):
        seen = 0

        def preprocess_batch(self, batch):
            Poisoned.seen += 1
            if Poisoned.seen == at:
                next(self.model.parameters()).register_hook(self.once)
            return super().preprocess_batch(batch)

        def once(self, grad):
            return grad * math.nan if Poisoned.seen == at else grad

    return Poisoned


def test_a_bad_step_is_skipped_at_once(data, tmp_path):
    """Without fastclip the weights are NaN from there on, and ultralytics can't go back in the first epoch."""
    lost = trained(data, tmp_path, poisoned(DetectionTrainer, 1), epochs=1, val=False)
    assert not all(bool(weight.isfinite().all()) for weight in weights(lost))
    ours = trained(data, tmp_path, poisoned(Clipped, 1), epochs=1, val=False)
    assert all(bool(weight.isfinite().all()) for weight in weights(ours))
    assert reports_of(ours.optimizer).skipped_steps == 1
    (event,) = reports_of(ours.optimizer).events
    assert {*event.tensors} <= {name for name, _ in ours.model.named_parameters()}
    assert ours.nan_recovery_attempts == 0


def test_columns_stay_the_same_before_the_first_step(data, tmp_path):
    """An epoch of two batches, and a step after every eighth image: the first comes in the second epoch."""
    ours = trained(data, tmp_path, Clipped, nbs=3 * BATCH, val=False, epochs=3)
    with ours.csv.open() as file:
        header, *lines = csv.reader(file)
    assert [len(line) for line in lines] == [len(header)] * 3
    assert results(ours)[0]["clip/grad_norm"] == "nan"
    assert float(results(ours)[-1]["clip/grad_norm"]) > 0.0
    assert [name for name in ours.read_results_csv() if name.startswith("clip/")] == [
        "clip/grad_norm", "clip/clip_rate", "clip/skipped_steps"
    ]  # fmt: skip


def with_bad_losses(base, at, spoils=None):
    """A trainer with a NaN in the loss, and in batch norm's statistics of what it ``spoils``, at some batches."""

    class Bad(base):
        seen = 0
        epochs_run: ClassVar[list[int]] = []

        def preprocess_batch(self, batch):
            Bad.seen += 1
            return super().preprocess_batch(batch)

        @property
        def loss(self):
            return self._loss

        @loss.setter
        def loss(self, value):
            self._loss = value * math.nan if value is not None and Bad.seen in at else value

        def run_callbacks(self, event):
            super().run_callbacks(event)
            if event == "on_train_epoch_start":
                Bad.epochs_run.append(self.epoch)

        def optimizer_step(self):
            super().optimizer_step()
            if spoils and Bad.seen in at:
                model = self.model if spoils == "model" else self.ema.ema
                next(buffer for buffer in model.buffers() if buffer.is_floating_point()).fill_(math.nan)

    return Bad


def test_an_epoch_that_ends_with_a_skipped_step_is_kept(data, tmp_path):
    last = set(range(4, 12, 2))
    Bad = with_bad_losses(Clipped, at=last)
    ours = trained(data, tmp_path, Bad, epochs=5)
    assert Bad.epochs_run == [0, 1, 2, 3, 4]
    assert ours.nan_recovery_attempts == 0
    assert reports_of(ours.optimizer).skipped_steps == len(last)
    assert ours.loss.isnan()  # for whoever looks at it afterwards
    Alone = with_bad_losses(DetectionTrainer, at=last)
    with pytest.raises(RuntimeError, match="NaN persisted"):
        trained(data, tmp_path / "alone", Alone, epochs=5)


@pytest.mark.parametrize(
    ("nonfinite", "nbs", "spoils"),
    [
        ("skip", 3 * BATCH, None),
        ("skip", BATCH, "model"),
        ("skip", BATCH, "average"),
        ("propagate", BATCH, None),
        ("propagate", 3 * BATCH, None),
    ],
    ids=["still accumulating", "statistics", "average", "weights", "gradients"],
)
def test_ultralytics_goes_back_where_there_is_harm(data, tmp_path, nonfinite, nbs, spoils):
    """In the weights, in batch norm's statistics, here or in the average, or in gradients that a later step lets in."""

    class Other(Clipped):
        clipping = {"max_norm": 10.0, "nonfinite": nonfinite}  # noqa: RUF012

    Bad = with_bad_losses(Other, at={4}, spoils=spoils)
    trained(data, tmp_path, Bad, nbs=nbs)
    assert Bad.epochs_run == ([0, 1, 1] if spoils or nonfinite == "propagate" else [0, 1])


def test_a_tensor_as_the_bound_may_change_while_it_trains(data, tmp_path):
    bound = torch.tensor(1.0)

    class Bounded(Clipped):
        clipping = {"max_norm": bound}  # noqa: RUF012

    assert reports_of(trained(data, tmp_path, Bounded, epochs=1, val=False).optimizer).max_norm is bound


def test_the_mixin_wants_to_be_first():
    with pytest.raises(TypeError, match="Behind: expected ClippedTrainer before a trainer"):

        class Behind(DetectionTrainer, ClippedTrainer):
            pass


def test_any_policy(data, tmp_path):
    class Other(Clipped):
        clipping = {"policy": policies.Chain(policies.ZScore(warmup=2), policies.GlobalNorm(5.0))}  # noqa: RUF012

    ours = trained(data, tmp_path, Other, epochs=1, val=False)
    assert isinstance(reports_of(ours.optimizer).policy, policies.Chain)
    assert reports_of(ours.optimizer).policy is not Other.clipping["policy"]
    assert reports_of(ours.optimizer).clipped_steps > 0


def test_a_patch_reaches_ultralytics(data, tmp_path, monkeypatch, theirs):
    calls = []
    real = fastclip.functional.clip_grad_norm_
    monkeypatch.setattr(fastclip.functional, "clip_grad_norm_", lambda *a, **k: (calls.append(a), real(*a, **k))[1])
    with fastclip.patch():
        ours = trained(data, tmp_path, DetectionTrainer)
    assert len(calls) == EPOCHS * IMAGES // BATCH
    torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_whom_a_patch_reaches_in_timm(monkeypatch, mode):
    """timm needs torchvision, as ultralytics does. Its AGC is code of its own."""
    calls = []
    for name in ("clip_grad_norm_", "clip_grad_value_"):
        real = getattr(fastclip.functional, name)
        monkeypatch.setattr(fastclip.functional, name, lambda *a, r=real, **k: (calls.append(a), r(*a, **k))[1])
    p = torch.nn.Parameter(torch.ones(2, 2))
    p.grad = torch.full((2, 2), 5.0)
    with fastclip.patch():
        timm.utils.dispatch_clip_grad([p], 1.0, mode=mode)
    assert len(calls) == (mode != "agc")


def test_nms_is_that_of_torchvision():
    """The plain one that stands in for torchvision's, on boxes whose overlaps are known."""
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1.8], [0, 0, 2, 1], [5, 5, 6, 6]])
    scores = torch.tensor([0.5, 0.9, 0.7, 0.1])
    assert torchvision.ops.nms(boxes, scores, 0.5).tolist() == [1, 3]
    assert torchvision.ops.nms(boxes, scores, 0.6).tolist() == [1, 2, 3]
    assert torchvision.ops.nms(boxes[:0], scores[:0], 0.5).tolist() == []
    torchvision_cpu.admit()
