"""Files of a monitor for the tests of what reads them: written by the functions that write real ones."""

import math

import numpy as np

from fastclip.ladder import Event
from fastclip.monitoring import records
from fastclip.monitoring.records import StepRecord

HEADER = {"format": records.FORMAT, "version": records.VERSION, "policy": "GlobalNorm(max_norm=2)", "time": 1.7e9}


def step(number, norms, names, **changes):
    """A record as a monitor makes it, clipped at 2."""
    norms = np.asarray(norms, dtype=np.float64)
    total = float(np.sqrt(np.square(norms).sum()))
    settings = {
        "step": number,
        "time": 1.7e9 + number,
        "total_norm": total,
        "clipped_norm": min(total, 2.0),
        "max_norm": 2.0,
        "clip_coef": min(1.0, 2.0 / total) if total else 1.0,
        "clipped": total > 2.0,
        "skipped": False,
        "reason": "",
        "rolled_back": False,
        "nans": int(np.isnan(norms).sum()),
        "infs": int(np.isinf(norms).sum()),
        "worst": names[int(np.argmax(norms))],
        "max_abs": None,
        "zeros": None,
        "subnormals": None,
        "loss": 1.0 / number,
        "lr": [0.1],
        "fold": None,
        "names": names,
        "tensor_norms": norms.astype(np.float32),
    }
    return StepRecord(**{**settings, **changes})


def beginning(names):
    return [
        records.line(records.HEADER, **HEADER),
        records.line(records.TENSORS, names=list(names), sizes=[100] * len(names)),
    ]


def run(count=400, names=("h.0.weight", "h.0.bias", "h.1.weight", "h.1.bias"), folds=1):
    """Lines of a run with a spike, a NaN, a tensor that vanishes and one that dies."""
    generator = np.random.default_rng(0)
    lines = beginning(names)
    for number in range(1, count + 1):
        norms = np.exp(0.3 * generator.standard_normal(len(names)))
        changes = {"fold": str(number * folds // (count + 1)) if folds > 1 else None}
        if number == count // 4:
            norms[1] = 1e4
            changes["events"] = [Event(number, "exploding", "norm 1e+04, 30 deviations above its usual 1", (names[1],))]
        if number == count // 2:
            norms[2] = math.nan
            events = [
                Event(number, kind, "NaN or Inf in the gradients", (names[2],)) for kind in ("non-finite", "skip")
            ]
            changes |= {
                "skipped": True,
                "clipped": False,
                "clipped_norm": None,
                "reason": "nonfinite",
                "events": events,
            }
        if number > 3 * count // 4:
            norms[0] *= 1e-6
        if number > 7 * count // 8:
            norms[3] = 0.0
        lines.append(records.step_line(step(number, norms, names, **changes)))
    return lines
