"""A text read as one long sequence: detach the state between chunks, let gradients through, or bound them there.

A tanh RNN reads the source of Python's standard library in parallel lanes, byte after byte, and carries its state on.
Each update takes several chunks of text. Truncated backpropagation through time calls ``detach()`` between them, so no
chunk learns for a later one. Full backpropagation lets the gradient run back through all of them; here it grows on its
way, because the recurrent matrix begins as twice an orthogonal one (chosen for that: with a factor of 1 nothing grows,
and detach or not makes little difference). Clipping all gradients afterwards bounds their length, but their direction
is that of the exploded part. ``fastclip.clip_boundary`` bounds what crosses from one chunk into the one before.

Of the learning rates 0.03, 0.1, 0.3 and 1 it is the one at which the detached RNN does best; the bound at the boundary
is about what a chunk's own loss sends back once the beginning is over. Full backpropagation gets a tenth of the rate as
a second chance.

``fastclip example long_sequences``; needs ``pip install 'torch-fastclip[examples]'``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastclip
from fastclip.examples import study
from fastclip.examples.gpt import BYTES, Text, load_text
from fastclip.examples.study import LINES, Run, Study

NEEDS: tuple[str, ...] = ()
DETACH, FULL, SLOWER, CLIPPED = "detach", "full", "full, lr / 10", "full, GlobalNorm"
BOUNDARY, BOTH = "clip_boundary", "clip_boundary, GlobalNorm"
VARIANTS = (FULL, DETACH, CLIPPED, SLOWER, BOUNDARY, BOTH)
DRAWN = (FULL, BOUNDARY)


@dataclass(frozen=True)
class Settings:
    """Everything that all runs share.

    Args:
        updates: optimizer steps, each after ``chunks`` chunks of ``chunk_length`` bytes in each of ``lanes`` lanes.
        gain: what the orthogonal recurrent matrix is multiplied by before the first update.
        max_norm: bound of all gradients' norm.
        boundary_norm: bound of the gradient that crosses from a chunk into the one before.
    """

    seeds: int = 3
    updates: int = 100
    chunks: int = 8
    chunk_length: int = 25
    lanes: int = 16
    width: int = 64
    gain: float = 2.0
    lr: float = 0.3
    momentum: float = 0.9
    max_norm: float = 1.0
    boundary_norm: float = 1e-3
    validation_bytes: int = 16_384

    @classmethod
    def quick(cls) -> Settings:
        return cls(seeds=1, updates=8, lanes=4, validation_bytes=2_048)

    @property
    def update_length(self) -> int:
        return self.chunks * self.chunk_length


class Reader(nn.Module):
    """Bytes and the state before them to logits of the byte that follows each, and the state after them."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.token = nn.Embedding(BYTES, 32)
        self.rnn = nn.RNN(32, settings.width, batch_first=True)
        for name, weight in self.rnn.named_parameters():
            if name.startswith("weight_hh"):
                nn.init.orthogonal_(weight, gain=settings.gain)
        self.head = nn.Linear(settings.width, BYTES)

    def forward(self, text: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        states, state = self.rnn(self.token(text), state)
        return self.head(states), state


def loss_of(model: Reader, text: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy in nats of each byte but the first, and the state after the last but one."""
    logits, state = model(text[:, :-1], state)
    return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()), state


class Stream:
    """The text in lanes of equal length, read from left to right; the state is carried on from chunk to chunk."""

    def __init__(self, model: Reader, text: Tensor, variant: str, settings: Settings) -> None:
        self.model, self.variant, self.settings = model, variant, settings
        self.lanes = text[: len(text) // settings.lanes * settings.lanes].view(settings.lanes, -1)
        self.state = torch.zeros(1, settings.lanes, settings.width)
        self.position = 0
        self.boundaries: list[Tensor] = []

    def next_loss(self) -> Tensor:
        """Of the chunks of one update; ``boundaries`` holds the states that stood between them."""
        self.state, self.boundaries = self.state.detach(), []  # the update has changed what is behind it
        losses = [self._next_chunk(is_first=i == 0) for i in range(self.settings.chunks)]
        return torch.stack(losses).mean()

    def _next_chunk(self, is_first: bool) -> Tensor:
        if not is_first:
            self.state = self.cross(self.state)
        chunk = self.lanes[:, self.position : self.position + self.settings.chunk_length + 1]
        self.position += self.settings.chunk_length
        loss, self.state = loss_of(self.model, chunk, self.state)
        return loss

    def cross(self, state: Tensor) -> Tensor:
        """From one chunk to the next."""
        if self.variant == DETACH:
            return state.detach()
        self.boundaries.append(state)
        return fastclip.clip_boundary(state, self.settings.boundary_norm) if "boundary" in self.variant else state


def norms_at_boundaries(variant: str, text: Tensor, settings: Settings) -> list[float]:
    """What arrives at each boundary, from the latest to the earliest, in the first update of the first seed."""
    with study.one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stream = Stream(Reader(settings), text, variant, settings)
        loss = stream.next_loss()
        arrived = torch.autograd.grad(loss, stream.boundaries[::-1])
    return [float(fastclip.get_total_norm([grad])) for grad in arrived]


def train_one(variant: str, seed: int, text: Text, settings: Settings) -> Run:
    model = Reader(settings)
    lr = settings.lr / 10 if variant == SLOWER else settings.lr
    bare = torch.optim.SGD(model.parameters(), lr=lr, momentum=settings.momentum)
    optimizer = fastclip.ClippedOptimizer(bare, settings.max_norm) if "GlobalNorm" in variant else bare
    stream = Stream(model, text.train, variant, settings)

    def bits_per_byte() -> float:
        loss, _ = loss_of(model, text.validation[None], torch.zeros(1, 1, settings.width))
        return float(loss) / math.log(2)

    return study.train(optimizer, stream.next_loss, settings.updates, bits_per_byte)


def claims(runs: Mapping[str, Sequence[Run]], arrived: Mapping[str, Sequence[float]], bytes_back: int) -> list[str]:
    """What the runs show."""
    growth, bounded = arrived[FULL][-1] / arrived[FULL][0], max(arrived[BOUNDARY])
    changes = f"grows {growth:.1g}-fold" if growth > 1 else f"shrinks to {growth:.1g} of itself"
    return [
        f"Over {bytes_back} bytes back through time the gradient {changes}; "
        f"with clip_boundary at most {study.number(bounded)} gets across a boundary.",
        f"{study.verdict(runs, BOUNDARY, FULL)}.",
        f"{study.verdict(runs, BOUNDARY, CLIPPED)}.",
        f"{study.verdict(runs, BOUNDARY, DETACH)}"
        + ("." if study.wins(runs[BOUNDARY], runs[DETACH]) == len(runs[DETACH]) else ": here detach() is enough."),
    ]


def draw(axes: Any, arrived: Mapping[str, Sequence[float]], chunk_length: int) -> None:
    """The norms along the way back."""
    for variant, norms in arrived.items():
        colour, style = LINES[VARIANTS.index(variant)]
        back = [chunk_length * (i + 1) for i in range(len(norms))]
        axes.plot(back, norms, style, marker="o", color=colour, label=variant)
    axes.set_yscale("log")
    axes.set_title("gradient at the boundaries, first update", fontsize=12)
    axes.set_xlabel("bytes back through time", fontsize=12)
    axes.grid(alpha=0.25)


def run(settings: Settings, progress: bool = True) -> Study:
    """All variants; the same settings give the same losses on the same machine."""
    text = load_text(settings.lanes * (settings.updates * settings.update_length + 1), settings.validation_bytes)
    train = functools.partial(train_one, text=text, settings=settings)
    runs = study.compare(train, VARIANTS, settings.seeds, progress)
    arrived = {variant: norms_at_boundaries(variant, text.train, settings) for variant in DRAWN}
    return Study(
        title="A tanh RNN on one long text, its state carried on from chunk to chunk",
        measure="validation bits per byte",
        runs=runs,
        claims=claims(runs, arrived, settings.chunk_length * (len(arrived[FULL]) - 1)),
        max_norm=settings.max_norm,
        panel=functools.partial(draw, arrived=arrived, chunk_length=settings.chunk_length),
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    return study.main("long_sequences", __doc__, Settings, run, NEEDS, argv)


if __name__ == "__main__":
    raise SystemExit(main())
