"""The time that each framework spends on clipping in a step: its own way, and with fastclip in it.

``python -m fastclip.bench.frameworks [--quick] [--only NAME] [--json FILE]``
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastclip
from fastclip.guard import Guard

from . import machine, report, torchvision_cpu

WARM_UP = 3  # steps of a training that are left out
BUSY = 0.05  # of the CPU time: above it others worked too, and a ratio says little
TOLERANCE = 1e-5  # between the parameters of both ways after a training
INPUTS, WIDTH, DEPTH, BATCH = 64, 512, 12, 8  # of the network that is trained where a framework brings none
BOUNDS = {"nothing to clip": 1e9, "clipping": 1e-3}


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Args:
        rounds: trainings of each way, in turns.
        steps: of one training.
    """

    rounds: int = 5
    steps: int = 30

    @classmethod
    def quick(cls) -> Settings:
        return cls(rounds=1, steps=6)


class Clock:
    """The seconds that some functions take, call by call."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    @contextmanager
    def on(self, owner: Any, *names: str) -> Iterator[Clock]:
        """While it lasts, calls of ``owner.name`` are measured."""
        own = {name: vars(owner)[name] for name in names if name in vars(owner)}
        for name in names:
            setattr(owner, name, self._measured(getattr(owner, name)))
        try:
            yield self
        finally:
            for name in names:
                if name in own:
                    setattr(owner, name, own[name])
                else:  # inherited
                    delattr(owner, name)

    def _measured(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds.append(time.perf_counter() - start)

        return measured


@dataclass(frozen=True)
class Trained:
    """One training: seconds in clipping of each step, and the parameters it ended with."""

    seconds: list[float]
    parameters: list[Tensor]


class Network(nn.Module):
    """``DEPTH`` square layers, forward fast enough that many steps can be had."""

    def __init__(self) -> None:
        super().__init__()
        square = [layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
        self.layers = nn.Sequential(nn.Linear(INPUTS, WIDTH), *square, nn.Linear(WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def batches(steps: int) -> Tensor:
    return torch.randn(steps, BATCH, INPUTS, generator=torch.Generator().manual_seed(0))


def sgd(parameters: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.01)


def parameters_of(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def accelerate(ours: bool, bound: float, steps: int) -> Trained:
    from accelerate import Accelerator

    model = network()
    optimizer: Any = sgd(model.parameters())
    if ours:
        optimizer = fastclip.ClippedOptimizer(optimizer, max_norm=bound)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    with Clock().on(*(Guard, "_look") if ours else (Accelerator, "clip_grad_norm_")) as clock:
        for batch in batches(steps):
            accelerator.backward(prepared(batch).square().mean())
            if not ours:
                accelerator.clip_grad_norm_(prepared.parameters(), bound)
            optimizer.step()
            optimizer.zero_grad()
    return Trained(clock.seconds, parameters_of(model))


def transformers(ours: bool, bound: float, steps: int) -> Trained:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from fastclip.integrations.transformers import ClippedTrainer

    class Ours(ClippedTrainer, Trainer):
        pass

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_positions=16, n_embd=256, n_layer=6, n_head=4)
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.randint(512, (steps, 16), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=1, optim="sgd", learning_rate=0.01,
            max_grad_norm=bound, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in tokens]
        trainer = (Ours if ours else Trainer)(model, arguments, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        with Clock().on(*(Guard, "_look") if ours else (Trainer, "_clip_grad_norm")) as clock:
            trainer.train()
    return Trained(clock.seconds, parameters_of(model))


def lightning(ours: bool, bound: float, steps: int) -> Trained:
    import lightning as framework
    from lightning.pytorch.plugins import Precision

    from fastclip.integrations.lightning import Clip

    class Module(framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.network(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.parameters())

    module = Module()
    trainer = framework.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **({"callbacks": [Clip(max_norm=bound)]} if ours else {"gradient_clip_val": bound}),
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(list(batches(steps)), batch_size=None)
    with Clock().on(*(Guard, "_look") if ours else (Precision, "clip_gradients")) as clock:
        trainer.fit(module, loader)
    return Trained(clock.seconds, parameters_of(module))


def keras(ours: bool, bound: float, steps: int) -> Trained:
    import keras as framework

    from fastclip.integrations.keras import KerasGuard, clip

    framework.utils.set_random_seed(0)
    dense = framework.layers.Dense
    square = [dense(WIDTH, "tanh") for _ in range(DEPTH + 1)]
    model = framework.Sequential([framework.Input((INPUTS,)), *square, dense(1)])
    optimizer = framework.optimizers.SGD(0.01, global_clipnorm=None if ours else bound)
    inputs = batches(steps).reshape(-1, INPUTS).numpy()
    with Clock().on(*(KerasGuard, "look") if ours else (framework.optimizers.Optimizer, "_clip_gradients")) as clock:
        if ours:
            clip(optimizer, max_norm=bound)
        model.compile(optimizer, "mse")
        model.fit(inputs, inputs[:, :1] * 0, batch_size=BATCH, shuffle=False, verbose=0)
    return Trained(clock.seconds, [variable.value.detach().clone() for variable in model.weights])


def skorch(ours: bool, bound: float, steps: int) -> Trained:
    from skorch import NeuralNetRegressor
    from skorch.callbacks import GradientNormClipping

    from fastclip.integrations.skorch import Clip

    inputs = batches(steps).reshape(-1, INPUTS)
    torch.manual_seed(0)
    net = NeuralNetRegressor(
        Network, optimizer=torch.optim.SGD, lr=0.01, max_epochs=1, batch_size=BATCH, train_split=None, verbose=0,
        callbacks=[Clip(max_norm=bound) if ours else GradientNormClipping(bound)],
    )  # fmt: skip
    with Clock().on(*(Guard, "_look") if ours else (GradientNormClipping, "on_grad_computed")) as clock:
        net.fit(inputs, inputs[:, :1] * 0)
    return Trained(clock.seconds, parameters_of(net.module_))


def ultralytics(ours: bool, bound: float, steps: int) -> Trained:
    torchvision_cpu.admit()
    import cv2
    import numpy
    from ultralytics import YOLO
    from ultralytics.models.yolo.detect import DetectionTrainer

    from fastclip.integrations.ultralytics import ClippedTrainer

    class Ours(ClippedTrainer, DetectionTrainer):  # its bound is ultralytics' own, 10
        pass

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("images", "labels"):
            (folder / part).mkdir()
        for i in range(steps):
            image = numpy.random.default_rng(i).integers(0, 80, (64, 64, 3)).astype("uint8")
            image[16:48, 16:48] = 255
            cv2.imwrite(str(folder / "images" / f"{i}.png"), image)
            (folder / "labels" / f"{i}.txt").write_text("0 0.5 0.5 0.5 0.5")
        (folder / "data.yaml").write_text(f"path: {folder}\ntrain: images\nval: images\nnames: [square]")
        model = YOLO("yolov8n.yaml", verbose=False)
        with Clock().on(*(Guard, "_look") if ours else (torch.nn.utils, "clip_grad_norm_")) as clock:
            model.train(
                trainer=Ours if ours else DetectionTrainer, data=folder / "data.yaml", project=folder, epochs=1,
                imgsz=64, batch=1, nbs=1, workers=0, device="cpu", amp=False, plots=False, verbose=False, val=False,
                optimizer="SGD", lr0=1e-5, warmup_epochs=0,
            )  # fmt: skip
        return Trained(clock.seconds, parameters_of(model.trainer.model))


@dataclass(frozen=True)
class Framework:
    """A way to train, and what there is to compare."""

    train: Callable[[bool, float, int], Trained]
    what: str  # is replaced by what
    bounds: dict[str, float]


FRAMEWORKS = {
    "accelerate": Framework(accelerate, "`accelerator.clip_grad_norm_` / the wrapper", BOUNDS),
    "transformers": Framework(transformers, "`max_grad_norm` / `ClippedTrainer`", BOUNDS),
    "Lightning": Framework(lightning, "`gradient_clip_val` / `Clip`", BOUNDS),
    "Keras": Framework(keras, "`global_clipnorm` / `clip`", BOUNDS),
    "ultralytics": Framework(ultralytics, "its `clip_grad_norm_` at 10 / `ClippedTrainer`", {"clipping": 10.0}),
    "skorch": Framework(skorch, "`GradientNormClipping` / `Clip`", BOUNDS),
}


class DifferentResultError(RuntimeError):
    """Both ways ended with different parameters, so that their times mean nothing."""


def measure(name: str, case: str, settings: Settings) -> dict[str, Any]:
    """One row: medians over the steps of all rounds, the two ways taking turns."""
    framework = FRAMEWORKS[name]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    others = machine.Others()
    for number in range(settings.rounds):
        ended = {}
        for ours in (False, True) if number % 2 == 0 else (True, False):
            trained = framework.train(ours, framework.bounds[case], settings.steps)
            if len(trained.seconds) != settings.steps:
                raise DifferentResultError(f"{name}: {len(trained.seconds)} clipped steps of {settings.steps}")
            seconds[ours] += trained.seconds[WARM_UP:]
            ended[ours] = trained.parameters
        furthest = max(float((a - b).abs().max()) for a, b in zip(ended[False], ended[True], strict=True))
        if not furthest <= TOLERANCE:
            raise DifferentResultError(f"{name}, {case}: parameters differ by {furthest:.1e}")
    before, after = statistics.median(seconds[False]), statistics.median(seconds[True])
    share = others.share()
    return {
        "framework": name,
        "case": case,
        "what": framework.what,
        "tensors": len(ended[True]),
        "elements": sum(parameter.numel() for parameter in ended[True]),
        "before_s": before,
        "after_s": after,
        "ratio": before / after,
        "seconds": {"before": seconds[False], "after": seconds[True]},
        "busy": share is not None and not math.isnan(share) and share > BUSY,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; ``~`` marks a ratio that was measured beside other work."""
    lines = [
        "| framework, before / after | | parameters | before | after | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        size = f"{row['tensors']} tensors, {row['elements'] / 1e6:.1f}M"
        times = f"{row['before_s'] * 1e6:.0f} us | {row['after_s'] * 1e6:.0f} us"
        ratio = f"{'~' if row['busy'] else ''}**{row['ratio']:.2f}**"
        lines.append(f"| {row['framework']}: {row['what']} | {row['case']} | {size} | {times} | {ratio} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line; its status is 1 if both ways of a framework end differently."""
    parser = argparse.ArgumentParser(prog="python -m fastclip.bench.frameworks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round: shows that it runs")
    parser.add_argument("--only", default="", help="frameworks whose name contains it")
    parser.add_argument("--json", type=report.place, help="also write every time there")
    args = parser.parse_args(argv)
    wanted = {name: framework for name, framework in FRAMEWORKS.items() if args.only.lower() in name.lower()}
    if not wanted:
        parser.error(f"no framework's name contains {args.only!r}; they are: {', '.join(FRAMEWORKS)}")
    os.environ.setdefault("KERAS_BACKEND", "torch")
    os.environ.setdefault("YOLO_OFFLINE", "true")
    os.environ.setdefault("YOLO_VERBOSE", "false")
    settings = Settings.quick() if args.quick else Settings()
    torch.set_num_threads(1)  # as ultralytics does by itself, and as on a machine with other work
    rows, failed = [], False
    for name, framework in wanted.items():
        for case in framework.bounds:
            try:
                rows.append(measure(name, case, settings))
            except DifferentResultError as error:
                print(error, file=sys.stderr)
                failed = True
    facts = machine.facts() | machine.versions()
    print(table(rows))
    print(f"\n{facts['cpu']}, {facts['cores']} cores, {torch.get_num_threads()} threads, torch {facts['torch']}")
    if args.json:
        args.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
