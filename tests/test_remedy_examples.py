"""Long sequences, vanishing gradients and regularisation: each remedy does what it says, and so do the claims."""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fastclip
from fastclip.examples import long_sequences, regularisation, vanishing
from fastclip.examples.study import Run, Study

for extra in ("matplotlib", "tqdm", "sklearn"):
    pytest.importorskip(extra, reason="needs torch-fastclip[examples]")

NAN = math.nan
MODULES = {"long_sequences": long_sequences, "vanishing": vanishing, "regularisation": regularisation}


def runs(*scores: float, clip_rate: float | None = None) -> list[Run]:
    return [Run([1.0, 1.0], [1.0, 1.0], score, clip_rate=clip_rate) for score in scores]


@pytest.fixture(scope="module")
def studies() -> dict[str, Study]:
    return {name: module.run(module.Settings.quick(), progress=False) for name, module in MODULES.items()}


@pytest.mark.parametrize(
    ("module", "short"),
    [(long_sequences, {"updates": 3}), (vanishing, {"steps": 5}), (regularisation, {"steps": 5})],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_same_settings_same_losses(module: ModuleType, short: dict[str, int]) -> None:
    settings = dataclasses.replace(module.Settings.quick(), **short)
    first, again = (module.run(settings, progress=False) for _ in range(2))
    assert {v: r[0].losses for v, r in first.runs.items()} == {v: r[0].losses for v, r in again.runs.items()}
    assert first.claims == again.claims


def test_variants_begin_alike(studies: dict[str, Study]) -> None:
    begins = {
        name: {variant: of_variant[0].losses[0] for variant, of_variant in found.runs.items()}
        for name, found in studies.items()
    }
    assert len(set(begins["long_sequences"].values())) == 1
    assert len(set(begins["regularisation"].values())) == 1
    sigmoids = [vanishing.SIGMOID, vanishing.CLIPPED, vanishing.ADAM, vanishing.FASTER]
    assert len({begins["vanishing"][variant] for variant in sigmoids}) == 1


# ---- long sequences


def stream(variant: str, **changes: Any) -> long_sequences.Stream:
    settings = dataclasses.replace(long_sequences.Settings.quick(), **changes)
    text = long_sequences.load_text(10_000, 500).train
    torch.manual_seed(0)
    return long_sequences.Stream(long_sequences.Reader(settings), text, variant, settings)


def test_chunks_follow_one_another_and_the_state_is_carried_on() -> None:
    whole, parts = stream(long_sequences.FULL, chunks=1, chunk_length=12), stream(long_sequences.FULL, chunks=4)
    parts.settings = dataclasses.replace(parts.settings, chunk_length=3)
    assert torch.allclose(whole.next_loss(), parts.next_loss(), atol=1e-6)
    assert torch.allclose(whole.state, parts.state, atol=1e-5)
    assert whole.position == parts.position == 12
    assert torch.allclose(whole.next_loss(), parts.next_loss(), atol=1e-5)
    assert torch.equal(parts.lanes[:, :5], parts.lanes.flatten().view(parts.settings.lanes, -1)[:, :5])


@pytest.mark.parametrize("variant", long_sequences.VARIANTS)
def test_what_crosses_a_boundary(variant: str) -> None:
    reading = stream(variant)
    loss = reading.next_loss()
    if variant == long_sequences.DETACH:
        assert reading.boundaries == []
        assert reading.state.requires_grad
        assert not reading.cross(reading.state).requires_grad
        return
    assert len(reading.boundaries) == reading.settings.chunks - 1
    norms = [float(grad.norm()) for grad in torch.autograd.grad(loss, reading.boundaries, retain_graph=True)]
    if "boundary" in variant:
        assert max(norms) <= reading.settings.boundary_norm * (1 + 1e-6)
        assert norms == pytest.approx([reading.settings.boundary_norm] * len(norms), rel=1e-3)
    else:
        assert norms[0] > 1e3 * norms[-1]  # it grows on its way back
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in reading.model.parameters())


def test_boundaries_are_told_from_the_latest_to_the_earliest() -> None:
    settings = long_sequences.Settings.quick()
    text = long_sequences.load_text(10_000, 500).train
    state = torch.get_rng_state()
    norms = long_sequences.norms_at_boundaries(long_sequences.FULL, text, settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(norms) == settings.chunks - 1
    assert norms[0] < norms[-1]


def test_the_text_is_long_enough_for_all_updates() -> None:
    settings = long_sequences.Settings()
    assert settings.lanes * (settings.updates * settings.update_length + 1) < 1_000_000


@pytest.mark.parametrize(
    ("full", "clipped", "boundary", "detach", "said"),
    [
        (5.0, 4.5, 4.0, 4.1, ("better than full with each", "better than full, GlobalNorm with", "each of 2 seeds")),
        (5.0, 4.5, 4.0, 3.9, ("better than full with each", "better than full, GlobalNorm", "here detach() is enough")),
        (NAN, NAN, 4.0, 4.0, ("full died with 2", "full, GlobalNorm died with 2", "here detach() is enough")),
        (4.0, 4.0, NAN, 4.1, ("worse than full with each", "clip_boundary died with 2", "here detach() is enough")),
    ],
)
def test_claims_of_long_sequences(
    full: float, clipped: float, boundary: float, detach: float, said: tuple[str, ...]
) -> None:
    scores = {"full": full, "full, GlobalNorm": clipped, "clip_boundary": boundary, "detach": detach}
    made_up = {variant: runs(scores.get(variant, 4.2), scores.get(variant, 4.2)) for variant in long_sequences.VARIANTS}
    grown, *verdicts = long_sequences.claims(made_up, {"full": [1e-2, 1e5], "clip_boundary": [1e-3, 1e-3]}, 150)
    assert grown == (
        "Over 150 bytes back through time the gradient grows 1e+07-fold; "
        "with clip_boundary at most 0.001 gets across a boundary."
    )
    assert all(part in verdict for part, verdict in zip(said, verdicts, strict=True))
    shrunk, *_ = long_sequences.claims(made_up, {"full": [1.0, 0.01], "clip_boundary": [1e-3, 1e-3]}, 150)
    assert "the gradient shrinks to 0.01 of itself" in shrunk


# ---- vanishing gradients


def test_the_doctor_finds_the_sigmoids_and_is_silent_about_the_remedies(studies: dict[str, Study]) -> None:
    digits, settings = vanishing.load_digits(), vanishing.Settings.quick()
    state = torch.get_rng_state()
    found = {variant: vanishing.diagnose(variant, digits, settings) for variant in vanishing.NETWORKS}
    assert torch.equal(torch.get_rng_state(), state)
    assert [finding.code for finding in vanishing.matters(found[vanishing.SIGMOID])] == ["vanishing-depth"]
    for remedy in (vanishing.RELU, vanishing.SKIPS):
        assert vanishing.matters(found[remedy]) == []
    told = studies["vanishing"].details
    assert "ERROR vanishing-depth: the gradient shrinks to" in told
    assert "To do: " in told
    assert f"fastclip.check on {vanishing.RELU}: nothing that keeps it from training." in told
    assert max(map(len, told.splitlines())) <= 110


def test_the_remedies_train_and_clipping_does_not(studies: dict[str, Study]) -> None:
    found = studies["vanishing"].runs
    chance = studies["vanishing"].baseline
    assert chance is not None
    for variant in (vanishing.RELU, vanishing.SKIPS):
        assert found[variant][0].score > 40 + chance[1]
    for variant in (vanishing.SIGMOID, vanishing.CLIPPED, vanishing.ADAM, vanishing.FASTER):
        assert found[variant][0].score < 10 + chance[1]
    assert found[vanishing.CLIPPED][0].losses == found[vanishing.SIGMOID][0].losses  # nothing to clip


@pytest.mark.parametrize("variant", vanishing.NETWORKS)
def test_networks_have_as_many_linear_layers(variant: str) -> None:
    model = vanishing.make_model(variant, vanishing.Settings())
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == 13
    assert any(isinstance(module, nn.LayerNorm) for module in model.modules()) == (variant == vanishing.SKIPS)


def test_a_skip_connection_hands_its_input_on() -> None:
    silent = nn.Linear(vanishing.PIXELS, vanishing.PIXELS)
    nn.init.zeros_(silent.weight)
    nn.init.zeros_(silent.bias)
    x = torch.randn(3, vanishing.PIXELS)
    assert torch.equal(vanishing.Skip(silent, nn.Sigmoid())(x), x + 0.5)


@pytest.mark.parametrize("module", [vanishing, regularisation])
def test_digits_are_split_without_overlap(module: Any) -> None:
    digits = module.load_digits()
    assert len(digits.train_digits) + len(digits.test_digits) == 1797
    assert len(digits.train_digits) == (200 if module is regularisation else 1347)
    everything = torch.cat([digits.train_pixels, digits.test_pixels])
    assert len(everything.unique(dim=0)) == 1797
    assert (float(everything.min()), float(everything.max())) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("clipped", "rate", "said"),
    [
        ((10.0, 8.0), 0.0, "Clipping does not help vanishing gradients: 9%; it shortened 0% of them"),
        ((60.0, 8.0), 0.3, "Clipping helps with 1 of 2 seeds: 34%; it shortened 30% of them"),
    ],
)
def test_claims_of_vanishing(clipped: tuple[float, float], rate: float, said: str) -> None:
    healthy = fastclip.check(
        nn.Linear(4, 2), (torch.randn(8, 4), torch.randint(2, (8,))), nn.CrossEntropyLoss(), max_seconds=0
    )
    scores = {"sigmoid": (10.0, 8.0), "ReLU, He": (96.0, NAN), "skips, LayerNorm": (97.0, 5.0)}
    made_up = {variant: runs(*scores.get(variant, (10.0, 8.0))) for variant in vanishing.VARIANTS}
    made_up[vanishing.CLIPPED] = runs(*clipped, clip_rate=rate)
    found = vanishing.claims(made_up, {vanishing.SIGMOID: healthy}, chance=8.4)
    assert found[0] == "The doctor's finding before any training: none."
    assert found[1].startswith("ReLU, He: nan% right, 1 of 2 seeds better than the sigmoids' 9%")
    assert found[2].startswith("skips, LayerNorm: 51% right, 1 of 2 seeds better")
    assert said in found[3]


# ---- regularisation


def optimizer(variant: str) -> Any:
    settings = regularisation.Settings()
    return regularisation.make_optimizer(variant, regularisation.make_model(settings), settings)


def test_what_each_variant_is_made_of() -> None:
    settings = regularisation.Settings()
    assert optimizer(regularisation.SLOWER).param_groups[0]["lr"] == pytest.approx(settings.lr / 10)
    for variant in (regularisation.BARE, regularisation.SLOWER, regularisation.COSINE, regularisation.PLATEAU):
        assert type(optimizer(variant)) is torch.optim.SGD
    for variant in (regularisation.CLIPPED, regularisation.CLIPPED_L1, regularisation.CLIPPED_L2):
        assert optimizer(variant).max_norm == settings.max_norm
    assert optimizer(regularisation.L2).max_norm == math.inf
    assert optimizer(regularisation.BACKOFF).lr_factor == 1.0


@pytest.mark.parametrize(
    ("variant", "l1", "l2"),
    [(regularisation.CLIPPED_L1, 1e-4, 0.0), (regularisation.CLIPPED_L2, 0.0, 1e-3), (regularisation.L2, 0.0, 1e-3)],
)
def test_penalties_pull_at_the_weights(variant: str, l1: float, l2: float) -> None:
    settings = dataclasses.replace(regularisation.Settings(), momentum=0.0, max_norm=1e6)
    model = regularisation.make_model(settings)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    stepped = regularisation.make_optimizer(variant, model, settings)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stepped.step()
    for parameter, was in zip(model.parameters(), before, strict=True):
        assert torch.allclose(parameter, was - settings.lr * (l1 * was.sign() + l2 * was), atol=1e-7)


def test_schedules() -> None:
    settings = dataclasses.replace(regularisation.Settings(), steps=100, warmup=10)
    assert regularisation.make_schedule(regularisation.BARE, optimizer(regularisation.BARE), settings) is None
    stepped = optimizer(regularisation.WARMUP)
    schedule = regularisation.make_schedule(regularisation.WARMUP, stepped, settings)
    assert schedule is not None
    lrs = []
    for _ in range(100):
        lrs.append(stepped.param_groups[0]["lr"])
        stepped.step()
        schedule.step()
    assert lrs[0] == pytest.approx(settings.lr / 10)
    assert max(lrs) == lrs[9]
    assert lrs[-1] < 0.01 * settings.lr


def test_a_plateau_lowers_the_rate() -> None:
    settings = dataclasses.replace(regularisation.Settings.quick(), steps=30, patience=2, lr=1e-4)
    lrs: list[float] = []

    class Watched(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def step(self, *args: Any, **kwargs: Any) -> None:
            super().step(*args, **kwargs)
            lrs.append(self.optimizer.param_groups[0]["lr"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regularisation, "ReduceLROnPlateau", Watched)
        regularisation.train_one(regularisation.PLATEAU, 0, regularisation.load_digits(), settings, {})
    assert len(lrs) == 30
    assert (lrs[0], lrs[-1] < 1e-4) == (1e-4, True)


def made_up_runs(scores: dict[str, tuple[float, ...]], otherwise: tuple[float, ...]) -> dict[str, list[Run]]:
    return {variant: runs(*scores.get(variant, otherwise)) for variant in regularisation.VARIANTS}


def test_claims_of_regularisation() -> None:
    found = regularisation.claims(
        made_up_runs({"clipped": (91.0, 93.0), "plateau": (85.0, 30.0), "lr / 10": (94.0, 95.0)}, (10.0, NAN))
    )
    assert found[0] == "Saves every run: clipped."
    assert found[1] == "Saves some: plateau (1 of 2)."
    assert found[2].startswith("Saves none: bare; cosine; warmup; L2; ")
    assert found[3] == (
        "Clipped, 92% are right without a penalty, "
        "nan% with L1 (better with 0) and nan% with L2 (better with 0) of 2 seeds."
    )
    assert found[4].startswith("The best median has clipped: clipped is worse than lr / 10 with each of 2 seeds")
    assert found[5] == "So a smaller learning rate, once found, saves every run, too."


def test_claims_of_regularisation_when_nothing_is_saved_or_all() -> None:
    nothing = regularisation.claims(made_up_runs({}, (NAN, NAN)))
    assert nothing[0].startswith("Saves none: bare; cosine; ")
    assert len(nothing) == 3
    everything = regularisation.claims(made_up_runs({}, (90.0, 90.0)))
    assert everything[0].startswith("Saves every run: bare; cosine; ")
    assert "lr / 10" not in everything[0]
    assert len(everything) == 4


def test_gaps_of_variants_that_all_died() -> None:
    lines = regularisation.gaps(made_up_runs({"clipped": (90.0, 92.0)}, (NAN, NAN)), {"clipped": [100.0, 99.0]})
    assert lines.splitlines()[2].split() == ["bare", "nan", "nan"]
    assert next(line for line in lines.splitlines() if line.startswith("clipped ")).split() == ["clipped", "99.5", "91"]
