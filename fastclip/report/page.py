"""A digest as one page that needs nothing else: no server, no network, no other file."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import time
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

import numpy as np

from fastclip.monitoring.records import MOST_NAMES
from fastclip.report.digest import EVENTS, HIGHEST, INF, LOWEST, NAN, ZERO, Digest, Floats, Tensor
from fastclip.report.reading import GRAVE
from fastclip.version import __version__

SHOWN = 12  # tensors of the table, until the reader wants more
MOST = 1000  # tensors of the table


def page_of(digest: Digest) -> str:
    """The whole page."""
    script = _file("page.js")
    sha = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    title = f"Gradients of {digest.source}"
    parts = {
        "title": html.escape(title),
        "facts": _facts(digest),
        "style": _file("page.css"),
        "script": script,
        "script_hash": f"sha256-{sha}",
        "problems": _problems(digest.reader.problems()),
        "tiles": _tiles(digest),
        "kinds": _kinds(digest),
        "events": _events(digest),
        "tensors": _tensors(digest),
        "more": _more(digest),
        "folds_title": "Stability of the folds" if _has_folds(digest) else "Stability",
        "folds": _folds(digest),
        "footer": _footer(digest),
        "data": _data(digest),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _file("page.html"))  # what is put in stays as it is


def _file(name: str) -> str:
    return resources.files("fastclip.report").joinpath(name).read_text(encoding="utf-8")


def _number(value: float, digits: int = 3) -> str:
    if not math.isfinite(value):
        return "NaN" if value != value else "Inf" if value > 0 else "-Inf"
    return f"{value:.{digits}g}"


def _percent(part: float, of: float) -> str:
    share = part / of if of else 0.0
    return f"{share:.2%}" if 0 < share < 0.01 else f"{share:.1%}"


def _facts(digest: Digest) -> str:
    header = digest.reader.header
    facts = [f"{digest.records:,} records", f"{len(digest.reader.names):,} tensors"]
    if sizes := sum(digest.reader.sizes):
        facts.append(f"{sizes:,} elements")
    facts += [str(header[name])[:300] for name in ("policy",) if name in header]
    if isinstance(header.get("time"), (int, float)) and 0 <= header["time"] < 1e11:
        facts.append(time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(header["time"])))
    return html.escape(" · ".join(facts))


def _problems(problems: list[str]) -> str:
    if not problems:
        return ""
    items = "".join(f"<li>{html.escape(problem)}</li>" for problem in problems)
    return (
        '<section class="card warning" aria-labelledby="problems"><h2 id="problems">Not everything could be read</h2>'
        f"<ul>{items}</ul></section>"
    )


def _tile(name: str, value: str, note: str = "", kind: str = "") -> str:
    return f'<div class="tile"><dt>{name}</dt><dd class="{kind}">{value}<small>{note}</small></dd></div>'


def _tiles(digest: Digest) -> str:
    totals, steps = digest.totals, digest.records
    series = digest.series()
    finite = series["highest"][~np.isnan(series["highest"])]
    worst = min(digest.tensors(), key=lambda tensor: tuple(-part for part in tensor.gravity), default=None)
    name = html.escape(worst.name) if worst else "-"
    why = _why_worst(worst, digest.reader.norm_type) if worst else ""
    return "".join(
        [
            _tile("Clip rate", _percent(totals.clipped, steps), f"{totals.clipped:,} of {steps:,} steps"),
            _tile(
                "Skipped", f"{totals.skipped:,}", _percent(totals.skipped, steps), "bad" if totals.skipped else "good"
            ),
            _tile(
                "NaN or Inf",
                f"{totals.nonfinite:,}",
                "steps with such gradients",
                "bad" if totals.nonfinite else "good",
            ),
            _tile(
                "Spikes", f"{totals.spikes:,}", "steps with exploding gradients", "warn" if totals.spikes else "good"
            ),
            _tile("Largest norm", _number(float(finite.max())) if len(finite) else "-", "before clipping, finite"),
            _tile("Look first at", f'<span class="name" id="first" title="{name}">{name}</span>', why),
        ]
    )


def _why_worst(tensor: Tensor, norm_type: float) -> str:
    if tensor.nonfinite:
        return "NaN or Inf in 1 record" if tensor.nonfinite == 1 else f"NaN or Inf in {tensor.nonfinite:,} records"
    for kind in ("exploding", "vanishing", "dead"):
        if count := tensor.flags[kind]:
            return f"flagged {kind} " + ("once" if count == 1 else f"{count:,} times")
    if tensor.share is None:
        return "the largest usual norm"
    return f"{tensor.share:.0%} of the {_shared(norm_type)}"


def _shared(norm_type: float) -> str:
    """What the tensors have their shares of."""
    if norm_type == 1.0:
        return "total norm"
    return "squared total norm" if norm_type == 2.0 else f"total norm to the power of {norm_type:g}"


def _kinds(digest: Digest) -> str:
    options = ['<option value="">all kinds</option>']
    for kind, count in digest.counts.most_common():
        options.append(f'<option value="{html.escape(kind)}">{html.escape(kind)} ({count:,})</option>')
    return "".join(options)


def _table(name: str, caption: str, heads: Sequence[tuple[str, bool]], rows: Iterable[str]) -> str:
    """``heads``: words, and whether the column holds numbers."""
    head = "".join(
        f'<th scope="col"{" class=num" if is_number else ""}><button type="button">{words}</button></th>'
        for words, is_number in heads
    )
    return (
        f'<table id="{name}"><caption>{caption}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _count(value: int) -> str:
    return f'<td class="num" data-value="{value}">{value:,}</td>'


def _measure(value: float, shown: str) -> str:
    return f'<td class="num" data-value="{float(value)!r}">{shown}</td>'


def _events(digest: Digest) -> str:
    events, total = digest.events, sum(digest.counts.values())
    if not events:
        return '<p class="soft">None: nothing was flagged, skipped or rolled back.</p>'
    place = {name: i for i, name in enumerate(digest.reader.names)}
    rows = []
    for event in events:
        names = html.escape(", ".join(event.tensors[:3]))
        more = event.of - min(len(event.tensors), 3)
        names += f" and {more:,} more" if more > 0 else ""
        kind, fold = html.escape(event.kind), html.escape(event.fold)
        first = place.get(event.tensors[0]) if event.tensors else None
        tensor = f' data-tensor="{first}"' if first is not None else ""
        rows.append(
            f'<tr data-kind="{kind}"><td class="num" data-value="{event.step}"><button type="button" '
            f'data-step="{event.step}"{tensor}>{event.step:,}</button></td>'
            f'<td><span class="chip {GRAVE.get(event.kind, "")}">{kind}</span></td>'
            f'<td class="why">{html.escape(event.reason)}</td><td class="name">{names}</td>'
            + (f"<td>{fold}</td>" if _has_folds(digest) else "")
            + "</tr>"
        )
    kept = f"; the first {EVENTS:,} and the last {EVENTS:,} are listed" if len(events) < total else ""
    heads = [("Step", True), ("Event", False), ("Why", False), ("Tensors", False)]
    heads += [("Fold", False)] if _has_folds(digest) else []
    return _table("events", f"{total:,} events{kept}", heads, rows)


def _ordered(digest: Digest) -> list[tuple[int, Tensor]]:
    """The gravest first, with their places."""
    return sorted(enumerate(digest.tensors()), key=lambda each: tuple(-part for part in each[1].gravity))


def _tensors(digest: Digest) -> str:
    rows, ordered = [], _ordered(digest)
    for rank, (i, tensor) in enumerate(ordered[:MOST]):
        flags = tensor.flags
        rest = ' class="hidden" data-rest' if rank >= SHOWN else ""
        rows.append(
            f'<tr{rest}><td class="name"><button type="button" data-tensor="{i}">{html.escape(tensor.name)}</button>'
            + "</td>"
            + _count(tensor.size)
            + _measure(tensor.typical, _number(tensor.typical))
            + _measure(tensor.largest, _number(tensor.largest))
            + _count(tensor.largest_at)
            + ("" if tensor.share is None else _measure(tensor.share, f"{tensor.share:.1%}"))
            + "".join(_count(n) for n in (tensor.nonfinite, flags["exploding"], flags["vanishing"], flags["dead"]))
            + "</tr>"
        )
    if not rows:
        return '<p class="soft">No norms of single tensors were recorded.</p>'
    heads = [("Tensor", False), ("Elements", True), ("Usual norm", True), ("Largest", True), ("at step", True)]
    has_shares = ordered[0][1].share is not None  # as all have, or none
    heads += [("Share", True)] if has_shares else []
    heads += [("NaN, Inf", True), ("Exploding", True), ("Vanishing", True), ("Dead", True)]
    caption = "usual: geometric mean; "
    caption += f"share: mean part of the {_shared(digest.reader.norm_type)}; " if has_shares else ""
    caption += "NaN, Inf: number of records; then how often it was flagged, "
    caption += f"where one event counts for its first {MOST_NAMES} tensors"
    if len(digest.reader.names) > MOST:
        caption += f"; {MOST:,} of {len(digest.reader.names):,} tensors"
    return _table("tensors", caption, heads, rows)


def _more(digest: Digest) -> str:
    count = min(len(digest.reader.names), MOST)
    if count <= SHOWN:
        return ""
    return (
        f'<button type="button" id="more" aria-expanded="false" data-more="All {count:,}" data-fewer="Fewer">'
        f"All {count:,}</button>"
    )


def _has_folds(digest: Digest) -> bool:
    return any(digest.folds)


def _folds(digest: Digest) -> str:
    folds = list(digest.folds.items())
    if len(folds) > 1:
        folds.append(("all", digest.totals))
    rows = []
    for name, fold in folds:
        shown = html.escape(name) if name else "no fold" if _has_folds(digest) else "whole run"
        rows.append(
            f"<tr><td>{shown}</td>"
            + _count(fold.steps)
            + _measure(fold.spikes / max(fold.steps, 1), _percent(fold.spikes, fold.steps))
            + _measure(fold.clipped / max(fold.steps, 1), _percent(fold.clipped, fold.steps))
            + _count(fold.skipped)
            + _count(fold.nonfinite)
            + f'<td class="name">{html.escape(fold.worst) or "-"}</td></tr>'
        )
    heads = [("Fold" if _has_folds(digest) else "Part", False), ("Records", True), ("Spike rate", True)]
    heads += [("Clip rate", True), ("Skipped", True), ("NaN, Inf", True), ("Worst tensor", False)]
    caption = "spike: a step with an exploding gradient; worst: flagged most often, else most often the largest"
    return _table("folds", caption, heads, rows)


def _footer(digest: Digest) -> str:
    width = digest.bins.width
    joined = (
        f"Each column of the figures joins {width:,} records: lines are geometric means, bands reach from the smallest "
        "to the largest, the heat map shows the largest. "
        if width > 1
        else "Each column of the figures is one record. "
    )
    return f"{joined}Made by fastclip {html.escape(__version__)}."


def _listed(values: Floats) -> list[float | None]:
    return [None if math.isnan(value) else _short(value) for value in values.tolist()]


def _short(value: float) -> float:
    rounded = float(f"{value:.4g}")
    return rounded if math.isfinite(rounded) else value  # the largest numbers have no shorter ones above them


def _data(digest: Digest) -> str:
    series = digest.series()
    codes, low, high = digest.heat_map()
    used = digest.bins.used
    graver = series["skipped"] + series["nonfinite"] + series["spikes"]
    data: dict[str, Any] = {
        "width": digest.bins.width,
        **{name: [int(value) for value in series[name].tolist()] for name in ("first", "last", "records")},
        **{
            name: [int(v) for v in series[name].tolist()] for name in ("clipped", "skipped", "rolled_back", "nonfinite")
        },
        "norm": _listed(series["middle"]),
        "low_norm": _listed(series["lowest"]),
        "high_norm": _listed(series["highest"]),
        "bound": _listed(series["bound"]),
        "loss": _listed(series["loss"]),
        "names": digest.reader.names,
        "gravity": [i for i, _ in _ordered(digest)],
        "codes": [ZERO, LOWEST, HIGHEST, INF, NAN],
        "low": low,
        "high": high,
        "heat": base64.b64encode(codes.tobytes()).decode("ascii"),
        "worst_bin": int(np.argmax(graver)) if used and graver.any() else used - 1,
    }
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
