"""Every page: its snippets run and print what it says, its links lead somewhere, and the index leads to it."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import offline
import pytest
import snippets
from ranks import ranks

import fastclip
from fastclip import policies
from fastclip.types import Backend

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
LINKING = [*PAGES, ROOT / "bench" / "NOTES.md", ROOT / "CHANGELOG.md"]
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\s*^```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)

ON_RANKS = ("distributed.md",)  # whose programs run on every rank of two
BY_SECTION = ("frameworks.md",)  # each section a program of its own
TALKATIVE = ("transformers", "ultralytics")  # frameworks whose trainers print before the snippet does
WARN = (*TALKATIVE, "accelerate", "lightning", "keras", "skorch", "sklearn")  # packages that warn of themselves


@dataclass(frozen=True)
class Program:
    """Snippets that are read, and so run, from top to bottom in one interpreter."""

    name: str
    text: str

    @property
    def blocks(self) -> list[tuple[str, str]]:
        """Code, and what it prints; "" where the page doesn't say."""
        return BLOCK.findall(self.text)

    def imports(self, *packages: str) -> bool:
        return any(re.search(rf"^(?:from|import) .*\b{package}\b", self.text, re.MULTILINE) for package in packages)


def programs() -> list[Program]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if page.name in ON_RANKS:
            continue
        if page.name in BY_SECTION:
            parts = text.split("\n## ")[1:]
            found += [Program(f"{page.name}: {part.partition(chr(10))[0]}", part) for part in parts]
        else:
            found.append(Program(str(page.relative_to(ROOT)), text))
    return [program for program in found if program.blocks]


def check(blocks: list[tuple[str, str]], printed: list[str | None], talkative: bool = False) -> None:
    for (code, expected), said in zip(blocks, printed, strict=True):
        if said is None:
            assert code.startswith(snippets.NEEDS_GPU)
        elif expected:
            said = said.strip()
            assert (said[-len(expected.strip()) :] if talkative else said) == expected.strip()


@pytest.mark.parametrize("program", programs(), ids=lambda program: program.name)
def test_snippets_print_what_the_page_says(program):
    """In a fresh interpreter, whose warnings are errors where no framework gives them."""
    if program.imports("ultralytics"):
        offline.font_for_ultralytics()
    paths = [str(Path(fastclip.__file__).parents[1]), str(Path(__file__).parent)]
    asked = {
        "blocks": [code for code, _ in program.blocks],
        "torchvision": program.imports("ultralytics", "timm"),
        "strict": not program.imports(*WARN),
    }
    result = subprocess.run(
        [sys.executable, *([] if asked["strict"] else ["-W", "ignore"]), snippets.__file__],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=offline.inherited() | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        timeout=250,
    )
    answers = [line for line in result.stdout.splitlines() if line.startswith(snippets.ANSWER)]
    assert answers, result.stderr
    check(program.blocks, json.loads(answers[-1].removeprefix(snippets.ANSWER)), program.imports(*TALKATIVE))


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("name", ON_RANKS)
def test_snippets_print_what_the_page_says_on_every_rank(name):
    blocks = BLOCK.findall((DOCS / name).read_text(encoding="utf-8"))
    assert blocks
    for printed in ranks(2).run(snippets.run, [code for code, _ in blocks]):
        check(blocks, printed)


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
        again = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", known) is not None for known in found)
        found.add(f"{slug}-{again}" if again else slug)
    return found


def links(page: Path) -> list[tuple[Path, str]]:
    """File and anchor of each link within the repository."""
    targets = re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page))
    split = [target.partition("#") for target in targets]
    return [((page.parent / file).resolve() if file else page, anchor) for file, _, anchor in split]


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for file, anchor in links(page):
        assert file.exists(), file
        assert not anchor or anchor in anchors(file), f"{file.name}#{anchor}"


def test_the_index_leads_to_every_page():
    index = DOCS / "README.md"
    assert index in {file for file, _ in links(ROOT / "README.md")}
    listed = {file for file, _ in links(index)}
    missing = [page.name for page in PAGES if page not in listed and page != index]
    assert not missing, "docs/README.md has no line for these"


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.name)
def test_files_and_tests_that_a_page_names_are_there(page):
    tests = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py")}
    for name in re.findall(r"`([^`\s]+)`", prose(page)):
        if re.fullmatch(r"(bench|csrc|docs|fastclip|kernels|tests)/([\w/]+\.\w+|([\w]+/)*)", name):
            assert (ROOT / name).exists(), name
        elif re.fullmatch(r"test_\w+(\.py)?", name):
            assert name in tests or any(f"def {name}(" in text for text in tests.values()), name


def tables(page: Path) -> list[list[list[str]]]:
    """For each table its rows: what is the same in every language, words in code and digits."""
    found: list[list[list[str]]] = [[]]
    for line in prose(page).splitlines():
        if line.startswith("|"):
            found[-1].append(re.findall(r"`[^`]+`|\d+", line))
        elif found[-1]:
            found.append([])
    return [rows for rows in found if rows]


def test_the_translation_says_the_same():
    """The same sections and snippets, and tables with the same rows."""
    original, translation = DOCS / "policies.md", DOCS / "politicas.md"
    of_each = [page.read_text(encoding="utf-8") for page in (original, translation)]
    assert BLOCK.findall(of_each[0]) == BLOCK.findall(of_each[1])
    assert tables(original) == tables(translation)
    headings = [re.findall(r"^#+", text, re.MULTILINE) for text in map(prose, (original, translation))]
    assert headings[0] == headings[1]


def test_each_integration_has_a_section():
    files = {path.stem for path in (ROOT / "fastclip" / "integrations").glob("*.py")} - {"__init__", "facts"}
    sections = re.findall(r"^## (.+)$", prose(DOCS / "frameworks.md"), re.MULTILINE)
    assert files <= {section.lower() for section in sections}


def test_a_backends_contract_is_told_whole():
    (rows,) = [rows for rows in tables(DOCS / "extending.md") if ["`read_penalised_`"] in rows]
    told = {row[0].strip("`") for row in rows if row}
    assert told == {name for name in vars(Backend) if not name.startswith("_")}


@pytest.mark.parametrize("name", ["choosing.md", "migration.md", "policies.md"])
def test_the_rules_that_a_table_names_can_be_made(name):
    """With the settings that stand there; what is only the name of a number is taken for 1."""
    rules = {**policies.RULES, "Chain": policies.Chain}
    whole = re.compile(rf"(?:policy=)?((?:{'|'.join(rules)})\([^.]*(?:\.\d[^.]*)*\))")
    found = [match[1] for code in re.findall(r"`([^`]+)`", prose(DOCS / name)) if (match := whole.fullmatch(code))]
    assert len(found) > 5
    for code in found:
        names = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)} - {*rules, "math"}
        given = {each: policies.GlobalNorm() if each in ("first", "second") else 1.0 for each in names}
        assert isinstance(eval(code, {**rules, "math": math, **given}), policies.Policy), code
