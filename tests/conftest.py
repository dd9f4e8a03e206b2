"""Backends as parameters, and a state that every test finds and leaves alike."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import offline  # noqa: F401  # before any framework
import pytest
import torch
from hypothesis import HealthCheck, settings

import fastclip.backends
from fastclip._native import C
from fastclip.backends import EMULATED, cpu, reference, triton
from fastclip.types import Backend

settings.register_profile(
    "fastclip",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("fastclip")

if triton.INTERPRETED:
    # Triton's interpreter patches its language anew for each function that a kernel calls, a third of its time. Here
    # nothing is compiled, so it may stay as it is.
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, {}

    def patch_once(function: Callable[..., object]) -> object:
        modules = tuple(id(value) for value in function.__globals__.values() if isinstance(value, ModuleType))
        if modules not in patched:
            patched[modules] = patch(function)
            patched[modules].restore = lambda: None
        return patched[modules]

    interpreter._patch_lang = patch_once

CAPABILITIES: list[str] = list(C.cpu_capabilities()) if C is not None else []
BACKENDS = ["reference", *(f"cpu-{capability}" for capability in CAPABILITIES), *(b.name for b in EMULATED)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """In CI a skipped test fails: it hides a gap, unless what it needs is a GPU, or with FASTCLIP_ON_GPU none."""
    report = yield
    reason = "needs a GPU's absence" if os.environ.get("FASTCLIP_ON_GPU") else "needs a GPU"
    if os.environ.get("CI") and report.skipped and reason not in str(report.longrepr):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and not because it {reason}: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """One seed, one thread unless a test asks for more, and the process-wide settings put back."""
    torch.manual_seed(20240531)
    forced, threads = fastclip.backends.forced, torch.get_num_threads()
    order = fastclip.backends.BACKENDS
    capability = C.cpu_capability() if C is not None else ""
    torch.set_num_threads(1)
    yield
    fastclip.backends.forced = forced
    for emulated in EMULATED:
        emulated.device_type = None
    prefer(order)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    if capability:
        C.cpu_use_capability(capability)


def prefer(order: tuple[Backend, ...]) -> None:
    if order != fastclip.backends.BACKENDS:
        fastclip.backends.BACKENDS = order
        fastclip.backends._runnable.cache_clear()


def use(name: str, alone: bool) -> None:
    """Runs what follows on one backend; ``alone`` means that no other may help out."""
    if name.startswith("cpu-"):
        name, capability = name.split("-")
        assert C.cpu_use_capability(capability)
    elif not alone and (chosen := [b for b in EMULATED if b.name == name]):  # by themselves they are the last choice
        chosen[0].device_type = cpu.device_type  # or for tensors of the CPU its own come first
        prefer((*chosen, cpu, reference))
    fastclip.backends.forced = name if alone or name == "reference" else None


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, same_start: None) -> str:
    """Exactly this backend: a gradient that it can't serve is an error."""
    use(request.param, alone=True)
    return request.param


@pytest.fixture(params=BACKENDS)
def route(request: pytest.FixtureRequest, same_start: None) -> str:
    """This backend first; what it can't serve goes on to the next."""
    use(request.param, alone=False)
    return request.param


@pytest.fixture
def on_each() -> Callable[..., dict[str, object]]:
    """Calls a function once per backend, or per instruction set of the CPU's, and returns the results by name."""

    def run(work: Callable[[], object], cpu: bool = False) -> dict[str, object]:
        results = {}
        for name in [n for n in BACKENDS if n.startswith("cpu-")] if cpu else BACKENDS:
            use(name, alone=True)
            results[name] = work()
        return results

    return run


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program in a fresh interpreter that can import what this one can."""

    def run(program: str, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
        paths = [str(Path(fastclip.__file__).parents[1]), str(Path(__file__).parent)]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("FASTCLIP_")}
        clean["PYTHONPATH"] = os.pathsep.join([*paths, clean.get("PYTHONPATH", "")])
        return subprocess.run(
            [sys.executable, "-c", program], env=clean | env, capture_output=True, text=True, timeout=timeout
        )

    return run
