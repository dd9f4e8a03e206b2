"""The GPU's benchmark and its model, without a GPU: the same code over tiny lists on the CPU."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fastclip.bench import gpu, model
from fastclip.bench.workloads import GPT2, LLAMA

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict, str]:
    folder = tmp_path_factory.mktemp("gpu")
    files = ["--json", str(folder / "gpu.json"), "--markdown", str(folder / "gpu.md")]
    code = gpu.main(["--device", "cpu", "--tiny", "--rounds", "1", *files])
    return code, json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()


def test_every_row_is_checked_and_timed(written: tuple[int, dict, str]) -> None:
    code, results, table = written
    assert [row["name"] for row in results["rows"]] == [row.name for row in gpu.all_rows()]
    assert not [row["why"] for row in results["rows"] if "ratio" not in row]
    assert code == 0
    for row in results["rows"]:
        assert f"| {row['name']}" in table
        for contestant in row["contestants"]:
            assert min(contestant[f"{clock}_s"] for clock in ("device", "wall", "host")) > 0
    assert {"name", "verdict", "text"} <= results["facts"][0].keys()


def test_what_must_not_wait_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it waits a GPU has to say; here that the question itself is sound, also where a backend is forced."""
    monkeypatch.setattr(gpu, "no_syncs", contextlib.nullcontext)
    monkeypatch.setattr(gpu.fastclip.backends, "forced", "cpu")
    assert "wait for nothing" in gpu.FACTS["host syncs"](gpu.Inputs(gpu.tiny(GPT2)))


def test_a_run_that_is_cut_off_leaves_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured, rows = gpu.measured, []

    def cut_off(row: gpu.Row, *args: object) -> dict:
        if len(rows) == 2:
            raise KeyboardInterrupt  # as timeout sends it
        rows.append(row.name)
        return measured(row, *args)

    monkeypatch.setattr(gpu, "measured", cut_off)
    files = [tmp_path / "gpu.json", tmp_path / "gpu.md"]
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--device", "cpu", "--tiny", "--rounds", "1", "--json", str(files[0]), "--markdown", str(files[1])])
    assert [row["name"] for row in json.loads(files[0].read_text())["rows"]] == rows
    assert all(f"| {name}" in files[1].read_text() for name in rows)


def test_a_run_that_is_cut_off_leaves_its_facts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = iter([{"name": "first", "verdict": "ok", "text": "as it should be"}])

    def cut_off(*args: object) -> dict:
        if (own := next(found, None)) is None:
            raise KeyboardInterrupt
        return own

    monkeypatch.setattr(gpu, "fact", cut_off)
    file = tmp_path / "gpu.json"
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--device", "cpu", "--tiny", "--rounds", "1", "--only", "norm 1 GiB fp32", "--json", str(file)])
    assert [own["name"] for own in json.loads(file.read_text())["facts"]] == ["first"]


@pytest.mark.parametrize(
    ("ours", "torchs", "why"),
    [
        ({}, {"multi_tensor": 3}, "saw 0 launches of fastclip's"),
        ({"fastclip::read": 1}, {}, "0 of torch's"),
        ({"fastclip::read": 2, "fill": 1}, {"multi_tensor": 3}, "3 launches"),
    ],
)
def test_launches_that_nobody_saw_are_no_proof(
    monkeypatch: pytest.MonkeyPatch, ours: dict[str, int], torchs: dict[str, int], why: str
) -> None:
    seen = iter([ours, torchs])
    monkeypatch.setattr(gpu, "launches", lambda call: next(seen))
    with pytest.raises(gpu.WrongResult, match=why):
        gpu.FACTS["launches of a clip, clipping"](gpu.Inputs(gpu.tiny(GPT2)))


def test_a_row_tells_when_the_device_waited_for_the_host() -> None:
    clock = gpu.Clock("cpu")
    row = next(row for row in gpu.all_rows() if row.clock == "device")
    inputs = gpu.Inputs(gpu.tiny(row.workload))
    assert "head start" not in gpu.measured(row, inputs, clock, 1, 1.0)["verdict"]
    clock.head_start = 0.0
    assert "head start" in gpu.measured(row, inputs, clock, 1, 1.0)["verdict"]


def test_the_commit_of_a_tree_without_its_history_can_be_told(python) -> None:
    done = python("from fastclip.bench import machine; print(machine.commit())", FASTCLIP_COMMIT="0123abc")
    assert done.stdout.strip() == "0123abc"


def test_a_wrong_result_has_no_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = gpu.fastclip.clip_grad_norm_
    monkeypatch.setattr(gpu.fastclip, "clip_grad_norm_", lambda *args: right(*args) * 1.001)
    only = ["--only", "clip GPT-2 fp32, nothing"]
    assert gpu.main(["--device", "cpu", "--tiny", "--rounds", "1", *only]) == 1
    assert "not timed: total_norm is" in capsys.readouterr().out


def test_what_a_sanitizer_watches_runs() -> None:
    gpu.short("cpu")


def test_the_model_has_a_prediction_for_every_row(written: tuple[int, dict, str]) -> None:
    table = model.markdown("H200", written[1])
    for row, made in zip(gpu.all_rows(), model.predictions("H200"), strict=True):
        assert made["ours_s"] > 0
        assert made["other_s"] > 0
        (line,) = [
            line for line in table.splitlines() if line.startswith((f"| {row.name} |", f"| {row.name} (wall) |"))
        ]
        assert "" not in [cell.strip() for cell in line.split("|")[-3:-1]]  # the measured ones
    assert "nothing is measured yet" in model.markdown("H200", None)


def test_the_model_counts_launches_as_torch_makes_them() -> None:
    assert model.mta_launches([1] * 770) == 1
    assert model.mta_launches([1] * 771) == 2
    assert model.mta_launches([model.MTA_CHUNK * model.MTA_BLOCKS]) == 1
    assert model.mta_launches([model.MTA_CHUNK * model.MTA_BLOCKS + 1]) == 2
    # a tensor that goes on in the next launch takes a place there, too
    assert model.mta_launches([model.MTA_CHUNK * model.MTA_BLOCKS + 1, *[1] * 769]) == 2
    assert model.mta_launches([model.MTA_CHUNK * model.MTA_BLOCKS + 1, *[1] * 770]) == 3


def test_the_model_knows_how_many_tensors_a_launch_takes() -> None:
    device, table = ((ROOT / "csrc/cuda" / name).read_text() for name in ("nvidia/device.h", "table.h"))
    all_bytes = max(int(number) for number in re.findall(r"kParameterBytes = (\d+)", device))
    other, each = re.search(r"kOtherBytes = (\d+)", table), re.search(r"kOtherBytes\) / (\d+) / 8 \* 8", table)
    assert (all_bytes - int(other[1])) // int(each[1]) // 8 * 8 == model.OUR_TENSORS


def test_clipping_a_fused_step_costs_its_bytes() -> None:
    """NOTES.md: 32 bytes of 28 with nothing to clip, 40 with clipping; 1.35 times is out of reach."""
    bare = model.fused_adamw(LLAMA, False).moved_bytes
    for clips, bytes_ in ((False, 32), (True, 40)):
        made = model.our_clip(LLAMA, clips).moved_bytes + bare
        assert made / bare == pytest.approx(bytes_ / 28)
    assert model.our_clip(GPT2, False).launches == 2


def test_the_script_is_sound_and_names_what_exists() -> None:
    script = ROOT / "bench/gpu.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    for path in re.findall(r"tests/\w+\.py", script.read_text()):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"-m fastclip\.bench\.(\w+)", script.read_text()):
        assert (ROOT / "bench" / f"{name}.py").exists(), name


@pytest.fixture
def script(tmp_path: Path):
    """Runs the script with stand-ins for its tools, which list how they were called. -> (exit status, steps, calls)."""

    def tool(name: str, body: str) -> Path:
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\necho "$FASTCLIP_CUDA $FASTCLIP_BACKEND {name} $*" >>"{tmp_path}/calls"\n{body}\n')
        path.chmod(0o755)
        return path

    def run(
        *seconds: str, sanitizer: int = 0, numbers: int = 0, build: int = 0
    ) -> tuple[int, dict[str, str], str, Path]:
        tool("compute-sanitizer", f"exit {sanitizer}")
        for name in ("nvidia-smi", "nvcc"):
            tool(name, "")
        python = tool(
            "python",
            f'[ "$1" = - ] && exec "{sys.executable}" "$@"\necho torch\n'
            f'case "$*" in *bench.gpu\\ --json*) exit {numbers};; esac\n'
            f'case "$FASTCLIP_CUDA $*" in 1\\ *pip\\ install*) exit {build};; esac',
        )
        clean = {name: value for name, value in os.environ.items() if not name.startswith("FASTCLIP_")}
        env = {**clean, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(python), "FASTCLIP_COMMIT": "0123abc"}
        out = tmp_path / "out"
        command = ["bash", str(ROOT / "bench/gpu.sh"), str(out), *seconds]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        steps = {step["step"]: step["exit"] for step in json.loads((out / "steps.json").read_text())}
        return done.returncode, steps, (tmp_path / "calls").read_text(), out

    return run


@pytest.mark.parametrize(
    ("sanitizer", "numbers", "code"),
    [(0, 0, 0), (3, 0, 0), (9, 0, 1), (0, 1, 1)],  # refused by the machine; found something; missed numbers
    ids=["clean", "refused", "found", "numbers fail"],
)
def test_the_script_runs_every_step_and_fails_by_what_was_found(
    script, sanitizer: int, numbers: int, code: int
) -> None:
    status, steps, called, out = script(sanitizer=sanitizer, numbers=numbers)
    assert status == code
    assert steps["numbers"] == str(numbers)
    assert {f"compute-sanitizer {name}" for name in ("memcheck", "racecheck", "initcheck")} <= steps.keys()
    assert all(steps[name] == str(sanitizer) for name in steps if name.startswith("compute-sanitizer"))
    assert called.count("compute-sanitizer --tool") == 3
    assert "--tool memcheck --report-api-errors no --error-exitcode 9" in called
    assert "python -m fastclip.bench.model --json" in called
    assert " cuda python -m fastclip.bench.gpu --json" in called
    assert "tests/test_on_gpu.py" in called
    assert "build without CUDA's kernels" not in steps
    assert "gpu.md was not written" in (out / "summary.md").read_text()


def test_where_the_kernels_do_not_compile_tritons_are_measured(script) -> None:
    status, steps, called, _ = script(build=1)
    assert status == 1
    assert (steps["build"], steps["build without CUDA's kernels"]) == ("1", "0")
    assert "0  python -m pip install" in called
    assert " triton python -m fastclip.bench.gpu --json" in called
    assert "tests/test_cuda.py" not in called


def test_a_script_without_time_has_not_done_its_work(script) -> None:
    status, steps, _, _ = script("3")
    assert status == 1
    assert steps["build"] == steps["numbers"] == "no time left"
