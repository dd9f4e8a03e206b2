"""A diagnosis as a picture: gradients over depth and time, activations, and the range test; needs matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fastclip.doctor.diagnosis import Diagnosis, DoctorError

# Okabe and Ito: told apart by every kind of colour vision.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
NAMED = 30  # layers that are named at the axis


def save(diagnosis: Diagnosis, path: Path) -> None:
    """Writes it in the format that the ending of ``path`` names.

    Raises:
        DoctorError: matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise DoctorError("a picture needs matplotlib: pip install 'torch-fastclip[plots]'") from error
    panels = [_depth, _activations, *[_time] * bool(diagnosis.curves), *[_rates] * (diagnosis.lr is not None)]
    # Figure without pyplot draws with Agg and leaves the caller's backend alone.
    figure = Figure(figsize=(9, 3.2 * len(panels)), dpi=150, layout="constrained")
    for draw, axes in zip(panels, figure.subplots(len(panels), squeeze=False)[:, 0], strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        draw(diagnosis, axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    codes = [finding.code for finding in diagnosis.findings if finding.severity != "info"]
    figure.suptitle(", ".join(dict.fromkeys(codes)) or "nothing worse than an info was found")
    figure.savefig(path)


def _log(axes: Any, values: list[float]) -> None:
    if any(0 < value < math.inf for value in values):
        axes.set_yscale("log")


def _layers(diagnosis: Diagnosis, axes: Any, curves: dict[str, tuple[list[float], str]]) -> None:
    places = range(len(diagnosis.rows))
    for label, (values, colour) in curves.items():
        axes.plot(places, [v if 0 < v < math.inf else math.nan for v in values], "o-", ms=4, color=colour, label=label)
    _log(axes, [value for values, _ in curves.values() for value in values])
    if len(places) <= NAMED:
        axes.set_xticks(
            places, [row.layer if row.call == 1 else "" for row in diagnosis.rows], rotation=45, ha="right", fontsize=8
        )
    else:
        axes.set_xlabel("layer, in the order in which they ran")


def _depth(diagnosis: Diagnosis, axes: Any) -> None:
    of_outputs = [row.output_grad for row in diagnosis.rows]
    of_weights = [row.weight_grad for row in diagnosis.rows]
    _layers(diagnosis, axes, {"of the output": (of_outputs, BLUE), "of the weights": (of_weights, ORANGE)})
    axes.set_ylabel("gradient norm")


def _activations(diagnosis: Diagnosis, axes: Any) -> None:
    stds, gains = [row.std for row in diagnosis.rows], [row.gain for row in diagnosis.rows]
    _layers(diagnosis, axes, {"standard deviation of the output": (stds, GREEN), "gain": (gains, RED)})
    axes.set_ylabel("activations")


def _time(diagnosis: Diagnosis, axes: Any) -> None:
    for curve in diagnosis.curves:
        norms = [norm if 0 < norm < math.inf else math.nan for norm in curve.norms]
        axes.plot(range(1, len(norms) + 1), norms, label=curve.layer)
    _log(axes, [norm for curve in diagnosis.curves for norm in curve.norms])
    axes.set_xlabel("time step")
    axes.set_ylabel("gradient norm")


def _rates(diagnosis: Diagnosis, axes: Any) -> None:
    lr = diagnosis.lr
    assert lr is not None
    # The loss of a step is what the steps before it have reached.
    losses = [loss if math.isfinite(loss) else math.nan for loss in lr.losses[1:]]
    axes.plot(lr.lrs[:-1], losses, color=BLUE)
    axes.set_xscale("log")
    known = [loss for loss in (lr.losses[0], *losses) if not math.isnan(loss)]
    if min(known) > 0:
        axes.set_yscale("log")  # a loss that diverges, or begins far up, would press the rest into a line
    for value, label, colour in ((lr.used, "in use", RED), (lr.suggested, "suggested", GREEN)):
        if not math.isnan(value):
            axes.axvline(value, linestyle="--", color=colour, label=f"{label}: {value:.2g}")
    axes.set_xlabel(f"learning rate, {lr.optimizer}")
    axes.set_ylabel("loss")
