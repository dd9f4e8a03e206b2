"""A learning rate that is too high: what schedules, L1 and L2, skipped steps and clipping can save, and what not.

A network of three hidden layers learns scikit-learn's digits from 200 of them, by SGD with momentum. Of the learning
rates 0.05, 0.2, 0.3 and 0.5 the bare optimizer trains with the first alone; here it is 0.3, and for comparison a tenth
of that. A run counts as saved if it names at least 80 of 100 digits that it has not seen.

What to expect: a schedule changes the rate, but a cosine begins high, and a plateau is noticed after the damage.
``SkipLarge`` learns what is usual from the first 25 norms, and ``SpikeBackoff`` cuts the rate after what it skips:
neither helps where the damage comes before that, unless a warmup makes the beginning quiet. L1 and L2 keep weights
small, not steps.

``fastclip example regularisation``; needs ``pip install 'torch-fastclip[examples]'``.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, ReduceLROnPlateau

import fastclip
from fastclip.examples import study
from fastclip.examples.digits import Digits, all_digits
from fastclip.examples.study import Run, Study
from fastclip.policies import SkipLarge

NEEDS = ("sklearn",)
BARE, SLOWER, COSINE, WARMUP, PLATEAU = "bare", "lr / 10", "cosine", "warmup", "plateau"
L2, BACKOFF, WARM_BACKOFF = "L2", "backoff", "warmup, backoff"
CLIPPED, CLIPPED_COSINE, CLIPPED_L1, CLIPPED_L2 = "clipped", "clipped, cosine", "clipped, L1", "clipped, L2"
VARIANTS = (
    *(BARE, SLOWER, COSINE, WARMUP, PLATEAU, L2, BACKOFF, WARM_BACKOFF),
    *(CLIPPED, CLIPPED_COSINE, CLIPPED_L1, CLIPPED_L2),
)
LEARNED_EVERY = 9
SAVED = 80.0  # % right; what trains on to the end reaches more than 85, a blow-up has left 78 at most


@dataclass(frozen=True)
class Settings:
    """Everything that all runs share.

    Args:
        max_norm: of 0.1, 0.3 and 1.0 the middle one.
        l1, l2: strengths of the penalties; five times as much serves worse.
        warmup: steps of the schedule that begins with one, and ends in a cosine.
        patience: steps without a better loss, after which ``ReduceLROnPlateau`` takes a tenth of the rate.
    """

    seeds: int = 5
    steps: int = 400
    lr: float = 0.3
    momentum: float = 0.9
    max_norm: float = 0.3
    l1: float = 1e-4
    l2: float = 1e-3
    warmup: int = 50
    patience: int = 20
    batch_size: int = 32
    hidden: int = 128

    @classmethod
    def quick(cls) -> Settings:
        return cls(seeds=1, steps=100)


def load_digits() -> Digits:
    """Every ninth is for training, the others for validation."""
    pixels, digits = all_digits()
    learned = torch.arange(len(digits)) % LEARNED_EVERY == 0
    return Digits(pixels[learned], digits[learned], pixels[~learned], digits[~learned])


def make_model(settings: Settings) -> nn.Module:
    width = settings.hidden
    hidden = [layer for _ in range(2) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), *hidden, nn.Linear(width, 10))


def make_optimizer(variant: str, model: nn.Module, settings: Settings) -> Optimizer:
    lr = settings.lr / 10 if variant == SLOWER else settings.lr
    bare = torch.optim.SGD(model.parameters(), lr=lr, momentum=settings.momentum)
    if variant in (BACKOFF, WARM_BACKOFF):
        return fastclip.ClippedOptimizer(bare, policy=SkipLarge(), backoff=fastclip.SpikeBackoff(patience=1))
    l1 = settings.l1 if variant == CLIPPED_L1 else 0.0
    l2 = settings.l2 if variant in (L2, CLIPPED_L2) else 0.0
    if variant in (CLIPPED, CLIPPED_COSINE, CLIPPED_L1, CLIPPED_L2):
        return fastclip.ClippedOptimizer(bare, settings.max_norm, l1=l1, l2=l2)
    return fastclip.ClippedOptimizer(bare, math.inf, l2=l2) if variant == L2 else bare


def make_schedule(variant: str, optimizer: Optimizer, settings: Settings) -> LRScheduler | None:
    """Of those that go by the number of the step."""
    if variant in (COSINE, CLIPPED_COSINE):
        return CosineAnnealingLR(optimizer, settings.steps)
    if variant not in (WARMUP, WARM_BACKOFF):
        return None

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / settings.warmup) * (1 + math.cos(math.pi * step / settings.steps)) / 2

    return LambdaLR(optimizer, rate)


def percent_right(model: nn.Module, pixels: Tensor, digits: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((model(pixels).argmax(1) == digits).float().mean())


def train_one(variant: str, seed: int, digits: Digits, settings: Settings, learned: dict[str, list[float]]) -> Run:
    """One training; ``learned`` gets the accuracy on the digits that it learned from."""
    model = make_model(settings)
    optimizer = make_optimizer(variant, model, settings)
    plateau = ReduceLROnPlateau(optimizer, patience=settings.patience) if variant == PLATEAU else None
    random = torch.Generator().manual_seed(seed)

    def next_loss() -> Tensor:
        chosen = torch.randint(len(digits.train_digits), (settings.batch_size,), generator=random)
        loss = nn.functional.cross_entropy(model(digits.train_pixels[chosen]), digits.train_digits[chosen])
        if plateau is not None:
            plateau.step(loss.item())
        return loss

    def score() -> float:
        learned.setdefault(variant, []).append(percent_right(model, digits.train_pixels, digits.train_digits))
        return percent_right(model, digits.test_pixels, digits.test_digits)

    return study.train(optimizer, next_loss, settings.steps, score, make_schedule(variant, optimizer, settings))


def saved(runs: Sequence[Run]) -> int:
    """How many of the runs were."""
    return sum(run.died_at is None and run.score >= SAVED for run in runs)


def claims(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """What the runs show."""
    n = len(runs[BARE])
    at_full_rate = {variant: saved(of_variant) for variant, of_variant in runs.items() if variant != SLOWER}
    always = [variant for variant, count in at_full_rate.items() if count == n]
    sometimes = [f"{variant} ({count} of {n})" for variant, count in at_full_rate.items() if 0 < count < n]
    never = [variant for variant, count in at_full_rate.items() if count == 0]
    said = [
        f"{verb}: {'; '.join(which)}."
        for verb, which in (
            ("Saves every run", always),
            ("Saves some", sometimes),
            ("Saves none", never),
        )
        if which
    ]
    median = {variant: study.median_score(runs[variant], higher_is_better=True) for variant in at_full_rate}
    best = max(median, key=lambda variant: median[variant] if math.isfinite(median[variant]) else -math.inf)
    penalised = " and ".join(
        f"{study.number(median[variant])}% with {name} (better with {study.wins(runs[variant], runs[CLIPPED], True)})"
        for name, variant in (("L1", CLIPPED_L1), ("L2", CLIPPED_L2))
    )
    said.append(f"Clipped, {study.number(median[CLIPPED])}% are right without a penalty, {penalised} of {n} seeds.")
    said.append(f"The best median has {best}: {study.verdict(runs, best, SLOWER, higher_is_better=True)}.")
    if saved(runs[SLOWER]) == n:
        said.append("So a smaller learning rate, once found, saves every run, too.")
    return said


def gaps(runs: Mapping[str, Sequence[Run]], learned: Mapping[str, Sequence[float]]) -> str:
    """Accuracy on digits learned from and on others."""
    rows = [["median, %", "digits learned from", "other digits"]]
    for variant, of_variant in runs.items():
        reached = statistics.median(learned[variant]) if variant in learned else math.nan
        rows.append([variant, study.number(reached), study.number(study.median_score(of_variant, True))])
    return study.aligned(rows)


def run(settings: Settings, progress: bool = True) -> Study:
    """All variants; the same settings give the same losses on the same machine."""
    digits = load_digits()
    learned: dict[str, list[float]] = {}
    train = functools.partial(train_one, digits=digits, settings=settings, learned=learned)
    runs = study.compare(train, VARIANTS, settings.seeds, progress)
    return Study(
        title=f"{len(digits.train_digits)} digits to learn from, SGD at a learning rate of {settings.lr:g}",
        measure="validation accuracy in %",
        runs=runs,
        claims=claims(runs),
        higher_is_better=True,
        max_norm=settings.max_norm,
        details=gaps(runs, learned),
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    return study.main("regularisation", __doc__, Settings, run, NEEDS, argv)


if __name__ == "__main__":
    raise SystemExit(main())
