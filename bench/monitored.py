"""A small transformer learns the letters of this package's own source files, with a learning rate that is on the high
side and a monitor: the run behind the picture in README.md.

``python -m fastclip.bench.monitored RUN.jsonl [--steps N]``, then ``fastclip report RUN.jsonl``. About a minute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import fastclip

WIDTH, LAYERS, CONTEXT, BATCH = 64, 8, 48, 8


class Block(nn.Module):
    """Attention and a network of two layers, each added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.ln1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(nn.functional.gelu(self.up(self.ln2(x))))


class Letters(nn.Module):
    """The next letter from those before it."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(letters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, letters)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embed(text) + self.position.weight
        for block in self.h:
            x = block(x)
        return self.head(x)


def batches() -> Iterator[Tensor]:
    """``[BATCH, CONTEXT + 1]`` letters, for ever the same ones in the same order."""
    files = sorted(Path(fastclip.__file__).parent.rglob("*.py"))
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    letters = torch.tensor([min(ord(letter), 127) for letter in text])
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(letters) - CONTEXT - 1, (BATCH, 1), generator=generator)
        yield letters[starts + torch.arange(CONTEXT + 1)]


def train(run: Path, steps: int, lr: float = 0.02) -> None:
    """Writes the records of so many steps to ``run``."""
    torch.manual_seed(0)
    model = Letters(128)
    inner = torch.optim.AdamW(model.named_parameters(), lr=lr, betas=(0.9, 0.95), fused=True)
    opt = fastclip.ClippedOptimizer(inner, policy=fastclip.policies.GlobalNorm(1.0))
    with fastclip.GradMonitor(opt, sinks=[run]):
        for step, letters in zip(range(steps), batches(), strict=False):
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(letters[:, :-1]).flatten(0, 1), letters[:, 1:].flatten())
            opt.observe(loss)
            loss.backward()
            opt.step()
            if step % 200 == 0:
                print(f"step {step}: loss {float(loss.detach()):.3f}, norm {float(opt.last_norm):.3g}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastclip.bench.monitored", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--lr", type=float, default=0.02)
    arguments = parser.parse_args(argv)
    train(arguments.run, arguments.steps, arguments.lr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
