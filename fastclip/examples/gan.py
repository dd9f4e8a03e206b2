"""A GAN draws digits: two optimizers, bare, each clipped by its own norm, and both by one norm.

A Wasserstein GAN with gradient penalty on scikit-learn's 1797 digits of 8 x 8 pixels. Critic and generator are stepped
by SGD with momentum, each for its own loss, which makes the danger plain: Adam would rescale every gradient by itself.
The bare pair dies at this learning rate, which was chosen so: of 0.005, 0.015, 0.02 and 0.05 the bare pair survives
the first alone, and clipped to norm 1 the last trains badly. That smallest one is the bare pair's second chance.

The score is the Fréchet distance between the pixels' mean and covariance of generated digits and of digits that nobody
trained on. Clipping bounds the length of a step. It doesn't balance the two networks, nor cure mode collapse: the
distance notices both.

``fastclip example gan``; needs ``pip install 'torch-fastclip[examples]'``.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fastclip
from fastclip.examples import study
from fastclip.examples.digits import PIXELS, all_digits
from fastclip.examples.study import Run, Study

NEEDS = ("sklearn",)
BARE, SLOWER, EACH, TOGETHER = "bare", "bare, lr / 4", "each clipped", "ClipGroup"
VARIANTS = (BARE, SLOWER, EACH, TOGETHER)


@dataclass(frozen=True)
class Settings:
    """Everything that all runs share.

    Args:
        noise: numbers that the generator makes a digit of.
        penalty: how much a slope of the critic other than 1 costs.
        judged: generated digits whose distribution is compared.
        columns: of them in the picture, for each variant.
    """

    seeds: int = 3
    steps: int = 1200
    lr: float = 0.02
    momentum: float = 0.9
    max_norm: float = 1.0
    batch_size: int = 64
    hidden: int = 128
    noise: int = 16
    penalty: float = 10.0
    judged: int = 2000
    columns: int = 10

    @classmethod
    def quick(cls) -> Settings:
        return cls(seeds=1, steps=100, hidden=64, judged=500)


@dataclass(frozen=True)
class Digits:
    """Pixels from -1 to 1, ``[n, 64]``."""

    train: Tensor
    validation: Tensor


def load_digits() -> Digits:
    """Every fourth digit is for validation."""
    pixels = 2 * all_digits()[0] - 1
    held_out = torch.arange(len(pixels)) % 4 == 0
    return Digits(pixels[~held_out], pixels[held_out])


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between the normal distributions with the mean and covariance of either, ``[n, features]``; 0 if they agree.

    Source: Dowson and Landau 1982; with an Inception network's features it is Heusel et al. 2017, arXiv:1706.08500.
    """
    a, b = a.double(), b.double()
    # The product of two covariances has real eigenvalues of at least 0; rounding makes them a little complex.
    roots = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0.0).sqrt()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return float(apart + a.T.cov().trace() + b.T.cov().trace()) - 2.0 * float(roots.sum())


def make_generator(settings: Settings) -> nn.Module:
    width = settings.hidden
    return nn.Sequential(
        nn.Linear(settings.noise, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, PIXELS),
        nn.Tanh(),
    )


def make_critic(settings: Settings) -> nn.Module:
    width = settings.hidden
    return nn.Sequential(
        nn.Linear(PIXELS, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1)
    )


def critic_loss(critic: nn.Module, real: Tensor, fake: Tensor, mix: Tensor, penalty: float) -> Tensor:
    """How much higher the critic rates fake than real, plus what a slope other than 1 between the two costs."""
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    loss: Tensor = critic(fake).mean() - critic(real).mean() + penalty * (slope.norm(dim=1) - 1).square().mean()
    return loss


def make_optimizers(variant: str, generator: nn.Module, critic: nn.Module, settings: Settings) -> list[Optimizer]:
    """What is stepped after each batch: one for either network, or one for both."""
    lr = settings.lr / 4 if variant == SLOWER else settings.lr
    bare = [torch.optim.SGD(net.parameters(), lr=lr, momentum=settings.momentum) for net in (generator, critic)]
    if variant == EACH:
        return [fastclip.ClippedOptimizer(optimizer, settings.max_norm) for optimizer in bare]
    if variant == TOGETHER:
        return [fastclip.ClipGroup(bare, settings.max_norm)]
    return list(bare)


def give_gradients(generator: nn.Module, critic: nn.Module, losses: tuple[Tensor, Tensor]) -> float:
    """Each network gets the gradient of its own loss alone; returns the norm of both."""
    grads: list[Tensor] = []
    for network, loss in zip((generator, critic), losses, strict=True):
        parameters = list(network.parameters())
        own = torch.autograd.grad(loss, parameters, retain_graph=True)
        for parameter, grad in zip(parameters, own, strict=True):
            parameter.grad = grad
        grads += own
    return float(fastclip.get_total_norm(grads))


def train_one(variant: str, seed: int, digits: Digits, settings: Settings, drawn: dict[str, Tensor]) -> Run:
    """Steps both networks after each batch; what the first seed's generator draws in the end goes into ``drawn``."""
    generator, critic = make_generator(settings), make_critic(settings)
    optimizers = make_optimizers(variant, generator, critic, settings)
    random = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    total_norms: list[float] = []
    for _ in range(settings.steps):
        real = digits.train[torch.randint(len(digits.train), (settings.batch_size,), generator=random)]
        fake = generator(torch.randn(settings.batch_size, settings.noise, generator=random))
        mix = torch.rand(settings.batch_size, 1, generator=random)
        of_critic = critic_loss(critic, real, fake.detach(), mix, settings.penalty)
        of_generator = -critic(fake).mean()
        losses.append(of_critic.item())
        if not math.isfinite(losses[-1]):
            total_norms.append(math.nan)
            break
        total_norms.append(give_gradients(generator, critic, (of_generator, of_critic)))
        for optimizer in optimizers:
            optimizer.step()

    with torch.no_grad():
        made = generator(torch.randn(settings.judged, settings.noise, generator=torch.Generator().manual_seed(seed)))
    alive = math.isfinite(losses[-1]) and bool(made.isfinite().all())
    if seed == 0:
        drawn[variant] = made[: settings.columns]
    wrapped = [optimizer for optimizer in optimizers if isinstance(optimizer, fastclip.ClippedOptimizer)]
    return Run(
        losses,
        total_norms,
        score=frechet_distance(made, digits.validation) if alive else math.nan,
        skipped=sum(int(wrapper.skipped_steps) for wrapper in wrapped),
        clip_rate=statistics.mean(float(wrapper.clip_rate) for wrapper in wrapped) if wrapped else None,
    )


def claims(runs: Mapping[str, Sequence[Run]], constant: float, real: float) -> list[str]:
    """What the runs show; ``constant`` is the distance of one grey picture, ``real`` that of real digits."""
    n, median = len(runs[BARE]), {variant: study.median_score(of_variant) for variant, of_variant in runs.items()}
    said = [f"{study.deaths(runs[BARE])} of {n} bare runs end in NaN."]
    said += [f"{study.verdict(runs, variant, SLOWER)}." for variant in (EACH, TOGETHER)]
    reached = min(map(_or_inf, median.values()))
    said.append(
        f"Real digits lie {study.number(real)} apart and a constant picture {study.number(constant)}: "
        + (
            "these digits are better than that, and far from real ones; clipping alone doesn't make them so."
            if reached < constant
            else "nothing here has learned to draw; clipping keeps a GAN alive, no more."
        )
    )
    return said


def _or_inf(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def draw(axes: Any, drawn: Mapping[str, Tensor]) -> None:
    """A row of digits for each variant, and one of real ones."""
    rows = [images.nan_to_num(0.0).view(-1, 8, 8) for images in drawn.values()]
    framed = [nn.functional.pad(row, (1, 1, 1, 1), value=1.0).transpose(0, 1).reshape(10, -1) for row in rows]
    axes.imshow(torch.cat(framed).numpy(), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_yticks([10 * i + 4.5 for i in range(len(drawn))], list(drawn))
    axes.set_xticks([])
    axes.set_title("drawn after the first seed's training", fontsize=12)


def run(settings: Settings, progress: bool = True) -> Study:
    """All variants; the same settings give the same losses on the same machine."""
    digits = load_digits()
    drawn: dict[str, Tensor] = {}
    train = functools.partial(train_one, digits=digits, settings=settings, drawn=drawn)
    runs = study.compare(train, VARIANTS, settings.seeds, progress)
    drawn["real digits"] = digits.validation[: settings.columns]
    constant = frechet_distance(digits.train.mean(0).expand(2, -1), digits.validation)
    real = frechet_distance(digits.train, digits.validation)
    return Study(
        title="A GAN on 8 x 8 digits, both networks stepped by SGD with momentum",
        measure="Fréchet distance",
        runs=runs,
        claims=claims(runs, constant, real),
        baseline=("one constant picture", constant),
        max_norm=settings.max_norm,
        panel=functools.partial(draw, drawn=drawn),
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    return study.main("gan", __doc__, Settings, run, NEEDS, argv)


if __name__ == "__main__":
    raise SystemExit(main())
