"""Results of compare as text, as the README's table, and as a picture.

``python -m fastclip.bench.report results.json --markdown - --png FILE``
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Results = dict[str, Any]

FORMAT = 1  # of the JSON that compare writes
BUSY = 0.05  # of the CPU time, taken by others: a ratio measured meanwhile is marked
COLOURS = {"ok": "#2a7f62", "faster": "#7fb59f", "below floor": "#d98a29", "slower": "#b23a48"}


def seconds(value: float) -> str:
    """Three digits, in s, ms or us."""
    unit, scale = next((unit for unit in (("s", 1.0), ("ms", 1e3)) if value * unit[1] >= 1.0), ("us", 1e6))
    return f"{value * scale:#.3g}".rstrip(".") + f" {unit}"


def multiple(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def size(value: int | None) -> str:
    """In binary units, for caches and memory."""
    if value is None:
        return "unknown"
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value} B"


def outcome(row: Results) -> str:
    """One row in a few words."""
    if row["verdict"] == "wrong":
        return f"WRONG, not timed: {row['why']}"
    floor = "" if row["floor"] is None else f", floor {row['floor']:g}"
    return f"{multiple(row['ratio'])} ({row['verdict']}{floor})"


def floor_and_verdict(row: Results) -> str:
    """What the floor column says: "3.2 ok", "3.2 BELOW", "slower", or nothing."""
    if row["floor"] is not None:
        return f"{row['floor']:g} " + {"ok": "ok", "below floor": "BELOW", "wrong": "WRONG"}[row["verdict"]]
    return row["verdict"] if row["verdict"] in ("slower", "wrong") else ""


def marked_ratio(row: Results) -> str:
    """With a "~" where other processes kept the CPUs busy."""
    return multiple(row["ratio"]) + ("~" if (row.get("others_share_of_cpu") or 0.0) > BUSY else "")


def busy_lines(results: Results) -> list[str]:
    """What "~" means, if it was needed."""
    shares = [row["others_share_of_cpu"] for row in results["rows"] if row.get("others_share_of_cpu") is not None]
    if not shares or max(shares) <= BUSY:
        return []
    return [f"~: other processes took more than {BUSY:.0%} of the CPU time meanwhile, {max(shares):.0%} at most"]


def error(value: float | None) -> str:
    """A relative error; below half a float32 ulp nothing is left to say."""
    if value is None:
        return ""
    return "0" if value < 2**-24 else f"{value:.0e}"


def memory_line(memory: Results) -> str:
    extra = ", ".join(f"{name} {bytes_ / 1e3:.0f} KB" for name, bytes_ in memory["extra_bytes"].items())
    limit = f"limit {memory['limit_bytes'] / 1e6:g} MB"
    return f"{memory['name']}, {memory['workload']}: {extra} at most ({memory['verdict']}, {limit})"


def setting_lines(results: Results) -> list[str]:
    """The machine, the versions and the reading speed: what the numbers hang on."""
    facts, versions, reading = results["machine"], results["versions"], results["reading_speed"]
    commit = f" ({versions['commit']})" if versions["commit"] else ""
    capability = f" {versions['cpu_capability']}" if versions["cpu_capability"] else ""
    return [
        f"{facts['cpu']}, {facts['cores']} cores, L2 {size(facts['l2_bytes'])}, L3 {size(facts['l3_bytes'])}, "
        f"memory {size(facts['memory_bytes'])}",
        f"{facts['system']}, transparent huge pages: {facts['transparent_hugepages']}, "
        f"load {facts['load_average']} at the start",
        f"fastclip {versions['fastclip']}{commit}, backend {versions['backend']}{capability}, "
        f"torch {versions['torch']}, Python {versions['python']}, {results['threads']} threads",
        f"reading speed {reading['bytes_per_s'] / 1e9:.1f} GB/s, by {reading['by']} over "
        f"{reading['elements'] * 4 / 1e6:.0f} MB, the best of before and after",
    ]


def text(results: Results) -> str:
    """For a terminal of 120 columns."""
    header = (
        f"{'row':<48} {'ours':>8} {'other':>8} {'ratio':>6} {'min-max':>11} {'floor':>9} {'GB/s':>6} {'read':>5} "
        f"{'cache':<5} {'error':>5}"
    )
    lines = [*setting_lines(results), "", header, "-" * len(header)]
    for row in results["rows"]:
        if row["verdict"] == "wrong":
            lines.append(f"{row['name']:<48} {outcome(row)}")
            continue
        ours, other = row["contestants"]
        spread = f"{multiple(row['ratio_min'])}-{multiple(row['ratio_max'])}"
        lines.append(
            f"{row['name']:<48} {seconds(ours['median_s']):>8} {seconds(other['median_s']):>8} "
            f"{marked_ratio(row):>6} {spread:>11} {floor_and_verdict(row):>9} {ours['bytes_per_s'] / 1e9:>6.1f} "
            f"{ours['of_reading_speed']:>5.0%} {row['cache']:<5} {error(other['relative_error']):>5}"
        )
    if results["memory"] is not None:
        lines += ["", memory_line(results["memory"])]
    lines += [
        "",
        "ratio: median time of the other / of ours; min-max: of single rounds. GB/s: least bytes that ours must move,",
        "per second; read: that as a share of the reading speed. error: of the other against float64, relative.",
    ]
    return "\n".join([*lines, *busy_lines(results)])


def markdown(results: Results) -> str:
    """The README's table."""
    lines = [
        "| | fastclip | other | ratio | floor | GB/s | of reading speed | cache | other's error |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for row in results["rows"]:
        if row["verdict"] == "wrong":
            lines.append(f"| {row['name']} | not timed: {row['why']} | | | {floor_and_verdict(row)} | | | | |")
            continue
        ours, other = row["contestants"]
        lines.append(
            f"| {row['name']} | {seconds(ours['median_s'])} | {seconds(other['median_s'])} | "
            f"**{marked_ratio(row)}** | {floor_and_verdict(row)} | {ours['bytes_per_s'] / 1e9:.1f} | "
            f"{ours['of_reading_speed']:.0%} | {row['cache']} | {error(other['relative_error'])} |"
        )
    notes = [f"{line}  " for line in [*setting_lines(results), *busy_lines(results)]]
    if results["memory"] is not None:
        notes.append(memory_line(results["memory"]))
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def draw(results: Results, file: Path) -> None:
    """A bar per row on a logarithmic axis, from 1; a mark at the floor; rows that lose point to the left."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    rows = [row for row in results["rows"] if row["verdict"] != "wrong"][::-1]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.27 * len(rows)))
    ends = [1.0, *(row["ratio"] for row in rows), *(row["floor"] for row in rows if row["floor"] is not None)]
    for y, row in enumerate(rows):
        axes.barh(y, row["ratio"] - 1.0, left=1.0, color=COLOURS[row["verdict"]], height=0.7)
        beside = max(row["ratio"], 1.0)
        if row["floor"] is not None:
            axes.plot([row["floor"]] * 2, [y - 0.42, y + 0.42], color="black", linewidth=1.5)
            beside = row["floor"] if beside < row["floor"] < 1.5 * beside else beside
        axes.annotate(marked_ratio(row), (beside, y), (4, 0), textcoords="offset points", va="center", size=8)
    axes.set_xscale("log")
    axes.set_xlim(0.8 * min(ends), 1.6 * max(ends))
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_ylim(-0.7, max(len(rows), 1) - 0.3)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_xlabel("ratio: time of the other / time of fastclip; black mark: floor")
    used = [verdict for verdict in COLOURS if any(row["verdict"] == verdict for row in rows)]
    patches = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[verdict]) for verdict in used]
    if used:
        labels = {"ok": "floor kept", "faster": "faster, no floor", "slower": "slower, no floor"}
        axes.legend(patches, [labels.get(verdict, verdict) for verdict in used], loc="lower right", fontsize=8)
    versions = results["versions"]
    axes.set_title(
        f"fastclip {versions['fastclip']}, torch {versions['torch']}, {results['threads']} threads, "
        f"{results['machine']['cpu']}",
        fontsize=9,
    )
    figure.savefig(file, dpi=130, bbox_inches="tight")
    pyplot.close(figure)


def place(text: str) -> Path:
    """Of an argument: where a file can be written. Told before minutes of work, not after them."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def write(content: str, file: Path | None) -> None:
    """To a file, or to the terminal for "-" and None."""
    if file in (None, Path("-")):
        print(content, end="")
    else:
        file.write_text(content)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if the picture could not be drawn; 2 for a file that compare did not write."""
    parser = argparse.ArgumentParser(prog="python -m fastclip.bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="the file that compare --json wrote")
    parser.add_argument("--markdown", type=place, metavar="FILE", help="write the table; - for the terminal")
    parser.add_argument("--png", type=place, metavar="FILE", help="draw the ratios (needs matplotlib)")
    args = parser.parse_args(argv)
    try:
        results = json.loads(args.results.read_text())
    except OSError as error:
        parser.error(str(error))
    except ValueError:  # not JSON
        results = None
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        parser.error(f"{args.results} was not written by this version of fastclip.bench.compare")
    if args.markdown is None and args.png is None:
        print(text(results))
    if args.markdown is not None:
        write(markdown(results), args.markdown)
    if args.png is not None:
        try:
            draw(results, args.png)
        except ModuleNotFoundError as missing:
            print(f"no picture: {missing}; pip install matplotlib", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
