"""The code blocks of the documents, and how a page's blocks are run in its order.

A block runs as written, after only what stands above it on its page, in one shell in the project's folder. One that no
test can run has the line `<!-- not run: REASON -->` above it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROJECT: Final = Path(__file__).parents[1]
PAGES: Final = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]
SHOWN: Final = frozenset({"text", "mermaid", "json"})
"""Blocks that show something: nothing of them is run."""
RUNNABLE: Final = frozenset({"sh", "python"})
_BLOCK: Final = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n(?:^<!-- [^\n]*? -->\n)?)?"
    r"^(?P<fence>```+)(?P<language>\w*)\n(?P<code>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
_NOT_RUN: Final = "not run: "


@dataclass(frozen=True)
class Block:
    """`reason`: why no test can run it; None: it is run."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    @property
    def place(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page=page,
            line=text.count("\n", 0, found.start("fence")) + 1,
            language=found["language"],
            code=found["code"],
            reason=found["mark"].removeprefix(_NOT_RUN) if (found["mark"] or "").startswith(_NOT_RUN) else None,
        )
        for found in _BLOCK.finditer(text)
    ]


def script_of(page: Path, folder: Path) -> str:
    """One shell script that runs a page's blocks in order; each is written to a file of its own in `folder`."""
    lines = ["set -eu"]
    for number, block in enumerate(block for block in blocks_of(page) if block.language in RUNNABLE):
        if block.reason is not None:
            continue
        file = folder / f"{page.stem}-{number}.{block.language}"
        file.write_text(block.code, encoding="utf-8")
        lines.append(f"echo '== {block.place}'")
        lines.append(f". {file}" if block.language == "sh" else f"PYTHONPATH=. .venv/bin/python {file}")
    return "\n".join([*lines, "echo '== all done'", ""])
