"""The examples' frame with made-up runs, and of each example that its short form shows what its claims say."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fastclip
from fastclip import __main__ as fastclip_command
from fastclip import examples
from fastclip.examples import __main__ as all_examples
from fastclip.examples import study
from fastclip.examples.study import Run, Study

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "bench" / "results" / "examples"

for extra in ("matplotlib", "tqdm", "pandas", "sklearn", "num2words", "vaderSentiment", "vega_datasets"):
    pytest.importorskip(extra, reason="needs torch-fastclip[examples]")

ALIVE = Run([2.0, 1.0], [1.0, 0.5], score=0.5, clip_rate=0.25)
DEAD = Run([2.0, math.inf], [1e30, math.nan], score=math.nan)
FADED = Run([2.0, 1.0], [1.0, 0.5], score=math.nan)  # its last step broke its weights


def made_up(**runs: list[Run]) -> Study:
    return Study("title", "error", runs, ["A claim."], baseline=("as yesterday", 0.7), max_norm=1.0)


def test_a_run_has_died_if_it_has_no_score() -> None:
    assert (ALIVE.died_at, DEAD.died_at, FADED.died_at) == (None, 2, 2)
    assert study.deaths([ALIVE, DEAD, FADED]) == 2


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_the_dead_count_as_the_worst(higher_is_better: bool) -> None:
    scores = [dataclasses.replace(ALIVE, score=score) for score in (0.1, 0.2, 0.3)]
    assert study.median_score([*scores, DEAD, DEAD], higher_is_better) == (0.1 if higher_is_better else 0.3)
    assert study.median_score(scores, higher_is_better) == 0.2
    assert study.median_score([scores[0]], higher_is_better) == 0.1
    assert math.isnan(study.median_score([scores[0], DEAD], higher_is_better))
    assert math.isnan(study.median_score([DEAD], higher_is_better))
    assert study.wins(scores, [DEAD, scores[0], scores[2]], higher_is_better) == (2 if higher_is_better else 1)
    assert study.wins([DEAD, DEAD], [DEAD, ALIVE], higher_is_better) == 0


def sgd(parameter: nn.Parameter, wrapped: bool = False, **settings: Any) -> torch.optim.Optimizer:
    bare = torch.optim.SGD([parameter], lr=1.0)
    return fastclip.ClippedOptimizer(bare, max_norm=1.0, **settings) if wrapped else bare


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_loop_records_each_step(wrapped: bool) -> None:
    weight = nn.Parameter(torch.tensor([8.0]))
    optimizer = sgd(weight, wrapped)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    run = study.train(optimizer, lambda: weight.pow(2).sum() / 2, 3, lambda: float(weight), schedule)
    norms = [8.0, 7.0, 6.5] if wrapped else [8.0, 0.0, 0.0]
    assert run.total_norms == norms
    assert run.losses == [norm**2 / 2 for norm in norms]
    assert run.score == pytest.approx(6.25 if wrapped else 0.0)
    assert (run.skipped, run.clip_rate) == ((0, 1.0) if wrapped else (0, None))
    assert run.died_at is None


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_batch_ends_the_bare_run_and_is_skipped_by_the_wrapped(wrapped: bool, bad: float) -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    factors = iter([1.0, bad, 1.0, 1.0])
    run = study.train(
        sgd(weight, wrapped), lambda: weight.sum() * next(factors), 4, lambda: 0.5 if wrapped else pytest.fail("judged")
    )
    assert len(run.losses) == len(run.total_norms) == (4 if wrapped else 3)
    assert (run.died_at, run.skipped) == ((None, 1) if wrapped else (3, 0))
    assert math.isnan(run.score) != wrapped


def test_a_run_whose_last_step_broke_the_weights_has_no_score() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    run = study.train(sgd(weight), lambda: weight.sqrt().sum() + 0 * (weight - 1).sqrt().sum(), 1, pytest.fail)
    assert run.losses == [1.0]
    assert run.died_at == 1


def test_a_run_in_which_every_step_is_skipped_has_died() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = sgd(weight, wrapped=True, skip_limit=3)
    run = study.train(optimizer, lambda: (weight - 1).sqrt().sum(), 10, pytest.fail)
    assert (run.died_at, run.skipped, len(run.total_norms)) == (3, 3, 3)


def test_variants_begin_alike_and_the_generator_is_left_alone() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)

    def train_one(variant: str, seed: int) -> Run:
        assert torch.get_num_threads() == 1
        return dataclasses.replace(ALIVE, score=float(torch.rand(())))

    runs = study.compare(train_one, ["a", "b"], 3, progress=False)
    assert [len({run.score for run in of_seed}) for of_seed in zip(*runs.values(), strict=True)] == [1, 1, 1]
    assert len({run.score for run in runs["a"]}) == 3
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


def test_the_table_hides_nothing() -> None:
    bare = dataclasses.replace(ALIVE, clip_rate=None)
    lines = study.table(made_up(bare=[DEAD, DEAD, bare], wrapped=[ALIVE] * 3)).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "",
        "-" * len(lines[1]),
        "bare",
        "wrapped",
        "as yesterday",
        "",
        "A claim.",
    ]
    assert lines[2].split() == ["bare", "nan", "nan", "nan", "0.5", "2", "of", "3", "0", "-"]
    assert lines[3].split() == ["wrapped", "0.5", "0.5", "0.5", "0.5", "0", "of", "3", "0", "25%"]


@pytest.mark.parametrize(
    "runs",
    [
        {"bare": [DEAD], "wrapped": [ALIVE]},
        {"bare": [DEAD, DEAD], "wrapped": [DEAD, FADED]},
        {"bare": [Run([math.nan], [math.nan], math.nan)]},
        {"zero": [Run([0.0, 0.0], [0.0, 0.0], 0.0)], "huge": [Run([1e38, 1e-30], [3e38, 1e-38], 1e30)]},
        {str(i): [ALIVE, DEAD] for i in range(13)},
    ],
)
def test_pictures_with_any_runs(runs: dict[str, list[Run]], tmp_path: Path) -> None:
    study.save_picture(made_up(**runs), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_study_draws_its_own_panel(tmp_path: Path) -> None:
    drawn: list[Any] = []
    study.save_picture(dataclasses.replace(made_up(bare=[ALIVE]), panel=drawn.append), tmp_path / "picture.png")
    assert [type(axes).__name__ for axes in drawn] == ["Axes"]


@dataclass(frozen=True)
class Settings:
    seeds: int = 5
    steps: int = 100

    @classmethod
    def quick(cls) -> Settings:
        return cls(seeds=2, steps=10)


class Called:
    """Stands for an example's ``run``; keeps what it was called with."""

    def __init__(self) -> None:
        self.settings: list[Settings] = []

    def __call__(self, settings: Settings, progress: bool) -> Study:
        self.settings.append(settings)
        return made_up(bare=[DEAD] * settings.seeds, wrapped=[ALIVE] * settings.seeds)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Called:
    """The only example there is, under the name ``made_up``."""
    module = ModuleType("fastclip.examples.made_up", "What it shows.\n\nMore of it.")
    called = Called()
    module.Settings, module.NEEDS, module.run = Settings, ["json"], called  # type: ignore[attr-defined]
    module.main = lambda argv: study.main(  # type: ignore[attr-defined]
        "made_up", module.__doc__, Settings, called, module.NEEDS, argv
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(all_examples, "EXAMPLES", ("made_up",))
    return called


@pytest.mark.parametrize(
    ("argv", "settings"),
    [
        ([], Settings()),
        (["--quick"], Settings.quick()),
        (["--quick", "--seeds", "1"], Settings(seeds=1, steps=10)),
        (["--seeds", "7"], Settings(seeds=7)),
    ],
)
def test_the_command_runs_an_example(
    example: Called, argv: list[str], settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    assert fastclip_command.main(["example", "made_up", *argv, "--output", str(picture)]) == 0
    assert example.settings == [settings]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines()[-3:] == ["A claim.", "", f"Picture: {picture}"]


def test_the_command_lists_what_there_is(example: Called, capsys: pytest.CaptureFixture[str]) -> None:
    assert fastclip_command.main(["example"]) == 0
    assert capsys.readouterr().out == "made_up  What it shows.\n"
    for argv, said in ((["--help"], "made_up  What it shows."), (["made_up", "--help"], "--seeds")):
        with pytest.raises(SystemExit, match="0"):
            fastclip_command.main(["example", *argv])
        assert said in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        fastclip_command.main(["example", "maed_up"])
    assert "made_up" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--output", "no/such/folder/a.png"], "there is no folder"),
        (["--output", "picture.jpeg"], "take one like picture.png"),
        (["--output", "{folder}"], "take one like"),
    ],
)
def test_bad_arguments_are_refused_before_training(
    example: Called, argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder.png"
    folder.mkdir()
    with pytest.raises(SystemExit, match="2"):
        fastclip_command.main(["example", "made_up", *(part.format(folder=folder) for part in argv)])
    assert said in capsys.readouterr().err
    assert example.settings == []


def test_a_missing_extra_is_named_before_training(
    example: Called, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "json", None)
    assert fastclip_command.main(["example", "made_up"]) == 1
    message = capsys.readouterr().err
    assert "needs json: pip install 'torch-fastclip[examples]'" in message
    assert example.settings == []


def test_results_are_kept_and_make_the_readmes_table(
    example: Called, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert all_examples.main([str(tmp_path), "--quick", "--pictures", str(tmp_path)]) == 0
    assert (tmp_path / "made_up.png").exists()
    assert capsys.readouterr().out.splitlines()[2:] == ["| `made_up` | What it shows. | A claim. |"]
    kept = json.loads((tmp_path / "made_up.json").read_text())
    assert kept["settings"] == {"seeds": 2, "steps": 10}
    assert kept["runs"]["bare"] == [{"score": None, "died_at": 2, "skipped": 0}] * 2
    assert kept["runs"]["wrapped"] == [{"score": 0.5, "died_at": None, "skipped": 0}] * 2
    assert kept["made_with"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    "argv", [["no/such/folder"], ["{folder}", "--pictures", "no/such/folder"], ["{folder}", "--only", "x"]]
)
def test_bad_folders_are_refused_before_all_trainings(example: Called, argv: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        all_examples.main([part.format(folder=tmp_path) for part in argv])
    assert example.settings == []


def test_every_example_is_listed() -> None:
    folder = Path(examples.__file__).parent
    shared = {"__init__", "__main__", "command", "digits", "extras", "study", "grid_search", "weather"}
    assert {path.stem for path in folder.glob("*.py")} - shared == set(examples.EXAMPLES)
    for name in examples.EXAMPLES:
        module = importlib.import_module(f"fastclip.examples.{name}")
        assert (module.__doc__ or "").partition("\n")[0].endswith(".")


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_the_short_form_prints_its_claims(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"fastclip.examples.{name}")
    made: list[Study] = []
    run = module.run

    def kept_run(settings: Any, progress: bool) -> Study:
        made.append(run(settings, progress))
        return made[-1]

    monkeypatch.setattr(module, "run", kept_run)
    picture = tmp_path / "picture.png"
    assert fastclip_command.main(["example", name, "--quick", "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out.splitlines()
    assert made[0].claims
    assert printed[-2 - len(made[0].claims) : -2] == list(made[0].claims)
    assert {len(runs) for runs in made[0].runs.values()} == {module.Settings.quick().seeds}


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_results_that_are_kept_are_of_the_full_form(name: str) -> None:
    module = importlib.import_module(f"fastclip.examples.{name}")
    kept = json.loads((KEPT / f"{name}.json").read_text())
    settings = module.Settings()
    assert kept["settings"] == json.loads(json.dumps(dataclasses.asdict(settings)))
    assert {len(runs) for runs in kept["runs"].values()} == {settings.seeds}


def test_the_readme_says_what_was_printed() -> None:
    assert all_examples.markdown(KEPT) in (ROOT / "README.md").read_text()
