"""Exploding gradients in a vanilla RNN that reads digits two pixels at a time, and a bound that lets it learn.

A tanh network of 64 units gets one of scikit-learn's handwritten digits as 32 pairs of pixels, and says which it is
after the last. The gradient of the first pair has passed the recurrent matrix 31 times; once that matrix stretches,
it grows with each step back in time. A few steps along such gradients, and plain SGD lands where units are saturated:
the gradient now vanishes on its way back, and little can be learned any more. No NaN tells of it, only the accuracy.

The learning rates 0.003, 0.01, 0.03, 0.1 and 0.3 were tried: bare SGD is best at 0.03 and lost from 0.1 on, clipped SGD
is best at 0.1. So 0.1 is what both are compared at, and bare SGD at 0.03 is the honest rival.

Run it with ``fastclip example rnn``; needs ``pip install 'torch-fastclip[examples]'``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastclip
from fastclip.examples import study
from fastclip.examples.digits import CLASSES, Digits, all_digits
from fastclip.examples.extras import extra
from fastclip.examples.study import COLOURS, Run, Study, verdict

NEEDS = ("sklearn",)
PAIRS = 32  # of pixels in a digit
GUESSED = 2 / CLASSES  # an accuracy up to which nothing was learned
PROBED_STEPS = 100  # of the first seed: the gradient is looked at in time


@dataclass(frozen=True)
class Settings:
    """What all runs share.

    Args:
        lr: of the bare and of the clipped run; the smaller one is of the rival.
    """

    seeds: int = 3
    steps: int = 600
    lr: float = 0.1
    smaller_lr: float = 0.03
    momentum: float = 0.9
    max_norm: float = 1.0
    hidden: int = 64
    batch_size: int = 64

    @classmethod
    def quick(cls) -> Settings:
        """The same, cut short."""
        return cls(seeds=2, steps=40)

    @property
    def rival(self) -> str:
        return f"bare, lr {self.smaller_lr:g}"


class Reader(nn.Module):
    """Reads a digit pair by pair, and says which it is."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rnn = nn.RNN(2, hidden, batch_first=True)
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        states, _ = self.rnn(pixels.reshape(-1, PAIRS, 2))
        logits: Tensor = self.head(states[:, -1])
        return logits


def load_digits() -> Digits:
    """1,797 digits, of which three in ten are for the test, as many of each."""
    pixels, digits = all_digits()
    split = extra("sklearn.model_selection").train_test_split
    trained, tested = split(range(len(digits)), test_size=0.3, stratify=digits, random_state=0)
    return Digits(pixels[trained], digits[trained], pixels[tested], digits[tested])


def norms_in_time(model: Reader, pixels: Tensor, digits: Tensor) -> list[float]:
    """Norm of the loss's gradient with respect to the state after each pair of pixels."""
    state: Tensor | None = None
    states: list[Tensor] = []
    for pair in pixels.reshape(-1, PAIRS, 1, 2).unbind(1):
        _, state = model.rnn(pair, state)
        states.append(state)
    loss = nn.functional.cross_entropy(model.head(states[-1][0]), digits)
    return [float(grad.norm()) for grad in torch.autograd.grad(loss, states)]


def train_one(variant: str, seed: int, settings: Settings, data: Digits, probes: list[list[float]]) -> Run:
    """Trains a new model; its gradients in time go into ``probes``."""
    model = Reader(settings.hidden)
    lr = settings.smaller_lr if variant == settings.rival else settings.lr
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=settings.momentum)
    if variant == "clipped":
        optimizer = fastclip.ClippedOptimizer(optimizer, max_norm=settings.max_norm)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    shuffle = torch.Generator().manual_seed(seed)

    def next_loss() -> Tensor:
        batch = torch.randint(len(data.train_digits), (settings.batch_size,), generator=shuffle)
        pixels, digits = data.train_pixels[batch], data.train_digits[batch]
        if seed == 0 and schedule.last_epoch < PROBED_STEPS:
            probes.append(norms_in_time(model, pixels, digits))
        return nn.functional.cross_entropy(model(pixels), digits)

    def accuracy() -> float:
        return float((model(data.test_pixels).argmax(1) == data.test_digits).double().mean())

    return study.train(optimizer, next_loss, settings.steps, accuracy, schedule)


def claims(runs: Mapping[str, Sequence[Run]], settings: Settings) -> list[str]:
    """What the runs show."""
    stuck = {name: sum(not run.score > GUESSED for run in of_one) for name, of_one in runs.items()}

    def percent(score: float) -> str:
        return f"{score:.0%}"

    return [
        f"At lr {settings.lr:g} {verdict(runs, 'clipped', 'bare', True, percent)}.",
        f"Runs that learned nothing: {stuck['bare']} bare, {stuck['clipped']} clipped.",
        f"A smaller learning rate: {verdict(runs, 'clipped', settings.rival, True, percent)}.",
    ]


def draw_norms_in_time(axes: Any, probes: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Of each variant, with the first seed: the gradient at its largest, and dashed some steps later."""
    for (variant, found), colour in zip(probes.items(), COLOURS, strict=False):
        for norms, style in ((max(found, key=max), "-"), (found[-1], "--")):
            axes.plot(range(1, PAIRS + 1), norms, style, color=colour, label=variant)
    axes.set_yscale("log")
    axes.set_xlabel("pair of pixels", fontsize=12)
    steps = max(map(len, probes.values()))
    axes.set_title(f"gradient of the state after each pair:\nat its largest; dashed: step {steps}", fontsize=12)
    axes.grid(alpha=0.25)


def run(settings: Settings, progress: bool = True) -> Study:
    """All trainings; the same settings give the same losses on the same machine."""
    data = load_digits()
    variants = ("bare", "clipped", settings.rival)
    probes: dict[str, list[list[float]]] = {variant: [] for variant in variants}

    def one(variant: str, seed: int) -> Run:
        return train_one(variant, seed, settings, data, probes[variant])

    runs = study.compare(one, variants, settings.seeds, progress)
    return Study(
        title=f"A vanilla RNN reads digits pair by pair of pixels, lr {settings.lr:g}",
        measure="accuracy on unseen digits",
        runs=runs,
        claims=claims(runs, settings),
        higher_is_better=True,
        baseline=("guessing", 1 / CLASSES),
        max_norm=settings.max_norm,
        panel=lambda axes: draw_norms_in_time(axes, probes),
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    return study.main("rnn", __doc__, Settings, run, NEEDS, argv)


if __name__ == "__main__":
    raise SystemExit(main())
