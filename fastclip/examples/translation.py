"""A GRU translates number names from English to Portuguese; scored by whole names right, on numbers it has not seen.

"twenty-one thousand and three" becomes "vinte e um mil e três". The encoder reads English words; the decoder writes
Portuguese ones, and looks back at the encoder's states through dot-product attention (Luong et al. 2015,
arXiv:1508.04025). It is trained with teacher forcing: it is given the right word before each, however wrong its own
was. When it is tested it gets its own words. num2words spells the numbers, so there is no doubt about what is right.

The optimizer is SGD with momentum. Of the learning rates 0.3, 1 and 3, bare SGD is best at 1 and loses some seeds at 3;
clipped SGD is best at 3. So 3 is what both are compared at, and bare SGD at 1 is the honest rival.

Run it with ``fastclip example translation``; needs ``pip install 'torch-fastclip[examples]'``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastclip
from fastclip.examples import study
from fastclip.examples.extras import extra
from fastclip.examples.study import Run, Study, verdict

NEEDS = ("num2words",)
SOURCE, TARGET = "en", "pt_BR"
PAD, START, END = "<pad>", "<start>", "<end>"  # in this order the first words of each vocabulary
SAMPLES = 4  # translations that are printed


@dataclass(frozen=True)
class Settings:
    """What all runs share.

    Args:
        lr: of the bare and of the clipped run; the smaller one is of the rival.
        below: numbers are drawn from those below this.
    """

    seeds: int = 4
    steps: int = 400
    lr: float = 3.0
    smaller_lr: float = 1.0
    momentum: float = 0.9
    max_norm: float = 0.3
    hidden: int = 48
    batch_size: int = 32
    below: int = 100_000
    train_numbers: int = 2000
    test_numbers: int = 400

    @classmethod
    def quick(cls) -> Settings:
        """The same, cut short."""
        return cls(seeds=2, steps=30, train_numbers=500, test_numbers=100)

    @property
    def rival(self) -> str:
        return f"bare, lr {self.smaller_lr:g}"


@dataclass(frozen=True)
class Names:
    """Number names in both languages, ``[numbers, words]``, padded; words are positions in their vocabulary."""

    train_source: Tensor
    train_target: Tensor
    test_source: Tensor
    test_target: Tensor
    source_words: list[str]
    target_words: list[str]


class Translator(nn.Module):
    """An encoder, a decoder, and attention between them."""

    def __init__(self, source_words: int, target_words: int, hidden: int) -> None:
        super().__init__()
        self.read = nn.Embedding(source_words, hidden)
        self.write = nn.Embedding(target_words, hidden)
        self.encoder = nn.GRU(hidden, hidden, batch_first=True)
        self.decoder = nn.GRU(hidden, hidden, batch_first=True)
        self.head = nn.Linear(2 * hidden, target_words)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """The state after each word, and after the last."""
        states, last = self.encoder(self.read(source))
        return states, last

    def decode(self, written: Tensor, state: Tensor, source: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """For each written word the logits of the next; and the state after the last."""
        hidden, state = self.decoder(self.write(written), state)
        weights = hidden @ states.transpose(1, 2) / hidden.shape[-1] ** 0.5
        weights = weights.masked_fill((source == 0).unsqueeze(1), float("-inf")).softmax(-1)
        logits: Tensor = self.head(torch.cat([hidden, weights @ states], dim=-1))
        return logits, state

    def translate(self, source: Tensor, words: int) -> Tensor:
        """Up to so many words of each translation, always the likeliest next."""
        states, state = self.encode(source)
        word = torch.full((len(source), 1), 1)
        written = []
        for _ in range(words):
            logits, state = self.decode(word, state, source, states)
            word = logits.argmax(-1)
            written.append(word)
        return torch.cat(written, dim=1)


def spell(numbers: Sequence[int], language: str) -> list[list[str]]:
    """The words of each number's name, without commas and hyphens."""
    num2words = extra("num2words").num2words
    return [num2words(number, lang=language).replace(",", "").replace("-", " ").split() for number in numbers]


def load_names(settings: Settings) -> Names:
    """Numbers drawn without repetition, so that those of the test are in no batch."""
    drawn = random.Random(0).sample(range(settings.below), settings.train_numbers + settings.test_numbers)
    tensors, vocabularies = [], []
    for language in (SOURCE, TARGET):
        spelled = spell(drawn, language)
        words = [PAD, START, END, *sorted({word for name in spelled for word in name})]
        places = {word: i for i, word in enumerate(words)}
        rows = [torch.tensor([places[word] for word in (START, *name, END)]) for name in spelled]
        tensors.append(nn.utils.rnn.pad_sequence(rows, batch_first=True))
        vocabularies.append(words)
    (train_source, test_source), (train_target, test_target) = (
        t.tensor_split([settings.train_numbers]) for t in tensors
    )
    return Names(train_source, train_target, test_source, test_target, *vocabularies)


def exact_match(written: Tensor, target: Tensor) -> Tensor:
    """For each number whether all words up to the end are right."""
    wanted = target[:, 1:]
    return ((written == wanted) | (wanted == 0)).all(1)


def text(words: Tensor, vocabulary: Sequence[str]) -> str:
    """A name up to its end."""
    spelled = [vocabulary[i] for i in words.tolist()]
    return " ".join(word for word in spelled[: (*spelled, END).index(END)] if word != START)


def train_one(variant: str, seed: int, settings: Settings, names: Names, samples: list[str]) -> Run:
    """Trains a new model; some of its translations go into ``samples``."""
    model = Translator(len(names.source_words), len(names.target_words), settings.hidden)
    lr = settings.smaller_lr if variant == settings.rival else settings.lr
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=settings.momentum)
    if variant == "clipped":
        optimizer = fastclip.ClippedOptimizer(optimizer, max_norm=settings.max_norm)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    shuffle = torch.Generator().manual_seed(seed)

    def next_loss() -> Tensor:
        batch = torch.randint(len(names.train_source), (settings.batch_size,), generator=shuffle)
        source, target = names.train_source[batch], names.train_target[batch]
        states, last = model.encode(source)
        logits, _ = model.decode(target[:, :-1], last, source, states)
        return nn.functional.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=0)

    def accuracy() -> float:
        written = model.translate(names.test_source, names.test_target.shape[1] - 1)
        right = exact_match(written, names.test_target)
        for i in range(SAMPLES):
            source = text(names.test_source[i], names.source_words)
            wanted = "" if right[i] else f"  (right: {text(names.test_target[i], names.target_words)})"
            samples.append(f"{variant}: {source} -> {text(written[i], names.target_words)}{wanted}")
        return float(right.double().mean())

    return study.train(optimizer, next_loss, settings.steps, accuracy, schedule)


def claims(runs: Mapping[str, Sequence[Run]], settings: Settings) -> list[str]:
    """What the runs show."""

    def percent(score: float) -> str:
        return f"{score:.0%}"

    return [
        f"At lr {settings.lr:g} {verdict(runs, 'clipped', 'bare', True, percent)}.",
        f"A smaller learning rate: {verdict(runs, 'clipped', settings.rival, True, percent)}.",
    ]


def run(settings: Settings, progress: bool = True) -> Study:
    """All trainings; the same settings give the same losses on the same machine."""
    names = load_names(settings)
    variants = ("bare", "clipped", settings.rival)
    samples: list[str] = []

    def one(variant: str, seed: int) -> Run:
        return train_one(variant, seed, settings, names, samples if seed == 0 else [])

    runs = study.compare(one, variants, settings.seeds, progress)
    return Study(
        title=f"A GRU with attention translates number names, lr {settings.lr:g}",
        measure="names that are all right",
        runs=runs,
        claims=claims(runs, settings),
        higher_is_better=True,
        max_norm=settings.max_norm,
        details="\n".join(["Unseen numbers, translated by the runs of the first seed:", *samples]),
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    return study.main("translation", __doc__, Settings, run, NEEDS, argv)


if __name__ == "__main__":
    raise SystemExit(main())
