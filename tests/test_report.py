"""A report tells what is in the file, loses no spike, and says what it could not read."""

import html.parser
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest
import recorded
from hypothesis import given
from hypothesis import strategies as st

import fastclip.__main__
from fastclip.ladder import Event
from fastclip.monitoring import records
from fastclip.report import digest as digests
from fastclip.report.digest import BINS, INF, MISSING, NAN, ZERO, Bins, Digest
from fastclip.report.page import page_of
from fastclip.report.reading import Reader, lines_of
from fastclip.report.terminal import ASCII_BARS, Tail, View, follow, sparkline

NAMES = ("a.weight", "b.weight")
LARGEST = sys.float_info.max


def digest_from(lines, fit=True):
    digest = Digest("run.jsonl")
    digest.read(lines)
    if fit:
        digest.fit()
    return digest


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def fastclip_command(*argv):
    return fastclip.__main__.main([str(each) for each in argv])


# --- decimation


@given(
    counts=st.lists(st.integers(1, 700), min_size=1, max_size=12),
    seed=st.integers(0, 2**32 - 1),
    bins=st.sampled_from([4, 16]),
)
def test_bins_lose_no_extreme(counts, seed, bins):
    """Any number of records in any pieces: each value is in the bin of its step."""
    generator = np.random.default_rng(seed)
    total = sum(counts)
    norms = np.exp(generator.standard_normal(total))
    flags = generator.random(total) < 0.1
    heat = np.exp(generator.standard_normal((total, 3))).astype(np.float32)
    heat[generator.random((total, 3)) < 0.01] = math.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "BINS", bins)
        own = Bins()
        at = 0
        for count in counts:
            part = slice(at, at + count)
            values = {name: np.zeros(count) for name in Bins.FIELDS}
            values |= {"first": np.arange(at, at + count) * 1.0, "last": np.arange(at, at + count) * 1.0}
            values |= {"records": np.ones(count), "lowest": norms[part], "highest": norms[part]}
            values |= {"clipped": flags[part] * 1.0}
            own.add(values, heat[part])
            at += count
    assert own.used <= 2 * bins
    first, last = (own.values[name][: own.used].astype(int) for name in ("first", "last"))
    assert (first[0], last[-1]) == (0, total - 1)
    assert (first[1:] == last[:-1] + 1).all()
    assert (last - first + 1 == own.values["records"][: own.used]).all()
    assert (last - first + 1)[:-1].tolist() == [own.width] * (own.used - 1)
    for i, (a, z) in enumerate(zip(first, last, strict=True)):
        assert own.values["highest"][i] == norms[a : z + 1].max()
        assert own.values["lowest"][i] == norms[a : z + 1].min()
        assert own.values["clipped"][i] == flags[a : z + 1].sum()
        assert np.array_equal(own.heat[i], heat[a : z + 1].max(axis=0), equal_nan=True)


def test_each_spike_of_a_long_run_is_in_the_page():
    count, spikes = 30_000, (1, 9_999, 17_123, 30_000)
    line = records.step_line(recorded.step(1, [1.0, 1.0], NAMES, loss=None))

    def lines():
        yield from recorded.beginning(NAMES)
        for number in range(1, count + 1):
            if number in spikes:
                yield records.step_line(recorded.step(number, [1.0, 10.0 * number], NAMES))
            else:
                yield line.replace(b'"step":1,', b'"step":%d,' % number)

    digest = digest_from(lines())
    assert digest.records == count
    assert digest.bins.used <= 2 * BINS
    page = data_of(page_of(digest))
    for number in spikes:
        (at,) = [i for i, (a, z) in enumerate(zip(page["first"], page["last"], strict=True)) if a <= number <= z]
        assert page["high_norm"][at] == pytest.approx(10.0 * number, rel=1e-2)
    assert sum(page["clipped"]) == len(spikes)
    assert sum(page["records"]) == count


def test_memory_does_not_grow_with_the_run():
    names = [f"t{i}" for i in range(50)]
    line = records.step_line(recorded.step(1, np.ones(50), names))

    def lines(count):
        yield from recorded.beginning(names)
        for number in range(1, count + 1):
            yield line.replace(b'"step":1,', b'"step":%d,' % number)

    peaks = []
    for count in (4 * BINS, 16 * BINS):
        tracemalloc.start()
        digest_from(lines(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_the_heat_map_fits_a_page(monkeypatch):
    monkeypatch.setattr(digests, "CELLS", 1000)
    digest = digest_from(recorded.run(400))
    assert digest.bins.used * 4 <= 1000
    assert sum(data_of(page_of(digest))["records"]) == 400


def test_codes_of_the_heat_map():
    lines = recorded.beginning(NAMES)
    for number, norms in enumerate(([1e-3, 1e3], [0.0, math.inf], [math.nan, 1.0]), 1):
        lines.append(records.step_line(recorded.step(number, norms, NAMES)))
    lines.append(records.step_line(recorded.step(4, [7.0], NAMES, columns=[1])))
    codes, low, high = digest_from(lines).heat_map()
    assert (low, high) == pytest.approx((-3.0, 3.0), abs=1e-6)
    assert codes.tolist()[0] == [digests.LOWEST, ZERO, NAN, MISSING]
    assert codes.tolist()[1][:2] == [digests.HIGHEST, INF]
    norm = 10 ** (low + (codes[1, 3] - digests.LOWEST) / (digests.HIGHEST - digests.LOWEST) * (high - low))
    assert norm == pytest.approx(7.0, rel=0.03)


# --- what is told of a run


def test_sums_against_the_records():
    digest = digest_from(recorded.run(400, folds=4))
    assert digest.records == 400
    assert list(digest.folds) == ["0", "1", "2", "3"]
    assert digest.totals.steps == 400
    assert (digest.totals.skipped, digest.totals.nonfinite, digest.totals.spikes) == (1, 1, 1)
    assert digest.totals.clipped == sum(fold.clipped for fold in digest.folds.values()) > 100
    assert digest.folds["0"].worst == "h.0.bias"
    assert (digest.folds["0"].spikes, digest.folds["1"].spikes) == (1, 0)
    tensors = {tensor.name: tensor for tensor in digest.tensors()}
    assert (tensors["h.0.bias"].largest, tensors["h.0.bias"].largest_at) == (1e4, 100)
    assert tensors["h.1.weight"].nonfinite == 1
    assert tensors["h.1.weight"].typical == pytest.approx(1.0, rel=0.1)
    assert tensors["h.0.bias"].flags == {"exploding": 1}
    assert sum(tensor.share for tensor in tensors.values()) == pytest.approx(1.0, abs=0.1)


def test_a_tensor_whose_nan_became_zero_comes_first():
    bad = Event(2, "non-finite", "NaN or Inf in the gradient", (NAMES[1],))
    steps = [recorded.step(n, [9.0, 1.0], NAMES, **({"events": [bad], "nans": 1} if n == 2 else {})) for n in (1, 2, 3)]
    digest = digest_from([*recorded.beginning(NAMES), *map(records.step_line, steps)])
    first, second = sorted(digest.tensors(), key=lambda tensor: tensor.gravity, reverse=True)
    assert (first.name, first.nonfinite, second.nonfinite) == (NAMES[1], 1, 0)


def shares_of(*steps, norm_types=(2.0,)):
    """Of files that follow each other, one for each norm type, with the same steps."""
    lines = []
    for norm_type in norm_types:
        header = recorded.HEADER | {"norm_type": records.spelled(norm_type)}
        lines += [records.line(records.HEADER, **header), recorded.beginning("abc")[1]]
        for norms in steps:
            total = float(np.linalg.norm([norm for norm in norms if norm is not None], norm_type))
            columns = [i for i, norm in enumerate(norms) if norm is not None]
            known = [norms[i] for i in columns]
            changes = {"total_norm": total, "columns": None if len(known) == 3 else columns, "worst": "a"}
            lines.append(records.step_line(recorded.step(len(lines), known, "abc", **changes)))
    digest = digest_from(lines)
    assert digest.reader.problems() == []
    return digest, [tensor.share for tensor in digest.tensors()]


@pytest.mark.parametrize(
    ("steps", "shares"),
    [
        ([(1, 1, 1), (math.nan, 1, 1)] * 5, [1 / 3, 1 / 3, 1 / 3]),
        ([(1, 1, 1), (0, 0, 0)] * 5, [1 / 3, 1 / 3, 1 / 3]),
        ([(3, 1, 0)] * 9 + [(0, 0, 2)], [0.81, 0.09, 0.1]),
        ([(3, 1, None)] * 9 + [(None, None, 2)], [0.81, 0.09, 0.1]),
    ],
    ids=["nan", "all zero", "zero", "no gradient"],
)
def test_shares_of_the_norm_add_up(steps, shares):
    _, found = shares_of(*steps)
    assert found == pytest.approx(shares)


@pytest.mark.parametrize(
    ("norm_type", "what"),
    [(1.0, "total norm"), (2.0, "squared total norm"), (3.0, "total norm to the power of 3")],
)
def test_shares_of_other_norms_add_up(norm_type, what):
    digest, found = shares_of((2, 2, 2), (5, 5, 5), norm_types=(norm_type,))
    assert found == pytest.approx([1 / 3] * 3)
    page = page_of(digest)
    assert f"<small>33% of the {what}</small>" in page
    assert f"share: mean part of the {what}; NaN" in page


def test_an_inf_norm_has_no_shares():
    digest, found = shares_of((1, 2, 9), (4, 5, 1), norm_types=(math.inf,))
    assert found == [None] * 3
    assert max(digest.tensors(), key=lambda tensor: tensor.gravity).name == "b"  # of the largest usual norm
    page = page_of(digest)
    assert "the largest usual norm" in page
    assert ">Share<" not in page
    assert "share: " not in page


def test_shares_where_the_norm_changes():
    """Each record by its own norm, also of those that are joined at a time."""
    _, found = shares_of((1, 1, 2), norm_types=(1.0, 2.0, math.inf))
    assert found == pytest.approx([(1 / 4 + 1 / 6) / 2, (1 / 4 + 1 / 6) / 2, (2 / 4 + 4 / 6) / 2])


@pytest.mark.parametrize(
    ("kind", "count", "told"),
    [
        ("dead", 1, "flagged dead once"),
        ("exploding", 3, "flagged exploding 3 times"),
        ("non-finite", 1, "NaN or Inf in 1 record"),
        ("non-finite", 1234, "NaN or Inf in 1,234 records"),
    ],
)
def test_the_tile_tells_how_often_a_tensor_was_flagged(kind, count, told):
    lines = recorded.beginning(NAMES)
    for number in range(1, count + 1):
        lines.append(records.step_line(recorded.step(number, [1, 1], NAMES, events=[Event(number, kind, "", NAMES)])))
    assert f"<small>{told}</small>" in page_of(digest_from(lines))


def test_the_table_tells_which_tensors_of_an_event_count():
    names = [f"{i}.weight" for i in range(records.MOST_NAMES + 5)]
    event = Event(1, "exploding", "", tuple(names))
    lines = [*recorded.beginning(names), records.step_line(recorded.step(1, np.ones(25), names, events=[event]))]
    digest = digest_from(lines)
    assert sum(tensor.flags["exploding"] for tensor in digest.tensors()) == records.MOST_NAMES == 20
    assert "how often it was flagged, where one event counts for its first 20 tensors" in page_of(digest)


def test_a_norm_of_0_is_a_number():
    lines = recorded.beginning(NAMES)
    for number, norms in enumerate(([0.0, 0.0], [1.0, 0.0], [math.nan, 0.0]), 1):
        lines.append(records.step_line(recorded.step(number, norms, NAMES)))
    page = data_of(page_of(digest_from(lines)))
    assert page["norm"] == page["low_norm"] == page["high_norm"] == [0.0, 1.0, None]


def test_tables_of_the_page():
    page = page_of(digest_from(recorded.run(400, folds=4)))
    assert "Stability of the folds" in page
    cells = [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL)]
    assert [row[0] for row in cells if row[0] in ("0", "1", "2", "3", "all") and len(row) == 7] == [
        "0",
        "1",
        "2",
        "3",
        "all",
    ]
    assert ["100", "exploding", "norm"] in [row[:3] for row in cells]
    assert "0.25%" in page  # skipped


def test_tensors_of_a_resumed_run_keep_their_rows():
    lines = recorded.beginning(NAMES)
    lines.append(records.step_line(recorded.step(1, [1.0, 2.0], NAMES)))
    other = ("b.weight", "c.weight", "a.weight")
    lines += recorded.beginning(other)
    lines.append(records.step_line(recorded.step(2, [20.0, 30.0, 10.0], other)))
    lines.append(records.step_line(recorded.step(3, [200.0, 100.0], other, columns=[0, 2])))
    digest = digest_from(lines)
    assert digest.reader.names == ["a.weight", "b.weight", "c.weight"]
    assert digest.bins.heat[:3].tolist() == [[1, 2, -1], [10, 20, 30], [100, 200, -1]]
    assert digest.reader.problems() == []


def test_only_some_events_are_kept_and_all_are_counted(monkeypatch):
    monkeypatch.setattr(digests, "EVENTS", 5)
    lines = recorded.beginning(NAMES)
    for number in range(1, 101):
        events = [digests.Event(number, "", "exploding", "why", ["a.weight"], 1)]
        lines.append(records.step_line(recorded.step(number, [1.0, 1.0], NAMES, events=events)))
    digest = Digest("run.jsonl")
    digest._last_events = digests.deque(maxlen=5)
    digest.read(lines)
    assert [event.step for event in digest.events] == [1, 2, 3, 4, 5, 96, 97, 98, 99, 100]
    assert digest.counts == {"exploding": 100}


# --- bad input


def problems_of(lines):
    digest = digest_from(lines)
    page = page_of(digest)
    assert ("Not everything could be read" in page) == bool(digest.reader.problems())
    return digest.records, " | ".join(digest.reader.problems())


def test_a_truncated_file():
    whole = b"".join(recorded.run(50))
    for end in range(len(whole) - 1, len(whole) - 1200, -37):
        seen, told = problems_of(lines_of(io.BytesIO(whole[:end])))
        assert seen == whole[:end].count(b"\n") - 2 + whole[:end].endswith(b"}")
        assert "unfinished" in told or whole[:end].endswith((b"\n", b"}"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"hello\nworld\n", "2 lines, the first of them 1"),
        (b'{"loss": 1}\n{"loss": 2}\n', "kind that is not known"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "unfinished"),
        (b"[1, 2]\n", "damaged"),
        (b"[" * 100_000 + b"\n", "damaged"),
        (b'{"kind":"header","format":"other"}\n', "another format"),
    ],
)
def test_foreign_files(content, told):
    seen, problems = problems_of(lines_of(io.BytesIO(content)))
    assert seen == 0
    assert told in problems
    assert "no header" in problems


def test_a_file_that_is_yet_empty():
    assert problems_of(lines_of(io.BytesIO(b""))) == (0, "")


def test_a_newer_version():
    lines = recorded.run(20)
    newer = json.loads(lines[0]) | {"version": 7, "new": [1, 2]}
    lines[0] = json.dumps(newer).encode() + b"\n"
    lines.insert(5, b'{"kind":"weights","step":3,"norms":"AA=="}\n')
    lines[6] = lines[6].replace(b'"kind"', b'"surprise":{"a":1},"kind"')
    seen, told = problems_of(lines)
    assert seen == 20
    assert "version 7 of the format, where this program knows 1" in told
    assert "a kind that is not known here (line 6)" in told


DAMAGE = {
    "tensor_norms": ["", "!!!", "AA", 3, "AACAPwAAgD8AAIA/AACAPwAAgD8AAIA/"],
    "step": [None, "x", 1e400, {}],
    "total_norm": ["one", None, []],
    "columns": [[9, 9, 9, 9], [0], "abcd", [-1, 0, 1, 2]],
    "events": [[{"reason": "no kind"}], 3, ["x"]],
    "max_norm": ["two"],
    "nans": ["NaN"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in DAMAGE.items() for value in values])
def test_one_damaged_record(name, value):
    lines = recorded.run(20)
    lines[10] = json.dumps(json.loads(lines[10]) | {name: value}).encode() + b"\n"
    seen, told = problems_of(lines)
    if (name, value) == ("tensor_norms", ""):  # a record without norms of single tensors is one
        assert (seen, told) == (20, "")
    else:
        assert seen == 19
        assert "damaged (line 11)" in told


@given(st.lists(st.one_of(st.binary(max_size=80), st.sampled_from(recorded.run(8))), max_size=12))
def test_no_file_breaks_the_report(lines):
    digest = digest_from([line + b"\n" for line in lines])
    assert data_of(page_of(digest))["records"] == [1] * digest.records


@given(st.data())
def test_no_value_breaks_the_report(data):
    lines = recorded.run(4)
    json_values = st.recursive(
        st.none()
        | st.booleans()
        | st.floats()
        | st.integers()
        | st.text(max_size=9)
        | st.sampled_from(["NaN", "Infinity", LARGEST, -LARGEST]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=4,
    )
    for _ in range(3):
        place = data.draw(st.integers(0, len(lines) - 1))
        content = json.loads(lines[place])
        content[data.draw(st.sampled_from(sorted(content)))] = data.draw(json_values)
        lines[place] = json.dumps(content).encode() + b"\n"
    page_of(digest_from(lines))


@pytest.mark.parametrize("value", [LARGEST, 0.9999 * LARGEST, float(np.finfo(np.float32).max), 5e-324])
def test_the_largest_and_least_numbers_are_shown(value, tmp_path):
    from fastclip.report import figures

    changes = {"total_norm": value, "max_norm": value, "loss": value}
    steps = [recorded.step(n, [1.0, 1.0], NAMES, **changes) for n in range(1, 4)]
    digest = digest_from([*recorded.beginning(NAMES), *map(records.step_line, steps)])
    page = data_of(page_of(digest))
    for name in ("norm", "low_norm", "high_norm", "bound", "loss"):
        assert page[name] == [pytest.approx(value, rel=1e-3)] * 3
    assert len(figures.save(digest, tmp_path)) == 3


def test_records_that_are_lost_or_told_twice():
    lines = recorded.run(20)
    lines[10:10] = [records.line(records.LOST, records=7), lines[5]]
    seen, told = problems_of(lines)
    assert seen == 20
    assert "could not write 7 records" in told
    assert "told of before" in told


def test_a_line_without_end(monkeypatch):
    monkeypatch.setattr("fastclip.report.reading.LONGEST", 2000)
    lines = recorded.run(20)
    lines.insert(10, b'{"kind":"' + b"x" * 10_000 + b'"}\n')
    seen, told = problems_of(lines_of(io.BytesIO(b"".join(lines))))
    assert seen == 20
    assert "too long (line 11)" in told


EVIL = ('<script>alert("x")</script>', "</script><img src=x onerror=alert(1)>", "{{data}} & $x^2$ \u2028", "a'\"<b>")


class Tags(html.parser.HTMLParser):
    """Which elements there are, with which attributes."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes = [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}


def test_names_stay_text():
    pages = []
    for names in (("p", "q", "r", "s"), EVIL):
        lines = recorded.run(40, names=names)
        header = recorded.HEADER | {"policy": names[0]}
        lines[0] = records.line(records.HEADER, **header)
        lines = [line.replace(b'"fold":"', b'"fold":"<i>') for line in lines]
        digest = Digest(f"{names[0]}.jsonl")
        digest.read(lines)
        pages.append(page_of(digest))
    tags = []
    for page in pages:
        parser = Tags()
        parser.feed(page)
        tags.append((parser.tags, parser.attributes))
    assert tags[0] == tags[1]
    assert data_of(pages[1])["names"] == list(EVIL)


def test_the_page_needs_nothing_else():
    page = page_of(digest_from(recorded.run(40)))
    assert not re.search(r"https?://|src=|@import|url\(|<link", page)
    assert "default-src 'none'" in page


# --- commands


@pytest.mark.parametrize("content", [b"", b"step,total_norm\n1,2.0\n", b'{"some": "json"}\n'])
def test_no_page_takes_the_place_of_a_good_one(tmp_path, capsys, content):
    run, page = tmp_path / "run.csv", tmp_path / "run.html"
    run.write_bytes(content)
    page.write_text("a good one")
    assert fastclip_command("report", run) == 1
    assert "no page was written" in capsys.readouterr().err
    assert page.read_text() == "a good one"


def test_places_that_do_not_fit_are_refused(tmp_path, capsys):
    run, taken = tmp_path / "run.jsonl", tmp_path / "taken"
    run.write_bytes(b"".join(recorded.run(10)))
    taken.write_text("")
    table = tmp_path / "run.csv"
    for *arguments, wrong in (("report", run, "--png", taken), ("watch", tmp_path), ("watch", table)):
        with pytest.raises(SystemExit) as error:
            fastclip_command(*arguments, wrong)
        assert error.value.code == 2
        assert str(wrong) in capsys.readouterr().err


@pytest.mark.parametrize("way", ["same", "link", "default"])
def test_no_page_takes_the_place_of_its_recording(tmp_path, capsys, way):
    run = tmp_path / ("run.html" if way == "default" else "run.jsonl")
    run.write_bytes(b"".join(recorded.run(10)))
    link = tmp_path / "page.html"
    link.symlink_to(run)
    with pytest.raises(SystemExit) as error:
        fastclip_command("report", run, *{"same": ["-o", run], "link": ["-o", link], "default": []}[way])
    assert error.value.code == 2
    assert "is the recording itself" in capsys.readouterr().err
    assert run.read_bytes() == b"".join(recorded.run(10))


@pytest.mark.parametrize("command", ["report", "watch"])
@pytest.mark.parametrize("run", ["", ".", "..", "/"])
def test_a_folder_is_no_run(command, run, capsys):
    with pytest.raises(SystemExit, match="2"):
        fastclip_command(command, run)
    assert "expected the .jsonl file of a monitor" in capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_wrong_folder(tmp_path, monkeypatch):
    """As ``head -1`` is, after which print raises."""
    run = tmp_path / "run.jsonl"
    run.write_bytes(b"".join(recorded.run(10)))
    told = []

    def tell(*words, **_):
        if told:
            raise BrokenPipeError
        told.append(words)

    monkeypatch.setattr("builtins.print", tell)
    with pytest.raises(BrokenPipeError):
        fastclip_command("report", run, "--png", tmp_path)


def test_report_writes_page_and_figures(tmp_path, capsys):
    run = tmp_path / "run.jsonl"
    run.write_bytes(b"".join(recorded.run(100, folds=2)))
    page, figures = tmp_path / "page.html", tmp_path / "figures"
    assert fastclip_command("report", run, "-o", page, "--png", figures) == 0
    assert "100 records of 4 tensors" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    written = sorted(path.name for path in figures.iterdir())
    assert written == ["clip_rate.png", "heat_map.png", "norm.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures.iterdir())
    assert fastclip_command("report", run) == 0
    assert (tmp_path / "run.html").exists()


@pytest.mark.parametrize("lines", [[], recorded.beginning(NAMES), recorded.run(1), recorded.run(40, names=EVIL)])
def test_figures_of_odd_runs(lines, tmp_path):
    from fastclip.report import figures

    assert len(figures.save(digest_from(lines), tmp_path)) == 3


def test_figures_show_what_the_page_shows(tmp_path):
    """The drawn numbers, not the pixels."""
    from fastclip.report import figures

    digest = digest_from(recorded.run(400))
    (axes,) = figures._norm(digest).axes
    drawn = {line.get_label(): line for line in axes.lines}
    assert drawn["total norm"].get_ydata()[99] == pytest.approx(1e4, rel=1e-3)
    assert drawn["skipped"].get_xdata().tolist() == [200]
    assert set(drawn["bound"].get_ydata()) == {2.0}
    assert len(drawn["clipped"].get_xdata()) == digest.totals.clipped
    heat, bad, zero = figures._heat_map(digest).axes[0].images
    assert heat.get_array().shape == (4, 400)
    assert np.argwhere(~bad.get_array().mask).tolist() == [[2, 199]]
    assert np.argwhere(~zero.get_array().mask).tolist() == [[3, step] for step in range(350, 400)]


@pytest.mark.parametrize(("norms", "lone"), [([1, math.nan, 2, 3, math.nan, 4], [1, 6]), ([5], [1])])
def test_norms_without_neighbours_are_drawn(norms, lone):
    from fastclip.report import figures

    steps = [recorded.step(n, [norm, 0.0], NAMES) for n, norm in enumerate(norms, 1)]
    (axes,) = figures._norm(digest_from([*recorded.beginning(NAMES), *map(records.step_line, steps)])).axes
    dots = [line for line in axes.lines if line.get_marker() == "." and line.get_color() == figures.NORM]
    assert [line.get_xdata().tolist() for line in dots] == [lone]
    assert dots[0].get_ydata().tolist() == pytest.approx([norms[step - 1] for step in lone])


def test_report_says_what_it_could_not_read(tmp_path, capsys):
    run = tmp_path / "run.jsonl"
    run.write_bytes(b"not a run\n")
    assert fastclip_command("report", run) == 1
    assert f"{run}: lines that are not JSON (line 1)" in capsys.readouterr().err
    assert not (tmp_path / "run.html").exists()


@pytest.mark.parametrize("argv", [["no/such/run.jsonl"], []])
def test_report_of_nothing(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        fastclip_command("report", *argv)


@pytest.mark.parametrize(
    ("command", "module", "extra"), [("report", "matplotlib", "plots"), ("watch", "rich", "watch")]
)
def test_missing_extras_are_named(command, module, extra, tmp_path):
    run = tmp_path / "run.jsonl"
    run.write_bytes(b"".join(recorded.run(3)))
    arguments = ["--png", str(tmp_path)] if command == "report" else ["--once"]
    program = f"import sys; sys.modules[{module!r}] = None; from fastclip.__main__ import main; "
    program += f"sys.exit(main({[command, str(run), *arguments]!r}))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1
    assert module in result.stderr
    assert f"pip install 'torch-fastclip[{extra}]'" in result.stderr
    assert "Traceback" not in result.stderr


# --- watch


def test_watch_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # the name of the folder may be long
    run = tmp_path / "run.jsonl"
    for there in ("no such file yet", "no record yet"):
        assert fastclip_command("watch", run, "--once") == 1
        assert there in capsys.readouterr().out
        run.touch()
    run.write_bytes(b"".join(recorded.run(100)))
    assert fastclip_command("watch", run, "--once") == 0
    text = capsys.readouterr().out
    for words in ("100", "exploding", "h.0.bias", "1; NaN or Inf in 1", "!"):
        assert words in text


def test_watch_takes_markup_for_text(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    run = tmp_path / "run.jsonl"
    run.write_bytes(b"".join(recorded.run(40, names=("[red]a", "[/]b", "c", "d"))))
    assert fastclip_command("watch", run, "--once") == 0
    assert "[/]b" in capsys.readouterr().out


CLEARS = "a\x1b]0;title\x07\x1b[2J\x9b2J"


@pytest.mark.parametrize("where", ["tensor", "fold", "kind", "reason", "version"])
def test_no_name_commands_the_terminal(tmp_path, capsys, monkeypatch, where):
    monkeypatch.setenv("COLUMNS", "300")
    name = CLEARS if where == "tensor" else "a"
    lines = recorded.beginning([name])
    if where == "version":
        lines[0] = records.line(records.HEADER, **recorded.HEADER | {"version": CLEARS})
    event = Event(1, CLEARS if where == "kind" else "dead", CLEARS if where == "reason" else "", (name,))
    changes = {"events": [event], "fold": CLEARS if where == "fold" else None}
    run = tmp_path / "run.jsonl"
    run.write_bytes(b"".join([*lines, records.step_line(recorded.step(1, [1.0], [name], **changes))]))
    assert fastclip_command("watch", run, "--once") == 0
    out = capsys.readouterr().out
    assert "]0;title" in out
    assert not set("\x1b\x07\x9b") & set(out)
    assert fastclip_command("report", run) == 0
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "cp1252"])
@pytest.mark.parametrize("columns", ["20", "300"])
def test_watch_in_any_encoding(tmp_path, encoding, columns):
    run, names = tmp_path / "run.jsonl", ("c", "lone\ud800", "größe.weight", "d")
    run.write_bytes(b"".join(recorded.run(100, names=names)))
    result = subprocess.run(
        [sys.executable, "-m", "fastclip", "watch", str(run), "--once"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": columns},
    )
    assert (result.returncode, result.stderr) == (0, b"")
    text = result.stdout.decode(encoding)
    assert ("█" in text) == (encoding == "utf-8")
    assert "!" in text
    if columns == "300":
        assert "lone" in text
        assert ("größe" in text) == (encoding != "ascii")


def test_report_of_a_name_that_the_terminal_has_no_letters_for(tmp_path):
    run = tmp_path / "größe.jsonl"
    run.write_bytes(b"".join(recorded.run(10)))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    program = [sys.executable, "-m", "fastclip", "report", str(run)]
    result = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert "gr??e.html: 10 records" in result.stdout


def test_a_long_file_is_read_in_pieces(tmp_path):
    """What has been read is shown meanwhile."""
    path, lines = tmp_path / "run.jsonl", recorded.run(20)
    path.write_bytes(b"".join(lines))
    view, seen = View(path), []
    while not view.look(0.0):
        seen.append(view.records)
    assert seen == list(range(1, 21))
    path.write_bytes(b"".join([*lines, *recorded.run(25)[22:]]))
    assert view.look()
    assert [row.step for row in view.rows] == list(range(1, 26))
    assert view.reader.problems() == []


def test_what_is_there_is_shown_at_once(tmp_path, monkeypatch):
    import rich.console

    path, out = tmp_path / "run.jsonl", io.StringIO()
    path.write_bytes(b"".join(recorded.run(20)))

    def sleep(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastclip.report.terminal.time.sleep", sleep)
    assert follow(path, console=rich.console.Console(file=out, force_terminal=True, width=100, height=40)) == 0
    assert "of 20 " in out.getvalue()
    assert "no record yet" not in out.getvalue()


def test_a_tail_gives_each_whole_line_once(tmp_path):
    path = tmp_path / "run.jsonl"
    tail, lines = Tail(path), recorded.run(10)
    assert list(tail.lines()) == []
    content = b"".join(lines)
    seen = []
    for at in range(0, len(content), 301):
        path.write_bytes(content[: at + 301])
        seen += tail.lines()
    assert seen == lines
    path.write_bytes(b"".join(lines[:5]))  # a resumed run cut the file
    assert list(tail.lines()) == lines[:5]


@pytest.mark.parametrize("steps", [5, 60])
def test_watch_follows_a_run_that_was_cut(tmp_path, steps):
    """As a resumed one is, and then grows again, past where it was, too, between two looks."""
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"".join(recorded.run(20)))
    view = View(path)
    view.look()
    assert view.rows[-1].step == 20
    path.write_bytes(b"".join(recorded.run(steps, names=("another", "b", "c", "d"))))
    view.look()
    assert [row.step for row in view.rows] == list(range(1, steps + 1))
    assert (view.records, view.reader.problems()) == (steps, [])


@pytest.mark.parametrize("columns", [[0.5, 1.0], ["0", "1"], [True, [0]]])
def test_columns_that_are_no_numbers_of_tensors_are_told(columns):
    header, tensors, step, *_ = recorded.run(5)
    record = {
        **json.loads(step),
        "columns": columns,
        "tensor_norms": records.encoded(records.packed(np.array([1.0, 2.0]))),
    }
    lines = [header, tensors, json.dumps(record).encode() + b"\n"]
    assert problems_of(lines) == (0, "records that are damaged (line 3)")


def test_all_folds_together_have_a_worst_tensor():
    digest = digest_from(recorded.run(100, folds=2))
    assert {fold.worst for fold in digest.folds.values()} == {digest.totals.worst} != {""}


def test_watch_follows_a_run(tmp_path, monkeypatch):
    import rich.console

    path = tmp_path / "run.jsonl"
    lines = recorded.run(60)
    out = io.StringIO()
    console = rich.console.Console(file=out, force_terminal=True, width=100, height=40)
    waits = []

    def sleep(seconds):
        if len(waits) == 6:
            raise KeyboardInterrupt
        path.write_bytes(b"".join(lines[: 10 * (len(waits) + 1)]))
        waits.append(seconds)

    monkeypatch.setattr("fastclip.report.terminal.time.sleep", sleep)
    assert follow(path, console=console) == 0
    text = out.getvalue()
    assert text.index("no such file yet") < text.index("of 8 ") < text.index("of 58 ")


def test_watch_is_a_command_that_ends_when_interrupted(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"".join(recorded.run(20)))
    # what runs in the background may ignore the signal, and hand that on
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "from fastclip.__main__ import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm"}  # as in a terminal
    with subprocess.Popen(
        [sys.executable, "-u", "-c", program, "watch", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    ) as process:
        timer = threading.Timer(60, process.kill)
        timer.start()
        while "exploding" not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0
        timer.cancel()


def test_sparklines():
    assert sparkline([1.0, 10.0, 100.0], 3) == "▁▅█"
    assert sparkline([1.0, 1.0, 100.0, 1.0], 2) == "▁█"
    assert sparkline([1.0, math.nan, 0.0, 2.0], 4) == "▁! █"
    assert sparkline([1.0, 10.0, 100.0], 3, ASCII_BARS) == "_+@"


def test_a_view_forgets_old_records(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"".join(recorded.run(2000)))
    view = View(path)
    view.look()
    assert view.records == 2000
    assert len(view.rows) <= 512
    assert isinstance(view.reader, Reader)
