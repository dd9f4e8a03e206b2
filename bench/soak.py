"""A long training with faults thrown in, once for each policy: is it still finite, honest and resumable afterwards?

``python -m fastclip.bench.soak [--steps N] [--seed N] [--only SUBSTRING] [--jobs N] [--json FILE]``

The network and the data (Seattle's weather) are those of ``fastclip.examples.weather``, only smaller. Some steps, drawn
by the seed, get a fault: NaN or Inf in one gradient, one gradient times 1e30, all gradients 0, or a loss that
overflows, which the optimizer hears of through ``observe``. Then three things must hold:

* the parameters are finite at the end;
* each NaN, Inf and bad loss is in the optimizer's event log: a skip, at its step, with the gradient's name;
* saved and loaded in the middle, into a fresh optimizer and a fresh policy, the training ends in the same bits.

Needs ``pip install 'torch-fastclip[examples]'``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import json
import math
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor, nn

import fastclip
from fastclip import policies
from fastclip.examples import weather

from . import machine, report

SETTINGS = weather.Settings(lr=0.05, window=4, hidden=8, layers=1, batch_size=16)
FAULTS = ("nan", "inf", "loss", "spike", "zero")
MUST_SKIP = ("nan", "inf", "loss")
SPIKE = 1e30
CLEAN_STEPS = 50  # without faults: SkipLarge, SkipAboveMedian and ZScore let everything pass while they warm up

# SGD shows what a rule lets pass; Adam's normalisation would hide it.
POLICIES: dict[str, Callable[[], policies.Policy]] = {
    "GlobalNorm": lambda: policies.GlobalNorm(1.0),
    "PerTensorNorm": lambda: policies.PerTensorNorm(0.5),
    "BlockRMS": lambda: policies.BlockRMS(0.1),
    "Unitwise": lambda: policies.Unitwise(0.01),
    "Value": lambda: policies.Value(0.1),
    "Percentile": lambda: policies.Percentile(),
    "PerTensorPercentile": lambda: policies.PerTensorPercentile(),
    "ZScore": lambda: policies.ZScore(),
    "AdaGC": lambda: policies.AdaGC(),
    "SkipLarge": lambda: policies.SkipLarge(),
    "SkipAboveMedian": lambda: policies.SkipAboveMedian(),
    "Chain(ZScore, GlobalNorm)": lambda: policies.Chain(policies.ZScore(), policies.GlobalNorm(1.0)),
}


@dataclasses.dataclass(frozen=True)
class Soak:
    """What came of one training.

    Attributes:
        faults: how many of each kind.
        skipped: steps that did not happen: the faults of MUST_SKIP, and what the policy skips of its own.
        final_loss: mean squared error over 2015, in standardised units, with the last parameters.
        finite: whether all parameters and all of the optimizer's state are.
        unlogged: faults of MUST_SKIP that the event log doesn't tell of, or tells wrongly.
        resumed: whether the run that was saved and loaded in the middle ended in the same bits.
    """

    policy: str
    steps: int
    seed: int
    faults: dict[str, int]
    skipped: int
    clip_rate: float
    final_loss: float
    finite: bool
    unlogged: list[str]
    resumed: bool

    @property
    def passed(self) -> bool:
        return self.finite and self.resumed and not self.unlogged


@functools.cache
def _task() -> weather.Task:
    return weather.prepare(weather.load_weather(), SETTINGS.window)


class Plan:
    """What happens at each step, all of it drawn in advance: a run that starts in the middle meets the same."""

    def __init__(self, steps: int, seed: int, rate: float, parameters: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = (steps, SETTINGS.batch_size)
        self.batches = torch.randint(len(_task().train_inputs), size, generator=generator)
        self.victims = torch.randint(parameters, (steps,), generator=generator).tolist()
        places = (torch.rand(steps, generator=generator) < rate).nonzero().flatten().tolist()
        # in turns, so that a short run has all kinds
        kinds = {step: FAULTS[i % len(FAULTS)] for i, step in enumerate(s for s in places if s >= CLEAN_STEPS)}
        if steps // 2 - 3 >= CLEAN_STEPS:
            kinds[steps // 2 - 3] = "nan"  # so that the middle, where it is saved, falls into a cut of the lr
        self.faults = kinds


class Run:
    """One model in training; ``unlogged`` collects what the event log should have told."""

    def __init__(self, policy: str, seed: int) -> None:
        self.model = weather.make_model(dataclasses.replace(SETTINGS, seed=seed))
        self.parameters = list(self.model.parameters())
        inner = torch.optim.SGD(self.parameters, lr=SETTINGS.lr, momentum=SETTINGS.momentum, fused=True)
        backoff = fastclip.SpikeBackoff(0.5, patience=1, recover=20)
        self.optimizer = fastclip.ClippedOptimizer(inner, policy=POLICIES[policy](), backoff=backoff)
        self.unlogged: list[str] = []

    def train(self, plan: Plan, first: int, last: int) -> None:
        task, optimizer, parameters = _task(), self.optimizer, self.parameters
        before = int(optimizer.steps) - first  # a resumed optimizer counts its own steps
        for step in range(first, last):
            batch = plan.batches[step]
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(self.model(task.train_inputs[batch]), task.train_targets[batch])
            loss.backward()
            fault, victim = plan.faults.get(step), plan.victims[step]
            if fault is not None:
                _inject(fault, [p.grad for p in parameters], victim)
            optimizer.observe(loss.detach() * SPIKE * SPIKE if fault == "loss" else loss)
            optimizer.step()
            if fault in MUST_SKIP and not self._is_logged(before + step + 1, fault, victim):
                self.unlogged.append(f"{fault} at step {step + 1}")

    def _is_logged(self, step: int, fault: str, victim: int) -> bool:
        name = () if fault == "loss" else (f"param_groups[0]['params'][{victim}]",)
        reason = "loss" if fault == "loss" else "NaN or Inf"
        return any(
            (event.step, event.kind, event.tensors) == (step, "skip", name) and reason in event.reason
            for event in self.optimizer.events[-3:]
        )

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    @property
    def tensors(self) -> list[Tensor]:
        """Parameters and state."""
        return [p.detach() for p in self.parameters] + [
            value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        ]

    @torch.no_grad()
    def loss(self) -> float:
        task = _task()
        return float(nn.functional.mse_loss(self.model(task.validation_inputs), task.validation_targets))


def _inject(fault: str, grads: list[Any], victim: int) -> None:
    if fault in ("nan", "inf"):
        grads[victim].view(-1)[-1] = math.nan if fault == "nan" else -math.inf
    elif fault == "spike":
        grads[victim].mul_(SPIKE)
    elif fault == "zero":
        torch._foreach_zero_(grads)


def run_soak(policy: str, steps: int, seed: int = 0, rate: float = 0.02) -> Soak:
    """Trains with one of POLICIES for ``steps``, a share ``rate`` of which get a fault; the second half twice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are too small to share
    try:
        run, middle = Run(policy, seed), steps // 2
        plan = Plan(steps, seed, rate, len(run.parameters))
        run.train(plan, 0, middle)
        saved = run.save()
        run.train(plan, middle, steps)
        resumed = Run(policy, seed + 1)  # other weights: all that it knows comes from the file
        resumed.load(saved)
        resumed.train(plan, middle, steps)
        return Soak(
            policy=policy,
            steps=steps,
            seed=seed,
            faults=dict(Counter(plan.faults.values())),
            skipped=int(run.optimizer.skipped_steps),
            clip_rate=float(run.optimizer.clip_rate),
            final_loss=run.loss(),
            finite=all(bool(tensor.isfinite().all()) for tensor in run.tensors),
            unlogged=run.unlogged + [f"{what} (resumed)" for what in resumed.unlogged],
            resumed=all(map(_same_bits, run.tensors, resumed.tensors)),
        )
    finally:
        torch.set_num_threads(threads)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def table(soaks: list[Soak]) -> str:
    """As aligned text; a line for each fault that wasn't logged, at most three of a policy."""
    heads = ("policy", "steps", "faults", "skipped", "clip rate", "final loss", "finite", "resumed bit for bit")
    rows = [
        (
            soak.policy,
            f"{soak.steps:,}",
            str(sum(soak.faults.values())),
            str(soak.skipped),
            f"{soak.clip_rate:.1%}",
            f"{soak.final_loss:.3g}",
            "yes" if soak.finite else "NO",
            "yes" if soak.resumed else "NO",
        )
        for soak in soaks
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [
        "   ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in (heads, *rows)
    ]
    lines.insert(1, "-" * len(lines[0]))
    lines += [f"not in {soak.policy}'s event log: {', '.join(soak.unlogged[:3])}" for soak in soaks if soak.unlogged]
    return "\n".join(lines)


def record(soaks: list[Soak]) -> dict[str, Any]:
    """What the JSON file holds."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": machine.versions(),
        "machine": machine.facts(),
        "soaks": [{**dataclasses.asdict(soak), "passed": soak.passed} for soak in soaks],
    }


def _soaks(names: list[str], steps: int, seed: int, jobs: int) -> Iterator[Soak]:
    work = functools.partial(run_soak, steps=steps, seed=seed)
    if jobs == 1:
        yield from map(work, names)
        return
    # spawned, not forked: torch's threads don't survive a fork
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(work, names)


def main(argv: list[str] | None = None) -> int:
    """The command line; exit status 1 if something did not hold."""
    parser = argparse.ArgumentParser(prog="python -m fastclip.bench.soak", description="Train with faults thrown in.")
    parser.add_argument("--steps", type=int, default=20_000, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and faults; default %(default)s")
    parser.add_argument("--only", default="", help="policies whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default %(default)s")
    parser.add_argument("--json", type=report.place, help="where to write the record")
    args = parser.parse_args(argv)
    names = [name for name in POLICIES if args.only in name]
    if not names:
        parser.error(f"--only: no policy's name contains {args.only!r}; there are {', '.join(POLICIES)}")
    if args.steps < 2 or args.jobs < 1:
        parser.error("--steps must be at least 2, --jobs at least 1")
    from tqdm import tqdm

    soaks = _soaks(names, args.steps, args.seed, min(args.jobs, len(names)))
    done = list(tqdm(soaks, total=len(names), desc="soak", unit="policy"))
    print(table(done))
    if args.json is not None:
        args.json.write_text(json.dumps(record(done), indent=1) + "\n")
    return int(not all(soak.passed for soak in done))


if __name__ == "__main__":
    sys.exit(main())
