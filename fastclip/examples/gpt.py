"""A small GPT learns Python from the standard library's own source, with corrupt batches among the good ones.

The model reads bytes; it is judged by the bits per byte that it needs for files it has not seen. Everything is as in
real training runs, only smaller: AdamW with beta2 0.999, a short warmup, a cosine schedule. What makes the loss spike
is put in and not hidden: every ``bad_every`` steps the batch is one byte repeated, as a damaged file would give. Such
a gradient is many times longer than usual; with beta2 0.999 its square slows AdamW down for a thousand steps.
"""

from __future__ import annotations

import math
import sysconfig
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
from fastclip.policies import SkipLarge, ZScore

BYTES = 256
HELD_OUT = 8  # every eighth file is for validation


@dataclass(frozen=True)
class Settings:
    seeds: int = 3
    steps: int = 400
    warmup: int = 20
    lr: float = 4e-3
    bad_every: int = 50
    max_norm: float = 1.0
    batch_size: int = 16
    context: int = 64
    width: int = 64
    heads: int = 4
    layers: int = 2
    train_bytes: int = 1_000_000
    validation_bytes: int = 32_768

    @classmethod
    def quick(cls) -> Settings:
        return cls(seeds=1, steps=60, bad_every=40, width=32, validation_bytes=8_192)


@dataclass(frozen=True)
class Text:
    train: Tensor
    validation: Tensor


def sources() -> tuple[list[Path], list[Path]]:
    """Files for training and for validation: the modules at the top of the standard library, in order of names."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    held_out = files[::HELD_OUT]
    return [file for file in files if file not in held_out], held_out


def _first_bytes(files: list[Path], count: int) -> Tensor:
    text = b"".join(file.read_bytes() for file in files)[:count]
    if len(text) < count:
        raise RuntimeError(f"the standard library's source has {len(text)} bytes here, {count} are wanted")
    return torch.tensor(list(text))


def load_text(settings: Settings) -> Text:
    train, validation = sources()
    return Text(_first_bytes(train, settings.train_bytes), _first_bytes(validation, settings.validation_bytes))


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
        qkv = self.to_qkv(self.norms[0](x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.to_out(seen.transpose(1, 2).reshape(batch, time, width))
        return x + self.mlp(self.norms[1](x))


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
    windows = text.unfold(0, context + 1, context)
    return float(next_byte_loss(model, windows)) / math.log(2)
