"""The GPT and the GAN: what they read and draw is right, and their claims follow from the runs, whatever these are."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fastclip
from fastclip.examples import gan, gpt, study
from fastclip.examples.study import Run, Study

for extra in ("matplotlib", "tqdm", "sklearn"):
    pytest.importorskip(extra, reason="needs torch-fastclip[examples]")

NAN = math.nan


def runs(*scores: float) -> list[Run]:
    return [Run([1.0, NAN if math.isnan(score) else 1.0], [1.0, 20.0], score) for score in scores]


@pytest.fixture(scope="module")
def gpt_study() -> Study:
    return gpt.run(gpt.Settings.quick(), progress=False)


@pytest.fixture(scope="module")
def gan_study() -> Study:
    return gan.run(gan.Settings.quick(), progress=False)


def test_no_file_is_in_both_parts() -> None:
    train, validation = gpt.sources()
    assert train
    assert validation
    assert not set(train) & set(validation)
    assert all(path.read_bytes()[:65536].count(0) == 0 for path in train)  # so a damaged batch is none of the text's


def test_the_text_begins_with_the_first_file() -> None:
    text = gpt.load_text(1000, 500)
    assert (len(text.train), len(text.validation)) == (1000, 500)
    for part, files in zip((text.train, text.validation), gpt.sources(), strict=True):
        read = b"".join(path.read_bytes() for path in files[:5])
        assert bytes(part.tolist()) == read[: len(part)]


def test_too_little_source_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"has \d+ bytes here, 1000000000000 are wanted"):
        gpt.load_text(10**12, 500)


def test_the_gpt_never_looks_ahead() -> None:
    settings = gpt.Settings.quick()
    model = gpt.GPT(settings)
    text = torch.randint(gpt.BYTES, (2, settings.context))
    changed = text.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % gpt.BYTES
    first, second = model(text), model(changed)
    assert torch.equal(first[:, :10], second[:, :10])
    assert not torch.allclose(first[:, 10:], second[:, 10:])


def test_bits_per_byte_of_a_model_that_knows_nothing() -> None:
    class Uniform(nn.Module):
        def forward(self, text: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*text.shape, gpt.BYTES)

    assert gpt.bits_per_byte(Uniform(), torch.arange(200) % gpt.BYTES, 32) == pytest.approx(8.0)


def test_all_variants_see_the_same_batches_but_for_the_damage() -> None:
    settings = dataclasses.replace(gpt.Settings.quick(), damage_every=3)
    text = gpt.load_text(10_000, 500).train
    damaged, clean = (gpt.Batches(text, settings, seed=1, damaged=damaged) for damaged in (True, False))
    for step in range(1, 8):
        a, b = damaged.next(), clean.next()
        assert torch.equal(a, b) != (step % 3 == 0)
        assert (len(a.unique()) == 1) == (step % 3 == 0)


def test_spikes_of_the_gpt(gpt_study: Study) -> None:
    settings = gpt.Settings.quick()
    assert set(gpt_study.runs) == set(gpt.VARIANTS)
    assert len({of_variant[0].losses[0] for of_variant in gpt_study.runs.values()}) == 1
    (bare,) = gpt_study.runs[gpt.BARE]
    usual = sorted(bare.total_norms)[len(bare.total_norms) // 2]
    assert bare.total_norms[settings.damage_every - 1] > 5 * usual
    assert gpt_study.runs["SkipLarge"][0].skipped >= 1
    assert gpt_study.runs[gpt.CLEAN][0].losses != bare.losses
    assert len(gpt_study.claims) == 6
    assert " times as long as usual" in gpt_study.claims[0]


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ({"GlobalNorm": 1.0}, "Of the bare remedies lr / 3 is the best; GlobalNorm is better than bare, lr / 3"),
        ({"SkipLarge": 2.5, gpt.FORGETFUL: 2.0}, "beta2 0.95 is the best; SkipLarge is worse than bare, beta2 0.95"),
        ({"GlobalNorm": NAN, "ZScore": NAN, "SkipLarge": NAN}, "GlobalNorm died with 2"),
        ({gpt.BARE: NAN, gpt.SLOWER: NAN, gpt.FORGETFUL: NAN}, "bare, lr / 3 died with 2"),
    ],
)
def test_claims_of_the_gpt(scores: dict[str, float], said: str) -> None:
    made_up = {variant: runs(scores.get(variant, 3.0), scores.get(variant, 3.0)) for variant in gpt.VARIANTS}
    found = gpt.claims(made_up, damage_every=2)
    assert said in found[-1]
    assert found[0] == "A damaged batch's gradient is 2 times as long as usual."  # 20 against 10.5 in the middle
    bare = "nan" if math.isnan(scores.get(gpt.BARE, 3.0)) else "3"
    assert found[1] == f"Bits per byte, bare: {bare}; had nothing been damaged: 3."


def test_a_run_that_died_before_the_first_damage_says_nothing_of_spikes() -> None:
    made_up = {variant: runs(NAN) for variant in gpt.VARIANTS}
    assert not any("times as long" in claim for claim in gpt.claims(made_up, damage_every=40))


def test_digits_are_split_without_overlap() -> None:
    digits = gan.load_digits()
    assert len(digits.train) + len(digits.validation) == 1797
    assert (float(digits.train.min()), float(digits.train.max())) == (-1.0, 1.0)
    everything = torch.cat([digits.train, digits.validation])
    assert len(everything.unique(dim=0)) == len(everything)  # so no digit can be in both


def test_frechet_distance_of_normal_distributions() -> None:
    x = torch.randn(500, 4, dtype=torch.float64)
    assert gan.frechet_distance(x, x) == pytest.approx(0.0, abs=1e-6)
    assert gan.frechet_distance(x, x + 2.0) == pytest.approx(4 * 2.0**2)
    # one dimension in closed form: (m1 - m2)^2 + (s1 - s2)^2
    line = torch.linspace(-1, 1, 50).unsqueeze(1)
    std = float(line.double().std())
    padded = [torch.cat([part, torch.zeros(50, 1)], 1) for part in (line, 3 * line + 1)]
    assert gan.frechet_distance(*padded) == pytest.approx(1 + (2 * std) ** 2)


def test_the_penalty_asks_for_a_slope_of_one() -> None:
    critic = nn.Linear(gan.PIXELS, 1)
    with torch.no_grad():
        critic.weight.fill_(3 / 8)  # a slope of 3
    real, fake, mix = torch.randn(5, gan.PIXELS), torch.randn(5, gan.PIXELS), torch.rand(5, 1)
    plain = critic(fake).mean() - critic(real).mean()
    loss = gan.critic_loss(critic, real, fake, mix, penalty=10.0)
    assert float((loss - plain).detach()) == pytest.approx(10.0 * 2.0**2, rel=1e-4)


def test_each_network_gets_the_gradient_of_its_own_loss() -> None:
    settings = gan.Settings.quick()
    generator, critic = gan.make_generator(settings), gan.make_critic(settings)
    fake = generator(torch.randn(4, settings.noise))
    of_critic, of_generator = critic(fake.detach()).mean(), -critic(fake).mean()
    total = gan.give_gradients(generator, critic, (of_generator, of_critic))
    expected = [
        *torch.autograd.grad(of_generator, list(generator.parameters()), retain_graph=True),
        *torch.autograd.grad(of_critic, list(critic.parameters())),
    ]
    given = [p.grad for net in (generator, critic) for p in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
    assert total == pytest.approx(float(torch.cat([grad.flatten() for grad in expected]).double().norm()))


def test_one_norm_over_both_networks_or_one_each() -> None:
    settings = gan.Settings.quick()
    for variant, bounds in ((gan.EACH, [1.0, 1.0]), (gan.TOGETHER, [1.0])):
        generator, critic = gan.make_generator(settings), gan.make_critic(settings)
        optimizers = gan.make_optimizers(variant, generator, critic, settings)
        for parameter in (*generator.parameters(), *critic.parameters()):
            parameter.grad = torch.full_like(parameter, 10.0)
        for optimizer in optimizers:
            optimizer.step()
        norms = [
            float(fastclip.get_total_norm([p.grad for group in o.param_groups for p in group["params"]]))
            for o in optimizers
        ]
        assert norms == pytest.approx(bounds)


def test_digits_of_the_gan(gan_study: Study) -> None:
    assert {of_variant[0].losses[0] for of_variant in gan_study.runs.values()} == {
        gan_study.runs[gan.BARE][0].losses[0]
    }
    for variant in (gan.SLOWER, gan.EACH, gan.TOGETHER):
        assert math.isfinite(gan_study.runs[variant][0].score)
    assert gan_study.runs[gan.BARE][0].died_at is not None
    assert gan_study.claims[0] == "1 of 1 bare runs end in NaN."


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Those that are drawn."""
    drawn: list[Any] = []
    figure = study.figure
    monkeypatch.setattr(study, "figure", lambda *size: drawn.append(figure(*size)) or drawn[-1])
    return drawn


@pytest.mark.parametrize(("losses", "scale"), [([3.0, -2.0, -5.0], "symlog"), ([3.0, 2.0, 0.0], "log")])
def test_losses_below_zero_are_in_the_picture(
    losses: list[float], scale: str, figures: list[Any], tmp_path: Path
) -> None:
    found = {"bare": [Run(losses, [1.0, 1.0, 1.0], 1.0)]}
    study.save_picture(Study("title", "error", found, []), tmp_path / "picture.png")
    axes = next(axes for axes in figures[0].axes if axes.get_ylabel() == "training loss")
    assert axes.get_yscale() == scale
    if scale == "symlog":
        assert axes.get_ylim()[0] < -5.0


@pytest.mark.parametrize("higher_is_better", [False, True])
@pytest.mark.parametrize("panel", [None, lambda axes: None])
def test_no_score_is_hidden_by_words(higher_is_better: bool, panel: Any, figures: list[Any], tmp_path: Path) -> None:
    worst = 10.0 if higher_is_better else 30.0
    found = {"bare": runs(NAN, worst, 20.0), "clipped": runs(12.0, 20.0, 28.0)}
    made_up = Study("title", "error", found, [], higher_is_better=higher_is_better, panel=panel)
    study.save_picture(made_up, tmp_path / "picture.png")
    axes = next(axes for axes in figures[0].axes if axes.get_title() == "error")
    (words,) = [text for text in axes.texts if text.get_text()]
    assert words.get_text() == "1 died"
    for dots in axes.get_lines():
        for x, y in axes.transData.transform(dots.get_xydata()):
            assert not words.get_window_extent().padded(4).contains(x, y)


def test_the_picture_has_a_row_for_each_variant_and_one_of_real_digits() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    images = {name: torch.full((3, gan.PIXELS), value) for name, value in (("a", 1.0), ("b", NAN), ("c", -1.0))}
    gan.draw(axes, images)
    (shown,) = axes.get_images()
    assert shown.get_array().shape == (30, 30)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert [float(shown.get_array()[row, 5]) for row in (5, 15, 25)] == [1.0, 0.0, -1.0]


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ((NAN, 7.0, 8.0, 6.0), "these digits are better than that"),
        ((NAN, 20.0, 18.0, 19.0), "these digits are better than that"),
        ((30.0, 20.0, 19.0, 19.0), "nothing here has learned to draw"),
        ((NAN, NAN, NAN, NAN), "nothing here has learned to draw"),
    ],
)
def test_claims_of_the_gan(scores: tuple[float, ...], said: str) -> None:
    made_up = {variant: runs(score, score) for variant, score in zip(gan.VARIANTS, scores, strict=True)}
    found = gan.claims(made_up, constant=18.8, real=0.35)
    assert found[0] == f"{2 if math.isnan(scores[0]) else 0} of 2 bare runs end in NaN."
    assert f"constant picture 18.8: {said}" in found[-1]
    assert found[1].startswith(f"{gan.EACH} is ")


@pytest.mark.parametrize(
    ("module", "steps"),
    [(gpt, {"steps": 12, "damage_every": 5}), (gan, {"steps": 8})],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_same_settings_same_losses(module: ModuleType, steps: dict[str, int]) -> None:
    settings = dataclasses.replace(module.Settings.quick(), **steps)
    first, again = (module.run(settings, progress=False) for _ in range(2))
    assert {v: r[0].losses for v, r in first.runs.items()} == {v: r[0].losses for v, r in again.runs.items()}
    assert first.claims == again.claims
