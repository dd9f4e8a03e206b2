"""A diagnosis in words."""

from __future__ import annotations

import math
import textwrap
from collections import Counter

from fastclip.doctor.diagnosis import INFO, SEVERITIES, Diagnosis, Row
from fastclip.doctor.sequences import MIN_STEPS

WIDTH = 110
MAX_ROWS = 40  # of the table; a deeper model shows its first and last layers


def told(diagnosis: Diagnosis) -> str:
    """The table, then what was found, worst first, then what to clip by."""
    parts = [f"loss {diagnosis.loss:.4g}, norm of all gradients {diagnosis.total_norm:.4g}"]
    if diagnosis.rows:
        parts.append(_table(diagnosis))
    for finding in diagnosis.findings:
        said = _wrapped(f"{finding.severity.upper()} {finding.code}: {finding.message}.")
        parts.append(f"{said}\n{_wrapped(f'To do: {finding.advice}.', '  ')}")
    parts.append(_summary(diagnosis))
    bound = diagnosis.bound
    parts.append(_wrapped(f"Clipping: fastclip.ClippedOptimizer(optimizer, {bound.argument}): {bound.why}."))
    if diagnosis.lr is not None:
        parts.append(_wrapped(_rates(diagnosis)))
    if diagnosis.notes:
        parts.append("\n".join(_wrapped(f"Not judged: {note}.") for note in diagnosis.notes))
    return "\n\n".join(parts)


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _summary(diagnosis: Diagnosis) -> str:
    counts = {severity: sum(f.severity == severity for f in diagnosis.findings) for severity in SEVERITIES}
    plural = {severity: severity if severity == INFO else f"{severity}s" for severity in SEVERITIES}
    said = ", ".join(f"{n} {s if n == 1 else plural[s]}" for s, n in counts.items() if n)
    return f"Found: {said}. docs/doctor.md explains each code." if said else "Nothing was found."


def _rates(diagnosis: Diagnosis) -> str:
    lr = diagnosis.lr
    assert lr is not None
    low, high = lr.lrs[0], lr.lrs[-1]
    said = f"Learning rate, {lr.optimizer} on this batch, from {low:.0e} to {high:.2g}: "
    if not math.isnan(lr.suggested):
        said += f"lr={lr.suggested:.1g} is a good start"
    elif lr.endless:
        said += "the loss falls without end, as a critic's or a reward's does, and shows no good start"
    else:
        falls = lr.losses[-1] == min(lr.losses) < lr.losses[0]
        said += "the loss still falls" if falls else "the loss hardly fell"
    if not math.isnan(lr.diverges):
        said += f", from {lr.diverges:.2g} on it diverges"
    if not math.isnan(lr.used):
        said += f"; in use is {lr.used:g}"
    return f"{said}." if diagnosis.healthy else f"{said}. That is the model as it is: check again when it is cured."


def _table(diagnosis: Diagnosis) -> str:
    head = ("layer", "kind", "mean", "std", "gain", "weight std", "output grad", "weight grad", "dead")
    calls = Counter(row.layer for row in diagnosis.rows)
    rows = [
        (
            _label(row, calls[row.layer]),
            row.kind,
            *map(_n, (row.mean, row.std, row.gain, row.weight_std, row.output_grad, row.weight_grad)),
            "" if math.isnan(row.dead) else f"{row.dead:.0%}",
        )
        for row in diagnosis.rows
        if row.call == 1 or calls[row.layer] < MIN_STEPS  # else its calls are time steps, one like the other
    ]
    left_out = len(rows) - MAX_ROWS
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    ]
    if left_out > 0:
        half = MAX_ROWS // 2
        lines[1 + half : -half] = [f"... {left_out} more"]
    return "\n".join(line.rstrip() for line in lines)


def _label(row: Row, calls: int) -> str:
    return row.layer if calls == 1 else f"{row.layer} (call {row.call} of {calls})"


def _n(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2g}"
