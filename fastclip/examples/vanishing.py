"""A deep sigmoid network that doesn't learn: the doctor says why, its advice is followed, and clipping is no help.

Twelve layers of sigmoids on scikit-learn's digits. ``fastclip.check`` looks at one batch before any training, finds
that the gradient shrinks on its way to the first layers, and names two remedies: ReLU with He's initialisation, and
skip connections with a LayerNorm. Both are tried. So are what people try first: clipping, which makes no short gradient
longer; Adam, which rescales each gradient by itself; and a learning rate ten times higher.

The learning rate, 0.02 of 0.01, 0.02, 0.05 and 0.2, is one at which both remedies train without clipping.

``fastclip example vanishing``; needs ``pip install 'torch-fastclip[examples]'``.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fastclip
from fastclip.doctor import Diagnosis, Finding
from fastclip.doctor.diagnosis import INFO
from fastclip.examples import study
from fastclip.examples.digits import CLASSES, PIXELS, Digits, all_digits
from fastclip.examples.study import LINES, Run, Study

NEEDS = ("sklearn",)
SIGMOID, CLIPPED, ADAM, FASTER = "sigmoid", "sigmoid, clipped", "sigmoid, Adam", "sigmoid, lr x 10"
RELU, SKIPS = "ReLU, He", "skips, LayerNorm"
VARIANTS = (SIGMOID, CLIPPED, ADAM, FASTER, RELU, SKIPS)
NETWORKS = (SIGMOID, RELU, SKIPS)


@dataclass(frozen=True)
class Settings:
    """Everything that all runs share; ``adam_lr`` is Adam's default."""

    seeds: int = 3
    steps: int = 400
    lr: float = 0.02
    momentum: float = 0.9
    adam_lr: float = 1e-3
    max_norm: float = 1.0
    batch_size: int = 64
    layers: int = 12

    @classmethod
    def quick(cls) -> Settings:
        return cls(seeds=1, steps=160)  # with 80 the ReLUs still hover between 40% and 78%, by seed and by machine


def load_digits() -> Digits:
    """Every fourth is for validation."""
    pixels, digits = all_digits()
    held_out = torch.arange(len(digits)) % 4 == 0
    return Digits(pixels[~held_out], digits[~held_out], pixels[held_out], digits[held_out])


class Skip(nn.Module):
    """Adds what its layers make of the normalised input to the input."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(PIXELS), *layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


def make_model(variant: str, settings: Settings) -> nn.Module:
    """As many linear layers in each variant; torch's own initialisation but for ReLU."""
    layers: list[nn.Module] = []
    for _ in range(settings.layers):
        linear = nn.Linear(PIXELS, PIXELS)
        if variant == RELU:
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU()]
        else:
            layers += [Skip(linear, nn.Sigmoid())] if variant == SKIPS else [linear, nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(PIXELS, CLASSES))


def make_optimizer(variant: str, model: nn.Module, settings: Settings) -> Optimizer:
    if variant == ADAM:
        return torch.optim.Adam(model.parameters(), lr=settings.adam_lr)
    lr = 10 * settings.lr if variant == FASTER else settings.lr
    bare = torch.optim.SGD(model.parameters(), lr=lr, momentum=settings.momentum)
    return fastclip.ClippedOptimizer(bare, settings.max_norm) if variant == CLIPPED else bare


def diagnose(variant: str, digits: Digits, settings: Settings) -> Diagnosis:
    """Of the first seed's model, before its training."""
    with study.one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_model(variant, settings)
        batch = digits.train_pixels[: settings.batch_size], digits.train_digits[: settings.batch_size]
        return fastclip.check(model, batch, nn.CrossEntropyLoss(), max_seconds=0)


def train_one(variant: str, seed: int, digits: Digits, settings: Settings) -> Run:
    model = make_model(variant, settings)
    random = torch.Generator().manual_seed(seed)

    def next_loss() -> Tensor:
        chosen = torch.randint(len(digits.train_digits), (settings.batch_size,), generator=random)
        return nn.functional.cross_entropy(model(digits.train_pixels[chosen]), digits.train_digits[chosen])

    def accuracy() -> float:
        guessed = model(digits.test_pixels).argmax(1)
        return 100 * float((guessed == digits.test_digits).float().mean())

    return study.train(make_optimizer(variant, model, settings), next_loss, settings.steps, accuracy)


def matters(diagnosis: Diagnosis) -> list[Finding]:
    """The findings that are worse than good to know."""
    return [finding for finding in diagnosis.findings if finding.severity != INFO]


def told(diagnoses: Mapping[str, Diagnosis]) -> str:
    """What the doctor says of each network."""
    lines = []
    for variant, diagnosis in diagnoses.items():
        found = matters(diagnosis)
        lines.append(f"fastclip.check on {variant}:" + ("" if found else " nothing that keeps it from training."))
        for finding in found:
            said = f"{finding.severity.upper()} {finding.code}: {finding.message}", f"To do: {finding.advice}"
            lines += [textwrap.fill(f"{part}.", 110, initial_indent="  ", subsequent_indent="    ") for part in said]
    return "\n".join(lines)


def claims(runs: Mapping[str, Sequence[Run]], diagnoses: Mapping[str, Diagnosis], chance: float) -> list[str]:
    """What the runs show; ``chance`` is the accuracy of one answer for all."""
    n, median = len(runs[SIGMOID]), {v: study.median_score(of_v, True) for v, of_v in runs.items()}
    codes = [finding.code for finding in matters(diagnoses[SIGMOID])]
    said = [f"The doctor's finding before any training: {', '.join(codes) or 'none'}."]
    said += [
        f"{remedy}: {median[remedy]:.0f}% right, {study.wins(runs[remedy], runs[SIGMOID], True)} of {n} seeds better "
        f"than the sigmoids' {median[SIGMOID]:.0f}% (one answer for all: {chance:.0f}%)."
        for remedy in (RELU, SKIPS)
    ]
    rates = [run.clip_rate for run in runs[CLIPPED] if run.clip_rate is not None]
    helped = study.wins(runs[CLIPPED], runs[SIGMOID], True)
    said.append(
        f"Clipping {f'helps with {helped} of {n} seeds' if helped else 'does not help vanishing gradients'}: "
        f"{median[CLIPPED]:.0f}%; it shortened {max(rates, default=0.0):.0%} of them, and can make none longer."
    )
    said.append(f"Nor is it the optimizer: Adam reaches {median[ADAM]:.0f}%, ten times the rate {median[FASTER]:.0f}%.")
    return said


def draw(axes: Any, diagnoses: Mapping[str, Diagnosis]) -> None:
    """The gradient of each linear layer's weights, before any training."""
    for variant, diagnosis in diagnoses.items():
        colour, style = LINES[VARIANTS.index(variant)]
        norms = [row.weight_grad for row in diagnosis.rows if row.kind == "Linear"]
        axes.plot(range(1, len(norms) + 1), norms, style, marker="o", color=colour)
    axes.set_yscale("log")
    axes.set_title("gradient of each layer at the start", fontsize=12)
    axes.set_xlabel("linear layer, from the input on", fontsize=12)
    axes.grid(alpha=0.25)


def run(settings: Settings, progress: bool = True) -> Study:
    """The doctor, then all variants; the same settings give the same losses on the same machine."""
    digits = load_digits()
    diagnoses = {variant: diagnose(variant, digits, settings) for variant in NETWORKS}
    train = functools.partial(train_one, digits=digits, settings=settings)
    runs = study.compare(train, VARIANTS, settings.seeds, progress)
    most = digits.train_digits.mode().values
    chance = 100 * float((digits.test_digits == most).float().mean())
    return Study(
        title=f"{settings.layers} layers on 8 x 8 digits",
        measure="validation accuracy in %",
        runs=runs,
        claims=claims(runs, diagnoses, chance),
        higher_is_better=True,
        baseline=("one answer for all", chance),
        max_norm=settings.max_norm,
        details=told(diagnoses),
        panel=functools.partial(draw, diagnoses=diagnoses),
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    return study.main("vanishing", __doc__, Settings, run, NEEDS, argv)


if __name__ == "__main__":
    raise SystemExit(main())
