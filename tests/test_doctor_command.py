"""``fastclip check``, the text, the JSON and the picture."""

import json
import math
import sys
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from patients import Sequence, classes, mlp, series
from torch import nn

import fastclip
from fastclip import __main__ as command
from fastclip.doctor.diagnosis import Finding

FACTORIES = """
import torch
from torch import nn

torch.manual_seed(0)


def sick():
    layers = [layer for _ in range(12) for layer in (nn.Linear(8, 8), nn.Sigmoid())]
    model = nn.Sequential(*layers, nn.Linear(8, 2))
    return model, (torch.randn(40, 8), torch.randint(2, (40,))), nn.CrossEntropyLoss()


def healthy():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    batch = torch.randn(40, 8), torch.randint(2, (40,))
    return model, batch, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), lr=1e-3)


def as_dict():
    model, (x, y), loss_fn, optimizer = healthy()
    return {"model": model, "optimizer": optimizer, "step": lambda model: loss_fn(model(x), y)}


class Holder:
    make = staticmethod(healthy)


wrong = 3
nothing = lambda: None
two = lambda: (1, 2)
misspelt = lambda: {"model": healthy()[0], "loss": 3}
modelless = lambda: {"step": 3}
def ends():
    raise SystemExit(0)


class Ends(nn.Linear):
    def forward(self, x):
        raise SystemExit(0)


def ends_in_forward():
    return Ends(3, 1), (torch.ones(2, 3), torch.ones(2, 1)), nn.MSELoss()


class Odd(nn.Linear):
    def named_parameters(self, *args, **kwargs):
        return iter([("bias", self.bias)])


def odd():
    return Odd(3, 1), (torch.ones(2, 3), torch.ones(2, 1)), nn.MSELoss()


broken = lambda: (nn.Linear(3, 1), (torch.ones(2, 2), torch.ones(2, 1)), nn.MSELoss())
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "of_a_user.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("of_a_user", None)


@pytest.mark.parametrize("place", ["of_a_user", "of_a_user.py"])
def test_a_factory_of_the_users_is_checked(factories, capsys, place):
    assert command.main(["check", f"{place}:sick", "--max-seconds", "0"]) == 1
    assert "ERROR vanishing-depth" in capsys.readouterr().out
    for name in ("healthy", "as_dict", "Holder.make"):
        assert command.main(["check", f"{place}:{name}"]) == 0
        assert "Nothing was found." in capsys.readouterr().out


def test_json_and_picture(factories, capsys):
    assert command.main(["check", "of_a_user:sick", "--json", "--picture", "seen.png", "--max-seconds", "0"]) == 1
    told = json.loads(capsys.readouterr().out)
    finding = told["findings"][0]
    assert finding["code"] == "vanishing-depth"
    assert finding["docs"] == "docs/doctor.md#vanishing-depth"
    assert finding["numbers"]["layers"] == 13
    assert (factories / "seen.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("of_a_user", "expected MODULE:FACTORY"),
        ("of_a_user:", "expected MODULE:FACTORY"),
        ("of_somebody:healthy", "there is no module 'of_somebody'"),
        ("of_somebody.py:healthy", "there is no file of_somebody.py"),
        ("of_a_user:helthy", "has no 'helthy'; its functions are sick, healthy, as_dict"),
        ("of_a_user:wrong", "is a int, not a function"),
        ("of_a_user:nothing", "returned a NoneType; expected (model, batch, loss_fn)"),
        ("of_a_user:two", "returned a tuple of 2"),
        ("of_a_user:misspelt", "unknown 'loss'; known are model, batch, loss_fn"),
        ("of_a_user:modelless", "no 'model'"),
        ("of_a_user:broken", "the forward pass failed: RuntimeError"),
    ],
)
def test_what_is_wrong_is_said(factories, capsys, path, message):
    assert command.main(["check", path]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert not said.out


@pytest.mark.parametrize("path", ["ends.py:healthy", "of_a_user:ends", "of_a_user:ends_in_forward", "of_a_user:odd"])
def test_what_ends_by_itself_was_not_checked(factories, capsys, path):
    (factories / "ends.py").write_text("import sys\nsys.exit(0)\n")
    assert command.main(["check", path]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_usage(factories, capsys):
    for arguments in (["check"], ["check", "of_a_user:sick", "--picture", "no/where.png"], ["check", "a:b", "--what"]):
        with pytest.raises(SystemExit) as error:
            command.main(arguments)
        assert error.value.code == 2
        assert capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        command.main(["check", "--help"])
    assert error.value.code == 0
    assert "Exit status: 0 nothing" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import something_that_isnt_there", "No module named 'something_that_isnt_there'"),
        ("def f(:", "SyntaxError"),
        ("def f(): return {}['absent']", "KeyError: 'absent'"),
        ("def f(): raise ValueError('no data')", "in f"),
    ],
)
def test_what_fails_in_the_users_own_code_is_shown_with_its_place(factories, capsys, code, message):
    (factories / "failing.py").write_text(f"{code}\n")
    assert command.main(["check", "failing.py:f"]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert "failing.py" in said.err
    assert not said.out


def test_a_picture_that_cant_be_drawn_is_refused_before_anything_is_tried(factories, capsys, monkeypatch):
    monkeypatch.setattr("fastclip.doctor.command._asked", lambda *asked: pytest.fail("it was asked"))
    with pytest.raises(SystemExit):
        command.main(["check", "of_a_user:sick", "--picture", "seen.xyz"])
    assert ".png, .svg, .pdf" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command.main(["check", "of_a_user:sick", "--picture", "seen.png"])
    assert "matplotlib" in capsys.readouterr().err


def test_a_picture_that_cant_be_written_costs_no_finding(factories, capsys):
    (factories / "seen.png").mkdir()
    assert command.main(["check", "of_a_user:sick", "--picture", "seen.png", "--max-seconds", "0"]) == 2
    said = capsys.readouterr()
    assert "vanishing-depth" in said.out
    assert "--picture" in said.err


@pytest.mark.parametrize("seed", ["1e3", str(2**64), str(-(2**63) - 1)])
def test_a_seed_that_torch_cant_have(factories, capsys, seed):
    with pytest.raises(SystemExit) as error:
        command.main(["check", "of_a_user:sick", "--seed", seed])
    assert error.value.code == 2
    assert "argument --seed" in capsys.readouterr().err


def test_a_seed_gives_the_same_again(factories, capsys):
    said = []
    for _ in range(2):
        command.main(["check", "of_a_user:sick", "--seed", "3", "--max-seconds", "0"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def diagnosis():
    model = Sequence(nn.RNN(4, 16, batch_first=True))
    return fastclip.check(model, series(12), nn.MSELoss(), torch.optim.Adam(model.parameters(), lr=1e-3))


def test_the_text_has_table_sentences_bound_and_rates():
    found = diagnosis()
    text = str(found)
    assert text.splitlines()[0].startswith(f"loss {found.loss:.4g}, norm of all gradients")
    for row in found.rows:
        assert any(line.startswith(row.layer) and row.kind in line for line in text.splitlines())
    assert "Nothing was found." in text
    assert f"Clipping: fastclip.ClippedOptimizer(optimizer, max_norm={found.bound.max_norm:g})" in " ".join(
        text.split()
    )
    assert "in use is 0.001" in " ".join(text.split())
    finding = Finding("some-code", "warning", "it is 3 times too much", "do this", numbers={"times": 3.0})
    text = str(replace(found, findings=(finding,), notes=("this, for want of that",)))
    assert "WARNING some-code: it is 3 times too much.\n  To do: do this." in text
    assert "Found: 1 warning." in text
    assert "Not judged: this, for want of that." in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_a_deep_model_shows_its_ends():
    text = str(fastclip.check(mlp(nn.Tanh, 60, width=32), classes(), nn.CrossEntropyLoss(), max_seconds=0))
    lines = text.splitlines()
    assert "... 21 more" in lines
    assert any(line.startswith("120 ") for line in lines)


def test_json_holds_everything_and_spells_what_json_cant():
    found = replace(diagnosis(), loss=math.nan, total_norm=math.inf)
    told = json.loads(found.to_json())
    assert told["loss"] == "NaN"
    assert told["total_norm"] == "Infinity"
    assert told["rows"][0]["layer"] == "rnn"
    assert len(told["curves"][0]["norms"]) == 12
    assert told["bound"]["policy"] == found.bound.policy
    assert len(told["lr"]["lrs"]) == len(told["lr"]["losses"]) > 10


def test_a_diagnosis_cant_be_changed():
    with pytest.raises(FrozenInstanceError):
        diagnosis().loss = 0.0


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_pictures_of_all_kinds(tmp_path, ending):
    found = diagnosis()
    bad = fastclip.check(mlp(nn.Tanh, 40), (classes()[0] * math.nan, classes()[1]), nn.CrossEntropyLoss())
    for i, one in enumerate((found, bad, replace(found, rows=(), curves=(), lr=None))):
        one.save_picture(tmp_path / f"{i}.{ending}")
        assert (tmp_path / f"{i}.{ending}").stat().st_size > 5_000


def test_a_picture_without_matplotlib_says_what_is_missing(monkeypatch, tmp_path):
    found = diagnosis()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(fastclip.DoctorError, match="torch-fastclip\\[plots\\]"):
        found.save_picture(tmp_path / "x.png")


def test_the_bound_is_about_what_was_seen():
    torch.manual_seed(1)
    found = diagnosis()
    norms = sorted(found.trial.norms)
    assert found.bound.norms == found.trial.norms
    assert 0.5 * norms[0] <= found.bound.max_norm <= 10 * norms[-1]  # Pascanu et al.'s range
    assert found.bound.policy == f"GlobalNorm({found.bound.max_norm:g})"
    model = mlp(nn.ReLU, 12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    exploding = fastclip.check(model, classes(), nn.CrossEntropyLoss(), max_seconds=0)
    assert "exploding-depth" in exploding.codes
    assert exploding.bound.policy == "GlobalNorm(1.0)"


def test_a_spiking_norm_gets_a_policy_that_learns():
    from fastclip.doctor.bounds import bound_of

    spiking = bound_of((1.0, 1.1, 0.9, 40.0, 1.0), None, set(), "")
    assert spiking.policy == "Chain(ZScore(), GlobalNorm(2))"
    learned_by_heart = bound_of((3.0, 0.5, 1e-3, 1e-4, 1e-9), None, set(), "")
    assert learned_by_heart.policy == "GlobalNorm(6)"
    assert "40" in spiking.why
    assert bound_of((math.nan,), None, set(), "").policy == "GlobalNorm(1.0)"


def test_one_tensor_that_dominates_gets_a_bound_of_each_row():
    x, y = classes()
    model = mlp(nn.Tanh, 2)
    model.scale = nn.Parameter(torch.tensor([1e-3]))
    found = fastclip.check(
        model, step=lambda m: nn.functional.cross_entropy(m(x), y) + 1e3 * m.scale.sum(), max_seconds=0
    )
    assert found.bound.policy == "Unitwise(0.01)"
    assert "scale" in found.bound.why


@pytest.mark.parametrize("policy", ["GlobalNorm(0.5)", "Chain(ZScore(), GlobalNorm(2))", "Unitwise(0.01)"])
def test_what_is_advised_exists(policy):
    made = eval(policy, vars(fastclip.policies))
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    fastclip.clip_grads_([p], made)
