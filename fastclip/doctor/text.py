"""A diagnosis in words."""

from __future__ import annotations

import math
import textwrap

from fastclip.doctor.diagnosis import Diagnosis

WIDTH = 110
MAX_ROWS = 40  # of the table; a deeper model shows its first and last layers


def told(diagnosis: Diagnosis) -> str:
    """The table, then what was found, worst first."""
    parts = [_head(diagnosis)]
    if diagnosis.rows:
        parts.append(_table(diagnosis))
    for finding in diagnosis.findings:
        parts.append(
            _wrapped(f"{finding.severity.upper()} {finding.code}: {finding.message}.")
            + "\n"
            + _wrapped(f"To do: {finding.advice}.", "  ")
        )
    if not diagnosis.findings:
        parts.append("Nothing was found.")
    parts += [_wrapped(f"Not judged: {note}.") for note in diagnosis.notes]
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


def _head(diagnosis: Diagnosis) -> str:
    return f"loss {diagnosis.loss:.4g}, norm of all gradients {diagnosis.total_norm:.4g}"


def _table(diagnosis: Diagnosis) -> str:
    head = ("layer", "kind", "mean", "std", "gain", "weight std", "output grad", "weight grad")
    rows = [
        (row.layer, row.kind, *map(_n, (row.mean, row.std, row.gain, row.weight_std, row.output_grad, row.weight_grad)))
        for row in diagnosis.rows
    ]
    left_out = len(rows) - MAX_ROWS
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        )
        for row in (head, *rows)
    ]
    if left_out > 0:
        half = MAX_ROWS // 2
        lines[1 + half : -half] = [f"... {left_out} more"]
    return "\n".join(line.rstrip() for line in lines)


def _n(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2g}"
