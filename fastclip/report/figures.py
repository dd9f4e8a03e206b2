"""The figures of a report as PNG files, for papers and slides; needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure

from fastclip.report.digest import Digest

# Okabe and Ito: told apart by every kind of colour vision.
NORM, BOUND, CLIPPED, SKIPPED = "#0072B2", "#CC79A7", "#E69F00", "#D55E00"
ZERO = "#C3C9D4"  # as on the page
TOP = 1e250  # of what is drawn: above it the margin of a logarithmic axis overflows
LABELS = 40  # of tensors at the side of a heat map


def save(digest: Digest, folder: Path) -> list[Path]:
    """Writes norm.png, clip_rate.png and heat_map.png to ``folder``, which is made if need be; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {"norm": _norm(digest), "clip_rate": _clip_rate(digest), "heat_map": _heat_map(digest)}
    paths = []
    for name, figure in drawn.items():
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=160)
        paths.append(path)
    return paths


def _axes(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("step")
    return figure, axes


def _norm(digest: Digest) -> Figure:
    figure, axes = _axes(3.6)
    series = {name: np.minimum(values, TOP) for name, values in digest.series().items()}
    steps = series["last"]
    axes.fill_between(steps, series["lowest"], series["highest"], color=NORM, alpha=0.2, linewidth=0)
    for name, label, colour, style in (("middle", "total norm", NORM, "-"), ("bound", "bound", BOUND, "--")):
        known = np.isfinite(series[name])
        if name == "middle" or known.any():
            axes.plot(steps, series[name], color=colour, linestyle=style, linewidth=1.2, label=label)
        # what has no neighbour has no line
        before, after = np.append(False, known[:-1]), np.append(known[1:], False)
        lone = known & ~before & ~after
        axes.plot(steps[lone], series[name][lone], color=colour, linestyle="", marker=".", markersize=4)
    for name, colour, marker in (("clipped", CLIPPED, "|"), ("skipped", SKIPPED, "v"), ("rolled_back", BOUND, "D")):
        which = series[name] > 0
        if which.any():  # in the axes' own height: at the foot of it, or at its top
            height = np.full(which.sum(), 0.02 if name == "clipped" else 0.97)
            axes.plot(
                *(steps[which], height),
                *(marker,),
                color=colour,
                label=name.replace("_", " "),
                transform=axes.get_xaxis_transform(),
            )
    if (series["middle"] > 0).any():
        axes.set_yscale("log")
    axes.set_ylabel("norm")
    axes.legend(frameon=False, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _clip_rate(digest: Digest) -> Figure:
    figure, axes = _axes(2.2)
    series = digest.series()
    width = max(1, 64 // digest.bins.width)
    window = np.ones(min(width, max(len(series["last"]), 1)))
    if len(series["last"]):
        records = np.convolve(series["records"], window)[: len(series["last"])]
        rate = np.convolve(series["clipped"], window)[: len(series["last"])] / records
        axes.fill_between(series["last"], rate, color=CLIPPED, alpha=0.8, linewidth=0)
    axes.set_ylim(0, 1)
    axes.set_ylabel(f"clip rate, {width * digest.bins.width:,} records" if width > 1 else "clip rate")
    return figure


def _heat_map(digest: Digest) -> Figure:
    names = digest.reader.names
    figure, axes = _axes(min(max(2.5, 0.16 * len(names)), 9.0))
    heat = digest.bins.heat[: digest.bins.used].T
    if heat.size:
        shown = np.ma.masked_where(~np.isfinite(heat) | (heat <= 0), heat)
        colours = "viridis"
        steps = digest.series()["last"]
        norm = LogNorm() if shown.count() else None
        image = axes.imshow(
            shown,
            aspect="auto",
            interpolation="nearest",
            cmap=colours,
            norm=norm,
            extent=(digest.series()["first"][0] - 0.5, steps[-1] + 0.5, len(names) - 0.5, -0.5),
        )
        bad = np.ma.masked_where(np.isfinite(heat), np.ones_like(heat))
        axes.imshow(
            bad, aspect="auto", interpolation="nearest", cmap="autumn", vmin=0, vmax=99, extent=image.get_extent()
        )
        zero = np.ma.masked_where(heat != 0, heat)
        axes.imshow(
            zero, aspect="auto", interpolation="nearest", cmap=ListedColormap([ZERO]), extent=image.get_extent()
        )
        figure.colorbar(image, ax=axes, label="norm; red: NaN or Inf, grey: 0")
        each = -(-len(names) // LABELS)
        places = range(0, len(names), each)
        # a name may hold what matplotlib takes for formulas
        axes.set_yticks(places, [names[i].replace("$", r"\$") for i in places], fontsize=6)
    return figure
