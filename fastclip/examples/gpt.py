"""A small GPT learns Python from the standard library's own source, with damaged batches among the good ones.

The model reads bytes and is judged by the bits it needs for each byte of files it has not seen. AdamW with beta2 0.999,
a short warmup and a cosine schedule are as in real training; the loss spikes are put in on purpose: every
``damage_every`` steps the batch is one byte repeated, as a file full of zeros would give. Such a gradient is some
twenty times as long as usual; worse, its square stays in AdamW's second moment for a thousand steps and keeps the steps
after it short. One variant never sees the damage, to tell what it costs.

The learning rate is the better one of 4e-3 and 1.2e-2 for undamaged data. The bare optimizer gets two more chances: a
third of the learning rate, and beta2 0.95, which forgets a spike within twenty steps.

``fastclip example gpt``; needs ``pip install 'torch-fastclip[examples]'``.
"""

from __future__ import annotations

import functools
import math
import statistics
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import fastclip
from fastclip.examples import study
from fastclip.examples.study import Run, Study
from fastclip.policies import GlobalNorm, SkipLarge, ZScore

NEEDS: tuple[str, ...] = ()
CLEAN, BARE, SLOWER, FORGETFUL = "bare, undamaged", "bare", "bare, lr / 3", "bare, beta2 0.95"
CLIPPED = {"GlobalNorm": GlobalNorm, "ZScore": ZScore, "SkipLarge": SkipLarge}
VARIANTS = (BARE, SLOWER, FORGETFUL, *CLIPPED, CLEAN)

BYTES = 256
HELD_OUT_EVERY = 8  # files


@dataclass(frozen=True)
class Settings:
    """Everything that all runs share.

    Args:
        damage_every: steps from one damaged batch to the next.
        context: bytes that the model looks back.
        train_bytes, validation_bytes: of the files for either.
    """

    seeds: int = 3
    steps: int = 180
    warmup: int = 20
    lr: float = 1.2e-2
    damage_every: int = 40
    batch_size: int = 16
    context: int = 64
    width: int = 64
    heads: int = 4
    layers: int = 2
    train_bytes: int = 1_000_000
    validation_bytes: int = 32_768

    @classmethod
    def quick(cls) -> Settings:
        return cls(
            seeds=1,
            steps=65,
            damage_every=30,
            batch_size=8,
            context=32,
            width=32,
            train_bytes=100_000,
            validation_bytes=4_096,
        )


@dataclass(frozen=True)
class Text:
    train: Tensor
    validation: Tensor


def sources() -> tuple[list[Path], list[Path]]:
    """Files for training and for validation: the modules at the top of the standard library, in order of names."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    held_out = files[::HELD_OUT_EVERY]
    return [file for file in files if file not in held_out], held_out


def _first_bytes(files: list[Path], count: int) -> Tensor:
    text = b"".join(file.read_bytes() for file in files)[:count]
    if len(text) < count:
        raise RuntimeError(f"the standard library's source has {len(text)} bytes here, {count} are wanted")
    return torch.tensor(list(text))


def load_text(train_bytes: int, validation_bytes: int) -> Text:
    """Bytes as numbers; no file is in both parts."""
    train, validation = sources()
    return Text(_first_bytes(train, train_bytes), _first_bytes(validation, validation_bytes))


class Block(nn.Module):
    """Attention, then a network of two layers, each on the normalised residual stream (pre-norm)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        per_head = self.to_qkv(self.norms[0](x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = per_head.unbind()
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.to_out(seen.transpose(1, 2).reshape(batch, time, width))
        out: Tensor = x + self.mlp(self.norms[1](x))
        return out


class GPT(nn.Module):
    """Bytes ``[batch, time]`` to logits of the byte that follows each, ``[batch, time, 256]``."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.token = nn.Embedding(BYTES, settings.width)
        self.position = nn.Embedding(settings.context, settings.width)
        self.blocks = nn.Sequential(*(Block(settings.width, settings.heads) for _ in range(settings.layers)))
        self.norm, self.head = nn.LayerNorm(settings.width), nn.Linear(settings.width, BYTES)

    def forward(self, text: Tensor) -> Tensor:
        x = self.token(text) + self.position.weight[: text.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def next_byte_loss(model: nn.Module, text: Tensor) -> Tensor:
    """Mean cross entropy in nats of each byte but the first."""
    return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def bits_per_byte(model: nn.Module, text: Tensor, context: int) -> float:
    """Of all bytes, each read with what its window of ``context`` bytes holds before it."""
    windows = text.unfold(0, context + 1, context)
    return float(next_byte_loss(model, windows)) / math.log(2)


class Batches:
    """The same ones for the same seed: text from anywhere in the training files, and now and then a damaged batch."""

    def __init__(self, text: Tensor, settings: Settings, seed: int, damaged: bool) -> None:
        self.text, self.settings, self.damaged = text, settings, damaged
        self.generator = torch.Generator().manual_seed(seed)
        self.step = 0

    def next(self) -> Tensor:
        self.step += 1
        length = self.settings.context + 1
        begins = torch.randint(len(self.text) - length + 1, (self.settings.batch_size, 1), generator=self.generator)
        byte = int(torch.randint(BYTES, (), generator=self.generator))
        batch = self.text[begins + torch.arange(length)]
        return torch.full_like(batch, byte) if self.damaged and self.is_damaged(self.step) else batch

    def is_damaged(self, step: int) -> bool:
        return step % self.settings.damage_every == 0


def make_optimizer(variant: str, model: nn.Module, settings: Settings) -> Optimizer:
    lr = settings.lr / 3 if variant == SLOWER else settings.lr
    beta2 = 0.95 if variant == FORGETFUL else 0.999
    bare = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, beta2), weight_decay=0.1)
    return fastclip.ClippedOptimizer(bare, policy=CLIPPED[variant]()) if variant in CLIPPED else bare


def train_one(variant: str, seed: int, text: Text, settings: Settings) -> Run:
    model = GPT(settings)
    optimizer = make_optimizer(variant, model, settings)
    batches = Batches(text.train, settings, seed, damaged=variant != CLEAN)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / settings.warmup) * (1.1 + math.cos(math.pi * step / settings.steps)) / 2.1

    return study.train(
        optimizer,
        lambda: next_byte_loss(model, batches.next()),
        settings.steps,
        lambda: bits_per_byte(model, text.validation, settings.context),
        LambdaLR(optimizer, rate),
    )


def claims(runs: Mapping[str, Sequence[Run]], damage_every: int) -> list[str]:
    """What the runs show."""
    median = {variant: study.median_score(of_variant) for variant, of_variant in runs.items()}
    spikes = [
        statistics.median(run.total_norms[damage_every - 1 :: damage_every]) / statistics.median(run.total_norms)
        for run in runs[BARE]
        if len(run.total_norms) >= damage_every
    ]
    said = []
    if spikes:
        said.append(f"A damaged batch's gradient is {statistics.median(spikes):.0f} times as long as usual.")
    said.append(
        f"Bits per byte, bare: {study.number(median[BARE])}; had nothing been damaged: {study.number(median[CLEAN])}."
    )
    best, rival = _best(median, CLIPPED), _best(median, (SLOWER, FORGETFUL))
    said += [f"{study.verdict(runs, variant, BARE)}." for variant in CLIPPED]
    said.append(f"Of the bare remedies {rival.removeprefix('bare, ')} is the best; {study.verdict(runs, best, rival)}.")
    return said


def _best(median: Mapping[str, float], among: Sequence[str] | Mapping[str, object]) -> str:
    return min(among, key=lambda variant: median[variant] if math.isfinite(median[variant]) else math.inf)


def run(settings: Settings, progress: bool = True) -> Study:
    """All variants; the same settings give the same losses on the same machine."""
    text = load_text(settings.train_bytes, settings.validation_bytes)
    train = functools.partial(train_one, text=text, settings=settings)
    runs = study.compare(train, VARIANTS, settings.seeds, progress)
    return Study(
        title=f"A GPT on Python's standard library; every {settings.damage_every} steps a damaged batch",
        measure="validation bits per byte",
        runs=runs,
        claims=claims(runs, settings.damage_every),
        max_norm=1.0,
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    return study.main("gpt", __doc__, Settings, run, NEEDS, argv)


if __name__ == "__main__":
    raise SystemExit(main())
