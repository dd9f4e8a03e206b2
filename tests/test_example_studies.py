"""What the examples train on, how they judge it, and that their claims follow from the runs, whatever these were."""

from __future__ import annotations

import dataclasses
import math
from importlib import resources
from types import ModuleType

import pytest
import torch
from torch import nn

from fastclip.examples import forecast, rnn, sentiment, study, translation
from fastclip.examples.study import Run

for extra in ("matplotlib", "tqdm", "pandas", "sklearn", "num2words", "vaderSentiment", "vega_datasets"):
    pytest.importorskip(extra, reason="needs torch-fastclip[examples]")


def runs(*scores: float) -> list[Run]:
    return [Run([1.0], [1.0], score) for score in scores]


NAN = math.nan


@pytest.mark.parametrize("module", [rnn, forecast, translation, sentiment], ids=lambda module: module.__name__)
def test_same_settings_same_losses_and_all_variants_begin_alike(module: ModuleType) -> None:
    settings = dataclasses.replace(module.Settings.quick(), seeds=1, steps=8)
    state = torch.get_rng_state()
    first, again = (module.run(settings, False) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.claims == again.claims
    for variant, found in first.runs.items():
        assert [run.losses for run in found] == [run.losses for run in again.runs[variant]]
        assert [run.score for run in found] == [run.score for run in again.runs[variant]]
    begins = {
        (variant.partition(": ")[0] if module is forecast else "", found[0].losses[0])
        for variant, found in first.runs.items()
    }
    assert len(begins) == (2 if module is forecast else 1)


@pytest.mark.parametrize(
    ("clipped", "bare", "said"),
    [
        ([3.0, 4.0], [1.0, 2.0], "clipped is better than bare with each of 2 seeds (median 3.5 against 1.5)"),
        ([1.0, 2.0], [3.0, 4.0], "clipped is worse than bare with each of 2 seeds (median 1.5 against 3.5)"),
        (
            [1.0, 4.0],
            [3.0, 2.0],
            "clipped is better than bare with 1, worse with 1 of 2 seeds (median 2.5 against 2.5)",
        ),
        (
            [1.0, 4.0],
            [1.0, 4.0],
            "clipped is better than bare with 0, worse with 0 of 2 seeds (median 2.5 against 2.5)",
        ),
        ([1.0], [NAN], "clipped is better than bare with the only seed (median 1 against no score); bare died with 1"),
        (
            [NAN, NAN],
            [NAN, 2.0],
            "clipped is better than bare with 0, worse with 1 of 2 seeds (median no score against no score); "
            "clipped died with 2; bare died with 1",
        ),
    ],
)
def test_verdicts(clipped: list[float], bare: list[float], said: str) -> None:
    found = {"bare": runs(*bare), "clipped": runs(*clipped)}
    assert study.verdict(found, "clipped", "bare", higher_is_better=True) == said


def test_a_lower_error_is_better() -> None:
    found = {"bare": runs(0.3), "clipped": runs(0.2)}
    said = study.verdict(found, "clipped", "bare", say=lambda score: f"{score:.0%}")
    assert said == "clipped is better than bare with the only seed (median 20% against 30%)"


def test_digits_of_the_test_are_not_trained_on() -> None:
    data = rnn.load_digits()
    assert (len(data.train_digits), len(data.test_digits)) == (1257, 540)
    trained = {tuple(pixels) for pixels in data.train_pixels.tolist()}
    assert not trained & {tuple(pixels) for pixels in data.test_pixels.tolist()}
    assert (data.train_pixels.min(), data.train_pixels.max()) == (0.0, 1.0)
    counts = [digits.bincount() / len(digits) for digits in (data.train_digits, data.test_digits)]
    assert torch.allclose(*counts, atol=2e-3)


def test_norms_in_time_are_those_of_the_loss() -> None:
    """A state that is 0 all the time passes the gradient on times the recurrent matrix."""
    model = rnn.Reader(hidden=4)
    with torch.no_grad():
        for parameter in model.rnn.parameters():
            parameter.zero_()
        model.rnn.weight_hh_l0.copy_(1.5 * torch.eye(4))
    pixels, digits = torch.rand(3, 64), torch.tensor([0, 1, 2])
    norms = rnn.norms_in_time(model, pixels, digits)
    assert all(parameter.grad is None for parameter in model.parameters())
    state = torch.zeros(3, 4, requires_grad=True)
    nn.functional.cross_entropy(model.head(state), digits).backward()
    assert state.grad is not None
    assert norms == pytest.approx([float(state.grad.norm()) * 1.5 ** (31 - i) for i in range(32)], rel=1e-4)


def test_rnn_claims() -> None:
    settings = dataclasses.replace(rnn.Settings(), seeds=3)
    found = {"bare": runs(0.1, NAN, 0.5), "clipped": runs(0.9, 0.9, 0.9), settings.rival: runs(0.95, 0.95, 0.95)}
    assert rnn.claims(found, settings) == [
        "At lr 0.1 clipped is better than bare with each of 3 seeds (median 90% against 10%); bare died with 1.",
        "Runs that learned nothing: 2 bare, 0 clipped.",
        "A smaller learning rate: clipped is worse than bare, lr 0.03 with each of 3 seeds (median 90% against 95%).",
    ]


def times(changes: bool = False) -> forecast.Series:
    """The first feature is the time itself."""
    values = torch.arange(60.0).unsqueeze(1) * torch.tensor([1.0, 2.0])
    return forecast.Series(values, 1, 4, 0.1, changes)


def test_each_fold_is_judged_on_what_came_later() -> None:
    for i, task in enumerate(forecast.folds(times(), 3), 1):
        mean, std = float(torch.arange(15.0 * i).mean()), float(torch.arange(15.0 * i).std())
        raw = [part * std + mean for part in (task.train_inputs[..., 0], task.train_targets[..., 0])]
        assert torch.allclose(raw[1], raw[0] + 1, atol=1e-4)  # the target is the next time
        assert float(raw[1].max()) == pytest.approx(15 * i - 1)
        tested = task.test_targets[:, -1, 0] * std + mean
        assert tested.tolist() == pytest.approx(list(range(15 * i, 15 * (i + 1))), abs=1e-3)
        assert float(task.units) == pytest.approx(std)
        assert forecast.error(task.persistence, task) == pytest.approx(1.0, rel=1e-4)
    assert i == 3


def test_persistence_of_changes_is_no_change() -> None:
    for task in forecast.folds(times(changes=True), 2):
        values = times().values[:, 0]
        tested = task.test_targets[:, -1, 0] * task.units + values[: -len(task.test_targets)].mean()
        if len(tested) + len(task.train_targets) + 4 == 60:  # the last fold ends where the series does
            assert forecast.error(task.persistence, task) == pytest.approx(
                float(values[-len(tested) :].mean()), rel=1e-4
            )


@pytest.mark.parametrize("name", ["weather", "stocks"])
def test_later_values_do_not_leak_into_training(name: str) -> None:
    series = forecast.load_series(forecast.Settings())[name]
    first, *_ = forecast.folds(series, 3)
    known = len(first.train_targets) + series.window
    later = series.values.clone()
    later[known:] += 100.0
    changed, *_ = forecast.folds(dataclasses.replace(series, values=later), 3)
    for field in ("train_inputs", "train_targets", "units"):
        assert torch.equal(getattr(first, field), getattr(changed, field))
    assert torch.equal(first.test_inputs[0], changed.test_inputs[0])  # its window ends before the test part
    assert not torch.equal(first.test_targets, changed.test_targets)


def test_stocks_are_changes_of_the_logarithm() -> None:
    from vega_datasets import data

    prices = data.stocks().query("symbol == 'IBM'").sort_values("date")["price"].to_numpy()
    series = forecast.load_series(forecast.Settings())["stocks"]
    wanted = torch.tensor(prices).log().diff().float()
    assert torch.allclose(series.values[:, forecast.SYMBOLS.index("IBM")], wanted, atol=1e-6)
    assert series.changes


def test_a_fold_that_dies_ends_the_run() -> None:
    settings = dataclasses.replace(forecast.Settings.quick(), lr=1e20, steps=5)
    found = forecast.train_one("weather: bare", 0, settings, forecast.load_series(settings), None)
    assert found.died_at == len(found.losses) <= settings.steps  # in the first fold
    assert math.isnan(found.score)


def test_forecast_claims() -> None:
    settings = forecast.Settings()

    def said(weather: list[list[Run]], stocks: list[list[Run]]) -> list[str]:
        found = [(name, own) for name, all_own in (("weather", weather), ("stocks", stocks)) for own in all_own]
        kinds = [forecast.BARE, forecast.CLIPPED, forecast.RIVAL] * 2
        return forecast.claims(
            {f"{name}: {kind}": own for (name, own), kind in zip(found, kinds, strict=True)}, settings
        )

    claims = said([runs(NAN), runs(0.9), runs(0.95)], [runs(NAN), runs(NAN), runs(NAN)])
    assert claims[0].startswith(
        "Weather at lr 1.2: clipped is better than bare with the only seed (median 0.9 against no"
    )
    assert claims[1].startswith(
        "A smaller learning rate, 0.6: clipped is better than bare, smaller lr with the only seed"
    )
    assert claims[2] == "The best of them (clipped) beats persistence: 0.90 of its error."
    assert claims[4].startswith(
        "A smaller learning rate, 0.01: clipped is better than bare, smaller lr with 0, worse with 0 of 1 seeds"
    )
    assert claims[5] == "No forecast is left to compare with persistence."
    claims = said([runs(1.0), runs(1.5), runs(NAN)], [runs(1.1), runs(1.1), runs(1.01)])
    assert claims[2] == "The best of them (bare) does not beat persistence: 1.00 of its error."
    assert claims[5] == "The best of them (bare, smaller lr) does not beat persistence: 1.01 of its error."


def test_folds_are_told_apart() -> None:
    found = forecast.run(dataclasses.replace(forecast.Settings.quick(), seeds=1, steps=8), False)
    rows = [line.split() for line in found.details.splitlines()[2:]]
    assert [row[:4] for row in rows] == [
        [name, "fold", str(i), "8"] for name in ("weather,", "stocks,") for i in (1, 2)
    ]


def names(settings: translation.Settings) -> translation.Names:
    return translation.load_names(settings)


def test_names_are_those_of_the_numbers() -> None:
    found = names(translation.Settings.quick())
    assert translation.spell([21003], "en") == [["twenty", "one", "thousand", "and", "three"]]
    assert translation.spell([21003], "pt_BR") == [["vinte", "e", "um", "mil", "e", "três"]]
    english = {translation.text(row, found.source_words): i for i, row in enumerate(found.train_source)}
    number = next(n for n in range(100_000) if " ".join(translation.spell([n], "en")[0]) in english)
    row = english[" ".join(translation.spell([number], "en")[0])]
    portuguese = translation.text(found.train_target[row], found.target_words)
    assert portuguese == " ".join(translation.spell([number], "pt_BR")[0])


def test_numbers_of_the_test_are_not_trained_on() -> None:
    found = names(translation.Settings.quick())
    spelled = [
        [translation.text(row, found.source_words) for row in part] for part in (found.train_source, found.test_source)
    ]
    assert list(map(len, spelled)) == [500, 100]
    assert len({*spelled[0], *spelled[1]}) == 600


def test_a_name_is_right_if_all_its_words_are() -> None:
    target = torch.tensor([[1, 5, 6, 2, 0]] * 4)
    written = torch.tensor([[5, 6, 2, 9], [5, 6, 7, 2], [5, 7, 2, 0], [5, 6, 2, 2]])
    assert translation.exact_match(written, target).tolist() == [True, False, False, True]
    assert translation.text(torch.tensor([1, 3, 4, 2, 3]), ["", "<start>", "<end>", "cem", "mil"]) == "cem mil"


def test_attention_does_not_look_at_padding() -> None:
    model = translation.Translator(9, 9, 8)
    source, written = torch.tensor([[3, 4, 0, 0]]), torch.tensor([[1, 5]])
    states, last = model.encode(source)
    other = states.clone()
    other[:, 2:] = 1e3
    assert torch.equal(model.decode(written, last, source, states)[0], model.decode(written, last, source, other)[0])
    other[:, 1] = 0
    assert not torch.equal(
        model.decode(written, last, source, states)[0], model.decode(written, last, source, other)[0]
    )


def test_translating_is_decoding_ones_own_words() -> None:
    model = translation.Translator(9, 9, 8)
    source = torch.tensor([[3, 4, 5, 0], [6, 0, 0, 0]])
    with torch.no_grad():
        written = model.translate(source, 5)
        states, last = model.encode(source)
        given = torch.cat([torch.ones(2, 1, dtype=torch.long), written[:, :-1]], dim=1)
        logits, _ = model.decode(given, last, source, states)
    assert torch.equal(logits.argmax(-1), written)


def test_translation_claims() -> None:
    settings = translation.Settings()
    found = {"bare": runs(0.0, 0.9), "clipped": runs(0.5, 0.8), settings.rival: runs(0.5, 0.8)}
    assert translation.claims(found, settings) == [
        "At lr 3 clipped is better than bare with 1, worse with 1 of 2 seeds (median 65% against 45%).",
        "A smaller learning rate: clipped is better than bare, lr 1 with 0, worse with 0 of 2 seeds "
        "(median 65% against 65%).",
    ]


def test_words_have_their_ratings() -> None:
    words, ratings = sentiment.load_words()
    lexicon = (resources.files("vaderSentiment") / "vader_lexicon.txt").read_text(encoding="utf-8")
    assert f"\nabandoned\t{ratings[words.index('abandoned')]}\t" in lexicon
    assert len(words) == len(ratings) > 7000
    assert max(ratings) <= 4
    assert min(ratings) >= -4
    assert all(set(word) <= set("abcdefghijklmnopqrstuvwxyz") for word in words)


def test_words_of_the_test_are_not_trained_on() -> None:
    found = sentiment.split_words()

    def spelled(letters: torch.Tensor) -> list[str]:
        return ["".join(chr(96 + letter) for letter in row if letter) for row in letters.tolist()]

    words, ratings = sentiment.load_words()
    trained, tested = spelled(found.train_letters), spelled(found.test_letters)
    assert not {*trained} & {*tested}
    assert sorted([*trained, *tested]) == sorted(words)
    rated = dict(zip(words, ratings, strict=True))
    assert found.test_ratings.tolist() == pytest.approx([rated[word] for word in tested])
    stems = {word[:4] for word in trained}
    assert found.strangers.tolist() == [word[:4] not in stems for word in tested]
    assert 0 < int(found.strangers.sum()) < len(tested)


def test_padding_does_not_change_a_rating() -> None:
    model = sentiment.Reader(8)
    letters = torch.tensor([[1, 2, 3], [4, 5, 0]])
    longer = torch.cat([letters, torch.zeros(2, 4, dtype=torch.long)], dim=1)
    assert torch.allclose(model(letters), model(longer), atol=1e-6)
    assert torch.allclose(model(letters)[1], model(letters[1:, :2])[0], atol=1e-6)


def test_sentiment_claims() -> None:
    settings = sentiment.Settings()
    found = {"bare": runs(NAN, 1.6), "clipped": runs(1.1, 1.2), settings.rival: runs(1.0, 1.1)}
    of_strangers = {"bare": [], "clipped": [1.5, 1.7], settings.rival: [1.5]}
    assert sentiment.claims(found, settings, (1.5, 1.55), of_strangers) == [
        "At lr 2 clipped is better than bare with each of 2 seeds (median 1.15 against no score); bare died with 1.",
        "A smaller learning rate: clipped is worse than bare, lr 0.3 with each of 2 seeds (median 1.15 against 1.05).",
        "Below the baseline's error of 1.5: clipped and bare, lr 0.3.",
        "On words without relatives: clipped 1.6, bare, lr 0.3 1.5; baseline 1.55.",
    ]
    nothing = sentiment.claims(found, settings, (1.0, 1.55), {"bare": []})
    assert nothing[2:] == [
        "Below the baseline's error of 1: none.",
        "On words without relatives: none; baseline 1.55.",
    ]
