"""What watching costs: a step with and without a monitor, beside wandb.watch and Lightning's grad_norm; and the report.

``python -m fastclip.bench.monitor [host] [step] [report] [long]`` measures what is named, or all but ``long``.
wandb and Lightning are measured where they are installed. ``long`` is a run of 1,000,000 steps x 1,000 tensors: it
takes 5.5 GB in ``--folder`` and some minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastclip
from fastclip.monitoring import records

from . import machine, workloads

TENSORS, ROUNDS, BUFFER = 150, 60, 64
STEPS = 30  # of GPT-2's size, of each contestant
CENSUS_EVERY = 100  # the monitor's default
# the command, and what it needed
REPORT = """
import sys
from fastclip.__main__ import main
from fastclip.bench import machine
status = main(["report", *sys.argv[1:]])
print(machine.peak_memory_bytes())
sys.exit(status)
"""


class Scalars(nn.Module):
    """Many parameters of one element: what remains is the time of the host."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(list(self.weights)).sum() * x


class Counting(torch.optim.Optimizer):
    """Does nothing with its parameters."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: None = None) -> None:
        return None


def alternate(contestants: dict[str, Callable[[], object]], calls: int, rounds: int, clock: Any) -> dict[str, float]:
    """Median over the rounds of the seconds that one of ``calls`` calls took on average, taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 2):
        for name, call in contestants.items():
            start = clock()
            for _ in range(calls):
                call()
            if i >= 2:
                seconds[name].append((clock() - start) / calls)
    return {name: statistics.median(own) for name, own in seconds.items()}


def host(folder: Path) -> dict[str, float]:
    """Microseconds of the host's own time for each step, of 150 tensors; a round holds one flush."""
    steps: dict[str, Callable[[], object]] = {}
    monitors = []
    for name in ("wrapper", "with a monitor"):
        model = Scalars(TENSORS)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        opt = fastclip.ClippedOptimizer(Counting(model.parameters()), max_norm=1e6)
        if name != "wrapper":
            monitors.append(fastclip.GradMonitor(opt, sinks=folder / "host.jsonl", names=model, buffer=BUFFER))
        steps[name] = opt.step
    took = alternate(steps, BUFFER, ROUNDS, time.thread_time)
    for monitor in monitors:
        monitor.close()
    result = {"wrapper's step": took["wrapper"], "the monitor adds": took["with a monitor"] - took["wrapper"]}
    if importlib.util.find_spec("lightning") is not None:
        from lightning.pytorch.utilities import grad_norm

        result["Lightning's grad_norm, logged"] = alternate(
            {"": lambda: [float(norm) for norm in grad_norm(model, 2).values()]}, 8, 20, time.thread_time
        )[""]
    if importlib.util.find_spec("wandb") is not None:
        result["wandb.watch(log_freq=1) adds"] = _wandb_watch(folder)
    return {name: 1e6 * seconds for name, seconds in result.items()}


def _wandb_watch(folder: Path) -> float:
    import wandb

    run = wandb.init(mode="offline", dir=str(folder), settings=wandb.Settings(silent=True))
    models = {"plain": Scalars(TENSORS), "watched": Scalars(TENSORS)}
    run.watch(models["watched"], log="gradients", log_freq=1)

    def step(model: nn.Module) -> None:
        model(torch.ones(())).backward()
        run.log({"step": 1})

    took = alternate({name: lambda m=model: step(m) for name, model in models.items()}, 4, 20, time.thread_time)
    run.finish()
    return took["watched"] - took["plain"]


def step(folder: Path) -> dict[str, float]:
    """A step of AdamW over GPT-2's parameters, and what a monitor with its defaults adds to it; 2.5 GB."""
    parameters = workloads.filled(workloads.parameters(workloads.GPT2))
    opt = fastclip.ClippedOptimizer(torch.optim.AdamW(parameters, lr=1e-5, fused=True), max_norm=1e6)
    monitor = fastclip.GradMonitor(opt, sinks=folder / "step.jsonl", census_every=1)
    (listen,) = opt._record.listeners

    def plain() -> None:
        opt._record.listeners.clear()
        opt.step()
        opt._record.listeners.append(listen)

    took = alternate({"plain": plain, "census": opt.step}, 1, STEPS, time.perf_counter)
    monitor.close()
    census, own = took["census"] - took["plain"], 1e-6 * host(folder)["the monitor adds"]
    return {
        "step, ms": 1e3 * took["plain"],
        "a census adds, ms": 1e3 * census,
        "the monitor adds on average, %": 100 * (own + census / CENSUS_EVERY) / took["plain"],
    }


def write_run(path: Path, steps: int, tensors: int) -> None:
    """A run that never was: lognormal norms, and now and then a spike."""
    names = [f"h.{i // 12}.layer{i % 12}.weight" for i in range(tensors)]
    generator = np.random.default_rng(0)
    noise = np.exp(0.3 * generator.standard_normal((997, tensors)))
    with path.open("wb") as file:
        file.write(records.line(records.HEADER, format=records.FORMAT, version=records.VERSION, policy="GlobalNorm"))
        file.write(records.line(records.TENSORS, names=names, sizes=[1000] * tensors))
        for number in range(1, steps + 1):
            norms = noise[number % 997].copy()
            if number % 9973 == 0:
                norms[number % tensors] *= 1e4
            total = float(np.linalg.norm(norms))
            file.write(
                records.step_line(
                    records.StepRecord(
                        *(number, float(number), total, min(total, 20.0), 20.0, min(1.0, 20.0 / total), total > 20.0),
                        *(False, "", False, 0, 0, names[int(norms.argmax())], None, None, None, 2.0, [1e-3], None),
                        tensor_norms=norms.astype(np.float32),
                    )
                )
            )


def report(folder: Path, steps: int, tensors: int) -> dict[str, float]:
    """The command itself, in a process of its own."""
    run, page = folder / "run.jsonl", folder / "run.html"
    write_run(run, steps, tensors)
    before, start = os.times(), time.perf_counter()
    command = [sys.executable, "-c", REPORT, str(run), "-o", str(page)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, after = time.perf_counter() - start, os.times()
    result = {
        "file, MB": run.stat().st_size / 1e6,
        "report, s": seconds,
        "its CPU time, s": sum(after[2:4]) - sum(before[2:4]),
        "its memory at most, MB": int(said.split()[-1]) / 1e6,
        "page, MB": page.stat().st_size / 1e6,
    }
    run.unlink()
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastclip.bench.monitor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="*", help="host, step, report, long")
    parser.add_argument("--folder", type=Path, help="for the files; default: a temporary one")
    arguments = parser.parse_args(argv)
    parts: dict[str, Callable[[Path], dict[str, float]]] = {
        "host": host,
        "step": step,
        "report": lambda folder: report(folder, 100_000, 150),
        "long": lambda folder: report(folder, 1_000_000, 1_000),
    }
    if unknown := set(arguments.what) - parts.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(parts)}")
    print(", ".join(f"{name} {value}" for name, value in {**machine.facts(), **machine.versions()}.items()))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name in arguments.what or ["host", "step", "report"]:
            others = machine.Others()
            for what, value in parts[name](Path(folder)).items():
                print(f"{name:8} {what:48} {value:10.4g}", flush=True)
            share = others.share()
            if share is not None and share > 0.05:
                print(f"{name:8} other processes took {share:.0%} of the CPU time: these numbers say little")
    return 0


if __name__ == "__main__":
    sys.exit(main())
