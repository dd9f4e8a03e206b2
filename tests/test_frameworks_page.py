"""Every snippet of docs/frameworks.md, a section at a time in an interpreter of its own, as a reader would run it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import offline
import pytest

import fastclip

PAGE = Path(__file__).parents[1] / "docs" / "frameworks.md"
SECTIONS = {part.partition("\n")[0]: part for part in PAGE.read_text().split("\n## ")[1:]}
TALKATIVE = ("transformers", "ultralytics")  # their trainers print something before
BLOCK = re.compile(r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", re.DOTALL)

PROGRAM = """
import contextlib, io, json, sys
if "ultralytics" in sys.argv[1]:
    from fastclip.bench import torchvision_cpu
    torchvision_cpu.admit()
printed, namespace = [], {"__name__": "__main__"}
for number, code in enumerate(json.loads(sys.argv[1])):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, f"block {number}", "exec"), namespace)
    printed.append(out.getvalue())
print("PRINTED " + json.dumps(printed))
"""


@pytest.mark.parametrize("name", [name for name, text in SECTIONS.items() if BLOCK.search(text)])
def test_snippets_print_what_the_page_says(name):
    offline.font_for_ultralytics()
    blocks = BLOCK.findall(SECTIONS[name])
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps([code for code, _ in blocks])],
        capture_output=True,
        text=True,
        env=offline.inherited() | {"PYTHONPATH": str(Path(fastclip.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        timeout=250,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("PRINTED ")]
    assert lines, result.stderr
    for printed, (_, expected) in zip(json.loads(lines[-1].removeprefix("PRINTED ")), blocks, strict=True):
        said = printed.strip()
        if expected and name in TALKATIVE:
            said = said[-len(expected.strip()) :]
        if expected:
            assert said == expected.strip()


def test_each_file_has_a_section():
    files = {path.stem for path in (PAGE.parents[1] / "fastclip" / "integrations").glob("*.py")} - {"__init__", "facts"}
    assert files <= {name.lower() for name in SECTIONS}
