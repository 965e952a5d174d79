"""What documents and comments point to exists: sections, pitfalls, decisions, links, files, commands."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(PROJECT.glob("*.md")), *sorted((PROJECT / "docs").rglob("*.md"))]
NUMBER_LIST = r"\d+(?:(?:, | to | and |-)\d+)*"
NUMBERED = {
    "section": re.compile(r"§(\d+)"),
    "pitfall": re.compile(rf"\b[Pp]itfalls? ({NUMBER_LIST})"),
    "decision": re.compile(rf"\b[Dd]ecisions? ({NUMBER_LIST})"),
    "invariant": re.compile(rf"\b[Ii]nvariants? ({NUMBER_LIST})"),
}
BY_NAME = re.compile(r"§(\d+) \*([^*\n]+)\*")
BY_HEADING = re.compile(r'(docs/[\w-]+\.md|README), "([A-Z][^"]+)"')
BY_ROW = re.compile(r"[Ss]tep table (\d), row (\d+)")
OF_A_LOST_PAGE = re.compile(r"\(design[,:)]|\bdesign, |[Dd]esign's ")
"""References to a page that is not in the project."""
UNREAD = (".lock", ".json", ".svg", ".png")
"""Generated, recorded or no text."""


@cache
def text_of(name: str) -> str:
    return (PROJECT / name).read_text(encoding="utf-8")


@cache
def known_numbers() -> dict[str, set[int]]:
    architecture = text_of("docs/architecture.md")
    invariants = architecture.partition("## What may never be untrue")[2].partition("\n## ")[0]
    return {
        kind: {int(number) for number in re.findall(pattern, text, re.MULTILINE)}
        for kind, pattern, text in (
            ("section", r"^## (\d+)\. ", text_of("docs/contract.md")),
            ("pitfall", r"^\| (\d+) \| ", text_of("docs/pitfalls.md")),
            ("decision", r"^### Decision (\d+): ", architecture),
            ("invariant", r"^(\d+)\. ", invariants),
        )
    }


def numbers_of(listed: str) -> set[int]:
    """`9 to 12, 16` → 9, 10, 11, 12, 16."""
    spans = re.findall(r"(\d+)(?:(?: to |-)(\d+))?", listed)
    return {number for first, last in spans for number in range(int(first), int(last or first) + 1)}


def section_names(number: str, name: str) -> bool:
    section = text_of("docs/contract.md").partition(f"\n## {number}. ")[2].partition("\n## ")[0]
    return re.search(rf"^(?:- )?\*?{re.escape(name)}", section, re.MULTILINE | re.IGNORECASE) is not None


def has_heading(page: str, heading: str) -> bool:
    text = text_of("README.md" if page == "README" else page)
    return re.search(rf"^#+ {re.escape(heading)}$", text, re.MULTILINE) is not None


def has_row(table: str, row: str) -> bool:
    section = text_of("docs/architecture.md").partition(f"\n## Step table {table}: ")[2].partition("\n## ")[0]
    return f"\n| {row} |" in section


def dangling(text: str) -> list[str]:
    """Each reference that points nowhere."""
    known = known_numbers()
    found = [
        reference[0]
        for kind, pattern in NUMBERED.items()
        for reference in pattern.finditer(text)
        if not numbers_of(reference[1]) <= known[kind]
    ]
    for pattern, exists in ((BY_NAME, section_names), (BY_HEADING, has_heading), (BY_ROW, has_row)):
        found += [reference[0] for reference in pattern.finditer(text) if not exists(reference[1], reference[2])]
    return found + OF_A_LOST_PAGE.findall(text)


def committed_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split()
    return [name for name in listed if not name.endswith(UNREAD) and (PROJECT / name).is_file()]


def test_every_reference_to_a_section_pitfall_decision_or_invariant_points_to_one() -> None:
    found = {
        name: dangling((PROJECT / name).read_text(encoding="utf-8", errors="ignore")) for name in committed_files()
    }
    assert {name: references for name, references in found.items() if references} == {}


@pytest.mark.parametrize(
    "reference",
    [
        "contract §" + "9",
        "contract §2, §" + "31",
        "contract §4 " + "*Nothing*",
        "Pitfall " + "61",
        "pitfalls 9 to " + "70",
        "decision " + "40",
        "(design" + ", decision 7)",
        "invariants 1, 2 and " + "9",
        "docs/architecture.md" + ', "Nothing"',
        "step table 1, row " + "7",
    ],
)
def test_a_reference_that_points_nowhere_is_found(reference: str) -> None:
    assert dangling(f"# {reference}: because") != []


def test_references_that_point_somewhere_are_not_reported() -> None:
    assert dangling("contract §4 *Renewal*, §8, pitfalls 9 to 12, 16, decision 16, invariants 1 to 4, 6 and 7") == []
    assert dangling('docs/architecture.md, "Defaults"; step table 2, row 6') == []


def test_no_lock_records_an_address() -> None:
    locks = sorted(PROJECT.glob("*.lock"))
    assert locks
    assert [lock.name for lock in locks if "://" in lock.read_text(encoding="utf-8")] == []


def test_ci_runs_what_people_run() -> None:
    jobs = yaml.safe_load(text_of(".github/workflows/ci.yml"))["jobs"].values()
    commands = {step["run"] for job in jobs for step in job["steps"] if "run" in step}
    parts = re.findall(r'^ *part "[^"]+" \d+ (.+)$', text_of(".ci/run"), re.MULTILINE)
    assert len(parts) >= 3
    assert {part.removesuffix(" PART=$eighth") for part in parts} <= commands


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_dead(page: Path, link: str) -> bool:
    file, _, anchor = link.partition("#")
    target = page.parent / file if file else page
    return not target.exists() or (bool(anchor) and anchor not in anchors_of(target))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_no_link_is_dead(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and is_dead(path, link)] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_every_make_target_that_a_document_names_exists(path: Path) -> None:
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_every_module_that_a_document_runs_exists(path: Path) -> None:
    named = set(re.findall(r"python -m ([a-z_]\w*(?:\.\w+)*)", path.read_text(encoding="utf-8"))) - {"pytest"}
    assert [name for name in named if importlib.util.find_spec(name) is None] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_every_file_that_a_document_names_exists(path: Path) -> None:
    named = set(re.findall(r"`([a-z_]+/[\w./-]+\.(?:py|toml|ya?ml|md))[`:]", path.read_text(encoding="utf-8")))
    assert [name for name in sorted(named) if not (PROJECT / name).exists()] == []


def test_every_pitfall_has_a_test_or_is_marked_open() -> None:
    rows = re.findall(r"^\| (\d+) \| .+ \| (.+) \|$", text_of("docs/pitfalls.md"), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 61))
    is_held = re.compile(r"`tests/\S+::\w+`|mutants? `\w+`|\*\*open\*\*")
    assert [number for number, held in rows if not is_held.search(held)] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_every_test_that_a_document_names_exists(path: Path) -> None:
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", path.read_text(encoding="utf-8"))
    assert [f"{file}::{name}" for file, name in named if f"def {name}(" not in text_of(file)] == []
