"""A character LSTM learns how people feel about words, and is asked about words it has not seen.

The lexicon of vaderSentiment holds some 7,000 words, each with the mean of ten people's ratings from -4, very negative,
to 4. The network reads a word letter by letter, and the mean of its states gives the rating. It is judged by the mean
absolute error on words it has not seen; the baseline calls every word as good as the median word. What it learns are
mostly stems: of many a test word a relative ("abandon", "abandoned") was trained on. So the error on words without any
relative, as far as the first four letters tell, is told apart.

The optimizer is SGD with momentum. The learning rates 0.3, 1 and 2 were tried: bare SGD is best at 0.3, which makes it
the rival, gets through at 1, and its loss is Inf after some twenty steps at 2; there clipped SGD is as good as at 1.

Run it with ``fastclip example sentiment``; needs ``pip install 'torch-fastclip[examples]'``.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor, nn

import fastclip
from fastclip.examples import study
from fastclip.examples.extras import extra
from fastclip.examples.study import Run, Study, number, verdict

NEEDS = ("vaderSentiment", "sklearn")
STEM = 4  # letters that relatives share
LETTERS = 26


@dataclass(frozen=True)
class Settings:
    """What all runs share.

    Args:
        lr: of the bare and of the clipped run; the smaller one is of the rival.
    """

    seeds: int = 3
    steps: int = 1000
    lr: float = 2.0
    smaller_lr: float = 0.3
    momentum: float = 0.9
    max_norm: float = 0.3
    hidden: int = 48
    batch_size: int = 64

    @classmethod
    def quick(cls) -> Settings:
        """The same, cut short."""
        return cls(seeds=2, steps=40)

    @property
    def rival(self) -> str:
        return f"bare, lr {self.smaller_lr:g}"


@dataclass(frozen=True)
class Lexicon:
    """Words as letters ``[words, length]``, 1 for "a", padded with 0; and their ratings.

    ``strangers`` tells of each test word whether no word that is trained on begins with the same letters.
    """

    train_letters: Tensor
    train_ratings: Tensor
    test_letters: Tensor
    test_ratings: Tensor
    strangers: Tensor


class Reader(nn.Module):
    """Reads a word, and rates it."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(1 + LETTERS, 32, padding_idx=0)
        self.lstm = nn.LSTM(32, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, letters: Tensor) -> Tensor:
        states, _ = self.lstm(self.letters(letters))
        there = (letters > 0).unsqueeze(-1)
        rating: Tensor = self.head((states * there).sum(1) / there.sum(1))
        return rating.squeeze(-1)


def load_words() -> tuple[list[str], list[float]]:
    """The lexicon's words of lower-case letters, and their ratings; without its emoticons."""
    text = (resources.files(extra("vaderSentiment")) / "vader_lexicon.txt").read_text(encoding="utf-8")
    rated = [line.split("\t")[:2] for line in text.splitlines()]
    kept = [(word, float(rating)) for word, rating in rated if word.isascii() and word.isalpha() and word.islower()]
    return [word for word, _ in kept], [rating for _, rating in kept]


def split_words() -> Lexicon:
    """One word in five is for the test."""
    words, ratings = load_words()
    trained, tested = extra("sklearn.model_selection").train_test_split(
        range(len(words)), test_size=0.2, random_state=0
    )
    rows = [torch.tensor([ord(letter) - ord("a") + 1 for letter in word]) for word in words]
    letters, targets = nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(ratings)
    stems = {words[i][:STEM] for i in trained}
    strangers = torch.tensor([words[i][:STEM] not in stems for i in tested])
    return Lexicon(letters[trained], targets[trained], letters[tested], targets[tested], strangers)


def error(ratings: Tensor, wanted: Tensor) -> float:
    """Mean absolute error."""
    return float((ratings - wanted).abs().mean())


def train_one(variant: str, seed: int, settings: Settings, lexicon: Lexicon, of_strangers: list[float]) -> Run:
    """Trains a new model; its error on words without relatives goes into ``of_strangers``."""
    model = Reader(settings.hidden)
    lr = settings.smaller_lr if variant == settings.rival else settings.lr
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=settings.momentum)
    if variant == "clipped":
        optimizer = fastclip.ClippedOptimizer(optimizer, max_norm=settings.max_norm)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    shuffle = torch.Generator().manual_seed(seed)

    def next_loss() -> Tensor:
        batch = torch.randint(len(lexicon.train_ratings), (settings.batch_size,), generator=shuffle)
        return nn.functional.mse_loss(model(lexicon.train_letters[batch]), lexicon.train_ratings[batch])

    def test_error() -> float:
        ratings = model(lexicon.test_letters)
        of_strangers.append(error(ratings[lexicon.strangers], lexicon.test_ratings[lexicon.strangers]))
        return error(ratings, lexicon.test_ratings)

    return study.train(optimizer, next_loss, settings.steps, test_error, schedule)


def baseline_errors(lexicon: Lexicon) -> tuple[float, float]:
    """Of calling every word as good as the median word: on all test words, on those without relatives."""
    median = lexicon.train_ratings.median()
    return error(median, lexicon.test_ratings), error(median, lexicon.test_ratings[lexicon.strangers])


def claims(
    runs: Mapping[str, Sequence[Run]],
    settings: Settings,
    baselines: tuple[float, float],
    of_strangers: Mapping[str, Sequence[float]],
) -> list[str]:
    """What the runs show; ``baselines`` and ``of_strangers``: errors on all test words, and without relatives."""
    medians = {variant: study.median_score(of_one) for variant, of_one in runs.items()}
    below = [variant for variant, median in medians.items() if median < baselines[0]]
    told = [f"{variant} {number(statistics.median(errors))}" for variant, errors in of_strangers.items() if errors]
    return [
        f"At lr {settings.lr:g} {verdict(runs, 'clipped', 'bare')}.",
        f"A smaller learning rate: {verdict(runs, 'clipped', settings.rival)}.",
        f"Below the baseline's error of {number(baselines[0])}: {' and '.join(below) or 'none'}.",
        f"On words without relatives: {', '.join(told) or 'none'}; baseline {number(baselines[1])}.",
    ]


def run(settings: Settings, progress: bool = True) -> Study:
    """All trainings; the same settings give the same losses on the same machine."""
    lexicon = split_words()
    baselines = baseline_errors(lexicon)
    of_strangers: dict[str, list[float]] = {variant: [] for variant in ("bare", "clipped", settings.rival)}

    def one(variant: str, seed: int) -> Run:
        return train_one(variant, seed, settings, lexicon, of_strangers[variant])

    runs = study.compare(one, list(of_strangers), settings.seeds, progress)
    return Study(
        title=f"A character LSTM rates words it has not seen, lr {settings.lr:g}",
        measure="error of the rating, -4 to 4",
        runs=runs,
        claims=claims(runs, settings, baselines, of_strangers),
        baseline=("median word", baselines[0]),
        max_norm=settings.max_norm,
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    return study.main("sentiment", __doc__, Settings, run, NEEDS, argv)


if __name__ == "__main__":
    raise SystemExit(main())
