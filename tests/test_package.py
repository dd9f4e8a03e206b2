"""What a user gets: the installed package, its command, its layers, and words that are true."""

import ast
import doctest
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastclip
from fastclip import __main__ as command

ROOT = Path(__file__).parents[1]

FLOORS = {
    "version": 0,
    "types": 0,
    "_native": 0,
    "checks": 1,
    "tensors": 1,
    "ties": 2,
    "backends": 2,
    "units": 2,
    "reading": 3,
    "stats": 4,
    "distributed": 4,
    "policies": 4,
    "clipping": 5,
    "compiled": 6,
    "functional": 6,
    "riding": 6,
    "several": 7,
    "step_arguments": 1,
    "regularisation": 6,
    "ladder": 6,
    "boundary": 7,
    "checkpoint": 7,
    "ownership": 7,
    "patching": 7,
    "record": 7,
    "sharded": 7,
    "amp": 7,
    "guard": 8,
    "optim": 9,
    "integrations": 10,
    "monitoring": 9,
    "monitor": 10,
    "doctor": 10,
    "report": 10,
    "examples": 11,
    "bench": 10,
    "__main__": 12,
    "__init__": 12,
}
SAME_FLOOR = {("functional", "compiled"), ("tensors", "types"), ("_native", "types")}


def imports(path):
    """Modules of fastclip that a file imports at its top level."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("fastclip"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastclip"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sorted((ROOT / "fastclip").rglob("*.py")), ids=lambda p: p.stem)
def test_imports_point_downwards(path):
    own = path.relative_to(ROOT / "fastclip").parts[0].removesuffix(".py")
    for name in imports(path):
        target = name.partition(".")[2].partition(".")[0]
        if target in FLOORS and target != own:
            assert FLOORS[target] < FLOORS[own] or (own, target) in SAME_FLOOR, f"{own} imports {name}"
    assert own in FLOORS, f"{own} has no floor"


def test_importing_fastclip_imports_no_extra():
    extras = {"pandas", "matplotlib", "vega_datasets", "triton", "torchvision", "sklearn", "deepspeed"}
    extras |= {"accelerate", "transformers", "lightning", "pytorch_lightning", "keras", "ultralytics", "skorch"}
    extras |= {"rich", "tensorboard", "wandb", "num2words", "vaderSentiment"}
    code = f"import sys, fastclip; print(sorted({extras!r} & set(sys.modules)))"
    assert run(code) == "[]"


def run(code, cwd=None, **environment):
    result = subprocess.run(
        [sys.executable, "-W", "ignore::UserWarning", "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_every_package_is_in_the_wheel():
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert listed is not None
    found = [".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "fastclip").rglob("__init__.py")]
    assert {*found, "fastclip.kernels", "fastclip.bench"} == set(re.findall(r'"(.*?)"', listed[1]))


def test_public_names_are_torchs():
    for name in ("clip_grad_norm_", "clip_grad_value_", "get_total_norm", "clip_grads_with_norm_"):
        theirs = inspect.signature(inspect.unwrap(getattr(torch.nn.utils, name))).parameters
        ours = inspect.signature(getattr(fastclip, name)).parameters
        shared = list(ours)[: len(theirs)]
        assert shared == list(theirs)
        assert [ours[p].default for p in shared] == [theirs[p].default for p in theirs]
        assert all(ours[p].kind is inspect.Parameter.KEYWORD_ONLY for p in list(ours)[len(theirs) :])


@pytest.mark.parametrize("name", sorted(set(fastclip.__all__) - {"__version__"}))
def test_public_things_are_documented(name):
    assert inspect.getdoc(getattr(fastclip, name))


DOCTESTS = ["fastclip.functional", "fastclip.optim", "fastclip.amp", "fastclip.monitor", "fastclip.patching"]
DOCTESTS += [f"fastclip.integrations.{name}" for name in ("facts", "keras", "skorch")]
DOCTESTS += ["fastclip.doctor.checking"]


@pytest.mark.parametrize("module", DOCTESTS)
def test_docstring_examples_run(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.failed == 0
    assert results.attempted


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"{fastclip.__version__}\n")


def test_info_names_every_backend(capsys):
    assert command.main([]) == 0
    text = capsys.readouterr().out
    assert f"fastclip {fastclip.__version__}" in text
    assert torch.__version__ in text
    for backend in fastclip.backends.BACKENDS:
        reason = backend.unavailable()
        assert f"  {backend.name}: " + (f"not available: {reason}" if reason else "available") in text


def test_an_unknown_command_is_an_error(capsys):
    with pytest.raises(SystemExit):
        command.main(["dmeo"])
    assert "dmeo" in capsys.readouterr().err


def test_a_checkout_without_its_extension_says_so(tmp_path):
    """With a wheel installed, the checkout's own folder would be imported: never slow in silence."""
    shutil.copytree(
        ROOT / "fastclip", tmp_path / "fastclip", ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    )
    (tmp_path / "csrc").mkdir()
    result = subprocess.run([sys.executable, "-m", "fastclip"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "RuntimeWarning: fastclip runs on its slower reference backend" in result.stderr
    for text in (result.stdout, result.stderr):
        assert f"imported from the source folder {tmp_path}, where the extension is not built" in text
        assert "pip install -e ." in text
    assert "  reference: available" in result.stdout


def test_an_install_without_a_compiler_says_so(tmp_path):
    shutil.copytree(ROOT / "fastclip", tmp_path / "fastclip", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "fastclip" / "_build.json").write_text('{"extension": false, "why": "no C++ compiler was found"}')
    code = "import torch, fastclip; p = torch.nn.Parameter(torch.zeros(2)); p.grad = torch.tensor([3.0, 4.0]); "
    code += "print(fastclip.clip_grad_norm_([p], 1.0), [round(g, 4) for g in p.grad.tolist()]); "
    code += "print(fastclip.backends.explain([p]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler was found; install a C++ compiler and reinstall fastclip" in result.stderr
    assert result.stdout.startswith("tensor(5.) [0.6, 0.8]")
    assert "cpu: not available: no C++ compiler was found" in result.stdout
    assert "reference: available; serves 1 of 1 gradients" in result.stdout


def build(tmp_path, **environment):
    """Runs setup.py's build in a copy of the tree."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "fastclip", "kernels", "bench"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
        )
    return subprocess.run(
        [sys.executable, "-W", "ignore", "setup.py", "-q", "build", "--build-lib", "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k not in ("CXX", "LD_PRELOAD")}
        | {"FASTCLIP_CUDA": "0"}
        | environment,
    )


def test_a_missing_compiler_skips_the_extension(tmp_path):
    result = build(tmp_path, PATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert not list((tmp_path / "out" / "fastclip").glob("_C*"))
    facts = json.loads((tmp_path / "out" / "fastclip" / "_build.json").read_text())
    assert facts == {"extension": False, "why": "no C++ compiler was found when fastclip was installed"}


def test_a_compiler_that_fails_stops_the_install(tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho this compiler is out of order >&2\nexit 3\n")
    broken.chmod(0o755)
    result = build(tmp_path, CXX=str(broken))
    assert result.returncode != 0
    assert "this compiler is out of order" in result.stderr


def test_an_unknown_backend_is_named_with_the_known_ones():
    code = "import fastclip; print(fastclip.backends.explain())"
    known = ", ".join(backend.name for backend in fastclip.backends.BACKENDS)
    assert run(code, FASTCLIP_BACKEND="gpu").startswith(f"FASTCLIP_BACKEND=gpu: no such backend; known are {known}\n")


def test_version_has_one_place():
    found = [
        path
        for path in (*ROOT.glob("*.toml"), *ROOT.glob("setup.py"), *(ROOT / "fastclip").rglob("*.py"))
        if re.search(rf'["\']{re.escape(fastclip.__version__)}["\']', path.read_text())
    ]
    assert [path.name for path in found] == ["version.py"]


def test_a_torch_that_the_extension_does_not_fit_leaves_the_reference():
    code = (
        "import torch; del torch.Tensor.__dlpack_c_exchange_api__; import fastclip; print(fastclip.backends.explain())"
    )
    told = run(code)
    assert "the extension doesn't fit torch" in told
    assert "reference: available" in told
